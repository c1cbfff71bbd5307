"""Engines are really built, with `tensorrt_rtx`, which needs no GPU for that; the graphs come from torch and from `onnx.helper`."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dualmatch.export.engine import build_engine
from dualmatch.export.engine_profiles import (
    MAX_SIZE,
    AxisRange,
    check_profile,
    parse_axis_range,
    profile_for,
    profile_from_text,
)
from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.backends.engine_record import EngineRecord, Profile, ShapeRange, this_platform
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_file
from dualmatch.runtime.flavours import FLAVOURS, gpu_compute_capability, load_flavour, tensorrt_logger

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'dualmatch[tensorrt-rtx]'",
)

IMAGE = (TensorSpec(name="image", dtype="float32", shape=("batch", 3, 32, 32)),)
TEXT = (
    TensorSpec(name="ids", dtype="int64", shape=("batch", "length")),
    TensorSpec(name="lengths", dtype="int64", shape=("batch",)),
)
LENGTH = AxisRange(2, 12, 40)


def export(model, arguments, names, dynamic, path: Path) -> Path:
    import torch

    # torch 2.13 patches the GRU's kernel for an export without dropping the dispatcher's cached one:
    # without this every export of a GRU after the first in a process silently freezes the length axis.
    torch.ops.aten.gru.input._dispatch_cache.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            arguments,
            dynamo=True,
            input_names=names,
            dynamic_shapes=dynamic,
            opset_version=20,
            verbose=False,
        )
    program.save(str(path))
    return path


@pytest.fixture(scope="module")
def image_graph(tmp_path_factory) -> Path:
    """A small convolutional encoder: half precision, with pooling and l2norm in float32."""
    torch = pytest.importorskip("torch")

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, 2, 1),
                torch.nn.BatchNorm2d(8),
                torch.nn.ReLU(),
                torch.nn.Conv2d(8, 16, 3, padding=1),
            ).half()

        def forward(self, image):
            pooled = self.trunk(image.half()).float().mean((2, 3))
            return pooled / pooled.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)

    batch = {0: torch.export.Dim("batch", min=1, max=256)}
    return export(
        Encoder(), (torch.rand(2, 3, 32, 32),), ["image"], (batch,), tmp_path_factory.mktemp("image") / "image.onnx"
    )


@pytest.fixture(scope="module", params=["float32", "float16"])
def text_graph(request, tmp_path_factory) -> Path:
    """Embedding, GRU, last valid step, l2norm; the l2norm in float32 at both precisions."""
    torch = pytest.importorskip("torch")

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(50, 16)
            self.gru = torch.nn.GRU(16, 24, batch_first=True)

        def forward(self, ids, lengths):
            steps, _ = self.gru(self.embedding(ids))
            last = steps.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, steps.shape[2]))[:, 0].float()
            return last / last.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)

    batch, length = torch.export.Dim("batch", min=1, max=256), torch.export.Dim("length", min=2, max=128)
    return export(
        Encoder().to(getattr(torch, request.param)),
        (torch.randint(0, 50, (3, 7)), torch.tensor([7, 3, 2])),
        ["ids", "lengths"],
        ({0: batch, 1: length}, {0: batch}),
        tmp_path_factory.mktemp("text") / f"{request.param}.onnx",
    )


def graph_file(path: Path, nodes, inputs, outputs, initializers=()) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def deep_graph(path: Path) -> Path:
    """Forty convolutions, so that a build has many steps."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "image"
    for index in range(40):
        weights.append(numpy_helper.from_array(rng.normal(0, 0.1, (3, 3, 3, 3)).astype(np.float32), f"weight{index}"))
        nodes.append(helper.make_node("Conv", [last, f"weight{index}"], [f"conv{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"]))
        last = f"relu{index}"
    shape = ["batch", 3, 32, 32]
    image, features = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("image", last))
    return graph_file(path, nodes, [image], [features], weights)


def build(graph: Path, out: Path, inputs=IMAGE, **options) -> EngineRecord:
    profiles = options.pop("profiles", None) or [profile_from_text("latency", inputs, length=LENGTH)]
    return build_engine(
        graph, out, flavour=options.pop("flavour", "tensorrt-rtx"), inputs=inputs, profiles=profiles, **options
    )


# Profiles: no TensorRT needed.


def test_named_profiles_and_ranges_give_these_shapes():
    latency = profile_from_text("latency", TEXT, length=LENGTH)
    assert latency.shapes == {"ids": ShapeRange((1, 2), (1, 12), (1, 40)), "lengths": ShapeRange((1,), (1,), (1,))}
    throughput = profile_from_text("throughput", IMAGE)
    assert throughput.shapes == {"image": ShapeRange((1, 3, 32, 32), (32, 3, 32, 32), (64, 3, 32, 32))}
    own = profile_from_text("2:4:8", IMAGE)
    assert (own.name, [shape[0] for shape in own.shapes["image"]]) == ("2:4:8", [2, 4, 8])
    for profile in (latency, throughput, own):
        check_profile(profile, TEXT if profile is latency else IMAGE)


@pytest.mark.parametrize("text", ["4:2:8", "0:1:2", "1:2", "1:2:3:4", "a:b:c", ""])
def test_a_range_out_of_order_or_malformed_is_refused(text):
    with pytest.raises(DualmatchError, match=r"MIN:OPT:MAX"):
        parse_axis_range(text, what="the batch size")


def test_sizes_end_where_the_exported_graphs_do():
    assert parse_axis_range("1:1:65536", what="a size").max == MAX_SIZE
    with pytest.raises(DualmatchError, match="batch size reaches 65537, but the exported graphs take at most 65536"):
        profile_from_text("1:1:65537", IMAGE)


def test_an_unknown_profile_or_an_uncovered_axis_is_named():
    with pytest.raises(DualmatchError, match="no profile 'fast'"):
        profile_from_text("fast", IMAGE)
    with pytest.raises(DualmatchError, match="'ids' has the dynamic axis 'length'"):
        profile_from_text("latency", TEXT)
    regions = [TensorSpec(name="features", dtype="float32", shape=("batch", "regions", 2048))]
    with pytest.raises(DualmatchError, match="'features' has the dynamic axis 'regions'"):
        profile_from_text("latency", regions, length=LENGTH)
    covered = profile_for("own", regions, axes={"batch": AxisRange(1, 2, 3), "regions": AxisRange(10, 36, 36)})
    assert covered.shapes["features"].max == (3, 36, 2048)


@pytest.mark.parametrize(
    "shapes",
    [
        {"image": ShapeRange((1, 3, 32, 32), (1, 3, 32, 32), (1, 3, 64, 64))},  # a fixed axis
        {"image": ShapeRange((1, 3, 32), (1, 3, 32), (1, 3, 32))},  # another rank
        {"image": ShapeRange((4, 3, 32, 32), (2, 3, 32, 32), (8, 3, 32, 32))},  # out of order
        {"image": ShapeRange((0, 3, 32, 32), (1, 3, 32, 32), (1, 3, 32, 32))},  # empty
        {"pixels": ShapeRange((1, 3, 32, 32), (1, 3, 32, 32), (1, 3, 32, 32))},  # another name
    ],
)
def test_a_profile_that_does_not_fit_is_refused(shapes, tmp_path):
    with pytest.raises(DualmatchError, match="'own'"):
        check_profile(Profile(name="own", shapes=shapes), IMAGE)


# Engines.


@rtx
def test_an_image_engine_is_built_and_its_record_is_right(image_graph, tmp_path):
    out = tmp_path / "engines" / "image.engine"
    profiles = [profile_from_text(name, IMAGE) for name in ("latency", "throughput")]
    record = build(image_graph, out, profiles=profiles, workspace_bytes=1 << 26)
    assert [path.name for path in out.parent.iterdir()] == ["image.engine"]
    assert out.read_bytes()[:32].count(b"trt") >= 1
    assert (record.file, record.bytes, record.sha256) == ("image.engine", out.stat().st_size, sha256_of_file(out))
    assert record.onnx_sha256 == sha256_of_file(image_graph)
    assert (record.flavour, record.tensorrt_version) == ("tensorrt-rtx", load_flavour("tensorrt-rtx").__version__)
    assert (record.compute_capabilities, record.strongly_typed) == ((), True)
    assert 0 < record.seconds < 60
    assert record.platform == this_platform()
    assert record.workspace_bytes == 1 << 26
    if Path("/proc/self/clear_refs").exists():
        assert 2**26 < record.peak_memory_bytes < 2**33
    as_json = json.loads(json.dumps(record.to_json()))
    assert [profile["name"] for profile in as_json["profiles"]] == ["latency", "throughput"]
    assert as_json["profiles"][1]["shapes"]["image"]["max"] == [64, 3, 32, 32]


@rtx
def test_a_gru_engine_with_dynamic_batch_and_length_is_built(text_graph, tmp_path):
    profile = profile_from_text("throughput", TEXT, length=LENGTH)
    record = build(text_graph, tmp_path / "text.engine", TEXT, profiles=[profile])
    assert record.bytes > 10_000


@rtx
def test_a_build_is_deterministic_and_replaces_an_older_engine(image_graph, tmp_path):
    out = tmp_path / "image.engine"
    out.write_bytes(b"older")
    first = build(image_graph, out)
    assert build(image_graph, out).sha256 == first.sha256 == sha256_of_file(out)


@rtx
def test_compute_capabilities_can_be_asked_for(image_graph, tmp_path):
    portable = build(image_graph, tmp_path / "portable.engine")
    turing = build(image_graph, tmp_path / "turing.engine", compute_capabilities=["7.5"])
    assert turing.compute_capabilities == ("7.5",)
    assert turing.sha256 != portable.sha256
    with pytest.raises(DualmatchError, match=r"cannot build for compute capability 6\.1; it offers 7\.5"):
        build(image_graph, tmp_path / "pascal.engine", compute_capabilities=["6.1"])
    assert not (tmp_path / "pascal.engine").exists()


@rtx
def test_progress_reports_every_phase_to_its_end(image_graph, tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}
    build(
        image_graph,
        tmp_path / "e",
        progress=lambda phase, done, total: seen.setdefault(phase, []).append((done, total)),
    )
    assert len(seen) > 3
    for phase, steps in seen.items():
        assert steps[0][0] == 0, phase
        assert steps[-1][0] == steps[-1][1], phase
        assert all(0 <= done <= total for done, total in steps), phase


@rtx
def test_ctrl_c_cancels_and_leaves_nothing(tmp_path):
    graph = deep_graph(tmp_path / "deep.onnx")
    out = tmp_path / "deep.engine"
    steps = []

    def interrupt(phase, done, total):
        steps.append((phase, done))
        if len(steps) == 10:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.5)  # the main thread looks for signals ten times a second

    with pytest.raises(KeyboardInterrupt):
        build(graph, out, progress=interrupt)
    assert len(steps) < 20
    assert [path.name for path in tmp_path.iterdir()] == ["deep.onnx"]
    assert build(graph, out).bytes == out.stat().st_size  # TensorRT is fit for another build


@rtx
def test_an_error_in_the_progress_callback_ends_the_build_and_comes_back(tmp_path):
    class OwnError(Exception):
        pass

    def fail(phase, done, total):
        raise OwnError

    with pytest.raises(OwnError):
        build(deep_graph(tmp_path / "deep.onnx"), tmp_path / "deep.engine", progress=fail)
    assert not (tmp_path / "deep.engine").exists()


@rtx
def test_too_small_a_workspace_is_told_in_tensorrts_words(tmp_path):
    matrix = numpy_helper.from_array(np.ones((32, 32, 3, 3), np.float32), "weight")
    node = helper.make_node("Conv", ["image", "weight"], ["features"], pads=[1, 1, 1, 1])
    image, features = (helper.make_tensor_value_info(name, 1, ["batch", 32, 16, 16]) for name in ("image", "features"))
    graph = graph_file(tmp_path / "conv.onnx", [node], [image], [features], [matrix])
    inputs = [TensorSpec(name="image", dtype="float32", shape=("batch", 32, 16, 16))]
    with pytest.raises(DualmatchError, match=r"cannot build an engine from .*workspace"):
        build(graph, tmp_path / "e", inputs, profiles=[profile_from_text("throughput", inputs)], workspace_bytes=1)


# Errors.


@rtx
@pytest.mark.parametrize("content", [b"", b"not a graph at all " * 20, None])
def test_a_file_that_is_no_graph_is_refused(content, image_graph, tmp_path):
    graph = tmp_path / "broken.onnx"
    graph.write_bytes(image_graph.read_bytes()[:-500] if content is None else content)
    with pytest.raises(DualmatchError, match=r"tensorrt-rtx cannot read .*broken\.onnx"):
        build(graph, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def vector(name, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, ["batch", 4])


@rtx
def test_parser_errors_name_the_node_and_its_operator(tmp_path):
    inputs = [TensorSpec(name="x", dtype="float32", shape=("batch", 4))]
    unknown = helper.make_node("NoSuchOperator", ["x"], ["y"], name="the_odd_one")
    graph = graph_file(tmp_path / "unknown.onnx", [unknown], [vector("x")], [vector("y")])
    with pytest.raises(DualmatchError, match=r"node 'the_odd_one' \(NoSuchOperator\)"):
        build(graph, tmp_path / "e", inputs)
    # Strongly typed: TensorRT inserts no cast of its own.
    half = numpy_helper.from_array(np.eye(4, dtype=np.float16), "weight")
    mixed = helper.make_node("MatMul", ["x", "weight"], ["y"], name="mixed")
    graph = graph_file(tmp_path / "mixed.onnx", [mixed], [vector("x")], [vector("y")], [half])
    with pytest.raises(DualmatchError, match=r"node 'mixed' \(MatMul\): .*same input types") as error:
        build(graph, tmp_path / "e", inputs)
    assert "\n" not in str(error.value)
    assert "/_src/" not in str(error.value)


@rtx
@pytest.mark.parametrize(
    ("spec", "difference"),
    [
        (
            TensorSpec(name="x", dtype="float32", shape=("batch", "length")),
            r"float32 \[-1, 4\] instead of float32 \[-1, -1\]",
        ),
        (TensorSpec(name="x", dtype="float16", shape=("batch", 4)), r"float32 \[-1, 4\] instead of float16 \[-1, 4\]"),
        (
            TensorSpec(name="z", dtype="float32", shape=("batch", 4)),
            "'x' is .* instead of missing; 'z' is missing instead of",
        ),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(spec, difference, tmp_path):
    relu = helper.make_node("Relu", ["x"], ["y"])
    graph = graph_file(tmp_path / "relu.onnx", [relu], [vector("x")], [vector("y")])
    with pytest.raises(DualmatchError, match=difference):
        build(graph, tmp_path / "e", [spec])


def test_an_unknown_flavour_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(DualmatchError, match="no TensorRT flavour 'tensorflow'; choose one of tensorrt, tensorrt-rtx"):
        build(tmp_path / "no.onnx", tmp_path / "e", flavour="tensorflow")
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        with pytest.raises(DualmatchError, match="there is no ONNX file"):
            build(tmp_path / "no.onnx", tmp_path / "e")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_missing_package_names_the_extra(flavour, image_graph, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, FLAVOURS[flavour], None
    )  # what Python itself holds for a module that must not be found
    with pytest.raises(DualmatchError, match=rf"not installed: pip install 'dualmatch\[{flavour}\]'"):
        build(image_graph, tmp_path / "e", flavour=flavour)


@rtx
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timing_cache": Path("cache")}, "times no kernels"),
        ({"version_compatible": True}, "bound to its release"),
        ({"hardware_compatibility": "ampere-plus"}, "by their compute capabilities"),
    ],
)
def test_rtx_refuses_what_it_has_not(options, says, image_graph, tmp_path):
    with pytest.raises(DualmatchError, match=says):
        build(image_graph, tmp_path / "e", **options)


@rtx
def test_the_full_flavours_options_reach_the_builder(image_graph, tmp_path, monkeypatch):
    """TensorRT-RTX under the other flavour's name takes that flavour's branches, as far as they go without a GPU."""
    rtx_module, log = load_flavour("tensorrt-rtx"), tensorrt_logger("tensorrt-rtx")
    monkeypatch.setattr("dualmatch.export.engine.load_flavour", lambda _: rtx_module)
    monkeypatch.setattr("dualmatch.export.engine.tensorrt_logger", lambda _: log)
    monkeypatch.setattr("dualmatch.export.engine.gpu_compute_capability", lambda: "8.9")
    cache = tmp_path / "timings"
    for _ in range(2):  # the second build reads what the first has written
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            record = build(
                image_graph,
                tmp_path / "e",
                flavour="tensorrt",
                timing_cache=cache,
                hardware_compatibility="same-compute-capability",
            )
        assert cache.exists()
    assert (record.compute_capabilities, record.hardware_compatibility) == (("8.9",), "same-compute-capability")
    with pytest.raises(DualmatchError, match="libnvinfer_lean"):  # RTX has no lean runtime to put into the plan
        build(image_graph, tmp_path / "v", flavour="tensorrt", version_compatible=True)
    with pytest.raises(DualmatchError, match="leave compute capabilities out"):
        build(image_graph, tmp_path / "v", flavour="tensorrt", compute_capabilities=["8.6"])


@rtx
def test_tensorrt_gets_one_logger_per_process():
    assert tensorrt_logger("tensorrt-rtx") is tensorrt_logger("tensorrt-rtx")


def test_building_needs_neither_torch_nor_onnx():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'transformers', 'onnxruntime', 'tensorrt_rtx']));"
    code = f"{blocked} import dualmatch.export.engine, dualmatch.runtime.flavours"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ""})


def gpu_is_here() -> bool:
    try:
        return bool(gpu_compute_capability())
    except DualmatchError:
        return False


@pytest.mark.skipif(gpu_is_here(), reason="there is a GPU")
def test_no_gpu_is_told_in_a_sentence():
    with pytest.raises(DualmatchError, match=r"no CUDA GPU that can be used here \(|needs cuda-bindings"):
        gpu_compute_capability()
