"""The work in an ONNX graph, per call: operations, and the bytes that have to move.

The graph is run once, as it stands (onnxruntime with its optimisations off), and onnxruntime's profile tells the shape of every
tensor at every node: exact whatever the graph computes its shapes from. What depends on weights alone, such as the dequantisation
of a weight, is done once when a graph is loaded and is not counted.

- **matrix** operations: those of products and convolutions, a multiply-add being two. Only these are held against a GEMM.
- **other** operations: one for each element that an element-wise operator writes (`STEPS` for those made of several), one for each
  element that a reduction or a pooling reads, none for moving data.
- **least** bytes: every weight once in the type it is stored in (of a table only the rows that are looked up), inputs and outputs: what
  would cross memory if everything between were kept in registers and caches.
- **unfused** bytes: every operator reads its inputs from memory and writes its outputs there, in the types in which onnxruntime's CPU
  provider computes (float32 for a float16 graph). Views are free.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.errors import DualmatchError

from .onnx_graph import TYPES, Node, OnnxGraph, read_graph

RECURRENT = frozenset(("GRU", "LSTM", "RNN"))
INTEGER = frozenset(("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"))
UNCOUNTED = frozenset(("Attention", "ConvTranspose", "DeformConv", "Einsum", "MultiHeadAttention"))
"""Operators that hold products which are not counted here: a graph with one of them is refused, not counted short."""

VIEWS = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
MOVES = VIEWS | {
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "GatherElements", "GatherND", "If", "Loop", "Pad"),
    *("Range", "Scan", "ScatterElements", "ScatterND", "Shape", "Slice", "Split", "Tile", "Transpose"),
}  # fmt: skip
LOOK_UPS = frozenset(("Gather", "GatherElements", "GatherND"))
STEPS = {
    "BatchNormalization": 2, "DequantizeLinear": 2, "Gelu": 5, "HardSigmoid": 4, "HardSwish": 5, "LayerNormalization": 7,
    "LogSoftmax": 5, "QuantizeLinear": 4, "Softmax": 5,
}  # fmt: skip
SIZES = dict(TYPES.values())
INSERTED = (
    "InsertedPrecisionFreeCast"  # onnxruntime's own casts around operators that its CPU provider has in float32 only
)

Shape = tuple[int, ...]
Tensor = tuple[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of a graph takes, for the whole batch; see the module.

    Attributes:
        matrix: operations in products and convolutions, those on 8-bit integers among them.
        matrix_int8: of these, the ones whose two factors are 8-bit integers.
        other: operations of everything else.
        by_operator: both kinds, by ONNX operator.
        weight_bytes: of weights as stored, rows of tables only where looked up.
        weight_bytes_float32: the same had all of them been float32.
        boundary_bytes: the graph's inputs and outputs.
        unfused_bytes: with every operator reading from and writing to memory.
    """

    matrix: int
    matrix_int8: int
    other: int
    by_operator: Mapping[str, int] = field(default_factory=dict)
    weight_bytes: int
    weight_bytes_float32: int
    boundary_bytes: int
    unfused_bytes: int

    @property
    def least_bytes(self) -> int:
        """Weights once, inputs and outputs."""
        return self.weight_bytes + self.boundary_bytes

    def in_float32(self) -> "Work":
        """The same network computed in float32 from float32 weights, as torch runs it beside a bundle of another precision."""
        return replace(self, matrix_int8=0, weight_bytes=self.weight_bytes_float32)


@dataclass(frozen=True)
class Event:
    """One operator as it ran: tensors that were left out are not in `inputs`."""

    name: str
    operator: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def count_work(graph: bytes | Path, feeds: Mapping[str, Array], *, threads: int = 0) -> Work:
    """Count by running the graph once on `feeds`.

    Raises:
        DualmatchError: onnxruntime is not installed or cannot run the graph, or it has an operator of `UNCOUNTED`.
    """
    events, outputs = _run(graph, feeds, threads)
    boundary = sum(feed.nbytes for feed in feeds.values()) + outputs
    return work_of(read_graph(graph if isinstance(graph, bytes) else graph.read_bytes()), events, boundary)


def _run(graph: bytes | Path, feeds: Mapping[str, Array], threads: int) -> tuple[list[Event], int]:
    """What ran, in order, and the bytes of the outputs."""
    try:
        import onnxruntime
    except ImportError:
        raise DualmatchError(
            "counting a graph's operations needs onnxruntime, which is not installed: pip install 'dualmatch[bench]'."
        ) from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # a packed weight is not in the profile
    options.intra_op_num_threads, options.log_severity_level, options.enable_profiling = threads, 3, True
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "run")
        try:
            given = graph if isinstance(graph, bytes) else str(graph)
            session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
            results = session.run(None, dict(feeds))
        except Exception as error:  # noqa: BLE001  (onnxruntime raises exception types that it does not document)
            raise DualmatchError(f"the operations of the graph cannot be counted: {error}") from None
        profile = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [_event(entry) for entry in profile if str(entry["name"]).endswith("_kernel_time")], sum(
        result.nbytes for result in results
    )


def _event(entry: Mapping[str, Any]) -> Event:
    def tensors(key: str) -> tuple[Tensor, ...]:
        return tuple((dtype, tuple(shape)) for one in entry["args"][key] for dtype, shape in one.items())

    name = entry["name"].removesuffix("_kernel_time")
    return Event(name, entry["args"]["op_name"], tensors("input_type_shape"), tensors("output_type_shape"))


def work_of(graph: OnnxGraph, events: Sequence[Event], boundary_bytes: int) -> Work:
    """Add up what ran.

    Raises:
        DualmatchError: as `count_work`.
    """
    if unknown := sorted({event.operator for event in events} & UNCOUNTED):
        raise DualmatchError(
            f"the operations of the graph cannot be counted: how many {' and '.join(unknown)} takes is not known here."
        )
    origins = _origins(graph)
    nodes = {node.name: node for node in graph.nodes if node.name}
    integers = _integer_products(graph)
    counts: Counter[str] = Counter()
    matrix = matrix_int8 = unfused = rows = rows_float32 = 0
    used: set[str] = set()
    for event in events:
        # Nodes of loops' bodies are not in `nodes`: they are counted by what the profile says of them.
        node = nodes.get(event.name, Node(name="", operator="", inputs=(), outputs=()))
        if event.name.startswith(INSERTED) or (node.outputs and node.outputs[0] in origins):
            continue
        names = [name for name in node.inputs if name] or [""] * len(event.inputs)
        product = products(event)
        matrix += product
        if event.operator in INTEGER or node.name in integers:
            matrix_int8 += product
        counts[event.operator] += product + others(event)
        traffic = sum(map(_bytes, event.outputs))
        for position, (name, tensor) in enumerate(zip(names, event.inputs, strict=True)):
            if name not in origins:
                traffic += _bytes(tensor)
            elif event.operator in LOOK_UPS and position == 0:
                dtype = graph.weights[min(origins[name])].dtype
                found = prod(event.outputs[0][1])
                rows += found * SIZES[dtype]
                rows_float32 += found * (SIZES[dtype] if "64" in dtype else 4)
                traffic += found * SIZES[dtype]
            else:
                used |= origins[name]
                traffic += sum(graph.weights[origin].num_bytes for origin in origins[name])
        unfused += 0 if event.operator in VIEWS else traffic
    weights = [graph.weights[name] for name in used]
    return Work(
        matrix=matrix,
        matrix_int8=matrix_int8,
        other=counts.total() - matrix,
        by_operator={name: number for name, number in counts.most_common() if number},
        weight_bytes=rows + sum(weight.num_bytes for weight in weights),
        weight_bytes_float32=rows_float32 + sum(w.num_bytes if "64" in w.dtype else 4 * prod(w.shape) for w in weights),
        boundary_bytes=boundary_bytes,
        unfused_bytes=unfused,
    )


def products(event: Event) -> int:
    """Operations of the products in one operator, a multiply-add being two."""
    shapes = [shape for _, shape in event.inputs]
    written = prod(event.outputs[0][1]) if event.outputs else 0
    if event.operator in ("MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul"):
        return 2 * written * shapes[0][-1]
    if event.operator == "Gemm":
        rows = event.outputs[0][1][0]
        return 2 * written * prod(shapes[0]) // rows if rows else 0
    if event.operator in ("Conv", "ConvInteger"):
        return 2 * written * prod(shapes[1][1:])  # the kernel is (channels out, channels in of a group, …)
    if event.operator == "QLinearConv":
        return 2 * written * prod(shapes[3][1:])
    if event.operator in RECURRENT:
        (steps, batch, _), (directions, gates, inputs), recurrent = shapes[:3]
        return 2 * steps * batch * directions * gates * (inputs + recurrent[2])
    return 0


def others(event: Event) -> int:
    """Operations of one operator besides its products."""
    if event.operator in MOVES or not event.outputs:
        return 0
    if (
        event.operator in RECURRENT
    ):  # of each gate two biases, a sum and a function; then the state: three more for each of its units
        (steps, batch, _), (directions, gates, _), recurrent = (shape for _, shape in event.inputs[:3])
        return steps * batch * directions * (4 * gates + 3 * recurrent[2])
    if products(event):
        return prod(event.outputs[0][1]) if len(event.inputs) == 3 else 0  # the bias of a Gemm or a Conv
    if event.operator.startswith("Reduce") or event.operator.endswith("Pool"):
        return prod(event.inputs[0][1])
    return STEPS.get(event.operator, 1) * prod(event.outputs[0][1])


def _bytes(tensor: Tensor) -> int:
    return prod(tensor[1]) * SIZES.get(tensor[0], 0)


def _origins(graph: OnnxGraph) -> dict[str, set[str]]:
    """For each tensor that depends on weights alone, which weights."""
    origins = {name: {name} for name in graph.weights}
    for node in graph.nodes:
        inputs = [name for name in node.inputs if name]
        if inputs and all(name in origins for name in inputs):
            found = set[str]().union(*(origins[name] for name in inputs))
            origins |= {name: found for name in node.outputs if name}
    return origins


def _integer_products(graph: OnnxGraph) -> set[str]:
    """Names of the products both factors of which come from a `DequantizeLinear`: runtimes take them as 8-bit products."""
    makers = {output: node for node in graph.nodes for output in node.outputs}

    def dequantised(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.operator in VIEWS | {"Transpose", "Expand"}:
            node = makers.get(node.inputs[0])
        return node is not None and node.operator == "DequantizeLinear"

    return {
        node.name
        for node in graph.nodes
        if node.operator in ("Conv", "Gemm", "MatMul") and all(dequantised(name) for name in node.inputs[:2])
    }
