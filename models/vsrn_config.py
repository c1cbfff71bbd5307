"""VSRN's options, as frozen dataclasses: what the paper's tables vary and where the authors' code departs from the paper."""

from dataclasses import dataclass, field
from typing import Literal

from dualmatch.runtime.configs import check_range
from dualmatch.runtime.errors import DualmatchError

from .config import TextConfig, TrunkConfig, _check_choices, check_levels

Measure = Literal["cosine", "order"]


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """The captioning branch, which helps in training (paper section 3.4) and is no part of a checkpoint or bundle.

    Attributes:
        weight: of the caption loss beside the matching loss (eq 10: 1); 0 trains without it (Table 4's `4RRR+GSR*`).
        hidden_dim: width of the region reader's state in one direction; the authors' 512.
        word_dim: width of the branch's own word embedding.
        max_length: captions are cut to this many tokens, <start> and <end> included.
        bidirectional: the regions are read in both directions, and the decoder is twice as wide.
        dropout: on the projected regions and on the decoder's input.
    """

    weight: float = 1.0
    hidden_dim: int = 512
    word_dim: int = 300
    max_length: int = 60
    bidirectional: bool = False
    dropout: float = 0.2

    def __post_init__(self) -> None:
        check_range("weight", self.weight, 0.0, 1e6)
        check_range("hidden_dim", self.hidden_dim, 1, 65536)
        check_range("word_dim", self.word_dim, 1, 65536)
        check_range("max_length", self.max_length, 3, 65536)
        check_range("dropout", self.dropout, 0.0, 0.95)


def _text() -> TextConfig:
    return TextConfig(encoder="gru", word_dropout=0.0, normalise_tokens=False, max_length=0)


@dataclass(frozen=True, kw_only=True)
class VsrnConfig:
    """VSRN (paper section 3). The defaults are the authors' code on COCO; their Flickr30K network has `normalise_projected` off and
    `final_norm` on.

    The order of the regions is the data's, not the network's: global reasoning by `gru` reads them as they come. The authors' files hold
    them by descending detector confidence; for Table 5's other orders (box size, random), write the region file in that order.

    Attributes:
        trunk: `none`, as in the paper, where regions come from files; or the network whose map regions are pooled from inside the
            graph, so that pixels are the only input (see `RegionConfig`, whose `stage` and `levels` these are).
        stage, levels: the trunk's map, and its pyramid of boxes, largest first, in which order global reasoning reads them.
        geometry: a pooled region's six numbers of geometry stand behind its channels; the relation layers know no places without.
        feature_dim: channels of a region feature from files.
        embed_dim: D, width of the shared space.
        num_relation_layers: region relationship reasoning (section 3.2): 0 leaves it out.
        global_reasoning: what makes one vector of the regions: the last state of a `gru` (section 3.3), or their `mean` (GSR off).
        normalise_projected: each channel is divided by its norm over the regions before the relation layers.
        normalise_related: and again behind them. The paper has neither. Its mean-pool baseline (Table 4) was not published as code, so
            whether it had them is not known.
        final_norm: BatchNorm on the vector that global reasoning gives.
        normalise_images: image embeddings get unit norm; off: the authors' `--no_imgnorm`. Caption embeddings always have unit norm.
        absolute: both embeddings are made non-negative (`--use_abs`), as order embeddings want them.
        measure: similarity of two embeddings: their product, or the order measure -‖max(0, caption - image)‖.
        l2_epsilon: least norm wherever vectors are normalised; the authors have none, so that zeros become NaN.
        text: the word embedding and its GRU, whose last state is read whatever `pooling` says and normalised whatever `normalise_tokens` says.
        captioning: the branch that training adds.
    """

    trunk: TrunkConfig = field(default_factory=lambda: TrunkConfig(name="none"))
    stage: Literal["final", "previous"] = "final"
    levels: tuple[int, ...] = (1, 2, 3)
    geometry: bool = True
    feature_dim: int = 2048
    embed_dim: int = 2048
    num_relation_layers: int = 4
    global_reasoning: Literal["gru", "mean"] = "gru"
    normalise_projected: bool = True
    normalise_related: bool = True
    final_norm: bool = False
    normalise_images: bool = True
    absolute: bool = False
    measure: Measure = "cosine"
    l2_epsilon: float = 0.0
    text: TextConfig = field(default_factory=_text)
    captioning: CaptionConfig = field(default_factory=CaptionConfig)

    def __post_init__(self) -> None:
        _check_choices(self)
        check_range("feature_dim", self.feature_dim, 1, 65536)
        check_range("embed_dim", self.embed_dim, 1, 65536)
        check_levels(self.levels)
        check_range("num_relation_layers", self.num_relation_layers, 0, 64)
        if self.l2_epsilon:  # its square must still be a float32 number
            check_range("l2_epsilon", self.l2_epsilon, 1e-18, 1.0)
        if self.text.encoder != "gru":
            raise DualmatchError(
                f'VSRN reads captions with a gru; set text.encoder = "gru", not {self.text.encoder!r}.'
            )
        if self.text.pooling == "gpo":
            raise DualmatchError('VSRN reads a caption by its last state; text.pooling = "gpo" is for DSRAN.')
