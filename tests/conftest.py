"""Fixtures shared by several files: the tiny networks' ONNX graphs, each exported once in a session."""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .demo_fixture import attentive, demo, small_bundle, small_run  # noqa: F401  (fixtures of every test file)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Every file begins with torch on one thread, whatever a benchmark tested before it has set: other threads, other last bits."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@dataclass(frozen=True)
class Exported:
    """A tiny encoder in evaluation mode and its float32 graph."""

    encoder: Any
    path: Path
    model: Any

    @property
    def is_text(self) -> bool:
        return not hasattr(self.encoder, "input_names")

    def feeds(self, batch: int, length: int = 7, seed: int = 1) -> dict[str, Any]:
        """Random inputs as NumPy arrays; `length` is a text encoder's."""
        from .tiny_models import captions, images

        tensors = {"token_ids": captions(batch, length, seed)} if self.is_text else images(self.encoder, batch, seed)
        return {name: value.numpy() for name, value in tensors.items()}

    def shapes(self) -> list[dict[str, Any]]:
        """Inputs of batches 1, 2, 7 and, for text, of lengths off the traced one."""
        lengths = (1, 2, 5, 17, 40) if self.is_text else (0,)
        return [self.feeds(batch, length, seed=batch + length) for batch in (1, 2, 7) for length in lengths]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Exported]":
    """`exported(name)`: the graph of `tiny_models.EXPORTED[name]`."""
    from dualmatch.export.graph import export_encoder

    from .tiny_models import EXPORTED, captions, image_encoder, images, text_encoder

    folder = tmp_path_factory.mktemp("graphs")

    @cache
    def export(name: str) -> Exported:
        config, side = EXPORTED[name], name.partition("-")[0]
        encoder = text_encoder(config) if side == "text" else image_encoder(config)
        example = {"token_ids": captions(3, 7)} if side == "text" else images(encoder, 2)
        path = folder / f"{name}.onnx"
        return Exported(encoder, path, export_encoder(encoder, example, path, output=f"{side}_embedding"))

    return export


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A ring without a case says so in words: pytest's own reason is "got empty parameter set"."""
    for item in items:
        for mark in item.own_markers:
            if mark.name == "skip" and str(mark.kwargs.get("reason", "")).startswith("got empty parameter set"):
                mark.kwargs["reason"] = (
                    f"not run: no case for {item.name} in the goldens folder (see DUALMATCH_GOLDENS)"
                )
