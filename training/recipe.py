"""Recipes: small TOML files that say which network is trained on what and how."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dualmatch.models.config import DsranConfig
from dualmatch.models.vsrn_config import VsrnConfig
from dualmatch.runtime.configs import check_range, from_mapping
from dualmatch.runtime.errors import DualmatchError

from .recipe_files import recipe_names, recipe_values, set_option


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which part of a data set is used and how its images are presented.

    Attributes:
        train_splits, val_splits: splits joined for training, and for choosing the best epoch.
        resize: `squash` or `crop`, see `runtime.preprocess`.
        views: with a frozen trunk, cached views of each training image: the evaluation view, its mirror image, then random crops.
        augment: every image is cropped and flipped anew each time it is seen, as the authors do; a frozen trunk then runs in every
            step, and nothing is cached. In place of `views`.
        crop_min_area: smallest share of the photograph that an augmented view shows (the authors: 0.08).
        regions: a region file, for networks that take precomputed regions.
        min_word_count: rarer words of the training captions become the unknown word (word-level vocabularies).
    """

    train_splits: tuple[str, ...] = ("train",)
    val_splits: tuple[str, ...] = ("val",)
    resize: Literal["squash", "crop"] = "crop"
    views: int = 1
    augment: bool = False
    crop_min_area: float = 0.08
    regions: str = ""
    min_word_count: int = 1

    def __post_init__(self) -> None:
        check_range("views", self.views, 1, 64)
        check_range("crop_min_area", self.crop_min_area, 0.001, 1.0)
        check_range("min_word_count", self.min_word_count, 1, 1_000_000)
        if not self.train_splits or not self.val_splits:
            raise DualmatchError("train_splits and val_splits need at least one split each.")
        if both := sorted({*self.train_splits} & {*self.val_splits}):
            raise DualmatchError(
                f"{both[0]!r} is in train_splits and in val_splits; images that are trained on cannot choose the epoch."
            )


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The matching loss.

    Attributes:
        kind: `hinge` (eq 21; VSE++) or `infonce` (symmetric cross-entropy over the batch).
        margin: alpha of the hinge loss.
        hardest: only the hardest negatives in the batch count; otherwise all do.
        num_negatives: how many of the hardest; the mean of their costs is taken (average top-k; Fan et al., 2017). The papers': 1.
        temperature: of `infonce`.
        warmup_epochs: epochs on the loss that `warmup` names before `hinge` starts.
        warmup: `infonce`, or `sum`: the hinge over all negatives (as VSE∞ does in its first epoch; Chen et al., 2021).
        mask_same_image: other captions of the same image in a batch are no negatives (the authors count them).
    """

    kind: Literal["hinge", "infonce"] = "hinge"
    margin: float = 0.2
    hardest: bool = True
    num_negatives: int = 1
    temperature: float = 0.05
    warmup_epochs: int = 0
    warmup: Literal["infonce", "sum"] = "infonce"
    mask_same_image: bool = True

    def __post_init__(self) -> None:
        check_range("margin", self.margin, 0.0, 2.0)
        check_range("num_negatives", self.num_negatives, 1, 1_000_000)
        if self.num_negatives > 1 and not (self.hardest and self.kind == "hinge"):
            raise DualmatchError('num_negatives counts the hardest ones: it needs kind = "hinge" and hardest = true.')
        check_range("temperature", self.temperature, 1e-4, 10.0)
        check_range("warmup_epochs", self.warmup_epochs, 0, 100_000)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The optimisation.

    Attributes:
        epochs: passes over the training set.
        epoch_over: a pass sees every `pairs` of image and caption, or every one of `images` with captions_per_image of its captions,
            drawn at random; an image is then encoded once for all of them.
        batch_size: pairs or images.
        precision: `fp32`, or what autocast computes the network in: `bf16`, `fp16` (a GPU's, with a scaled loss). Embeddings, loss, weights
            and validation stay float32.
        accumulate: into how many parts a batch is divided on its way through the network, for memory; the loss, and with it the negatives,
            stay the whole batch's (GradCache; Gao et al., 2021). BatchNorm sees a part at a time.
        save_steps: `last.safetensors` is also written every so many steps; 0: after every epoch only.
        graph_learning_rate: factor on the learning rate of graph attention, fusion and relation layers.
        word_learning_rate: factor on the learning rate of the word encoder, for a BERT that is fine-tuned (VSE∞ takes 0.1; Chen et al., 2021).
        optimiser: `adam`; `adamw` with weight_decay on matrices (not on biases and norms); or `bertadam`, with which the authors train
            their BERT variant: no bias correction, and its own warm-up and linear decay to zero over all steps, which multiply the schedule.
        schedule: learning rate `constant`, `step` (times 0.1 every `step_epochs`), or `cosine` down to zero.
        warmup: share of all steps in which the learning rate rises linearly; the cosine begins after it.
        clip_norm: global gradient norm is cut to this (for `bertadam` each tensor's own); 0 for no clipping.
        average: decay of an exponential moving average of the weights that is what gets evaluated and saved as best; 0 for none.
    """

    epochs: int = 20
    batch_size: int = 128
    epoch_over: Literal["pairs", "images"] = "pairs"
    captions_per_image: int = 1
    optimiser: Literal["adam", "adamw", "bertadam"] = "adam"
    learning_rate: float = 2e-4
    graph_learning_rate: float = 1.0
    word_learning_rate: float = 1.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    step_epochs: int = 8
    warmup: float = 0.0
    clip_norm: float = 2.0
    average: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    save_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("epochs", self.epochs, 1, 100_000)
        check_range("batch_size", self.batch_size, 2, 1_000_000)
        check_range("captions_per_image", self.captions_per_image, 1, 1000)
        check_range("learning_rate", self.learning_rate, 1e-12, 1e6)
        check_range("graph_learning_rate", self.graph_learning_rate, 0.0, 1e6)
        check_range("word_learning_rate", self.word_learning_rate, 0.0, 1e6)
        check_range("weight_decay", self.weight_decay, 0.0, 1e6)
        check_range("step_epochs", self.step_epochs, 1, 100_000)
        check_range("clip_norm", self.clip_norm, 0.0, 1e6)
        check_range("accumulate", self.accumulate, 1, self.batch_size // 2)
        check_range("save_steps", self.save_steps, 0, 1_000_000_000)
        check_range("seed", self.seed, 0, 2**31)
        check_range("warmup", self.warmup, 0.0, 0.9)
        check_range("average", self.average, 0.0, 0.99999)
        if self.epoch_over == "pairs" and self.captions_per_image != 1:
            raise DualmatchError(
                'captions_per_image is for epoch_over = "images"; an epoch over pairs takes them one by one.'
            )
        if self.weight_decay and self.optimiser != "adamw":
            raise DualmatchError(f'weight_decay is for optimiser = "adamw"; set it to 0 for {self.optimiser}.')
        if self.optimiser == "bertadam" and (self.schedule == "cosine" or not self.warmup or not self.clip_norm):
            raise DualmatchError(
                'optimiser = "bertadam" decays by itself: it takes schedule = "step" or "constant", a warmup and a clip_norm above 0.'
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, completely described.

    Attributes:
        name, description: shown by `dualmatch train --list`.
        trunk_weights: a file with pretrained weights for a trunk that no package carries (`resnet152`).
        word_weights: where text.pretrained is `file`: a GloVe text file for a gru; for a bert a folder with model.safetensors and vocab.txt.
        network: which of the two `model` configures.
    """

    name: str
    description: str = ""
    trunk_weights: str = ""
    word_weights: str = ""
    network: Literal["dsran", "vsrn"] = "dsran"
    model: DsranConfig | VsrnConfig = field(default_factory=DsranConfig)
    data: DataOptions = field(default_factory=DataOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        frozen = self.model.trunk.name != "none" and self.model.trunk.frozen
        if self.data.views > 1 and (self.data.augment or not frozen):
            raise DualmatchError(
                "data.views are cached views of a frozen trunk; a trained one, or one that is not cached, takes data.augment = true and views = 1."
            )
        if self.data.augment and self.model.trunk.name == "none":
            raise DualmatchError("data.augment is for networks that see pixels; this one has no trunk.")
        if isinstance(self.model, VsrnConfig) and (self.model.measure != "cosine" or not self.model.normalise_images):
            raise DualmatchError(
                'a run serves unit vectors that are compared by their product: measure must be "cosine" and normalise_images true.'
            )

    @property
    def region_dims(self) -> tuple[int, int] | None:
        """(channels, position numbers) of the precomputed regions that the network takes; None where it takes none."""
        if isinstance(self.model, VsrnConfig):
            return (self.model.feature_dim, 0) if self.model.trunk.name == "none" else None
        if not self.model.regional_path or self.model.regions.source != "precomputed":
            return None
        return self.model.regions.feature_dim, self.model.regions.position_dim

    @property
    def num_regions(self) -> int:
        """Precomputed regions that the network takes of an image; 0: any number."""
        return self.model.regions.num_regions if isinstance(self.model, DsranConfig) else 0

    @property
    def unread_files(self) -> list[str]:
        """Options that name a file which the network does not take: rows of a study share options, a single run has no use for them."""
        is_read = {
            "data.regions": (self.data.regions, self.region_dims is not None),
            "trunk_weights": (self.trunk_weights, self.model.trunk.name == "resnet152"),
            "word_weights": (self.word_weights, self.model.text.pretrained == "file"),
        }
        return [option for option, (file, is_taken) in is_read.items() if file and not is_taken]

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ForeignRecipe:
    """What stands for the recipe of a network that other code trained."""

    name: str
    description: str
    data: DataOptions = field(default_factory=DataOptions)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (see `recipe_files.recipe_names`) or a TOML file by path, with `key=value` overrides (`train.epochs=3`).

    A recipe that begins with `base = "…"` (a shipped recipe's name, or a file beside it) says only what differs from that one.

    Raises:
        DualmatchError: no such recipe, TOML that cannot be read, an unknown or mistyped option.
    """
    values = recipe_values(name_or_path)
    values.setdefault("name", name_or_path if name_or_path in recipe_names() else Path(name_or_path).stem)
    for override in overrides:
        set_option(values, override)
    return recipe_from_json(values, f"recipe {name_or_path}")


def recipe_from_json(values: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain values, strictly."""
    values = dict(values)
    model, network = values.pop("model", {}), values.get("network", "dsran")
    if network in ("dsran", "vsrn"):  # any other is refused below
        if not isinstance(model, dict):
            raise DualmatchError(f"{where}.model must be a table, got {model!r}.")
        values["model"] = from_mapping(VsrnConfig if network == "vsrn" else DsranConfig, model, f"{where}.model")
    return from_mapping(Recipe, values, where)
