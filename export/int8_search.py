"""One encoder's int8 graph: ranges calibrated, the clipping percentile measured, layers left out until retrieval passes."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.parity import Decision, Verdict

from .int8 import engines_differ, layers_of, to_int8
from .int8_ranges import Feeds, histograms
from .int8_sensitivity import Sensitivity, cosines, sensitivities
from .int8_smooth import smoothed

PERCENTILES = (99.9, 99.99, 99.999, 100.0)
# Items that percentiles and layers are compared on: enough to rank them, and each layer costs a pass over them.
NUM_COMPARED = 8
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """An encoder's int8 graphs.

    Attributes:
        model: for onnxruntime.
        engine_model: for TensorRT, where that is another one (see `int8`); None where `model` serves both.
        facts: how it was made, for the manifest: the percentile, the calibration items, the excluded layers with their noise.
    """

    model: onnx.ModelProto
    engine_model: onnx.ModelProto | None
    facts: dict[str, Any]


class SearchFailedError(DualmatchError):
    """No graph of an encoder passes; export makes the gate's refusal of it.

    Args:
        found: what does not pass, up to the reason.
        reason: of the last trial.
        model: the graph of that trial.
        trials: what each gave, as in `Quantised.facts`.
    """

    def __init__(self, found: str, reason: str, model: onnx.ModelProto, trials: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(self.sentence(found, reason))
        self.found = found
        self.model = model
        self.trials = trials

    @staticmethod
    def sentence(found: str, reason: str) -> str:
        """What was found, why, and what to do."""
        return f"{found} {reason}; export with --fp16 or --fp32."


def quantise(
    single: onnx.ModelProto,
    calibration: Sequence[Feeds],
    scratch: Path,
    *,
    name: str,
    decide: Callable[[onnx.ModelProto], Decision],
    accepts: Sequence[Verdict] = ("pass",),
    progress: Progress,
) -> Quantised | None:
    """The int8 form of a float32 graph that passes `decide` with the fewest layers left out (to a factor of two).

    Layers are left out by their sensitivity, the most sensitive first: none, then 1, 2, 4, 8 … up to half of them. Where TensorRT takes
    another graph, that one is settled behind onnxruntime's, and may leave out more layers, even all.
    Where all layers are linear, loud channels are smoothed first if that brings the embeddings closer. None where there is nothing to
    quantise, or one layer that does not pass: the encoder stays as it is.

    Args:
        calibration: real inputs, one item each.
        scratch: a folder for temporary graphs.
        name: the encoder's, for progress.
        decide: the verdict of retrieval with a graph.
        accepts: the verdicts that end the search.

    Raises:
        SearchFailedError: half of the layers in float32 are not enough.
    """
    layers = layers_of(single)
    if not layers:
        return None
    compared = calibration[:: max(1, len(calibration) // NUM_COMPARED)][:NUM_COMPARED]
    ranges = _ranges(single, calibration, compared, scratch, name=name, progress=progress)
    if not any(layer.operator == "Conv" for layer in layers):
        progress(f"smoothing the {name} encoder", 0, 0)
        if (smooth := smoothed(single, calibration, scratch)) is not None:
            other = _ranges(smooth, calibration, compared, scratch, name=name, progress=progress)
            ranges = max(ranges, other, key=lambda one: max(one.cosines.values()))
    smoothing, single, thresholds = ranges.model is not single, ranges.model, ranges.thresholds

    order: list[Sensitivity] = []
    trials: list[dict[str, Any]] = []

    def settled(graph: str, counts: Iterable[int], refused: str) -> tuple[onnx.ModelProto, int]:
        """The first of the graphs with `counts` layers left out that passes, and its count; `refused` begins the sentence if none does."""
        nonlocal order
        for count in counts:
            if count and not order:
                order = sensitivities(
                    single, thresholds, compared, scratch,
                    lambda done, of: progress(f"measuring the {name} encoder's layers", done, of),
                )  # fmt: skip
            left_out = [one.layer for one in order[:count]]
            model = to_int8(single, thresholds, excluded=left_out, for_engine=graph == "engine")
            decision = decide(model)
            trials.append({"excluded": count, "graph": graph, "verdict": decision.verdict, "reason": decision.reason})
            progress(f"{name} encoder, {graph}, {count} of {len(layers)} layers in float32: {decision.verdict}", 0, 0)
            if decision.verdict in accepts:
                return model, count
        raise SearchFailedError(refused, decision.reason, model, trials)

    most = max(1, len(layers) // 2)
    refused = (
        f"int8 does not keep retrieval: with {most} of the {name} encoder's {len(layers)} layers in float32, still"
    )
    model, left = settled("onnxruntime", _ladder(most), refused)
    if left == len(layers):
        return None
    # TensorRT's codes are coarser, so its graph leaves out as many layers or more, if need be all of them: then its engine is float32.
    engine: onnx.ModelProto | None = None
    left_by_engine = left
    if engines_differ(single):
        refused = f"the {name} encoder's graph for TensorRT does not pass with all layers in float32:"
        engine, left_by_engine = settled("engine", [*(n for n in _ladder(most) if n >= left), len(layers)], refused)
    facts = {
        "scheme": "static Q/DQ, symmetric, int8 weights per channel, 8-bit activations with all codes used behind a ReLU, word tables int8 by row",
        "calibration_items": len(calibration),
        "percentile": ranges.percentile,
        "cosine_by_percentile": {f"{one:g}": cosine for one, cosine in ranges.cosines.items()},
        "smoothed": smoothing,
        "layers": len(layers),
        "excluded": [asdict(one) for one in order[:left]],
        "engine_excluded": [asdict(one) for one in order[:left_by_engine]],
        "trials": trials,
    }
    return Quantised(model=model, engine_model=engine, facts=json.loads(json.dumps(facts)))


@dataclass(frozen=True, kw_only=True)
class _Ranges:
    """One form of the float32 graph with its activations' ranges, and how close 8 bits come to it by percentile."""

    model: onnx.ModelProto
    thresholds: Mapping[str, float]
    percentile: float
    cosines: Mapping[float, float]


def _ranges(
    model: onnx.ModelProto,
    calibration: Sequence[Feeds],
    compared: Sequence[Feeds],
    scratch: Path,
    *,
    name: str,
    progress: Progress,
) -> _Ranges:
    """The percentile whose ranges keep the embeddings of `compared` closest."""
    tensors = sorted({tensor for layer in layers_of(model) for tensor in layer.activations})
    found = histograms(
        model, tensors, calibration, scratch,
        lambda done: progress(f"calibrating the {name} encoder", done, len(calibration)),
    )  # fmt: skip
    wanted = _embeddings(model, compared, scratch)
    thresholds = {p: {tensor: one.threshold(p) for tensor, one in found.items()} for p in PERCENTILES}
    measured: dict[float, float] = {}
    for number, percentile in enumerate(PERCENTILES):
        given = _embeddings(to_int8(model, thresholds[percentile]), compared, scratch)
        measured[percentile] = float(np.mean([cosines(a, b) for a, b in zip(wanted, given, strict=True)]))
        progress(f"choosing the {name} encoder's clipping", number + 1, len(PERCENTILES))
    best = max(PERCENTILES, key=lambda one: measured[one])
    return _Ranges(model=model, thresholds=thresholds[best], percentile=best, cosines=measured)


def _ladder(most: int) -> Iterator[int]:
    """0, 1, 2, 4, 8 … and `most`."""
    yield 0
    count = 1
    while count < most:
        yield count
        count *= 2
    if most:
        yield most


def _embeddings(model: onnx.ModelProto, batches: Sequence[Feeds], scratch: Path) -> list[Any]:
    path = scratch / "compared.onnx"
    onnx.save(model, path)
    try:
        with open_session(path) as session:
            return [next(iter(session.run(batch).values())) for batch in batches]
    finally:
        path.unlink()
