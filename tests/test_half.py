"""Graphs rewritten to float16: the type of every tensor, the values in honest half arithmetic, overflow, and that TensorRT builds them."""

import importlib.util
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dualmatch.export.engine import build_engine
from dualmatch.export.engine_profiles import AxisRange, profile_from_text
from dualmatch.export.graph import specs
from dualmatch.export.half import HALF_MAX, magnitudes, to_half
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError

from .tiny_models import EXPORTED

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed, so no half graph was built as an engine: pip install 'dualmatch[tensorrt-rtx]'",
)

ISLANDS = {"Softmax", "LayerNormalization", "BatchNormalization", "Pow", "ReduceSum", "ReduceMean", "Sqrt", "Div"}
HALVES = {"Conv", "MatMul", "Gemm", "GRU", "Gelu", "Relu", "Sigmoid"}
SHAPES_ONLY = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Identity"}
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}


@pytest.fixture(scope="module")
def half_of(exported, tmp_path_factory):
    """`half_of(name)`: the exported graph, its half model and the file that holds it."""
    folder = tmp_path_factory.mktemp("half")

    @cache
    def make(name):
        graph = exported(name)
        half = to_half(graph.model)
        path = folder / f"{name}.onnx"
        onnx.save(half, path)
        return graph, half, path

    return make


def types_of(model):
    """The element type of every tensor."""
    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return types | {
        value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)
    }


def run(path, feeds):
    with open_session(path) as session:
        (result,) = session.run(feeds).values()
    return result


def cosines(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("name", EXPORTED)
def test_inputs_and_output_are_those_of_the_float32_graph(name, half_of):
    graph, half, _ = half_of(name)
    assert specs(half.graph.input) == specs(graph.model.graph.input)
    assert specs(half.graph.output) == specs(graph.model.graph.output)
    assert {spec.dtype for spec in specs(half.graph.input)} <= {"float32", "int64"}
    assert {spec.dtype for spec in specs(half.graph.output)} == {"float32"}


@pytest.mark.parametrize("name", EXPORTED)
def test_islands_are_float32_and_all_products_float16(name, half_of):
    graph, half, _ = half_of(name)
    types = types_of(half)
    counted = {"islands": 0, "halves": 0}
    for node in half.graph.node:
        floats = {types[tensor] for tensor in (*node.input, *node.output) if types.get(tensor) in FLOATS}
        if node.op_type in ISLANDS:
            assert floats == {TensorProto.FLOAT}, node
            counted["islands"] += 1
        elif node.op_type in HALVES:
            assert floats == {TensorProto.FLOAT16}, node
            counted["halves"] += 1
        elif node.op_type != "Cast":
            assert len(floats) <= 1, node
    operators = [node.op_type for node in graph.model.graph.node]
    assert counted["islands"] == sum(operator in ISLANDS for operator in operators) >= 4
    assert counted["halves"] == sum(operator in HALVES for operator in operators) > 0


@pytest.mark.parametrize("name", EXPORTED)
def test_no_value_goes_through_float16_inside_an_island(name, half_of):
    """Upwards from each cast to float32, past what only moves values, there is no cast down: not between islands, not within one."""
    graph, half, _ = half_of(name)
    maker = {tensor: node for node in half.graph.node for tensor in node.output}
    types = types_of(half)
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    for cast in casts:
        assert types[cast.input[0]] != types[cast.output[0]]
        source = maker.get(cast.input[0])
        while source is not None and source.op_type in SHAPES_ONLY:
            source = maker.get(source.input[0])
        assert source is None or source.op_type != "Cast" or types[source.input[0]] not in FLOATS, cast
    made = [(cast.input[0], cast.attribute[0].i) for cast in casts]
    assert len(made) == len(set(made))
    # The embedding's normalisation, from the mean or fused vector to the output, is one island: nothing is cast from its root on.
    last = maker[graph.model.graph.output[0].name]
    chain = []
    while last.op_type != "Pow":
        chain.append(last.op_type)
        last = maker[last.input[1] if last.op_type == "Div" else last.input[0]]
    assert chain in (["Div", "Sqrt", "Clip", "ReduceSum"], ["Div", "Sqrt", "ReduceSum"])


@pytest.mark.parametrize("name", EXPORTED)
def test_half_embeddings_point_where_the_float32_ones_do(name, half_of):
    graph, _, path = half_of(name)
    for length in (2, 17):
        feeds = graph.feeds(7, length, seed=5)
        single, half = run(graph.path, feeds), run(path, feeds)
        assert half.dtype == np.float32
        assert np.isfinite(half).all()
        # Sixteen blocks of random convolutions lose more than trained ones.
        assert cosines(single, half).min() > (0.9995 if "lite0" in name else 0.9999)
        assert np.abs(single - half).max() > 0  # it is another precision
        np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["image-both-k2", "image-files-k2", "text-bert-masked", "text-gru-masked"])
def test_half_embeddings_hold_in_honest_half_arithmetic(name, half_of):
    """onnxruntime's CPU computes float16 in float32; onnx's reference rounds after every step, as a GPU does."""
    graph, half, _ = half_of(name)
    feeds = graph.feeds(3, 9, seed=5)
    (honest,) = ReferenceEvaluator(half).run(None, feeds)
    assert honest.dtype == np.float32
    assert cosines(run(graph.path, feeds), honest).min() > 0.9999


def test_the_file_is_half_as_large(half_of):
    graph, _, path = half_of("image-lite0-k1")
    assert graph.path.stat().st_size > 10_000_000
    assert 0.48 < path.stat().st_size / graph.path.stat().st_size < 0.53


# Small graphs with a fault planted.


def model_of(nodes, width, weights=(), out_width=None):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width if out_width is None else out_width])
    tensors = [numpy_helper.from_array(value, name) for name, value in weights]
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normalising_model(scale):
    """x -> x @ (scale * identity) -> l2norm, as the exporter writes it."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["v"]),
        helper.make_node("Pow", ["v", "two"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "axis"], ["sum"], keepdims=1),
        helper.make_node("Clip", ["sum", "least"], ["clipped"]),
        helper.make_node("Sqrt", ["clipped"], ["norm"]),
        helper.make_node("Div", ["v", "norm"], ["y"]),
    ]
    weights = [
        ("weight", np.eye(4, dtype=np.float32) * np.float32(scale)),
        ("two", np.array(2, np.float32)),
        ("axis", np.array([-1])),
        ("least", np.array(1e-24, np.float32)),
    ]
    return model_of(nodes, 4, weights)


@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-4])
def test_a_norm_whose_squares_leave_float16_stays_right(scale):
    half = to_half(normalising_model(scale))
    x = np.array([[1, 2, 3, 4], [-4, 0, 0.5, 1], [0, 0, 0, 0]], np.float32)
    (y,) = ReferenceEvaluator(half).run(None, {"x": x})
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    assert (scale * norms[0, 0]) ** 2 > HALF_MAX or scale <= 1
    np.testing.assert_allclose(y, x / np.maximum(norms, 1e-6), rtol=0, atol=1e-3)


def test_that_norm_would_fail_if_its_squares_were_float16():
    """The check above sees what it is for: squares in half precision overflow."""
    half = to_half(normalising_model(1e4))
    for node in half.graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT and node.input[0] == "v":
            node.attribute[0].i = TensorProto.FLOAT16
    for tensor in half.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            with np.errstate(all="ignore"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    del half.graph.value_info[:]
    with np.errstate(all="ignore"):
        (y,) = ReferenceEvaluator(half).run(None, {"x": np.array([[1, 2, 3, 4]], np.float32)})
    assert not np.abs(y).max() > 0.5


@pytest.mark.parametrize("value", [7e4, -7e4, float("inf"), float("nan")])
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(value):
    weight = np.eye(4, dtype=np.float32)
    weight[1, 2] = value
    model = model_of([helper.make_node("MatMul", ["x", "the_large_one"], ["y"])], 4, [("the_large_one", weight)])
    with pytest.raises(DualmatchError, match=r"weight 'the_large_one' .* float16's 65504; export with --fp32"):
        to_half(model)


def test_a_large_weight_of_a_float32_island_is_no_reason_to_refuse():
    names = ("scale", "shift", "mean", "variance")
    node = helper.make_node("BatchNormalization", ["x", *names], ["y"])
    weights = [(name, np.full(4, 1e6, np.float32)) for name in names]
    half = to_half(model_of([node], 4, weights))
    x = np.ones((2, 4), np.float32)
    (y,), (wanted,) = (ReferenceEvaluator(m).run(None, {"x": x}) for m in (half, model_of([node], 4, weights)))
    np.testing.assert_allclose(y, wanted, rtol=1e-6)


def test_a_graph_with_a_subgraph_or_a_constant_node_is_refused():
    constant = helper.make_node("Constant", [], ["two"], name="c", value=numpy_helper.from_array(np.float32(2)))
    with pytest.raises(DualmatchError, match="expects constants as initialisers, found the node 'c'"):
        to_half(model_of([constant, helper.make_node("Mul", ["x", "two"], ["y"])], 4))
    value = helper.make_tensor_value_info("branch", TensorProto.FLOAT, ["batch", 4])
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["branch"])], "branch", [], [value])
    switch = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(DualmatchError, match="takes flat graphs"):
        to_half(model_of([switch], 4, [("yes", np.array(True))]))


# Magnitudes.


def test_magnitudes_find_a_tensor_that_overflows(tmp_path):
    model = normalising_model(1e4)
    found = magnitudes(model, to_half(model), [{"x": np.array([[1, -9, 2, 3]], np.float32)}], tmp_path)
    assert [(one.tensor, one.operator) for one in found] == [("v", "MatMul"), ("x", "input")]
    assert found[0].largest == pytest.approx(9e4)
    assert found[0].share == pytest.approx(9e4 / HALF_MAX)
    assert found[0].share > 1
    assert found[1].largest == 9
    assert list(tmp_path.iterdir()) == []


def test_magnitudes_find_an_overflow_in_the_cast_out_of_an_island(tmp_path):
    names = ("scale", "shift", "mean", "variance")
    nodes = [
        helper.make_node("BatchNormalization", ["x", *names], ["normalised"]),
        helper.make_node("MatMul", ["normalised", "weight"], ["y"]),
    ]
    weights = [("scale", np.full(4, 1e5, np.float32)), *((name, np.ones(4, np.float32)) for name in names[1:])]
    model = model_of(nodes, 4, [*weights, ("weight", np.eye(4, dtype=np.float32))])
    found = magnitudes(model, to_half(model), [{"x": np.full((1, 4), 3, np.float32)}], tmp_path)
    large = {one.tensor: one.largest for one in found if one.share > 1}
    assert large["normalised"] == pytest.approx(2e5, rel=1e-4)
    assert large["y"] == pytest.approx(2e5, rel=1e-4)


def test_magnitudes_of_a_network_are_its_own(half_of, tmp_path):
    graph, half, _ = half_of("image-both-k4")
    batches = [graph.feeds(2, seed=seed) for seed in range(3)]
    found = magnitudes(graph.model, half, batches, tmp_path)
    assert [one.largest for one in found] == sorted((one.largest for one in found), reverse=True)
    by_name = {one.tensor: one.largest for one in found}
    assert by_name["pixels"] == max(np.abs(batch["pixels"]).max() for batch in batches)
    types = types_of(half)
    operators = {node.op_type for node in graph.model.graph.node if types.get(node.output[0]) == TensorProto.FLOAT16}
    assert operators <= {one.operator for one in found}
    assert all(0 < one.share < 0.01 for one in found)


# Engines.


@rtx
@pytest.mark.parametrize("name", EXPORTED)
def test_every_half_graph_builds_as_a_strongly_typed_engine(name, half_of, tmp_path):
    _, half, path = half_of(name)
    inputs = specs(half.graph.input)
    profile = profile_from_text("1:4:16", inputs, length=AxisRange(1, 12, 40) if name.startswith("text") else None)
    record = build_engine(path, tmp_path / "e", flavour="tensorrt-rtx", inputs=inputs, profiles=[profile])
    assert record.strongly_typed
    assert record.bytes > 10_000
