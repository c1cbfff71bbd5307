"""Which files a graph asks for, found by our own walk over its bytes: wherever onnx allows a tensor, and whatever the bytes are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.onnx_files import CHILDREN, external_files

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def external(location, name="w"):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def plain(name="w"):
    return numpy_helper.from_array(np.zeros(1, np.float32), name)


def model(nodes=(), initializers=(), **others):
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(list(nodes), "g", [], [y], list(initializers), **others)
    return helper.make_model(graph)


def constant(tensor):
    return helper.make_node("Constant", [], ["y"], value=tensor)


def in_subgraph(tensor):
    then = helper.make_graph([constant(tensor)], "then", [], [helper.make_tensor_value_info("y", 1, [1])])
    return helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then)


def sparse(tensor):
    return helper.make_sparse_tensor(tensor, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [4])


def with_function(tensor):
    made = model()
    made.functions.append(helper.make_function("d", "F", [], ["y"], [constant(tensor)], []))
    return made


def with_function_default(tensor):
    made = with_function(plain())
    made.functions[0].attribute_proto.append(helper.make_attribute("value", tensor))
    return made


def with_training(tensor):
    made = model()
    made.training_info.add().initialization.CopyFrom(helper.make_graph([constant(tensor)], "t", [], []))
    return made


PLACES = {
    "initializer": lambda t: model(initializers=[t]),
    "constant": lambda t: model([constant(t)]),
    "list of tensors": lambda t: model([helper.make_node("X", [], ["y"], domain="d", values=[plain(), t])]),
    "subgraph": lambda t: model([in_subgraph(t)]),
    "list of graphs": lambda t: model([helper.make_node("X", [], ["y"], domain="d", graphs=[model([constant(t)]).graph])]),
    "sparse initializer": lambda t: model(sparse_initializer=[sparse(t)]),
    "sparse attribute": lambda t: model([helper.make_node("Constant", [], ["y"], sparse_value=sparse(t))]),
    "function": with_function,
    "function's default": with_function_default,
    "training": with_training,
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_wherever_onnx_allows_a_tensor(place):
    assert external_files(PLACES[place](external("weights.bin")).SerializeToString(), "g") == {"weights.bin"}
    assert external_files(PLACES[place](plain()).SerializeToString(), "g") == set()


def test_the_table_of_messages_follows_every_path_of_onnx_to_a_tensor_or_a_node():
    """Else a release of onnx could add a place for tensors that the walk does not know."""
    wanted, queue, table = {"TensorProto", "NodeProto"}, [onnx.ModelProto.DESCRIPTOR], {}
    descriptors = {}
    while queue:
        descriptor = queue.pop()
        if descriptor.name not in descriptors:
            descriptors[descriptor.name] = descriptor
            queue += [f.message_type for f in descriptor.fields if f.message_type]

    def leads(name, seen=()):
        if name in wanted:
            return True
        inner = [f.message_type.name for f in descriptors[name].fields if f.message_type]
        return any(one not in seen and leads(one, (*seen, one)) for one in inner)

    for name, descriptor in descriptors.items():
        found = {
            f.number: f.message_type.name for f in descriptor.fields if f.message_type and leads(f.message_type.name)
        }
        if found:
            table[name] = found
    table["TensorProto"] = {
        onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"].number: "StringStringEntryProto"
    }
    assert {name: children for name, children in CHILDREN.items() if children} == table


def test_a_second_graph_in_the_same_file_is_walked_too():
    """Parsers merge them."""
    both = (
        model(initializers=[external("a")]).SerializeToString()
        + model(initializers=[external("b")]).SerializeToString()
    )
    assert external_files(both, "g") == {"a", "b"}


def test_a_location_that_stands_there_twice_is_found_twice():
    def field(number, data):
        return bytes([number << 3 | 2, len(data)]) + data

    entry = field(1, b"x") + field(1, b"location") + field(2, b"first") + field(2, b"second")
    data = field(7, field(5, field(13, entry)))
    assert external_files(data, "g") == {"first", "second"}
    with pytest.raises(DualmatchError, match="without naming it"):
        external_files(field(7, field(5, field(13, field(1, b"location")))), "g")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"not a graph at all", b"\x3a", b"\x3a\x05\x0a", b"\xff" * 20, b"\x3b\x3c", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"],
    ids=["empty", "zero", "text", "cut at the length", "cut inside", "long varint", "group", "impossible length"],
)  # fmt: skip
def test_what_is_no_graph(data):
    with pytest.raises(DualmatchError, match="is not an ONNX graph"):
        external_files(data, "g")


def test_onnxruntimes_own_format_and_operators_that_open_files():
    with pytest.raises(DualmatchError, match="own format"):
        external_files(b"\x20\0\0\0ORTM" + b"\0" * 40, "g")
    node = helper.make_node(
        "EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="/etc/passwd", embed_mode=0
    )
    with pytest.raises(DualmatchError, match="EPContext"):
        external_files(model([node]).SerializeToString(), "g")


def test_graphs_within_graphs_without_end():
    def field(number, data):
        size, length = bytearray(), len(data)
        while length >= 0x80:
            size.append(length & 0x7F | 0x80)
            length >>= 7
        return bytes([number << 3 | 2, *size, length]) + data

    data = b""
    for _ in range(200):
        data = field(1, field(5, field(6, data)))
    with pytest.raises(DualmatchError, match="deeper"):
        external_files(field(7, data), "g")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_walked_or_refused(data):
    try:
        external_files(data, "g")
    except DualmatchError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_onnx_reads_with_external_data_the_walk_sees_too(data):
    """Damaged graphs: whatever onnx itself still reads as one with external data, the walk reports or refuses."""
    raw = bytearray(PLACES[data.draw(st.sampled_from(sorted(PLACES)))](external("weights.bin")).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = onnx.ModelProto.FromString(bytes(raw))
    except Exception:  # noqa: BLE001
        return
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    wanted = {
        entry.value.decode("utf-8", "backslashreplace") if isinstance(entry.value, bytes) else entry.value
        for tensor in _get_all_tensors(read)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    try:
        found = external_files(bytes(raw), "g")
    except DualmatchError:
        return
    assert wanted <= found
