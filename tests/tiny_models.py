"""Tiny networks with random weights, and inputs for them; `IMAGE_OPTIONS` and `TEXT_OPTIONS` span every configuration."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dualmatch.models import DsranConfig, ImageEncoder, RegionConfig, TextConfig, TextEncoder, TrunkConfig
from dualmatch.models.trunks import build_trunk

torch.set_num_threads(1)  # for networks this small, threads cost more time than they save

IMAGE_SIZE, VOCABULARY, NUM_REGIONS = 32, 50, 5

REGIONS = {
    "final": RegionConfig(stage="final", levels=(1, 2)),
    "previous": RegionConfig(stage="previous", levels=(1, 3), position_dim=0),
    "files": RegionConfig(source="precomputed", feature_dim=20, position_dim=0),
    "files-positions-hidden": RegionConfig(source="precomputed", feature_dim=20, position_dim=9, hidden_layer=True),
}
TEXTS = {
    "gru": TextConfig(encoder="gru", vocabulary_size=VOCABULARY, word_dim=12),
    "bert": TextConfig(
        encoder="bert",
        vocabulary_size=VOCABULARY,
        word_dim=24,
        num_layers=2,
        num_heads=3,
        intermediate_dim=32,
        max_positions=40,
        max_length=40,
    ),
}
TINY = TrunkConfig(name="tiny", frozen=False, image_size=IMAGE_SIZE)
NO_TRUNK = TrunkConfig(name="none")

# (trunk, global path, regions or none for no regional path)
PATHS: dict[str, tuple[TrunkConfig, bool, str | None]] = {
    "grid": (TINY, True, None),
    "grid-pooled": (replace(TINY, grid_size=2), True, None),
    "pyramid-final": (TINY, False, "final"),
    "grid-and-pyramid-final": (replace(TINY, grid_size=3), True, "final"),
    "grid-and-pyramid-previous": (TINY, True, "previous"),
    "grid-and-files": (TINY, True, "files"),
    "files": (NO_TRUNK, False, "files"),
    "files-positions-hidden": (NO_TRUNK, False, "files-positions-hidden"),
}
JOINT = {"k1": 1, "k2": 2, "k4": 4, "no-jsr": 0}


def image_config(paths: str, joint: str = "k2", ssr: str = "ssr", norm: str = "batch", **options: Any) -> DsranConfig:
    """The configuration of one image encoder."""
    trunk, global_path, regions = PATHS[paths]
    return DsranConfig(
        trunk=trunk,
        regions=REGIONS[regions or "final"],
        text=TEXTS["gru"],
        embed_dim=16,
        num_heads=4,
        joint_graphs=JOINT[joint] or 2,
        joint_relations=joint != "no-jsr",
        separate_relations=ssr == "ssr",
        global_path=global_path,
        regional_path=regions is not None,
        norm=norm,
        **options,
    )


def text_config(
    encoder: str,
    pad_policy: str = "masked",
    norm: str = "batch",
    graph: str = "graph",
    tokens: str = "unit",
    **options: Any,
) -> DsranConfig:
    """The configuration of one text encoder; `tokens` says whether token vectors are normalised."""
    return DsranConfig(
        trunk=TINY,
        text=replace(TEXTS[encoder], normalise_tokens=tokens == "unit"),
        embed_dim=16,
        num_heads=4,
        caption_relations=graph == "graph",
        pad_policy=pad_policy,
        norm=norm,
        **options,
    )


LITE0 = TrunkConfig(name="efficientnet-lite0", image_size=64)

# The networks that are exported: each option at least once, and the pairs that recipes use. All of them would take many minutes.
EXPORTED = {
    "image-grid-k1": image_config("grid", "k1", "no-ssr", "layer", grid_positions=True),
    "image-pyramid-no-jsr": image_config("pyramid-final", "no-jsr", "ssr", "batch", l2_epsilon=0.0),
    "image-both-no-jsr": image_config("grid-and-pyramid-final", "no-jsr", "ssr", "layer", projection="relu"),
    "image-both-k2": image_config("grid-and-pyramid-previous", "k2", "ssr", "batch"),
    "image-both-k4": image_config("grid-and-pyramid-previous", "k4", "no-ssr", "layer"),
    "image-grid-and-files-k1": image_config("grid-and-files", "k1", "ssr", "batch"),
    "image-files-k2": image_config("files-positions-hidden", "k2", "ssr", "layer", projection="relu"),
    "image-lite0-k1": replace(image_config("grid-and-pyramid-previous", "k1", "no-ssr", "batch"), trunk=LITE0),
    "text-gru-masked": text_config("gru", "masked", "batch"),
    "text-gru-authors": text_config("gru", "authors", "layer"),
    "text-gru-mean": text_config("gru", "masked", graph="no-graph", tokens="raw"),
    "text-bert-masked": text_config("bert", "masked", "layer"),
    "text-bert-authors": text_config("bert", "authors", "batch", tokens="raw", projection="relu", l2_epsilon=0.0),
}

IMAGE_OPTIONS = list(product(PATHS, JOINT, ("ssr", "no-ssr"), ("batch", "layer")))
TEXT_OPTIONS = list(product(TEXTS, ("masked", "authors"), ("batch", "layer"), ("graph", "no-graph"), ("unit", "raw")))


def randomised(module: nn.Module) -> None:
    """Give biases and scales that start at 0 or 1 random values, so that one left out, or taken for another, shows."""
    chance = torch.Generator().manual_seed(7)
    for name, value in module.state_dict().items():
        if name.endswith("bias"):
            value.copy_(torch.randn(value.shape, generator=chance) * 0.1)
        elif value.ndim == 1 and name.endswith("weight"):
            value.copy_(torch.rand(value.shape, generator=chance) + 0.5)


def settled(module: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Set BatchNorm statistics to those of `inputs`, as training would; random ones drown the input in a deep network."""
    module.eval()
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        module(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()


def image_encoder(config: DsranConfig) -> ImageEncoder:
    """A random image encoder in evaluation mode."""
    torch.manual_seed(0)
    trunk = None if config.trunk.name == "none" else build_trunk(config.trunk, pretrained=False)
    encoder = ImageEncoder(config, trunk)
    randomised(encoder)
    settled(encoder, images(encoder, 16, seed=99))
    return encoder


def text_encoder(config: DsranConfig) -> TextEncoder:
    """A random text encoder in evaluation mode."""
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    randomised(encoder)
    settled(encoder, {"token_ids": captions(16, 9, seed=99)})
    return encoder


def images(encoder: ImageEncoder, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """The inputs that an image encoder takes."""
    chance = torch.Generator().manual_seed(seed)
    config = encoder.config
    shapes = {
        "pixels": (3, config.trunk.image_size, config.trunk.image_size),
        "regions": (NUM_REGIONS, config.regions.feature_dim),
        "region_positions": (NUM_REGIONS, config.regions.position_dim),
    }
    inputs = {name: torch.randn(batch, *shapes[name], generator=chance) for name in encoder.input_names}
    if (
        "pixels" in inputs
    ):  # blotches that differ from image to image: what white noise leaves after pooling is the same for all
        coarse = torch.randn(batch, 3, 4, 4, generator=chance)
        inputs["pixels"] = inputs["pixels"] * 0.3 + nn.functional.interpolate(coarse, inputs["pixels"].shape[2:])
    return inputs


def captions(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids (batch, length): the first caption fills the length, the others are shorter or as long."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=chance)
    lengths = torch.randint(1, length + 1, (batch,), generator=chance)
    lengths[0] = length
    return ids * (torch.arange(length) < lengths[:, None])


def louder_before_the_norm(model):
    """What enters the l2norm a thousand times larger: the same embedding, but its squares pass 65504."""
    graph = model.graph
    last = max(index for index, node in enumerate(graph.node) if node.op_type == "Pow")
    plain = graph.node[last].input[0]
    for node in list(graph.node)[last:]:
        node.input[:] = ["louder" if name == plain else name for name in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1000), "loud"))
    graph.node.insert(last, onnx.helper.make_node("Mul", [plain, "loud"], ["louder"]))
