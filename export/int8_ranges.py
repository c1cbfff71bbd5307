"""Activation ranges for static quantisation: a histogram of magnitudes per tensor on real inputs, and the percentile that clips it.

One batch at a time and one histogram per tensor, so that memory does not grow with the number of calibration items.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError

NUM_BINS = 4096
Feeds = Mapping[str, NDArray[Any]]


class Histogram:
    """Magnitudes of one tensor in equal bins from 0; the range doubles, two bins becoming one, when a larger value comes.

    Exact zeros are not counted: behind a ReLU most values are, and they say nothing about the range.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(NUM_BINS, dtype=np.int64)
        self.top = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count more values."""
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if largest == 0:
            return
        if self.top == 0:
            self.top = largest
        while self.top < largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(NUM_BINS // 2, dtype=np.int64)])
            self.top *= 2
        bins = np.minimum((magnitudes * np.float32(NUM_BINS / self.top)).astype(np.int32), NUM_BINS - 1)
        self.counts += np.bincount(bins, minlength=NUM_BINS)
        self.counts[0] -= magnitudes.size - np.count_nonzero(magnitudes)

    def threshold(self, percentile: float) -> float:
        """The magnitude under which `percentile` percent of the values other than zero lie; 100 keeps the largest bin."""
        if not self.counts.any():
            return self.top
        reached = np.cumsum(self.counts) / self.counts.sum()
        last = int(np.searchsorted(reached, percentile / 100 - 1e-12))
        return self.top * min(last + 1, NUM_BINS) / NUM_BINS


def histograms(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Feeds],
    scratch: Path,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Histogram]:
    """Histograms of the named float tensors of `model` on real inputs.

    Args:
        tensors: inputs of the graph or tensors computed in it.
        batches: real inputs, best one item each: every named tensor of a batch is in memory at once.
        scratch: a folder for a temporary graph.
        progress: called with the number of batches done.

    Raises:
        DualmatchError: no batch, or a tensor that is not finite.
    """
    found = {name: Histogram() for name in tensors}
    done = 0
    for values_of in observed(model, tensors, batches, scratch):
        for name, values in values_of.items():
            found[name].add(values)
        done += 1
        if progress is not None:
            progress(done)
    if not done:
        raise DualmatchError("there is nothing to calibrate on.")
    return found


def observed(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Feeds], scratch: Path
) -> Iterator[dict[str, NDArray[Any]]]:
    """The named float tensors of `model`, batch by batch; as for `histograms`."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    given = {value.name for value in probed.graph.input}
    declared = {value.name for value in probed.graph.output}
    probed.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors if name not in given | declared
    )
    path = scratch / "calibration.onnx"
    onnx.save(probed, path)
    try:
        with open_session(path) as session:
            for feeds in batches:
                values = dict(feeds) | session.run(feeds)
                yield {name: values[name] for name in tensors}
    finally:
        path.unlink()
