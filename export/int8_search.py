"""One encoder's int8 graph: ranges calibrated, the clipping percentile measured, layers left out until retrieval passes."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.parity import Decision, Verdict

from .int8 import layers_of, to_int8, unsigned_tensors
from .int8_ranges import Feeds, histograms
from .int8_sensitivity import Sensitivity, cosines, sensitivities

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

    Layers are left out by their sensitivity, the most sensitive first: none, then 1, 2, 4, 8 … up to half of them.
    None where there is no layer to quantise: a GRU over word embeddings, and nothing else, stays as it is.

    Args:
        calibration: real inputs, one item each.
        scratch: a folder for temporary graphs.
        name: the encoder's, for progress.
        decide: the verdict of retrieval with a graph.
        accepts: the verdicts that end the search.

    Raises:
        DualmatchError: half of the layers in float32 are not enough.
    """
    layers = layers_of(single)
    if not layers:
        return None
    tensors = sorted({tensor for layer in layers for tensor in layer.activations})
    found = histograms(
        single, tensors, calibration, scratch,
        lambda done: progress(f"calibrating the {name} encoder", done, len(calibration)),
    )  # fmt: skip
    compared = calibration[:: max(1, len(calibration) // NUM_COMPARED)][:NUM_COMPARED]
    wanted = _embeddings(single, compared, scratch)

    def agreement(model: onnx.ModelProto) -> float:
        return float(
            np.mean([cosines(a, b) for a, b in zip(wanted, _embeddings(model, compared, scratch), strict=True)])
        )

    thresholds_at = {p: {tensor: one.threshold(p) for tensor, one in found.items()} for p in PERCENTILES}
    measured: dict[float, float] = {}
    for number, percentile in enumerate(PERCENTILES):
        measured[percentile] = agreement(to_int8(single, thresholds_at[percentile]))
        progress(f"choosing the {name} encoder's clipping", number + 1, len(PERCENTILES))
    percentile = max(PERCENTILES, key=lambda one: measured[one])
    thresholds = thresholds_at[percentile]

    order: list[Sensitivity] = []
    trials: list[dict[str, Any]] = []
    for count in _ladder(len(layers) // 2):
        if count and not order:
            order = sensitivities(
                single, thresholds, compared, scratch,
                lambda done, of: progress(f"measuring the {name} encoder's layers", done, of),
            )  # fmt: skip
        left_out = [one.layer for one in order[:count]]
        model = to_int8(single, thresholds, excluded=left_out)
        engine = to_int8(single, thresholds, excluded=left_out, for_engine=True) if unsigned_tensors(single) else None
        accepted = True
        # The engine's codes are coarser, so where one of the two fails it is mostly that one: it goes first.
        for graph, candidate in (("engine", engine), ("onnxruntime", model)):
            if candidate is not None and accepted:
                decision = decide(candidate)
                accepted = decision.verdict in accepts
                trials.append(
                    {"excluded": count, "graph": graph, "verdict": decision.verdict, "reason": decision.reason}
                )
                progress(
                    f"{name} encoder, {graph}, {count} of {len(layers)} layers in float32: {decision.verdict}", 0, 0
                )
        if accepted:
            break
    else:
        raise DualmatchError(
            f"int8 does not keep retrieval: with {count} of the {name} encoder's {len(layers)} layers in float32, still {decision.reason}; "
            "export with --fp16 or --fp32."
        )
    facts = {
        "scheme": "static Q/DQ, symmetric, int8 weights per channel, 8-bit activations with all codes used behind a ReLU",
        "calibration_items": len(calibration),
        "percentile": percentile,
        "cosine_by_percentile": {f"{one:g}": measured[one] for one in PERCENTILES},
        "layers": len(layers),
        "excluded": [asdict(one) for one in order[: len(left_out)]],
        "trials": trials,
    }
    return Quantised(model=model, engine_model=engine, facts=json.loads(json.dumps(facts)))


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
