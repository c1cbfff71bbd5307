"""The way from a photograph or a caption to a vector, each stage timed: decode, pre-process or tokenise, copy in, compute, copy out.

Legend: B batch, S image size, L caption length.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dualmatch.runtime.backends import ENGINE_BACKENDS, Session
from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.bundle import Bundle, EncoderName
from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import open_rgb
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .measure import Clock, Samples, samples_needed

LEAST_ITEMS = 16
MOST_CALLS = samples_needed(0.99)
# A TensorRT lane overlaps its copies with computing, so that they are no time of their own.
COMPUTE, COPY_AND_COMPUTE = "compute", "copy_and_compute"
END_TO_END = "end_to_end"
Stage = tuple[str, Callable[[Any], Any]]


def sample_items(data: str, encoder: EncoderName, number: int) -> list[Any]:
    """The first `number` encoded photographs (bytes) or captions of a data set, from the start again where it has fewer.

    Raises:
        DualmatchError: there is no such data set, or it is empty.
    """
    dataset = open_dataset(data)
    if not dataset.items:
        raise DualmatchError(f"{data} holds no images: nothing to prepare.")
    if encoder == "image":
        items: list[Any] = [item.read_bytes() for item in dataset.items[:number]]
    else:
        items = [caption for item in dataset.items[:number] for caption in item.captions][:number]
    return [items[index % len(items)] for index in range(number)]


def preparing_stages(bundle: Bundle, encoder: EncoderName, others: Mapping[str, Array]) -> list[Stage]:
    """The stages before the graph: a list of B items to the graph's inputs.

    Args:
        others: inputs that do not come from the items, such as precomputed regions.
    """
    manifest = bundle.manifest
    if encoder == "text":
        tokenizer = CaptionTokenizer(bundle.read("tokenizer.json"), manifest.tokenizer)
        return [("tokenise", lambda captions: {"token_ids": tokenizer(captions)})]  # int64 (B, L)
    preprocess = manifest.preprocessing
    if preprocess is None:
        return [("look_up", lambda _: dict(others))]
    rest = {name: value for name, value in others.items() if name != "pixels"}
    return [
        ("decode", lambda photos: [open_rgb(photo) for photo in photos]),
        (
            "pre_process",
            lambda images: rest | {"pixels": np.stack([preprocess.normalise(preprocess.fit(i)) for i in images])},
        ),  # float32 (B, 3, S, S)
    ]


def bound_stages(bound: Any) -> list[Stage]:
    """The stages of an onnxruntime `BoundRun` that has run once with feeds of the same shapes."""
    values, session, binding = bound._values, bound._session, bound._binding  # noqa: SLF001

    def copy_in(feeds: Mapping[str, Array]) -> None:
        for name, feed in feeds.items():
            values[name].update_inplace(np.ascontiguousarray(feed))

    return [
        ("copy_in", copy_in),
        (COMPUTE, lambda _: session.run_with_iobinding(binding)),
        ("copy_out", lambda _: [np.array(value.numpy()) for value in binding.get_outputs()]),
    ]


def graph_stages(session: Session) -> list[Stage]:
    """The graph's own stages: copies apart where the backend has them and lets them be told apart."""
    device = getattr(session, "_device", None)
    if device is not None:
        return bound_stages(session._bound(device))  # type: ignore[attr-defined]  # noqa: SLF001
    name = COPY_AND_COMPUTE if session.backend.partition("+")[0] in ENGINE_BACKENDS else COMPUTE
    return [(name, session.run)]


def measure_stages(
    stages: Sequence[Stage],
    batches: Sequence[Sequence[Any]],
    *,
    budget_s: float,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Samples]:
    """Samples of each stage in ns, and of `end_to_end`, the way from the first to the last of them.

    The batches take turns. One pass warms up and is not counted; then passes go on until p99 is earned or the budget is spent,
    for at least as many as earn a median.
    """
    taken: list[list[int]] = []
    started, number = clock(), 0
    while number <= samples_needed(0.5) or (clock() - started < budget_s * 1e9 and number <= MOST_CALLS):
        value: Any = batches[number % len(batches)]
        instants = [clock()]
        for _, action in stages:
            value = action(value)
            instants.append(clock())
        taken.append([*np.diff(instants).tolist(), instants[-1] - instants[0]])
        number += 1
    names = [*(name for name, _ in stages), END_TO_END]
    columns = np.array(taken[1:], dtype=np.int64).T
    return {name: Samples(column) for name, column in zip(names, columns, strict=True)}
