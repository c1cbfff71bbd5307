"""Which layers int8 hurts: for every layer the noise that 8-bit operands add to its output, all in one pass over real inputs.

The float32 graph gets a second copy of each layer, fed with the same exact inputs through their codes, and the two outputs' squared
distance as a further output. Nothing is rebuilt or loaded again between layers, so two hundred of them cost about two encodings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dualmatch.runtime.backends import open_session

from .int8 import Layer, layers_of, to_int8
from .int8_ranges import Feeds


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What quantising one layer adds: the energy of the error of its output as a share of the output's own."""

    layer: str
    operator: str
    noise: float


def sensitivities(
    model: onnx.ModelProto,
    thresholds: Mapping[str, float],
    batches: Sequence[Feeds],
    scratch: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Every layer's noise, the most sensitive first; layers of equal noise stay in the graph's order.

    Args:
        thresholds: as for `to_int8`.
        batches: real inputs.
        scratch: a folder for a temporary graph.
        progress: called with batches done and batches in all.
    """
    layers = layers_of(model)
    path = scratch / "sensitivity.onnx"
    onnx.save(_with_copies(model, thresholds, layers), path)
    noise, signal = np.zeros(len(layers)), np.zeros(len(layers))
    try:
        with open_session(path) as session:
            for done, feeds in enumerate(batches, start=1):
                found = session.run(feeds)
                noise += [float(found[_noise_of(layer)]) for layer in layers]
                signal += [float(found[_signal_of(layer)]) for layer in layers]
                if progress is not None:
                    progress(done, len(batches))
    finally:
        path.unlink()
    shares = np.divide(noise, signal, out=np.zeros_like(noise), where=signal > 0)
    found_layers = [
        Sensitivity(layer=layer.name, operator=layer.operator, noise=float(share))
        for layer, share in zip(layers, shares, strict=True)
    ]
    return sorted(found_layers, key=lambda one: -one.noise)


def cosines(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row of `before` with the same row of `after`."""
    first, second = before.astype(np.float64), after.astype(np.float64)
    return np.einsum("nd,nd->n", first, second) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))


def _noise_of(layer: Layer) -> str:
    return f"{layer.name}.noise"


def _signal_of(layer: Layer) -> str:
    return f"{layer.name}.signal"


def _with_copies(model: onnx.ModelProto, thresholds: Mapping[str, float], layers: Sequence[Layer]) -> onnx.ModelProto:
    """`model`, and from its quantised form every layer once more on exact inputs, with both outputs compared."""
    result, quantised = onnx.ModelProto(), to_int8(model, thresholds)
    result.CopyFrom(model)
    graph = result.graph
    have = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for tensor in quantised.graph.initializer if tensor.name not in have)
    names, before = {layer.name for layer in layers}, {node.name for node in model.graph.node}
    for node in quantised.graph.node:
        if node.name not in before:
            graph.node.append(node)
        elif node.name in names:
            (output,) = node.output
            copied = graph.node.add()
            copied.CopyFrom(node)
            copied.name, copied.output[0] = f"{node.name}.copy", f"{output}.copy"
            error = f"{output}.error"
            graph.node.append(helper.make_node("Sub", [copied.output[0], output], [error]))
            for what, name in ((error, f"{node.name}.noise"), (output, f"{node.name}.signal")):
                graph.node.append(helper.make_node("ReduceSumSquare", [what], [name], keepdims=0))
                graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    return result
