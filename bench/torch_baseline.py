"""Torch eager in float32 as the baseline of a benchmark: a run's own encoders behind the interface of a session.

The one file of `bench` that imports torch and the networks, so that every other measurement runs where only a bundle is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dualmatch.runtime.backends import Session
from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.bundle import EncoderEntry, EncoderName
from dualmatch.training.checkpoint import load_run


class TorchSession(Session):
    """One of a run's encoders in eager mode, in evaluation, without gradients.

    Args:
        encoder: the module.
        entry: its graph's description in a bundle of the same run.
        threads: torch's intra-operator threads.
    """

    def __init__(self, encoder: torch.nn.Module, entry: EncoderEntry, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self._encoder = encoder.eval()
        self.inputs, self.outputs = entry.inputs, entry.outputs
        self.backend = "torch"
        self.provider = f"torch {torch.__version__} eager on the CPU, {torch.get_num_threads()} threads"

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            result = self._encoder(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return {self.outputs[0].name: result.numpy()}

    def _release(self) -> None: ...


def torch_encoders(run: Path) -> dict[EncoderName, Any]:
    """A run's encoders as torch modules, at its best epoch."""
    model = load_run(run).model
    return {"image": model.image_encoder, "text": model.text_encoder}
