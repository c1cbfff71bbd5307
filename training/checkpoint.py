"""A run's folder: safetensors and JSON, never pickles; every file is replaced whole, so a kill leaves the last good one.

RUN/run.json             recipe with every option, data set, tool versions
RUN/tokenizer.json       the captions' tokenizer
RUN/frozen.safetensors   tensors that training does not change (pretrained trunk, pretrained BERT), written once
RUN/best.safetensors     the rest, at the epoch with the best validation Rsum
RUN/last.safetensors     the rest, with the optimiser's state, after the last finished epoch
RUN/log.jsonl            a line per epoch
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dualmatch.models import DSRAN, VSRN
from dualmatch.models.config import PadPolicy, TextConfig
from dualmatch.models.trunks import build_trunk, preprocess_of
from dualmatch.models.vsrn_config import VsrnConfig
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json, refuse_other_kind, sha256_of_file, write_atomically
from dualmatch.runtime.preprocess import Preprocess
from dualmatch.runtime.tokenizer import CaptionTokenizer, TokenizerOptions

from .recipe import ForeignRecipe, Recipe, recipe_from_json

FORMAT = "dualmatch-run"
VERSION = 1


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors with JSON facts in the file's header, atomically."""
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(contiguous, metadata={"dualmatch": json.dumps(facts)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        DualmatchError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _facts(file)  # noqa: SIM118  (not a dict)


def read_facts(path: Path) -> dict[str, Any]:
    """The JSON facts alone, without the tensors; raises as `load_tensors`."""
    with _opened(path) as file:
        return _facts(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DualmatchError(f"there is no checkpoint {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, json.JSONDecodeError) as error:
        raise DualmatchError(f"the checkpoint {path} is damaged: {error}.") from None


def _facts(file: Any) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((file.metadata() or {}).get("dualmatch", "{}"))
    return facts


def frozen_names(model: nn.Module) -> set[str]:
    """Names in the state dict that training never changes: a frozen trunk's and a frozen word encoder's."""
    assert isinstance(model, DSRAN | VSRN)
    prefixes = []
    if model.config.trunk.frozen:
        prefixes.append("image_encoder.trunk.")
    if model.config.text.frozen:
        prefixes.append("text_encoder.words.")
    return {name for name in model.state_dict() if name.startswith(tuple(prefixes))}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained run, opened.

    Attributes:
        model: both encoders in evaluation mode, float32.
        facts: what `best.safetensors` says about itself: epoch, validation Rsum.
        checkpoint_hash: SHA-256 of `best.safetensors`.
        caption_batch: how many captions are encoded together (it matters under the `authors` padding only).
        provenance: what else a bundle's manifest is to say of where the network comes from.
        reference: the run as it was trained, where this one pads captions in another way (see `padding.with_padding`).
    """

    folder: Path
    recipe: Recipe | ForeignRecipe
    model: DSRAN | VSRN
    preprocess: Preprocess
    tokenizer: CaptionTokenizer
    data: str
    facts: dict[str, Any]
    checkpoint_hash: str
    caption_batch: int = 128
    provenance: dict[str, Any] = field(default_factory=dict)
    reference: "Run | None" = None

    @property
    def pad_policy(self) -> PadPolicy:
        """The network's; a VSRN's captions never depend on padding."""
        return self.model.config.pad_policy if isinstance(self.model, DSRAN) else "masked"

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.folder / "tokenizer.json"


def tokenizer_options(recipe: Recipe) -> TokenizerOptions:
    """How the recipe cuts and pads captions."""
    return text_options(recipe.model.text)


def text_options(text: TextConfig) -> TokenizerOptions:
    """How a text encoder wants captions cut and padded."""
    return TokenizerOptions(
        max_length=text.max_length, fixed_length=text.fixed_length, keep_last_special=text.keep_last_special
    )


def read_run_json(folder: Path) -> dict[str, Any]:
    """The run's description.

    Raises:
        DualmatchError: no run there, or one of another version.
    """
    if not folder.is_dir():
        raise DualmatchError(
            f"there is no run folder {folder}; `dualmatch train RECIPE --data DATA --out {folder}` makes one."
        )
    refuse_other_kind(folder, "a training run")
    if not (folder / "run.json").is_file():
        raise DualmatchError(f"{folder} is not a training run: it has no run.json.")
    values = read_json(folder / "run.json", "training run")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DualmatchError(f"{folder / 'run.json'} does not describe a dualmatch run.")
    if values.get("version") != VERSION:
        raise DualmatchError(
            f"the run {folder} has format version {values.get('version')}; this dualmatch reads version {VERSION}."
        )
    if not isinstance(values.get("recipe"), dict) or not isinstance(values.get("data"), str):
        raise DualmatchError(f"{folder / 'run.json'} is incomplete: it lacks the recipe or the data set's name.")
    return values


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a complete state dict, or say in one sentence that it belongs to another network.

    Raises:
        DualmatchError: tensors are missing, unknown, or of another shape.
    """
    own = model.state_dict()
    if missing := sorted(set(own) - set(state)):
        raise DualmatchError(
            f"{source} belongs to another network: it lacks {len(missing)} tensors, the first {missing[0]!r}."
        )
    if unknown := sorted(set(state) - set(own)):
        raise DualmatchError(
            f"{source} belongs to another network: it has {len(unknown)} tensors too many, the first {unknown[0]!r}."
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise DualmatchError(
                f"{source} belongs to another network: {name!r} has shape {list(value.shape)}, the recipe's has {list(own[name].shape)}."
            )
    model.load_state_dict(state)


def load_run(folder: Path) -> Run:
    """Open a run at its best epoch.

    Raises:
        DualmatchError: no finished epoch, damaged or foreign files.
    """
    values = read_run_json(folder)
    recipe = recipe_from_json(values["recipe"], f"{folder / 'run.json'}: recipe")
    best = folder / "best.safetensors"
    state, facts = load_tensors(best)
    if (folder / "frozen.safetensors").is_file():
        state |= load_tensors(folder / "frozen.safetensors")[0]
    model = build_model(recipe, pretrained=False)
    load_state(model, state, str(best))
    model.eval()
    return Run(
        folder=folder,
        recipe=recipe,
        model=model,
        preprocess=preprocess_of(recipe.model.trunk, recipe.data.resize),
        tokenizer=CaptionTokenizer(folder / "tokenizer.json", tokenizer_options(recipe)),
        data=values["data"],
        facts=facts,
        checkpoint_hash=sha256_of_file(best),
    )


def build_model(recipe: Recipe, *, pretrained: bool) -> DSRAN | VSRN:
    """The recipe's network; `pretrained` loads pretrained weights, otherwise a checkpoint is to bring all tensors."""
    config = recipe.model
    trunk = None
    if config.trunk.name != "none":
        weights = Path(recipe.trunk_weights) if recipe.trunk_weights else None
        trunk = build_trunk(config.trunk, weights=weights, pretrained=pretrained)
    if not pretrained:
        config = replace(config, text=replace(config.text, pretrained="none"))
    model = VSRN(config, trunk) if isinstance(config, VsrnConfig) else DSRAN(config, trunk)
    return model if pretrained else model.float()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, frozen) parameter counts."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained


def versions() -> dict[str, str]:
    """Versions of the tools that made a checkpoint."""
    from importlib.metadata import version

    return {"dualmatch": version("dualmatch"), "torch": torch.__version__}
