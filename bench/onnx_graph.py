"""As much of an ONNX graph as counting its work takes: nodes, edges, sizes of its weights. Read without an ONNX library.

`bench` runs where only a bundle is, and onnx comes with `export`. Field numbers are those of `onnx.proto`;
`tests/test_roofline.py` compares what is read here with what onnx reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dualmatch.runtime.errors import DualmatchError

# TensorProto.DataType: its name as onnxruntime's profiles spell it, and bytes of an element.
TYPES = {
    1: ("float", 4), 2: ("uint8", 1), 3: ("int8", 1), 4: ("uint16", 2), 5: ("int16", 2), 6: ("int32", 4), 7: ("int64", 8),
    9: ("bool", 1), 10: ("float16", 2), 11: ("double", 8), 12: ("uint32", 4), 13: ("uint64", 8), 16: ("bfloat16", 2),
}  # fmt: skip
FLOATS = frozenset(("float", "float16", "double", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator; an input left out has the name ""."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A constant of the graph."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """The main graph; bodies of loops and branches are not in it."""

    nodes: tuple[Node, ...]
    weights: dict[str, Weight]


def read_graph(data: bytes) -> OnnxGraph:
    """The main graph of a serialised model.

    Raises:
        DualmatchError: no ONNX model, or weights of a type that is not known here.
    """
    nodes: list[Node] = []
    weights: dict[str, Weight] = {}
    try:
        for graph in _all(memoryview(data), 7):
            weights.update(_weight(message) for message in _all(graph, 5))
            for message in _all(graph, 1):
                nodes.append(_node(message))
                if nodes[-1].operator == "Constant":  # its tensor is in an attribute
                    tensors = (tensor for attribute in _all(message, 5) for tensor in _all(attribute, 5))
                    weights.update((nodes[-1].outputs[0], _weight(tensor)[1]) for tensor in tensors)
    except (IndexError, ValueError, UnicodeDecodeError):
        raise DualmatchError("the operations of the graph cannot be counted: it is no ONNX model.") from None
    except KeyError as error:
        raise DualmatchError(
            f"the operations of the graph cannot be counted: it has weights of ONNX's type {error}."
        ) from None
    if not nodes:
        raise DualmatchError("the operations of the graph cannot be counted: it has no nodes.")
    return OnnxGraph(nodes=tuple(nodes), weights=weights)


def _node(message: memoryview) -> Node:
    inputs, outputs = _texts(message, 1), _texts(message, 2)
    return Node(name="".join(_texts(message, 3)), operator="".join(_texts(message, 4)), inputs=inputs, outputs=outputs)


def _weight(message: memoryview) -> tuple[str, Weight]:
    shape: list[int] = []
    for number, value in _fields(message):
        if number == 1:  # dims, each by itself or packed
            shape += [value] if isinstance(value, int) else list(_varints(value))
    (kind,) = (value for number, value in _fields(message) if number == 2)
    assert isinstance(kind, int)
    dtype, size = TYPES[kind]
    return "".join(_texts(message, 8)), Weight(dtype=dtype, shape=tuple(shape), num_bytes=prod(shape) * size)


def _all(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, value in _fields(message):
        if number == wanted and not isinstance(value, int):
            yield value


def _texts(message: memoryview, wanted: int) -> tuple[str, ...]:
    return tuple(bytes(value).decode() for value in _all(message, wanted))


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every varint and every length-delimited field of a message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
        elif wire == 2:
            length, position = _varint(data, position)
            if length > len(data) - position:
                raise ValueError
            yield tag >> 3, data[position : position + length]
            position += length
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise ValueError


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
