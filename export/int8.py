"""A float32 ONNX graph with explicit Q/DQ pairs: int8 weights per output channel, activations by calibrated ranges, all static.

Pairs stand on operands, so leaving a layer out touches no other. Codes are symmetric throughout. Nothing
depends on the batch: an item's embedding is the same alone and in company.

One choice differs between processors. onnxruntime drops a ReLU into an integer convolution only where the codes themselves end at 0,
so tensors behind a ReLU are uint8 there and have all 256 codes. TensorRT takes int8 only: `for_engine` gives it the same network with
the same ranges on half as many codes. Tables of words are written in two ways too (see `int8_tables`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dualmatch.runtime.errors import DualmatchError

from .int8_tables import is_table, lookup

WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
# What passes values on unchanged, so that a tensor behind it is as free of negative values as the one before.
_MOVES = frozenset({"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_SMALLEST_SCALE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An operator that can be quantised: a product with constant weights, the sum that ends a residual branch, or a table of words.

    Attributes:
        name: the operator's name in the graph.
        operator: its type.
        activations: the float tensors that flow in; none into a table.
        weight: the constant that it multiplies with or looks rows up in, or none for a sum.
        channel_axis: the weight's axis of output channels, or of words.
    """

    name: str
    operator: str
    activations: tuple[str, ...]
    weight: str | None = None
    channel_axis: int = 0


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """What `to_int8` quantises, in the graph's order.

    Convolutions, products and linear layers with constant weights; and sums of two convolutions' branches, so that a residual network
    stays in integers from one block to the next; and large tables of word embeddings, whose rows are float32 again once looked up.
    Attention's own products, recurrent layers and everything with a sum of squares or exponentials stay float32.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if (
            node.op_type in WEIGHTED
            and len(node.input) > 1
            and node.input[1] in weights
            and node.input[0] not in weights
        ):
            weight = weights[node.input[1]]
            if weight.data_type != TensorProto.FLOAT or len(weight.dims) < 2:
                continue
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            axis = 0 if node.op_type == "Conv" or transposed else len(weight.dims) - 1
            found.append(
                Layer(
                    name=node.name,
                    operator=node.op_type,
                    activations=(node.input[0],),
                    weight=node.input[1],
                    channel_axis=axis,
                )
            )
        elif _adds_convolutions(node, maker) and not any(name in weights for name in node.input):
            found.append(Layer(name=node.name, operator="Add", activations=tuple(node.input)))
        elif is_table(node, weights):
            found.append(Layer(name=node.name, operator="Gather", activations=(), weight=node.input[0]))
    assert len({layer.name for layer in found}) == len(found)
    return found


def to_int8(
    model: onnx.ModelProto,
    thresholds: Mapping[str, float],
    *,
    excluded: Sequence[str] = (),
    for_engine: bool = False,
) -> onnx.ModelProto:
    """A copy of `model` whose layers, but for the excluded ones, compute on 8-bit integers.

    Args:
        thresholds: for every activation of a layer the magnitude where its codes end.
        excluded: names of layers that stay float32.
        for_engine: int8 codes everywhere, as TensorRT wants them.

    Raises:
        DualmatchError: the graph has subgraphs, or a weight is not finite.
    """
    if model.functions or any(
        a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for n in model.graph.node for a in n.attribute
    ):
        raise DualmatchError("int8 rewriting takes flat graphs; this one has functions or subgraphs.")
    layers = {layer.name: layer for layer in layers_of(model) if layer.name not in set(excluded)}
    return _Writer(model, thresholds, for_engine=for_engine).written(layers)


def unsigned_tensors(model: onnx.ModelProto) -> dict[str, float]:
    """Tensors behind a ReLU of a convolution's branch, which onnxruntime can drop, with the ReLU's own ceiling (infinite, or 6)."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, float] = {}
    for node in model.graph.node:
        source = maker.get(node.input[0]) if node.input else None
        if node.op_type in ("Relu", "Clip"):
            ceiling = _ceiling(node, weights)
            if ceiling and source is not None and (source.op_type == "Conv" or _adds_convolutions(source, maker)):
                found |= dict.fromkeys(node.output, ceiling)
        elif node.op_type in _MOVES and node.input[0] in found:
            found |= dict.fromkeys(node.output, found[node.input[0]])
    return found


def engines_differ(model: onnx.ModelProto) -> bool:
    """Whether `to_int8` writes another graph for TensorRT than for onnxruntime."""
    return bool(unsigned_tensors(model)) or any(layer.operator == "Gather" for layer in layers_of(model))


def _adds_convolutions(node: onnx.NodeProto, maker: Mapping[str, onnx.NodeProto]) -> bool:
    return node.op_type == "Add" and any(name in maker and maker[name].op_type == "Conv" for name in node.input)


def _ceiling(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> float:
    """Where a ReLU ends; 0 for a clip that is none."""
    if node.op_type == "Relu":
        return float("inf")
    if len(node.input) != 3 or any(name not in weights for name in node.input[1:]):
        return 0.0
    low, high = (float(numpy_helper.to_array(weights[name])) for name in node.input[1:])
    return high if low == 0 else 0.0


def quantised_weight(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes from -127 to 127 and a scale for each slice along `axis`."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = np.maximum(np.abs(weight).max(axis=others) / 127, _SMALLEST_SCALE).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    codes = np.clip(np.round(weight / scales.reshape(shape)), -127, 127).astype(np.int8)
    return codes, scales


class _Writer:
    """Builds the new graph in one pass over the nodes in their topological order."""

    def __init__(self, model: onnx.ModelProto, thresholds: Mapping[str, float], *, for_engine: bool) -> None:
        self.model = model
        self.thresholds = thresholds
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.unsigned = {} if for_engine else unsigned_tensors(model)
        self.for_engine = for_engine
        self.users: dict[str, int] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.new: dict[str, TensorProto] = {}
        self.quantised: set[str] = set()

    def written(self, layers: Mapping[str, Layer]) -> onnx.ModelProto:
        for node in self.model.graph.node:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            layer = layers.get(node.name)
            if layer is not None and layer.operator == "Gather":
                self._table(node)
                continue
            if layer is not None:
                for index, name in enumerate(layer.activations):
                    copied.input[index] = self._activation(name, shared=node.op_type in ("Conv", "Add"))
                if layer.weight is not None:
                    copied.input[1] = self._weight(layer.weight, layer.channel_axis, node.name)
            self.nodes.append(copied)
        result = onnx.ModelProto()
        result.CopyFrom(self.model)
        graph = result.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        graph.initializer.extend(tensor for name, tensor in self.weights.items() if name in used)
        graph.initializer.extend(self.new.values())
        onnx.checker.check_model(result, full_check=True)
        return result

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        if name not in self.new:
            self.new[name] = numpy_helper.from_array(value, name)
        return name

    def _activation(self, name: str, *, shared: bool) -> str:
        """The tensor through its codes: one pair for all convolutions and sums that read it, one of its own for each product."""
        # onnxruntime fuses a convolution only where its one pair is all that its output meets, and a product only with a pair that
        # nothing else reads; it merges equal pairs before it looks, so a product's scale differs in its last bits.
        number = 0
        if not shared and not self.for_engine:
            number = self.users[name] = self.users.get(name, 0) + 1
        pair = f"{name}.{number}" if number else name
        output = f"{pair}.dequantised"
        if pair in self.quantised:
            return output
        self.quantised.add(pair)
        # Around a convolution onnxruntime wants one type of codes: signed values are uint8 there too, with 128 for zero.
        codes = np.uint8 if name in self.unsigned or (shared and not self.for_engine) else np.int8
        zero = codes(0 if name in self.unsigned or codes is np.int8 else 128)
        # A clip, too, is dropped only where the codes end before it does.
        threshold = min(self.thresholds[name], self.unsigned.get(name, np.inf) * (1 - 1e-6))
        scale = max(threshold, _SMALLEST_SCALE) / (255 if name in self.unsigned else 127) * (1 + number * 2.0**-22)
        constants = [
            self._constant(f"{pair}.scale", np.asarray(scale, dtype=np.float32)),
            self._constant(f"{pair}.zero", np.asarray(zero)),
        ]
        self.nodes += [
            helper.make_node("QuantizeLinear", [name, *constants], [f"{pair}.codes"], name=f"quantise.{pair}"),
            helper.make_node("DequantizeLinear", [f"{pair}.codes", *constants], [output], name=f"dequantise.{pair}"),
        ]
        return output

    def _table(self, node: onnx.NodeProto) -> None:
        nodes, constants = lookup(node, *self._codes(node.input[0], 0), for_engine=self.for_engine)
        self.nodes += nodes
        for name, value in constants.items():
            self._constant(name, value)

    def _codes(self, name: str, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        values = numpy_helper.to_array(self.weights[name])
        if not np.isfinite(values).all():
            raise DualmatchError(f"weight {name!r} holds NaN or infinity; there is nothing to quantise.")
        return quantised_weight(values, axis)

    def _weight(self, name: str, axis: int, user: str) -> str:
        if f"{name}.codes" not in self.new:
            codes, scales = self._codes(name, axis)
            self._constant(f"{name}.codes", codes)
            self._constant(f"{name}.scale", scales)
            self._constant(f"{name}.zero", np.zeros(len(scales), dtype=np.int8))
        output = f"{user}.weight"
        parts = [f"{name}.codes", f"{name}.scale", f"{name}.zero"]
        self.nodes.append(
            helper.make_node("DequantizeLinear", parts, [output], name=f"dequantise.{user}.weight", axis=axis)
        )
        return output
