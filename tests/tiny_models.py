"""Tiny networks with random weights, and inputs for them; `IMAGE_OPTIONS` and `TEXT_OPTIONS` span every configuration."""

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from dualmatch.models import DSRAN, DsranConfig, ImageEncoder, RegionConfig, TextConfig, TextEncoder, TrunkConfig
from dualmatch.models.trunks import build_trunk

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


def image_config(
    paths: str, joint: str = "k2", ssr: str = "ssr", norm: str = "batch", **options: Any
) -> DsranConfig:
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
    encoder: str, pad_policy: str = "masked", norm: str = "batch", graph: str = "graph", tokens: str = "unit", **options: Any
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

# The networks that are exported: every option at least once, the frequent pairs of options too. Exporting all of them would take minutes.
EXPORTED = {
    "image-grid-k1": image_config("grid", "k1", "no-ssr", "layer"),
    "image-grid-pooled-k2": image_config("grid-pooled", "k2", "ssr", "batch"),
    "image-pyramid-final-k1": image_config("pyramid-final", "k1", "ssr", "batch", l2_epsilon=0.0),
    "image-both-no-jsr": image_config("grid-and-pyramid-final", "no-jsr", "ssr", "layer", projection="relu"),
    "image-both-k4": image_config("grid-and-pyramid-previous", "k4", "no-ssr", "layer"),
    "image-grid-and-files-k2": image_config("grid-and-files", "k2", "no-ssr", "batch"),
    "image-files-no-jsr": image_config("files", "no-jsr", "no-ssr", "batch"),
    "image-files-k2": image_config("files-positions-hidden", "k2", "ssr", "layer", projection="relu"),
    "image-lite0-k1": replace(image_config("grid-and-pyramid-previous", "k1", "no-ssr", "batch"), trunk=LITE0),
    "text-gru-masked": text_config("gru", "masked", "batch"),
    "text-gru-masked-layer": text_config("gru", "masked", "layer", tokens="raw"),
    "text-gru-authors": text_config("gru", "authors", "batch"),
    "text-gru-mean": text_config("gru", "masked", graph="no-graph"),
    "text-bert-masked": text_config("bert", "masked", "layer", tokens="raw", projection="relu"),
    "text-bert-authors": text_config("bert", "authors", "batch", tokens="raw", projection="relu", l2_epsilon=0.0),
    "text-bert-mean": text_config("bert", "masked", graph="no-graph"),
}

IMAGE_OPTIONS = list(product(PATHS, JOINT, ("ssr", "no-ssr"), ("batch", "layer")))
TEXT_OPTIONS = list(product(TEXTS, ("masked", "authors"), ("batch", "layer"), ("graph", "no-graph"), ("unit", "raw")))


def randomised(module: nn.Module) -> Any:
    """Give parameters and statistics that start at 0 or 1 random values, so that one left out, or taken for another, shows."""
    chance = torch.Generator().manual_seed(7)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=chance) + 0.5)
        elif name.endswith(("running_mean", "bias")):
            value.copy_(torch.randn(value.shape, generator=chance) * 0.1)
        elif value.ndim == 1 and value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=chance) + 0.5)
    return module.eval()


def image_encoder(config: DsranConfig) -> ImageEncoder:
    """A random image encoder in evaluation mode."""
    torch.manual_seed(0)
    trunk = None if config.trunk.name == "none" else build_trunk(config.trunk, pretrained=False)
    return randomised(ImageEncoder(config, trunk))


def text_encoder(config: DsranConfig) -> TextEncoder:
    """A random text encoder in evaluation mode."""
    torch.manual_seed(0)
    return randomised(TextEncoder(config))


def network(config: DsranConfig) -> DSRAN:
    """Both encoders, random, in evaluation mode."""
    torch.manual_seed(0)
    trunk = None if config.trunk.name == "none" else build_trunk(config.trunk, pretrained=False)
    return randomised(DSRAN(config, trunk))


def images(encoder: ImageEncoder, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """The inputs that an image encoder takes."""
    chance = torch.Generator().manual_seed(seed)
    config = encoder.config
    shapes = {
        "pixels": (3, config.trunk.image_size, config.trunk.image_size),
        "regions": (NUM_REGIONS, config.regions.feature_dim),
        "region_positions": (NUM_REGIONS, config.regions.position_dim),
    }
    return {name: torch.randn(batch, *shapes[name], generator=chance) for name in encoder.input_names}


def captions(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids (batch, length): the first caption fills the length, the others are shorter or as long."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=chance)
    lengths = torch.randint(1, length + 1, (batch,), generator=chance)
    lengths[0] = length
    return ids * (torch.arange(length) < lengths[:, None])
