"""Loud channels of a linear layer's input moved into its weights, without changing what the network computes (SmoothQuant; Xiao et al., 2023).

A few channels of a transformer's activations are tens of times larger than the others, and one range for all of them leaves the
others few codes. Dividing each channel by a factor before it is quantised, and multiplying the weights that read it, moves the
differences to where each output channel has a scale of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .int8 import Layer, layers_of
from .int8_ranges import Feeds, observed

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of the activations' loudness, the share that the weights take over (their paper's alpha). Measured on MiniLM and photographs' captions:
# worst cosine 0.983 without smoothing, 0.991 at 0.6, 0.996 at 0.8 and at 0.9.
STRENGTH = 0.8
# A channel that is nearly silent on these inputs says little about others.
_LEAST = 1e-5


def smoothed(
    model: onnx.ModelProto, batches: Sequence[Feeds], scratch: Path, *, strength: float = STRENGTH
) -> onnx.ModelProto | None:
    """The same network with factors in front of its linear layers, for `to_int8` to quantise behind them; None where it has none.

    Args:
        batches: real inputs; a channel's loudness is its largest magnitude on them.
        scratch: a folder for a temporary graph.
        strength: from 0, which follows the weights alone, to 1, which brings all channels of an activation to one range.
    """
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    readers: dict[str, list[Layer]] = {}
    for layer in layers_of(model):
        if layer.operator in ("MatMul", "Gemm") and layer.weight is not None and weights[layer.weight].ndim == 2:
            readers.setdefault(layer.activations[0], []).append(layer)
    if not readers:
        return None
    loudest: dict[str, NDArray[Any]] = {}
    for found in observed(model, sorted(readers), batches, scratch):
        for name, values in found.items():
            largest_C = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
            loudest[name] = np.maximum(loudest.get(name, np.float32(0)), largest_C)

    new: dict[str, NDArray[Any]] = {}
    multiplied: dict[str, tuple[str, str]] = {}  # by layer: its activation and its weight from now on
    for name, layers in readers.items():
        weight_C = np.max([np.abs(weights[str(one.weight)]).max(axis=one.channel_axis) for one in layers], axis=0)
        factor_C = np.maximum(loudest[name], _LEAST) ** strength / np.maximum(weight_C, _LEAST) ** (1 - strength)
        factor_C = (factor_C / np.exp(np.log(factor_C).mean())).astype(np.float32)
        new[f"{name}.smoothing"] = 1 / factor_C
        for one in layers:
            own = f"{one.name}.weight.smoothed"
            new[own] = weights[str(one.weight)] * np.expand_dims(factor_C, one.channel_axis)
            multiplied[one.name] = f"{name}.smoothed", own

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    written: set[str] = set()
    for node in model.graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        if node.name in multiplied:
            name = node.input[0]
            copied.input[0], copied.input[1] = multiplied[node.name]
            if name not in written:
                written.add(name)
                graph.node.append(
                    helper.make_node("Mul", [name, f"{name}.smoothing"], [f"{name}.smoothed"], name=f"smooth.{name}")
                )
        graph.node.append(copied)
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in used)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in new.items())
    onnx.checker.check_model(result, full_check=True)
    return result
