"""A float32 ONNX graph rewritten to compute in float16, with float32 islands where float16 sums overflow or lose too much.

The precision is written into the graph, as strongly typed TensorRT networks want it. Inputs and outputs stay float32. Islands are
softmax, normalisation and reductions, with the elementwise steps between them; casts stand only where an island begins or ends, so
that a sum of squares never passes through float16 on its way to the root.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.stages import HALF_MAX, Magnitude

# Computed in float32 wherever they occur.
ISLAND_OPERATORS = frozenset({
    "BatchNormalization", "ConstantOfShape", "Exp", "LayerNormalization", "LogSoftmax", "Pow", "ReduceL2", "ReduceMean", "ReduceSum",
    "ReduceSumSquare", "Softmax", "Sqrt",
})  # fmt: skip
# Divisions by a float32 norm or count stay float32 as a whole.
ISLAND_IF_ANY_INPUT = frozenset({"Div"})
# Carried along when all that flows in is float32 already.
ISLAND_IF_ALL_INPUTS = frozenset(
    {"Add", "Clip", "Mul", "Sub", "Max", "Reciprocal", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Expand"}
)


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` that computes in float16.

    Raises:
        DualmatchError: a weight does not fit into float16, or the graph has a construct that this rewriting does not know.
    """
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = model.graph
    if model.functions or any(
        a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for n in graph.node for a in n.attribute
    ):
        raise DualmatchError("float16 rewriting takes flat graphs; this one has functions or subgraphs.")
    return _Rewriter(graph).rewritten(model)


class _Rewriter:
    """One pass over the nodes in their topological order."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.float_names = {
            value.name
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.float_names |= {name for name, tensor in self.weights.items() if tensor.data_type == TensorProto.FLOAT}
        # Float tensors that exist in float32 in the new graph; the other computed ones are float16.
        self.single = {value.name for value in graph.input if value.name in self.float_names}
        self.island_made: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.casts: dict[tuple[str, int], str] = {}
        self.new_weights: dict[str, TensorProto] = {}

    def rewritten(self, model: onnx.ModelProto) -> onnx.ModelProto:
        for node in self.graph.node:
            self._place(node)
        self._restore_outputs()
        result = onnx.ModelProto()
        result.CopyFrom(model)
        graph = result.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.new_weights.values())
        result = onnx.shape_inference.infer_shapes(result, strict_mode=True, data_prop=True)
        onnx.checker.check_model(result, full_check=True)
        return result

    def _place(self, node: onnx.NodeProto) -> None:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        makes_float = any(name in self.float_names for name in node.output)
        if node.op_type == "Cast" and makes_float:
            # From integers or booleans: masks and counts. They are born in half precision.
            for attribute in copied.attribute:
                if attribute.name == "to":
                    attribute.i = TensorProto.FLOAT16
            self.nodes.append(copied)
            return
        if node.op_type == "Constant" and makes_float:
            raise DualmatchError(f"float16 rewriting expects constants as initialisers, found the node {node.name!r}.")
        island = self._is_island(node)
        wanted = TensorProto.FLOAT if island else TensorProto.FLOAT16
        for index, name in enumerate(node.input):
            if name in self.float_names:
                copied.input[index] = self._as(name, wanted)
            elif name in self.weights:
                self.new_weights[name] = self.weights[name]
        self.nodes.append(copied)
        if island:
            made = [name for name in node.output if name in self.float_names]
            self.single.update(made)
            self.island_made.update(made)

    def _is_island(self, node: onnx.NodeProto) -> bool:
        if node.op_type in ISLAND_OPERATORS:
            return True
        flowing = [name for name in node.input if name in self.float_names and name not in self.weights]
        from_island = [name in self.island_made for name in flowing]
        if node.op_type in ISLAND_IF_ANY_INPUT:
            return any(from_island)
        return node.op_type in ISLAND_IF_ALL_INPUTS and bool(flowing) and all(from_island)

    def _as(self, name: str, wanted: int) -> str:
        """The name under which the float tensor `name` is available at the wanted precision."""
        if name in self.weights:
            return self._weight(name, wanted)
        if (name in self.single) == (wanted == TensorProto.FLOAT):
            return name
        if (name, wanted) not in self.casts:
            suffix = "float32" if wanted == TensorProto.FLOAT else "float16"
            cast = f"{name}.{suffix}"
            self.nodes.append(helper.make_node("Cast", [name], [cast], name=f"cast.{cast}", to=wanted))
            self.casts[name, wanted] = cast
        return self.casts[name, wanted]

    def _weight(self, name: str, wanted: int) -> str:
        if wanted == TensorProto.FLOAT:
            self.new_weights[name] = self.weights[name]
            return name
        half = f"{name}.float16"
        if half not in self.new_weights:
            values = numpy_helper.to_array(self.weights[name])
            if not np.abs(values).max(initial=0.0) <= HALF_MAX:  # NaN too
                raise DualmatchError(
                    f"weight {name!r} has a magnitude of {np.abs(values).max():.3g}, above float16's {HALF_MAX:.0f}; export with --fp32."
                )
            self.new_weights[half] = numpy_helper.from_array(values.astype(np.float16), half)
        return half

    def _restore_outputs(self) -> None:
        """Outputs keep name and type: a float16 one is renamed and cast back."""
        for output in self.graph.output:
            if output.name not in self.float_names or output.name in self.single:
                continue
            renamed = f"{output.name}.float16"
            for node in self.nodes:
                node.input[:] = [renamed if name == output.name else name for name in node.input]
                node.output[:] = [renamed if name == output.name else name for name in node.output]
            self.nodes.append(
                helper.make_node("Cast", [renamed], [output.name], name=f"cast.{output.name}", to=TensorProto.FLOAT)
            )


def magnitudes(
    single: onnx.ModelProto, half: onnx.ModelProto, batches: Sequence[dict[str, NDArray[np.float32]]], scratch: Path
) -> list[Magnitude]:
    """Largest magnitudes on real inputs, largest first, of every tensor that the half graph holds in float16.

    Measured on the float32 graph: a CPU backend computes float16 operators in float32 and would hide an overflow.

    Args:
        single, half: the graph before and after `to_half`.
        batches: real inputs.
        scratch: a folder for a temporary graph.

    Raises:
        DualmatchError: a tensor is not finite in float32 already.
    """
    from dualmatch.runtime.backends import open_session

    inferred = onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True)
    # A tensor counts under its own name, and also where only a cast of it (`name.float16`) is half: casts overflow too.
    halves = {
        value.name.removesuffix(".float16") for value in half.graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }  # fmt: skip
    probed = onnx.ModelProto()
    probed.CopyFrom(inferred)
    operators = {name: node.op_type for node in inferred.graph.node for name in node.output}
    declared = {value.name for value in probed.graph.output}
    watched = [value for value in inferred.graph.value_info if value.name in halves & operators.keys() - declared]
    ends = [value.name for value in (*inferred.graph.input, *inferred.graph.output) if value.name in halves]
    probed.graph.output.extend(watched)
    path = scratch / "probe.onnx"
    onnx.save(probed, path)
    largest = dict.fromkeys((*ends, *(value.name for value in watched)), 0.0)
    try:
        with open_session(path) as session:
            for feeds in batches:
                for name, value in (feeds | session.run(feeds)).items():
                    if name in largest and value.size:
                        largest[name] = max(largest[name], float(np.abs(value).max()))
    finally:
        path.unlink()
    found = [
        Magnitude(tensor=name, operator=operators.get(name, "input"), largest=value) for name, value in largest.items()
    ]
    return sorted(found, key=lambda one: -one.largest)
