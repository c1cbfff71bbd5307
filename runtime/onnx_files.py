"""What an ONNX graph's bytes say without any ONNX library: which other files it asks for, and what its dynamic axes are called.

The first is asked before a library gets to open one of those files.

The walk follows the protobuf wire format (https://protobuf.dev/programming-guides/encoding) through every path of `onnx.proto` that
leads to a tensor or a node, and steps over everything else by its length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import DualmatchError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# Message → number of a field → the message in it; `tests/test_onnx_files.py` compares this with the descriptors of onnx itself.
CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto", 22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "StringStringEntryProto": {},
}  # fmt: skip
OP_TYPE = 4
KEY, VALUE = 1, 2

# A node of this type names a compiled file that an execution provider opens by itself.
FOREIGN_OPERATORS = frozenset({b"EPContext"})
MAX_DEPTH = 64
MAX_FIELDS = 10_000_000


class _MalformedError(Exception):
    """The bytes are no protobuf, or not an ONNX model's."""


def external_files(data: bytes, name: str) -> set[str]:
    """The locations of all external data that the ONNX model `data` names, in tensors, attributes, subgraphs and functions alike.

    Args:
        name: what to call the graph in an error.

    Raises:
        DualmatchError: not an ONNX model, external data without a file, or an operator that opens files by itself.
    """
    if data[4:8] == b"ORTM":  # onnxruntime would take these bytes for its own format, in which nothing is walked here
        raise DualmatchError(f"{name} is not an ONNX graph but one in onnxruntime's own format; it is refused.")
    walk = _Walk(name)
    try:
        walk.message(memoryview(data), "ModelProto", 0)
    except _MalformedError as error:
        raise DualmatchError(f"{name} is not an ONNX graph: {error}.") from None
    if not walk.has_graph:
        raise DualmatchError(f"{name} is not an ONNX graph: it holds none.")
    return walk.locations


def axis_names(data: bytes) -> dict[str, tuple[str, ...]]:
    """For each input and output of a graph, the names of its axes; "" for one of a fixed size.

    Raises:
        DualmatchError: not an ONNX model.
    """
    walk = _Walk("the graph")

    def inside(message: memoryview, *path: int) -> Iterator[memoryview]:
        if not path:
            yield message
            return
        for number, value in walk.fields_of(message):
            if number == path[0]:
                yield from inside(value, *path[1:])

    def text(message: memoryview, number: int) -> str:
        return b"".join(map(bytes, inside(message, number))).decode("utf-8", "backslashreplace")

    try:
        return {
            text(value, 1): tuple(text(dim, 2) for dim in inside(value, 2, 1, 2, 1))  # type, tensor_type, shape, dim
            for graph in inside(memoryview(data), 7)
            for value in (*inside(graph, 11), *inside(graph, 12))
        }
    except _MalformedError as error:
        raise DualmatchError(f"the graph is not an ONNX graph: {error}.") from None


@dataclass
class _Walk:
    name: str
    locations: set[str] = field(default_factory=set)
    has_graph: bool = False
    fields: int = 0

    def message(self, data: memoryview, kind: str, depth: int) -> None:
        """Visit one message. Its occurrences are not merged as a parser would: each counts, so nothing hides behind a later one."""
        if depth > MAX_DEPTH:
            raise _MalformedError(f"it nests deeper than {MAX_DEPTH} levels")
        children = CHILDREN[kind]
        for number, value in self.fields_of(data):
            child = children.get(number)
            if child == "StringStringEntryProto":
                self._external(value)
            elif child is not None:
                self.has_graph |= child == "GraphProto"
                self.message(value, child, depth + 1)
            elif kind == "NodeProto" and number == OP_TYPE and bytes(value) in FOREIGN_OPERATORS:
                raise DualmatchError(
                    f"{self.name} has an operator {bytes(value).decode()}, which opens a file of its own; it is refused."
                )

    def _external(self, entry: memoryview) -> None:
        keys, values = [], []
        for number, value in self.fields_of(entry):
            if number == KEY:
                keys.append(bytes(value))
            elif number == VALUE:
                values.append(bytes(value))
        if b"location" not in keys:
            return
        if not values:
            raise DualmatchError(f"{self.name} keeps weights in another file without naming it; it is refused.")
        self.locations |= {value.decode("utf-8", "backslashreplace") for value in values}

    def fields_of(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """(number, bytes) of each length-delimited field; the others hold nothing that could name a file."""
        position, end = 0, len(data)
        while position < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise _MalformedError(f"it has more than {MAX_FIELDS} fields")
            tag, position = _varint(data, position, most_bytes=5)
            number, wire = tag >> 3, tag & 7
            if number == 0 or tag >= 1 << 32:
                raise _MalformedError("a field has an impossible number")
            if wire == VARINT:
                _, position = _varint(data, position, most_bytes=10)
            elif wire == BYTES:
                length, position = _varint(data, position, most_bytes=10)
                if length > end - position:
                    raise _MalformedError("a field is longer than what holds it")
                yield number, data[position : position + length]
                position += length
            elif wire in (FIXED32, FIXED64):
                position += 4 if wire == FIXED32 else 8
            else:  # groups, which ONNX never writes, and what is not defined
                raise _MalformedError(f"a field has the wire type {wire}")
        if position > end:
            raise _MalformedError("it is cut")


def _varint(data: memoryview, position: int, *, most_bytes: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * most_bytes, 7):
        if position >= len(data):
            raise _MalformedError("it is cut")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _MalformedError("a number is too long")
