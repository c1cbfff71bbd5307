"""onnxruntime's GPU backends as far as a CPU carries: IO binding and node placement are really run, on onnxruntime's CPU device."""

import re
import shutil
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dualmatch.runtime import backends
from dualmatch.runtime.backends import BACKENDS, open_encoder, open_session
from dualmatch.runtime.backends.onnxruntime import PROVIDERS, BoundRun, OnnxruntimeSession, _reason, placement
from dualmatch.runtime.bundle import file_entry, load_bundle
from dualmatch.runtime.errors import DualmatchError

from .demo_fixture import edit_manifest

onnxruntime = pytest.importorskip("onnxruntime")
CPU = "CPUExecutionProvider"
ON_GPU = [backend for backend, provider in PROVIDERS.items() if provider != CPU]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Token ids (batch, length) times 2, and their sum over a table as a matrix product."""
    table = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "table")
    nodes = [
        helper.make_node("MatMul", ["x", "table"], ["product"]),
        helper.make_node("Add", ["ids", "ids"], ["twice"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"]),
    ]
    outputs = [
        helper.make_tensor_value_info("product", TensorProto.FLOAT, ["batch", 4]),
        helper.make_tensor_value_info("twice", TensorProto.INT64, ["batch", "length"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, [table]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    onnx.save(model, path)
    return path


def feeds(batch, length, seed=0):
    chance = np.random.default_rng(seed)
    return {"x": chance.random((batch, 3), np.float32), "ids": chance.integers(0, 9, (batch, length))}


def recorded(path):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=[CPU])


def test_a_bound_run_gives_what_a_plain_run_gives_at_every_shape(graph):
    session = recorded(graph)
    bound = BoundRun(session, "cpu")
    kept = []
    for turn, (batch, length) in enumerate([(2, 3), (2, 3), (5, 1), (2, 3), (1, 7)]):
        given = feeds(batch, length, seed=turn)
        wanted = session.run(None, given)
        got = bound.run(given)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        kept.append((got, [value.copy() for value in got]))
    for got, copies in kept:  # results are the caller's: no later run writes into them
        for one, other in zip(got, copies, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_bound_run_takes_arrays_that_are_not_contiguous(graph):
    session = recorded(graph)
    given = feeds(8, 6)
    given = {"x": np.asfortranarray(given["x"])[::2], "ids": given["ids"][::2]}
    for one, other in zip(BoundRun(session, "cpu").run(given), session.run(None, given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_session_binds_once_per_thread_when_it_has_a_device(graph):
    session = OnnxruntimeSession(graph)
    session._device = "cpu"
    plain = OnnxruntimeSession(graph)
    results, bindings = {}, set()

    def work(seed):
        for _ in range(3):
            results[seed] = session.run(feeds(seed + 1, 4, seed))
        bindings.add(session._own.bound)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bindings) == 4
    for seed, got in results.items():
        for name, value in plain.run(feeds(seed + 1, 4, seed)).items():
            np.testing.assert_array_equal(got[name], value)


def test_placement_is_read_back_from_onnxruntime(graph):
    session = recorded(graph)
    assert placement(session, CPU) == CPU
    with pytest.raises(
        DualmatchError, match=f"asked for CUDAExecutionProvider, but runs part of the graph elsewhere: MatMul on {CPU}"
    ):
        placement(session, "CUDAExecutionProvider")


def test_shape_arithmetic_elsewhere_is_told_and_not_refused():
    def part(provider, *operators):
        nodes = [SimpleNamespace(op_type=operator) for operator in operators]
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

    parts = [part("CUDAExecutionProvider", "MatMul", "Relu"), part(CPU, "Shape"), part(CPU, "Gather")]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert (
        placement(session, "CUDAExecutionProvider") == "CUDAExecutionProvider (2 of 4 nodes, of shapes only, elsewhere)"
    )
    with pytest.raises(DualmatchError, match="does not tell which provider runs which node"):
        placement(SimpleNamespace(), "CUDAExecutionProvider")


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_provider_that_is_not_there_is_refused_with_those_that_are(backend, graph):
    assert backend in BACKENDS
    assert PROVIDERS[backend] in onnxruntime.get_all_providers()
    if PROVIDERS[backend] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(DualmatchError, match=rf"needs {PROVIDERS[backend]}; this onnxruntime .* offers .*{CPU}"):
        open_session(graph, backend=backend)


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_provider_that_onnxruntime_drops_is_refused(backend, graph, monkeypatch):
    """onnxruntime lists a provider, fails to load it and goes on without: only the session tells."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS[backend], CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("noise"))
    with pytest.raises(
        DualmatchError, match=f"asked for {PROVIDERS[backend]}, but onnxruntime runs the graph on {CPU}|cannot load"
    ):
        open_session(graph, backend=backend)


def changed(path, folder, change):
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_type_that_no_encoder_has_is_refused_by_name(side, graph, tmp_path):
    def add_double(model):
        model.node.append(helper.make_node("Cast", ["product"], ["cast"], to=TensorProto.DOUBLE))
        name = "extra" if side == "input" else "cast"
        getattr(model, side).append(helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["batch", 4]))

    path = changed(graph, tmp_path, add_double)
    with pytest.raises(DualmatchError, match=r"'(extra|cast)' is a tensor\(double\), and an encoder takes and gives"):
        open_session(path)
    if side == "output":
        open_session(path, leave_out=["cast"]).close()


def test_a_graph_that_does_not_load_is_one_sentence_without_places_in_onnxruntimes_source(graph, tmp_path, capfd):
    def lie_about_its_length(model):
        # A sum with a constant that onnxruntime computes when it loads the graph.
        model.initializer.append(numpy_helper.from_array(np.ones((1, 4), np.float32), "bias"))
        model.node.append(helper.make_node("Add", ["bias", "bias"], ["folded"]))
        model.node.append(helper.make_node("Add", ["product", "folded"], ["more"]))
        model.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 4]))
        tensor = model.initializer[-1]
        (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
        tensor.external_data.add(key="length", value="999")

    path = changed(graph, tmp_path, lie_about_its_length)
    with pytest.raises(DualmatchError, match=r"cannot load .*external_data.length: 999\.$") as found:
        open_session(path)
    assert "\n" not in str(found.value)
    assert not any(word in str(found.value) for word in ("_src", ".cc:", "onnxruntime::", "(const"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "CUDA failure 2: out of memory ; GPU=0 ; file=/onnxruntime_src/a/cuda_call.cc ; line=65 ; expr=x",
            "CUDA failure 2: out of memory ; GPU=0 ; expr=x",
        ),
        (
            "/onnxruntime_src/a/cuda_call.cc:129 Status onnxruntime::CudaCall(ERRTYPE, const char*) [with ERRTYPE = cudaError] CUDA failure 700: an illegal memory access",
            "CUDA failure 700: an illegal memory access",
        ),
        (
            "/onnxruntime_src/a/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRaw(size_t, Stream*) Failed to allocate 9",
            "Failed to allocate 9",
        ),
        ("Invalid rank for input: x Got: 3 (of 2)", "Invalid rank for input: x Got: 3 (of 2)"),
    ],
)
def test_what_remains_of_onnxruntimes_words(message, wanted):
    assert _reason(RuntimeError(message)) == wanted


def test_the_extra_for_gpus_asks_for_a_release_that_tells_where_nodes_run():
    """`get_provider_graph_assignment_info`, without which every GPU backend refuses, came with onnxruntime 1.24.1."""
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (least,) = re.findall(r"^onnxruntime-gpu>=([\d.]+)$", "\n".join(extras["gpu"]), re.MULTILINE)
    assert [int(part) for part in least.split(".")] >= [1, 24, 1]


@pytest.mark.parametrize(
    ("message", "sticky"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", True),
        ("CUDA failure 2: out of memory ; GPU=0", False),
        ("Got invalid dimensions for input", False),
    ],
)
def test_a_cuda_error_that_stays_ends_the_sessions_work(message, sticky, graph):
    session = OnnxruntimeSession(graph)
    real = session._session

    class Broken:
        def run(self, names, given):
            raise RuntimeError(message)

    session._session = Broken()
    with pytest.raises(DualmatchError, match=message[:12]):
        session.run(feeds(2, 3))
    session._session = real
    if sticky:
        with pytest.raises(DualmatchError, match=r"cannot be used by this process any more.*start the process again"):
            session.run(feeds(2, 3))
    else:
        assert set(session.run(feeds(2, 3))) == {"product", "twice"}


@pytest.mark.parametrize(
    ("backend", "wanted"),
    [
        ("onnxruntime", "image_encoder.onnx"),
        ("onnxruntime-cuda", "image_encoder.onnx"),
        ("openvino", "image_encoder.onnx"),
        ("onnxruntime-tensorrt", "image_encoder.engine.onnx"),
        ("onnxruntime-tensorrt-rtx", "image_encoder.engine.onnx"),
    ],
)
def test_tensorrts_providers_load_the_graph_that_engines_are_compiled_from(
    backend, wanted, small_bundle, tmp_path, monkeypatch
):
    """At int8 the other graph has codes that TensorRT refuses."""
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    other = onnx.load(bundle / "image_encoder.onnx")
    other.doc_string = "for TensorRT"
    onnx.save(other, bundle / "image_encoder.engine.onnx")

    def list_it(values):
        values["encoders"]["image"]["engine_file"] = "image_encoder.engine.onnx"
        values["files"]["image_encoder.engine.onnx"] = vars(file_entry(bundle / "image_encoder.engine.onnx"))

    edit_manifest(bundle, list_it)
    opened = []
    monkeypatch.setattr(backends, "open_session", lambda graph, **_: opened.append(graph))
    for encoder in ("image", "text"):
        open_encoder(load_bundle(bundle), encoder, backend=backend)
    assert opened == [(bundle / wanted).read_bytes(), (bundle / "text_encoder.onnx").read_bytes()]
