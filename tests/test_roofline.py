"""Operations and bytes of a graph against formulas by hand and torch's own counter; roofs, percentages and the picture."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from dualmatch.bench import roofs as roofs_module
from dualmatch.bench.case import Bench, Case
from dualmatch.bench.onnx_graph import read_graph
from dualmatch.bench.operations import Event, Work, count_work, others, products
from dualmatch.bench.roofline import Roofline, picture, roofs_line
from dualmatch.bench.roofs import MIB, Roofs, array_bytes, copy_rate, gemm_graph, gemm_rate
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError

from .demo_fixture import dualmatch

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

F, H, I8 = np.float32, np.float16, np.int8


def model(nodes, inputs, output, weights=(), kind=TensorProto.FLOAT):
    """Bytes of a graph; inputs as name=shape, weights as name=array."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(output, kind, None)],
        [numpy_helper.from_array(value, name) for name, value in dict(weights).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def node(operator, inputs, output, **attributes):
    return helper.make_node(operator, inputs.split(), [output], name=f"node_{output}", **attributes)


def counted(nodes, inputs, weights, output="y", *, kind=TensorProto.FLOAT, dtype=F, feeds=None):
    given = feeds or {name: np.ones(shape, dtype) for name, shape in inputs.items()}
    return count_work(model(nodes, inputs, output, weights, kind), given, threads=1)


# Reading graphs


def test_a_graph_is_read_as_onnx_reads_it(exported) -> None:
    for name in ("image-both-k2", "text-gru-masked", "text-bert-masked"):
        wanted = exported(name).model.graph
        graph = read_graph(exported(name).model.SerializeToString())
        assert [(n.name, n.operator, n.inputs, n.outputs) for n in graph.nodes] == [
            (n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in wanted.node
        ]
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in wanted.initializer}
        assert {name: (w.shape, w.num_bytes) for name, w in graph.weights.items()} == {
            name: (array.shape, array.nbytes) for name, array in arrays.items()
        }


@pytest.mark.parametrize("data", [b"", b"no model", b"\xff" * 40, b"\x3a\x7f"])
def test_what_is_no_graph_is_refused(data) -> None:
    with pytest.raises(DualmatchError, match="cannot be counted"):
        read_graph(data)


# Operations, by hand


def test_a_linear_layer() -> None:
    weights = {"w": np.ones((5, 7), F), "b": np.ones(7, F)}
    work = counted([node("MatMul", "x w", "p"), node("Add", "p b", "y")], {"x": (2, 3, 5)}, weights)
    assert work.matrix == 2 * 2 * 3 * 5 * 7
    assert work.other == 2 * 3 * 7
    assert work.weight_bytes == 4 * (5 * 7 + 7)
    assert work.boundary_bytes == 4 * 2 * 3 * (5 + 7)
    assert work.least_bytes == work.weight_bytes + work.boundary_bytes
    product = 2 * 3 * 7
    assert work.unfused_bytes == 4 * ((30 + 35 + product) + (product + 7 + product))  # the sum goes to memory and back


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_a_bias_either_way_round(transposed) -> None:
    shape = (7, 5) if transposed else (5, 7)
    weights = {"w": np.ones(shape, F), "b": np.ones(7, F)}
    work = counted([node("Gemm", "x w b", "y", transB=transposed)], {"x": (3, 5)}, weights)
    assert (work.matrix, work.other) == (2 * 3 * 5 * 7, 3 * 7)


def test_attention_of_two_heads() -> None:
    B, H_, L, D = 2, 2, 5, 4
    nodes = [
        node("Transpose", "x", "t", perm=[0, 1, 3, 2]),
        node("MatMul", "x t", "s"),
        node("Softmax", "s", "a", axis=-1),
        node("MatMul", "a x", "y"),
    ]
    work = counted(nodes, {"x": (B, H_, L, D)}, {})
    assert work.matrix == 2 * (2 * B * H_ * L * L * D)
    assert work.other == 5 * B * H_ * L * L
    assert work.weight_bytes == 0


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_with_groups_and_stride(groups) -> None:
    weights = {"w": np.ones((8, 4 // groups, 3, 3), F), "b": np.ones(8, F)}
    convolution = node("Conv", "x w b", "y", group=groups, strides=[2, 2], pads=[1, 1, 1, 1])
    work = counted([convolution], {"x": (2, 4, 9, 9)}, weights)
    written = 2 * 8 * 5 * 5
    assert (work.matrix, work.other) == (2 * written * (4 // groups) * 9, written)


@pytest.mark.parametrize(("operator", "gates"), [("GRU", 3), ("LSTM", 4)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers(operator, gates, directions) -> None:
    steps, batch, size, units = 6, 2, 3, 5
    weights = {
        "w": np.ones((directions, gates * units, size), F),
        "r": np.ones((directions, gates * units, units), F),
        "b": np.ones((directions, 2 * gates * units), F),
    }
    direction = "bidirectional" if directions == 2 else "forward"
    work = counted(
        [node(operator, "x w r b", "y", hidden_size=units, direction=direction)], {"x": (steps, batch, size)}, weights
    )
    assert work.matrix == 2 * steps * batch * directions * gates * units * (size + units)
    assert work.weight_bytes == sum(weight.nbytes for weight in weights.values())


def test_of_a_table_only_the_rows_that_are_looked_up_count() -> None:
    feeds = {"x": np.zeros((2, 3), np.int64)}
    graph = helper.make_graph(
        [node("Gather", "t x", "y")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((1000, 8), F), "t")],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    work = count_work(data, feeds, threads=1)
    assert (work.matrix, work.other, work.weight_bytes) == (0, 0, 4 * 2 * 3 * 8)


def test_a_weight_used_twice_moves_once_and_what_weights_alone_decide_is_free() -> None:
    w = np.ones((4, 4), F)
    nodes = [
        node("Sqrt", "w", "root"),  # known when the graph is loaded
        node("MatMul", "x root", "a"),
        node("MatMul", "a w", "y"),
    ]
    work = counted(nodes, {"x": (3, 4)}, {"w": w})
    assert (work.matrix, work.other) == (2 * 2 * 3 * 4 * 4, 0)
    assert work.weight_bytes == w.nbytes


def test_products_of_dequantised_factors_are_products_of_integers() -> None:
    weights = {"w": np.ones((4, 6), I8), "s": F(0.5), "z": I8(0), "v": np.ones((6, 2), F)}
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "w s z", "dw"),
        node("MatMul", "d dw", "p"),
        node("MatMul", "p v", "y"),
    ]
    work = counted(nodes, {"x": (3, 4)}, weights)
    assert work.matrix_int8 == 2 * 3 * 4 * 6
    assert work.matrix == work.matrix_int8 + 2 * 3 * 6 * 2
    assert work.weight_bytes == 4 * 6 + 4 + 1 + 4 * 6 * 2  # 8-bit weights are read as such
    assert work.in_float32().matrix_int8 == 0
    assert work.in_float32().weight_bytes >= 4 * (4 * 6 + 6 * 2)


def test_a_float16_graph_does_the_same_work_with_half_the_weights() -> None:
    works = []
    for dtype, kind in ((F, TensorProto.FLOAT), (H, TensorProto.FLOAT16)):
        nodes = [node("MatMul", "x w", "p"), node("Relu", "p", "y")]
        works.append(counted(nodes, {"x": (3, 4)}, {"w": np.ones((4, 6), dtype)}, kind=kind, dtype=dtype))
    single, half = works
    assert (single.matrix, single.other) == (half.matrix, half.other)  # onnxruntime's own casts are not the graph's
    assert half.weight_bytes * 2 == single.weight_bytes == half.in_float32().weight_bytes


def test_an_operator_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(DualmatchError, match="how many Einsum takes is not known"):
        counted([node("Einsum", "x w", "y", equation="ij,jk->ik")], {"x": (3, 4)}, {"w": np.ones((4, 5), F)})
    with pytest.raises(DualmatchError, match="cannot be counted"):
        count_work(b"no graph", {}, threads=1)


def test_integer_operators_are_counted_from_their_own_inputs() -> None:
    tensor = ("uint8", ())
    product = Event("", "QLinearMatMul", (("uint8", (3, 4)), tensor, tensor, ("int8", (4, 5))), (("uint8", (3, 5)),))
    assert products(product) == 2 * 3 * 4 * 5
    kernel = (("uint8", (1, 2, 8, 8)), tensor, tensor, ("int8", (6, 2, 3, 3)))
    assert products(Event("", "QLinearConv", kernel, (("uint8", (1, 6, 6, 6)),))) == 2 * 6 * 36 * 18
    assert others(Event("", "ReduceSum", (("float", (3, 4)),), (("float", (3,)),))) == 12


# Operations, by torch's own counter


@pytest.mark.parametrize(
    "name", ["image-both-k2", "image-both-no-jsr", "image-lite0-k1", "image-grid-and-files-k1", "text-bert-masked"]
)
def test_products_are_what_torch_counts(name, exported) -> None:
    """torch counts matmuls and convolutions of the eager network; it does not know GRUs, which the formulas above cover."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    found = exported(name)
    feeds = found.feeds(3, 6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found.encoder(**{key: torch.from_numpy(value) for key, value in feeds.items()})
    wanted = counter.get_total_flops()
    position = getattr(getattr(found.encoder, "regions", None), "position", None)
    if isinstance(position, torch.nn.Linear):  # of a pyramid's boxes, always the same: the graph has its result
        wanted -= 2 * found.encoder.regions.geometry.numel() * position.out_features
    assert count_work(found.path, feeds, threads=1).matrix == wanted


def test_work_grows_with_the_batch_and_weights_do_not(exported) -> None:
    found = exported("text-gru-masked")
    one, four = (count_work(found.path, found.feeds(n, 6), threads=1) for n in (1, 4))
    assert four.matrix > 2 * one.matrix
    assert four.boundary_bytes == 4 * one.boundary_bytes


# Roofs


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_the_product_that_is_measured_is_the_product(dtype) -> None:
    generator = np.random.default_rng(0)
    right = generator.integers(-64, 64, (16, 16)).astype(dtype)
    left = generator.integers(0, 200, (16, 16)).astype(np.float32 if dtype == np.float32 else np.uint8)
    data = gemm_graph(right)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    with open_session(data, backend="onnxruntime", threads=1) as session:
        (found,) = session.run({"x": left}).values()
    assert np.array_equal(found, left.astype(np.int64) @ right.astype(np.int64))


def test_roofs_are_measured() -> None:
    for dtype in (np.float32, np.uint8):
        assert 1e7 < gemm_rate(dtype, 1, sizes=(128,), seconds=0.01) < 1e14
    assert 1e7 < copy_rate(8 * MIB, 2, seconds=0.01) < 1e13


def test_rates_are_operations_and_bytes_per_second(monkeypatch) -> None:
    monkeypatch.setattr(roofs_module, "_fastest", lambda action, seconds: 0.5)
    assert gemm_rate(np.float32, 1, sizes=(64, 32)) == 2 * 64**3 / 0.5
    assert copy_rate(8 * MIB, 1) == 2 * 8 * MIB / 0.5


def test_the_copied_array_is_as_large_as_the_last_cache(tmp_path) -> None:
    assert array_bytes(tmp_path) == 64 * MIB
    for number, size in enumerate(("48K", "2048K", "266240K")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert array_bytes(tmp_path) == 260 * MIB


# The roofline

ROOFS = Roofs(threads=1, gemm={"float32": 100e9, "int8": 400e9}, copy=10e9, array_bytes=MIB)


def roofline(matrix, least, seconds, matrix_int8=0):
    work = Work(
        matrix=matrix, matrix_int8=matrix_int8, other=0, weight_bytes=least, weight_bytes_float32=least, boundary_bytes=0,
        unfused_bytes=least,
    )  # fmt: skip
    return Roofline(work=work, roofs=ROOFS, seconds=seconds)


def test_percentages_of_the_roofs() -> None:
    found = roofline(matrix=10**9, least=10**7, seconds=0.02)
    assert found.gemm_percent == pytest.approx(50)  # 0.01 s of GEMM in 0.02
    assert found.copy_percent == pytest.approx(5)  # 0.001 s of copying
    assert (found.bound, found.intensity, found.rate) == ("gemm", 100, 5e10)
    assert roofline(matrix=10**6, least=10**7, seconds=0.02).bound == "copy"
    mixed = roofline(matrix=10**9, least=10**7, seconds=0.02, matrix_int8=8 * 10**8)
    assert mixed.gemm_percent == pytest.approx(100 * (0.002 + 0.002) / 0.02)  # each part by the roof of its type


def test_the_roofline_picture_shows_every_point_below_its_roof_and_its_numbers() -> None:
    points = [("fp32 <a>, batch 1", roofline(10**9, 10**7, 0.02)), ("int8", roofline(10**9, 10**7, 0.01, 10**9))]
    root = ET.fromstring(picture("image <encoder>", ROOFS, points))
    space = {"svg": "http://www.w3.org/2000/svg"}
    description = root.find("svg:desc", space).text
    assert root.find("svg:title", space).text == "image <encoder>"
    assert "fp32 <a>, batch 1: 50 G operations/s, 50 % of GEMM, 5 % of copy" in description
    assert "float32 GEMM 100 G operations/s" in description
    circles = [one for one in root.iter("{http://www.w3.org/2000/svg}circle") if "tone6" not in one.get("class")]
    y = [float(circle.get("cy")) for circle in circles]
    assert y[1] < y[0]  # twice the rate is further up
    roofs = [line.get("points").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    flat = [float(corners[-1].split(",")[1]) for corners in roofs]
    assert flat[1] < flat[0] < y[0]  # int8 above float32 above the point at half of it


def test_the_roofs_in_words() -> None:
    assert "with 1 thread: float32 GEMM 100 G operations/s, int8 GEMM 400" in roofs_line(ROOFS)


# The commands


def test_compare_holds_each_variant_on_the_cpu_against_the_roofs(small_bundle, tmp_path) -> None:
    finished = dualmatch(
        *("bench", "compare", small_bundle, "--backends", "onnxruntime,null", "--threads", "1", "--encoders", "text"),
        *("--batch-sizes", "2,4", "--budget", "0.2", "--out", tmp_path / "report.json", "--pictures", tmp_path),
    )
    assert finished.code == 0, finished.err
    assert "Roofs measured in this run with 1 thread: float32 GEMM" in finished.out.replace("\n", " ")
    report = json.loads((tmp_path / "report.json").read_text())
    roofs = report["roofs"]
    cases = {(case["label"].split()[1], case["batch"]): case for case in report["cases"]}
    assert cases["null", 2]["roofline"] is None
    for batch in (2, 4):
        found = cases["onnxruntime", batch]
        work = Bench(Case(bundle=small_bundle, encoder="text", threads=1, batch=batch)).work()
        assert found["roofline"]["operations"]["matrix"] == work.matrix
        assert found["roofline"]["bytes"] == {"least": work.least_bytes, "unfused": work.unfused_bytes}
        seconds = found["request_latency"]["p50"] / 1e3
        assert found["roofline"]["percent"]["gemm"] == pytest.approx(
            100 * work.matrix / seconds / roofs["gemm"]["float32"]["avg"]
        )
        assert found["roofline"]["percent"]["copy"] == pytest.approx(
            100 * work.least_bytes / seconds / roofs["copy"]["avg"]
        )
    drawn = (tmp_path / "roofline-text.svg").read_text()
    assert "onnxruntime, batch 2" in drawn
    assert "null" not in drawn


def test_bench_latency_has_a_roofline_where_it_is_asked_for(small_bundle, tmp_path) -> None:
    options = ("--threads", "1", "--batch-sizes", "1", "--budget", "0.2", "--no-stages")
    finished = dualmatch("bench", "latency", small_bundle, *options, "--roofline", "--out", tmp_path / "report.json")
    assert finished.code == 0, finished.err
    assert "Roofline" in finished.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [case["roofline"]["operations"]["matrix"] > 0 for case in report["cases"]] == [True, True]
    assert report["roofs"]["threads"] == 1
    for line in (("--rate", "50"), ("--backend", "null")):
        refused = dualmatch("bench", "latency", small_bundle, *options, "--roofline", *line)
        assert refused.code == 1
        assert "a roofline is of single calls on the CPU" in refused.err


def test_torch_is_held_against_float32_whatever_the_bundle_is(small_bundle) -> None:
    from dualmatch.bench.case import work_of_backend

    work = Bench(Case(bundle=small_bundle, encoder="text", threads=1)).work()
    assert work_of_backend("onnxruntime+throttled", work) == work
    assert work_of_backend("torch-eager", work) == work.in_float32()
    assert work_of_backend("tensorrt", work) is None
