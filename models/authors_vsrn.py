"""The authors' VSRN in our terms: the configuration that a checkpoint describes, and tensors both ways.

A checkpoint's `model` is a list of two state dicts. Here their names carry the prefixes of the modules that they belong to in the
authors' code, `img_enc.` and `txt_enc.`; their captioning branch, which no checkpoint holds, has names of its own below.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from dualmatch.runtime.configs import from_mapping
from dualmatch.runtime.errors import DualmatchError

from .config import TextConfig
from .vsrn import VSRN
from .vsrn_caption import Captioner
from .vsrn_config import CaptionConfig, Measure, VsrnConfig

IMAGES, CAPTIONS = "img_enc.", "txt_enc."

_LAYERS = {
    "img_enc.fc": "image_encoder.project",
    "img_enc.img_rnn": "image_encoder.reasoning",
    "img_enc.bn": "image_encoder.final_norm",
    "txt_enc.embed": "text_encoder.words.embed",
    "txt_enc.rnn": "text_encoder.words.gru",
}
_RELATION = {"theta": "query", "phi": "key", "g": "value", "W.0": "merge", "W.1": "norm.norm"}
_CAPTIONER = {
    "encoder.vid2hid": "encoder.project",
    "encoder.rnn": "encoder.gru",
    "decoder.embedding": "decoder.embed",
    "decoder.attention": "decoder.attention",
    "decoder.attention.linear1": "decoder.attention.hidden",
    "decoder.attention.linear2": "decoder.attention.score",
    "decoder.rnn": "decoder.gru",
    "decoder.out": "decoder.output",
}


@cache
def modules(num_relation_layers: int) -> Mapping[str, str]:
    """Our module for each of theirs, relation layers whole and in parts."""
    relations = {f"img_enc.Rs_GCN_{k + 1}": f"image_encoder.relations.{k}" for k in range(num_relation_layers)}
    parts = {f"{a}.{b}": f"{x}.{y}" for a, x in relations.items() for b, y in _RELATION.items()}
    # What they call W is the Linear and its norm; what leaves it leaves the norm.
    outputs = {f"{a}.W": f"{x}.norm" for a, x in relations.items()}
    return {**_LAYERS, **relations, **outputs, **parts}


def ours_from_authors(name: str, num_relation_layers: int) -> str:
    """Our name of the authors' tensor.

    Raises:
        DualmatchError: their network has no such tensor.
    """
    module, _, tensor = name.rpartition(".")
    known = modules(num_relation_layers)
    if module not in known:
        raise DualmatchError(
            f"VSRN with {num_relation_layers} relation layers has no tensor {name!r} in the authors' code."
        )
    return f"{known[module]}.{tensor}"


def authors_from_ours(name: str, num_relation_layers: int) -> str:
    """The authors' name of our tensor.

    Raises:
        DualmatchError: their network has no such tensor.
    """
    module, _, tensor = name.rpartition(".")
    # Parts come after their wholes: the last that fits is the tensor's own module.
    found = [theirs for theirs, ours in modules(num_relation_layers).items() if ours == module]
    if not found:
        raise DualmatchError(
            f"the authors' VSRN with {num_relation_layers} relation layers has no tensor for our {name!r}."
        )
    return f"{found[-1]}.{tensor}"


def captioner_ours_from_authors(name: str) -> str:
    """Our name, within a `Captioner`, of a tensor of the authors' captioning branch.

    Raises:
        DualmatchError: their branch has no such tensor.
    """
    module, _, tensor = name.rpartition(".")
    if module not in _CAPTIONER:
        raise DualmatchError(f"the authors' captioning branch has no tensor {name!r}.")
    return f"{_CAPTIONER[module]}.{tensor}"


def num_relation_layers_of(images: Mapping[str, Tensor]) -> int:
    """The relation layers that the image encoder's state dict holds."""
    return max((int(match[1]) for name in images if (match := re.match(r"Rs_GCN_(\d+)\.", name))), default=0)


def renamed(states: tuple[Mapping[str, Tensor], ...], model: VSRN) -> dict[str, Tensor]:
    """The authors' tensors by our names and in our shapes: their 1x1 convolutions are Linear layers here.

    As in their code, what the image encoder does not know is left out; what the text encoder does not know is not.
    """
    images, captions = states
    known, num_layers = modules(model.config.num_relation_layers), model.config.num_relation_layers
    own = model.state_dict()
    result = {}
    for name, value in images.items():
        if (IMAGES + name).rpartition(".")[0] in known:
            ours = ours_from_authors(IMAGES + name, num_layers)
            if ours in own:
                result[ours] = value.squeeze(2) if value.ndim == 3 and value.shape[2] == 1 else value
    return result | {ours_from_authors(CAPTIONS + name, num_layers): value for name, value in captions.items()}


def authors_states(model: VSRN) -> list[dict[str, Tensor]]:
    """The two state dicts that the authors' code would save of this network.

    Raises:
        DualmatchError: their network has no place for a tensor, or lacks one that it needs (no GRU over the regions).
    """
    if model.image_encoder.reasoning is None:
        raise DualmatchError("the authors' VSRN always has a GRU over the regions; this one takes their mean.")
    states: dict[str, dict[str, Tensor]] = {IMAGES: {}, CAPTIONS: {}}
    for name, value in model.state_dict().items():
        theirs = authors_from_ours(name, model.config.num_relation_layers)
        prefix = IMAGES if theirs.startswith(IMAGES) else CAPTIONS
        convolution = ".Rs_GCN_" in theirs and value.ndim == 2
        states[prefix][theirs.removeprefix(prefix)] = value.unsqueeze(2) if convolution else value
    return list(states.values())


def load_captioner(captioner: Captioner, state: Mapping[str, Tensor]) -> None:
    """Fill a captioning branch from a state dict of the authors' one.

    Raises:
        DualmatchError: names or shapes do not fit.
    """
    try:
        captioner.load_state_dict({captioner_ours_from_authors(name): value for name, value in state.items()})
    except RuntimeError as error:
        raise DualmatchError(f"the captioning branch does not fit the authors': {error}") from None


def config_from_authors(opt: Mapping[str, Any], states: tuple[Mapping[str, Tensor], ...]) -> VsrnConfig:
    """The configuration that computes what the authors' code computes with these tensors.

    Args:
        opt: the checkpoint's own options; tensor shapes decide wherever they can.
        states: the authors' names, images first.

    Raises:
        DualmatchError: a network on pixels, a tensor that is needed is missing, or options and tensors contradict each other.
    """
    images, captions = states

    def shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
        if name not in state:
            raise DualmatchError(f"the checkpoint lacks the tensor {name!r}.")
        if state[name].ndim != 2:
            raise DualmatchError(f"the tensor {name!r} must be a matrix, got shape {list(state[name].shape)}.")
        return tuple(state[name].shape)

    data_name = opt.get("data_name")
    if not isinstance(data_name, str) or not data_name.endswith("_precomp"):
        raise DualmatchError(
            f"the checkpoint's options say data_name = {data_name!r}; only the authors' networks on precomputed regions "
            "(a name that ends with '_precomp') are VSRN as published."
        )
    embed_dim, feature_dim = shape(images, "fc.weight")
    vocabulary_size, word_dim = shape(captions, "embed.weight")
    sizes = {"embed_size": embed_dim, "img_dim": feature_dim, "vocab_size": vocabulary_size, "word_dim": word_dim}
    for name, size in sizes.items():
        if opt.get(name, size) != size:
            raise DualmatchError(f"the checkpoint's options say {name} = {opt[name]}, its tensors {size}.")
    measure: Measure = opt.get("measure", "cosine")
    # Their code asks for this one data set by name.
    flickr = data_name == "f30k_precomp"
    return VsrnConfig(
        feature_dim=feature_dim,
        embed_dim=embed_dim,
        num_relation_layers=num_relation_layers_of(images),
        normalise_projected=not flickr,
        final_norm=flickr,
        normalise_images=not opt.get("no_imgnorm", False),
        absolute=bool(opt.get("use_abs", False)),
        measure=measure,
        text=TextConfig(
            encoder="gru",
            vocabulary_size=vocabulary_size,
            word_dim=word_dim,
            word_dropout=0.0,
            normalise_tokens=False,
            max_length=0,
        ),
        captioning=_captioning(opt),
    )


def _captioning(opt: Mapping[str, Any]) -> CaptionConfig:
    """The branch that the checkpoint's training had; none of it is in the checkpoint. Its `rnn_dropout_p` drops nothing with one layer."""
    options = {
        "hidden_dim": "dim_hidden",
        "word_dim": "dim_word",
        "max_length": "max_len",
        "bidirectional": "bidirectional",
        "dropout": "input_dropout_p",
    }
    values = {ours: opt[theirs] for ours, theirs in options.items() if theirs in opt}
    if values.get("bidirectional") in (0, 1):  # a number where their command line set it
        values["bidirectional"] = bool(values["bidirectional"])
    return from_mapping(CaptionConfig, values, "the checkpoint's options")
