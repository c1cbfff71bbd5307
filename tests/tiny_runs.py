"""Tiny recipes and data for the training tests: an epoch takes a tenth of a second."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualmatch.runtime.datasets import Dataset, make_scenes
from dualmatch.runtime.errors import DualmatchError
from dualmatch.training.checkpoint import load_tensors
from dualmatch.training.loop import train
from dualmatch.training.recipe import Recipe, load_recipe

torch.set_num_threads(1)

# LayerNorm, because BatchNorm would make a step depend on how its batch is cut into parts and processes.
SIZES = (
    "model.norm=layer",
    "model.embed_dim=16",
    "model.num_heads=2",
    "model.trunk.image_size=32",
    "model.trunk.grid_size=0",
    "model.text.word_dim=12",
    "train.batch_size=16",
    "train.epochs=3",
)
CLOCKED = ("seconds", "pairs_per_second", "data_wait")
PAIRS = ("train.epoch_over=pairs", "train.captions_per_image=1")
NO_TRUNK = ("model.trunk.name=none", "model.global_path=false")
REGIONS = ("model.regions.source=precomputed", "model.regions.feature_dim=10", "model.regions.position_dim=0")
LITE0 = ("model.trunk.name=efficientnet-lite0", "model.trunk.frozen=true", "model.trunk.image_size=64")
BERT = (
    "model.text.encoder=bert",
    "model.text.num_layers=1",
    "model.text.num_heads=2",
    "model.text.intermediate_dim=16",
    "model.text.max_positions=64",
)


def tiny_recipe(*overrides: str) -> Recipe:
    """The scenes recipe at tiny sizes, with further options."""
    return load_recipe("scenes-dsran-gru", [*SIZES, *overrides])


@cache
def scenes() -> Dataset:
    """48 scenes: 32 train, 8 val, 8 test."""
    return make_scenes(num_train=32, num_val=8, num_test=8)


def first(dataset: Dataset, split: str, count: int) -> Dataset:
    """The first images of a split."""
    items = dataset.select([split]).items[:count]
    return Dataset(name=dataset.name, layout=dataset.layout, items=items)


def train_here(folder: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Train the tiny recipe on the tiny scenes into folder/run."""
    arguments: dict[str, Any] = {"data_name": "scenes", "cache": folder / "cache", **options}
    return train(tiny_recipe(*overrides), arguments.pop("dataset", scenes()), folder / "run", **arguments)


def log_of(run: Path) -> list[dict[str, Any]]:
    """The log's lines without what a clock measured."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]


def write_regions(path: Path, dataset: Dataset, *, channels: int = 10, regions: int = 3, **arrays: Any) -> Path:
    """A region file whose features tell images apart; `arrays` replaces or adds some."""
    chance = np.random.default_rng(0)
    content = {
        "filenames": np.array([item.id for item in dataset.items]),
        "features": chance.normal(size=(len(dataset.items), regions, channels)).astype(np.float16),
        **arrays,
    }
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def refusal(folder: Path, *overrides: str, **options: Any) -> str:
    """The one sentence with which training ends."""
    with pytest.raises(DualmatchError) as caught:
        train_here(folder, *overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_behind(folder: Path) -> list[str]:
    """What lies in the folder, the feature cache aside."""
    return sorted(path.name for path in folder.iterdir() if path.name != "cache")


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two checkpoints hold the same, bit for bit."""
    first_tensors, first_facts = load_tensors(one)
    other_tensors, other_facts = load_tensors(other)
    assert first_facts == other_facts
    assert first_tensors.keys() == other_tensors.keys()
    for name, value in first_tensors.items():
        assert torch.equal(value, other_tensors[name]), name
