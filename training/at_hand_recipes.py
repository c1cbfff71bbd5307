"""Recipes for data at hand, where the papers print nothing: their ablations and curves on the scenes and on a thousand photographs.

Generated as the rows of the papers are, from a base recipe that is a TOML file; imports no torch.
"""

from collections.abc import Iterator
from typing import Any

from .paper_recipes import ABLATIONS, RESNET, Row, ablation, described

_NOTHING = "nothing: --data scenes"
_BOXES = "--set data.regions=a file of `dualmatch data pool-regions --trunk resnet152`"


def _ablations() -> Iterator[tuple[str, Row]]:
    """The lines of Table III."""
    bases = {
        "scenes-dsran-gru": ("scenes", "DSRAN on the embedded scenes", _NOTHING, False),
        "flickr8k-dsran-minilm": (
            "flickr8k-1000",
            "DSRAN on a thousand photographs",
            "photographs with captions",
            False,
        ),
        "flickr8k-dsran-minilm-resnet152": (
            "flickr8k-1000",
            "DSRAN on a thousand photographs, ResNet-152",
            f"photographs with captions; {RESNET}",
            False,
        ),
        "flickr8k-dsran-authors": (
            "flickr8k-1000",
            "DSRAN as its authors train it, on a thousand photographs",
            f"photographs with captions; {RESNET}; --set data.regions=FILE",
            True,
        ),
        "flickr8k-dsran-boxes": (
            "flickr8k-1000",
            "DSRAN on a thousand photographs, ResNet-152 and detected boxes",
            f"photographs with captions; {RESNET}; {_BOXES}",
            True,
        ),
    }
    for base, (group, network, needs, from_files) in bases.items():
        for number, path in enumerate(ABLATIONS, start=1 if "minilm" in base or "boxes" in base else 9):
            words, values = ablation(path, regions_from_files=from_files)
            yield (
                f"{base}-table3-{number}",
                Row(
                    group=f"{group}: the ablations of DSRAN's Table III",
                    needs=needs,
                    base=base,
                    values=described(f"{network}: {words} (as Table III, line {number}).", values),
                ),
            )


def _scenes() -> Iterator[tuple[str, Row]]:
    """The papers' curves on the scenes (K, norm, epochs); and what a path knows of places, which decides what it can tell apart there."""
    base, network = "scenes-dsran-gru", "DSRAN on the embedded scenes"
    curves: dict[str, tuple[str, str, dict[str, Any]]] = {
        f"k{graphs}": (f"K = {graphs} (as Fig. 7)", "K", {"joint_graphs": graphs}) for graphs in (1, 2, 4)
    }
    curves["with-batchnorm"] = ("BatchNorm in the graph attention (as Fig. 9)", "BatchNorm", {"norm": "batch"})
    curves["with-layernorm"] = ("LayerNorm in the graph attention", "BatchNorm", {"norm": "layer"})
    curves["without-batchnorm"] = ("no norm in the graph attention (as Fig. 9)", "BatchNorm", {"norm": "none"})
    alone = {"joint_relations": False}
    places: dict[str, tuple[str, dict[str, Any]]] = {
        "positions": ("both paths, SSR and JSR; grid nodes know their places", {"grid_positions": True}),
        "global-positions": (
            "global path, SSR; grid nodes know their places",
            {**alone, "regional_path": False, "grid_positions": True},
        ),
        "regional-no-positions": (
            "regional path, SSR; regions do not know their places",
            {**alone, "global_path": False, "regions": {"position_dim": 0}},
        ),
        "regional-small": (
            "regional path, SSR; small regions only, none of the whole scene",
            {**alone, "global_path": False, "regions": {"levels": [3]}},
        ),
    }
    for name, (words, curve, model) in curves.items():
        values = described(f"{network}: {words}.", {"model": model})
        yield f"{base}-{name}", Row(group=f"{network}: {curve}", needs=_NOTHING, base=base, values=values)
    for epochs in (7, 14, 28):
        values = described(
            f"{network}: {epochs} epochs (as Fig. 8).", {"train": {"epochs": epochs, "step_epochs": epochs // 2}}
        )
        yield f"{base}-epochs{epochs}", Row(group=f"{network}: epochs", needs=_NOTHING, base=base, values=values)
    for name, (words, model) in places.items():
        values = described(f"{network}: {words}.", {"model": model})
        yield f"{base}-{name}", Row(group=f"{network}: places", needs=_NOTHING, base=base, values=values)


def _boxes() -> Iterator[tuple[str, Row]]:
    """What the ablations on photographs are compared with, on the same features."""
    needs = f"photographs with captions; {RESNET}; {_BOXES}"
    group = "DSRAN on a thousand photographs, ResNet-152 and detected boxes: beside the ablations"
    training = {
        "loss": {"kind": "hinge", "margin": 0.2, "mask_same_image": False},
        "train": {
            "epoch_over": "pairs",
            "captions_per_image": 1,
            "optimiser": "adam",
            "learning_rate": 2e-4,
            "graph_learning_rate": 1.0,
            "weight_decay": 0.0,
            "schedule": "step",
            "epochs": 16,
            "step_epochs": 8,
            "warmup": 0.0,
        },
    }
    rows: dict[str, tuple[str, str, dict[str, Any]]] = {
        "flickr8k-dsran-boxes-authors": (
            "flickr8k-dsran-boxes",
            "the authors' batches, loss, optimiser, schedule, dropout, BatchNorm and text graph",
            {
                **training,
                "model": {
                    "caption_relations": True,
                    "norm": "batch",
                    "zero_residual": False,
                    "input_dropout": 0.0,
                    "token_dropout": 0.0,
                    "channel_dropout": False,
                },
            },
        ),
        "flickr8k-dsran-boxes-modern": (
            "flickr8k-dsran-boxes",
            "generalised pooling, dropped nodes and words, a hinge over several hard negatives after a warm-up on all",
            {
                "model": {
                    "image_pooling": "gpo",
                    "drop_nodes": 0.2,
                    "drop_words": 0.2,
                    "text": {"pooling": "gpo"},
                    "regions": {"num_regions": 36},
                },
                "loss": {"kind": "hinge", "margin": 0.2, "num_negatives": 8, "warmup_epochs": 3, "warmup": "sum"},
            },
        ),
    }
    for name, (base, words, changes) in rows.items():
        values = described(f"DSRAN on a thousand photographs, ResNet-152 and detected boxes: {words}.", changes)
        yield name, Row(group=group, needs=needs, base=base, values=values)
    yield (
        "flickr8k-vsrn-boxes",
        Row(
            group=group,
            needs=f"photographs with captions; {_BOXES}",
            base="flickr8k-vsrn",
            values=described(
                "VSRN with a GRU on a thousand photographs, ResNet-152 features of detected boxes.",
                {"model": {"feature_dim": 2048}},
            ),
        ),
    )


AT_HAND_ROWS: dict[str, Row] = {name: row for rows in (_ablations(), _scenes(), _boxes()) for name, row in rows}
