"""The authors' DSRAN in our terms: the configuration that a checkpoint describes, and tensor names both ways.

Their GRU and BERT variants are two copies of one program whose attribute names drifted apart: `gat_1` is the region graph in one and
the grid graph in the other, and the last of four fusions is `fusion3` in one and `fusion` in the other.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from dualmatch.runtime.errors import DualmatchError

from .config import DsranConfig, RegionConfig, TextConfig, TrunkConfig
from .trunks import torchvision_from_transformers, transformers_from_torchvision

Variant = Literal["gru", "bert"]

_GRAPH = {
    "mha.query": "query",
    "mha.key": "key",
    "mha.value": "value",
    "fc_in": "merge",
    "bn_in": "norm_attention.norm",
    "fc_int": "expand",
    "fc_out": "contract",
    "bn_out": "norm_output.norm",
}
_FUSION = {"gate0": "embed_a", "gate1": "embed_b", "fusion0": "gate_a", "fusion1": "gate_b"}
_LAYERS: dict[Variant, dict[str, str]] = {
    "gru": {
        "img_enc.fc": "image_encoder.grid.project.linear",
        "rcnn_enc.fc_image": "image_encoder.regions.project.linear",
        "txt_enc.embed": "text_encoder.words.embed",
        "txt_enc.rnn": "text_encoder.words.gru",
    },
    "bert": {
        "img_enc.fc.0": "image_encoder.grid.project.linear",
        "rcnn_enc.fc_image.0": "image_encoder.regions.hidden.0",
        "rcnn_enc.fc_image.2": "image_encoder.regions.project.linear",
        "rcnn_enc.fc_pos.0": "image_encoder.regions.position.linear",
        "txt_enc.fc.0": "text_encoder.project.linear",
    },
}
_GRAPHS: dict[Variant, dict[str, str]] = {
    "gru": {"gat_2": "image_encoder.grid_graph", "gat_1": "image_encoder.region_graph"},
    "bert": {"gat_1": "image_encoder.grid_graph", "gat_2": "image_encoder.region_graph"},
}
_JOINT_GRAPHS: dict[Variant, tuple[str, ...]] = {
    "gru": ("gat_cat_1", "gat_cat_2", "gat_cat_3", "gat_cat_4"),
    "bert": ("gat_cat", "gat_cat_1", "gat_cat_2", "gat_cat_3"),
}
_FUSIONS: dict[Variant, dict[int, tuple[str, ...]]] = {
    "gru": {1: (), 2: ("fusion",), 4: ("fusion", "fusion2", "fusion3")},
    "bert": {1: (), 2: ("fusion",), 4: ("fusion_1", "fusion_2", "fusion")},
}
# Tensors that stand in the authors' state dicts and that their forward passes never read.
_UNUSED: dict[Variant, tuple[str, ...]] = {
    "gru": ("img_enc.cnn.fc.",),
    "bert": ("img_enc.cnn.fc.", "rcnn_enc.fc.", "txt_enc.bert.pooler.", "txt_enc.bert.embeddings.position_ids"),
}
_TRUNK, _OUR_TRUNK = "img_enc.cnn.", "image_encoder.trunk.resnet."
_BERT, _OUR_BERT = "txt_enc.bert.", "text_encoder.words.bert."


@dataclass(frozen=True, kw_only=True)
class DsranNames:
    """Names of tensors and modules, the authors' and ours; theirs without the `module.` that DataParallel puts in front."""

    variant: Variant
    joint_graphs: Literal[1, 2, 4]

    @cached_property
    def modules(self) -> dict[str, str]:
        """Our module for each of theirs: graph layers and fusions whole and in parts, projections, the GRU."""
        graphs = {
            **_GRAPHS[self.variant],
            **{
                theirs: f"image_encoder.joint_graphs.{index}"
                for index, theirs in enumerate(_JOINT_GRAPHS[self.variant][: self.joint_graphs])
            },
            "gat_cap": "text_encoder.caption_graph",
        }
        fusions = {
            theirs: f"image_encoder.fusions.{index}"
            for index, theirs in enumerate(_FUSIONS[self.variant][self.joint_graphs])
        }
        parts = {f"{a}.encoder.0.{b}": f"{x}.{y}" for a, x in graphs.items() for b, y in _GRAPH.items()}
        parts |= {f"{a}.{b}": f"{x}.{y}" for a, x in fusions.items() for b, y in _FUSION.items()}
        return {**_LAYERS[self.variant], **graphs, **fusions, **parts}

    def is_unused(self, name: str) -> bool:
        """Whether the authors keep this tensor without ever reading it."""
        return name.startswith(_UNUSED[self.variant])

    def ours_from_authors(self, name: str) -> str:
        """Our name of the authors' tensor.

        Raises:
            DualmatchError: this variant has no such tensor, or never uses it.
        """
        if not self.is_unused(name):
            if name.startswith(_TRUNK):
                return _OUR_TRUNK + transformers_from_torchvision(name.removeprefix(_TRUNK))
            if self.variant == "bert" and name.startswith(_BERT):
                return _OUR_BERT + name.removeprefix(_BERT)
            module, _, tensor = name.rpartition(".")
            if module in self.modules:
                return f"{self.modules[module]}.{tensor}"
        raise DualmatchError(
            f"DSRAN's {self.variant} variant with K = {self.joint_graphs} uses no tensor {name!r} in the authors' code."
        )

    def authors_from_ours(self, name: str) -> str:
        """The authors' name of our tensor.

        Raises:
            DualmatchError: the authors' network has no such tensor.
        """
        if name.startswith(_OUR_TRUNK):
            return _TRUNK + torchvision_from_transformers(name.removeprefix(_OUR_TRUNK))
        if self.variant == "bert" and name.startswith(_OUR_BERT):
            return _BERT + name.removeprefix(_OUR_BERT)
        module, _, tensor = name.rpartition(".")
        for theirs, ours in self.modules.items():
            if ours == module:
                return f"{theirs}.{tensor}"
        raise DualmatchError(
            f"the authors' {self.variant} variant with K = {self.joint_graphs} has no tensor for our {name!r}."
        )


def variant_of(names: Iterable[str]) -> Variant:
    """The variant that a state dict's names belong to.

    Raises:
        DualmatchError: neither.
    """
    names = set(names)
    if any(name.startswith(_BERT) for name in names):
        return "bert"
    if "txt_enc.rnn.weight_ih_l0" in names:
        return "gru"
    raise DualmatchError(
        "the checkpoint is no DSRAN of the authors: it holds neither 'txt_enc.rnn.weight_ih_l0' (GRU) nor 'txt_enc.bert.*' (BERT)."
    )


def joint_graphs_of(names: Iterable[str]) -> Literal[1, 2, 4]:
    """K, by counting joint graph layers.

    Raises:
        DualmatchError: their number is not 1, 2 or 4.
    """
    found = {match[0] for name in names if (match := re.match(r"gat_cat(_\d+)?\.", name))}
    if len(found) not in (1, 2, 4):
        raise DualmatchError(f"the checkpoint holds {len(found)} joint graph layers (gat_cat*); DSRAN has 1, 2 or 4.")
    return len(found)  # type: ignore[return-value]


def config_from_authors(
    opt: Mapping[str, Any], state: Mapping[str, Tensor], *, num_bert_heads: int | None = None
) -> DsranConfig:
    """The configuration that computes what the authors' code computes with these tensors.

    Args:
        opt: the checkpoint's own options; tensor shapes decide wherever they can.
        state: the authors' names, without `module.`.
        num_bert_heads: attention heads of BERT, which no shape tells; None: 64 channels a head, as every published BERT has.

    Raises:
        DualmatchError: no DSRAN, a tensor that is needed is missing, or options and tensors contradict each other.
    """
    variant, joint_graphs = variant_of(state), joint_graphs_of(state)
    if opt.get("K", joint_graphs) != joint_graphs:
        raise DualmatchError(f"the checkpoint's options say K = {opt['K']}, its tensors K = {joint_graphs}.")

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise DualmatchError(f"the checkpoint lacks the tensor {name!r}.")
        if state[name].ndim != 2:
            raise DualmatchError(f"the tensor {name!r} must be a matrix, got shape {list(state[name].shape)}.")
        return tuple(state[name].shape)

    has_trunk = f"{_TRUNK}conv1.weight" in state
    embed_dim, grid_dim = shape("img_enc.fc.weight" if variant == "gru" else "img_enc.fc.0.weight")
    trunk = TrunkConfig(
        name="resnet152",
        image_size=int(opt.get("crop_size", 224)),
        frozen=not (opt.get("finetune", False) or opt.get("ft_res", False)),
        feature_dim=0 if has_trunk else grid_dim,
    )
    if variant == "gru":
        vocabulary_size, word_dim = shape("txt_enc.embed.weight")
        return DsranConfig(
            trunk=trunk,
            regions=RegionConfig(
                source="precomputed", feature_dim=shape("rcnn_enc.fc_image.weight")[1], position_dim=0
            ),
            text=TextConfig(encoder="gru", vocabulary_size=vocabulary_size, word_dim=word_dim, max_length=0),
            embed_dim=embed_dim,
            joint_graphs=joint_graphs,
            projection="linear",
            l2_epsilon=1e-12,
            pad_policy="authors",
        )
    vocabulary_size, word_dim = shape(f"{_BERT}embeddings.word_embeddings.weight")
    num_heads = word_dim // 64 if num_bert_heads is None else num_bert_heads
    if num_heads < 1 or word_dim % num_heads:
        raise DualmatchError(
            f"a BERT of width {word_dim} cannot have {num_heads} attention heads; say how many it has (num_bert_heads)."
        )
    text = TextConfig(
        encoder="bert",
        vocabulary_size=vocabulary_size,
        word_dim=word_dim,
        num_layers=len(
            {match[1] for name in state if (match := re.match(r"txt_enc\.bert\.encoder\.layer\.(\d+)\.", name))}
        ),
        num_heads=num_heads,
        intermediate_dim=shape(f"{_BERT}encoder.layer.0.intermediate.dense.weight")[0],
        max_positions=shape(f"{_BERT}embeddings.position_embeddings.weight")[0],
        frozen=not opt.get("ft_bert", True),
        normalise_tokens=False,
        max_length=32,
        fixed_length=32,
        keep_last_special=False,
    )
    return DsranConfig(
        trunk=trunk,
        regions=RegionConfig(
            source="precomputed",
            feature_dim=shape("rcnn_enc.fc_image.0.weight")[1],
            position_dim=shape("rcnn_enc.fc_pos.0.weight")[1],
            hidden_layer=True,
        ),
        text=text,
        embed_dim=embed_dim,
        joint_graphs=joint_graphs,
        projection="relu",
        l2_epsilon=0.0,
        pad_policy="authors",
    )
