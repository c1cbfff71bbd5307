"""`dualmatch compile`: every encoder of every model through TensorRT-RTX, the manifest, the script beside each engine, Ctrl-C."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache

import pytest

from dualmatch.export.compile import _caption_lengths, compile_bundle
from dualmatch.export.engine import build_engine
from dualmatch.export.engine_profiles import AxisRange, profile_from_text
from dualmatch.runtime.backends import open_encoder
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_file
from dualmatch.runtime.flavours import gpu_compute_capability, load_flavour, tensorrt_logger
from dualmatch.runtime.tokenizer import TokenizerOptions

from .demo_fixture import dualmatch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'dualmatch[tensorrt-rtx]'",
)


# Every encoder of every model.


@pytest.fixture(scope="module")
def graph_of(exported, tmp_path_factory):
    """`graph_of(name)`: the float32 graph of an encoder, by the name of its test case; each exported once."""
    return cache(lambda name: exported_graph(name, exported, tmp_path_factory.mktemp("graph")))


def exported_graph(name, exported, folder):
    import onnx
    import torch

    from dualmatch.export.graph import export_encoder
    from dualmatch.models import DSRAN
    from dualmatch.models.config import TextConfig
    from dualmatch.models.trunks import build_trunk
    from dualmatch.models.vsrn import VSRN, VsrnConfig
    from dualmatch.training.recipe import load_recipe

    from .tiny_models import VOCABULARY, captions, images
    from .tiny_runs import SIZES

    family, _, side = name.partition(" ")
    if not side:
        return onnx.load(exported(name).path)
    torch.manual_seed(0)
    if family == "vsrn":
        text = TextConfig(encoder="gru", vocabulary_size=VOCABULARY, word_dim=12, normalise_tokens=False, max_length=0)
        network = VSRN(VsrnConfig(feature_dim=20, embed_dim=16, text=text)).eval()
        pictures = {"regions": torch.randn(2, 6, 20)}
    else:
        config = load_recipe("scenes-vse++", [*SIZES, f"model.text.vocabulary_size={VOCABULARY}"]).model
        network = DSRAN(config, build_trunk(config.trunk)).eval()
        pictures = images(network.image_encoder, 2)
    encoder = network.image_encoder if side == "image" else network.text_encoder
    example = pictures if side == "image" else {"token_ids": captions(3, 7)}
    return export_encoder(encoder, example, folder / "graph.onnx", output=f"{side}_embedding")


def converted(model, precision):
    from dualmatch.export.half import to_half
    from dualmatch.export.int8 import layers_of, to_int8

    if precision == "fp32":
        return model
    if precision == "fp16":
        return to_half(model)
    # Any ranges do: what is tested is whether TensorRT takes the graph.
    return to_int8(model, {name: 4.0 for layer in layers_of(model) for name in layer.activations}, for_engine=True)


def encoders():
    pytest.importorskip("torch", reason="not run: exporting needs torch")
    from .tiny_models import EXPORTED

    return [*EXPORTED, *(f"{family} {side}" for family in ("vsrn", "vse++") for side in ("image", "text"))]


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", encoders())
def test_every_encoder_of_every_model_compiles(name, precision, graph_of, tmp_path):
    import onnx

    from dualmatch.export.graph import specs

    model = converted(graph_of(name), precision)
    path = tmp_path / "converted.onnx"
    onnx.save(model, path)
    inputs = specs(model.graph.input)
    profiles = [profile_from_text("throughput", inputs, length=AxisRange(1, 16, 40))]
    record = build_engine(path, tmp_path / "e", flavour="tensorrt-rtx", inputs=inputs, profiles=profiles)
    assert record.strongly_typed
    assert record.bytes == (tmp_path / "e").stat().st_size > 10_000
    assert record.onnx_sha256 == sha256_of_file(path)


# A bundle.


@pytest.fixture(scope="module")
def compiled(small_bundle, tmp_path_factory):
    """A bundle, the hash that galleries know it by, and what `compile` printed."""
    bundle = tmp_path_factory.mktemp("compiled") / "bundle"
    shutil.copytree(small_bundle, bundle)
    before = load_bundle(bundle).hash
    done = dualmatch("compile", bundle, "--flavour", "tensorrt-rtx", "--length", "1:12:24", "--json")
    assert done.code == 0, done.err
    return bundle, before, done.json


def test_the_manifest_lists_engines_and_scripts_and_galleries_stay_valid(compiled):
    path, before, printed = compiled
    bundle = load_bundle(path)
    assert bundle.hash == before
    assert json.loads(json.dumps(bundle.manifest.engines)) == printed
    for engine in bundle.manifest.engines:
        assert bundle.manifest.files[engine["file"]].sha256 == engine["sha256"] == sha256_of_file(path / engine["file"])
        assert engine["file"].replace(".engine", ".reproduce.py") in bundle.manifest.files
        assert (engine["flavour"], engine["compute_capabilities"]) == ("tensorrt-rtx", [])
        assert [profile["name"] for profile in engine["profiles"]] == ["latency", "throughput"]
        assert engine["seconds"] > 0
        assert engine["bytes"] > 10_000
        assert engine["peak_memory_bytes"] is None or engine["peak_memory_bytes"] > 2**24
    assert {engine["onnx_sha256"] for engine in bundle.manifest.engines} == {
        sha256_of_file(path / entry.file) for entry in bundle.manifest.encoders.values()
    }
    assert not [one.name for one in path.iterdir() if one.name.startswith(".")]


def test_compiling_again_replaces_engines_and_prints_what_it_took(compiled, tmp_path):
    path = tmp_path / "bundle"
    shutil.copytree(compiled[0], path)
    done = dualmatch("compile", path, "--flavour", "tensorrt-rtx", "--profile", "1:2:4", "--compute-capability", "8.6")
    assert done.code == 0, done.err
    assert "peak memory" in done.out
    assert "profiles 1:2:4, for compute capability 8.6" in done.out
    assert " MiB in " in done.out
    engines = load_bundle(path).manifest.engines
    assert len(engines) == 2
    assert {tuple(engine["compute_capabilities"]) for engine in engines} == {("8.6",)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--profile", "fast"], "no profile 'fast'"),
        (["--profile", "8:4:2"], "MIN:OPT:MAX"),
        (["--profile", "1:1:99999999999"], "take at most 65536"),
        (["--profile", "latency", "--profile", "latency"], "asked for twice"),
        (["--length", "1:9:9000"], "the bundle cuts captions at"),
        (["--version-compatible"], "bound to its release"),
        (["--timing-cache", "x"], "times no kernels"),
        (["--hardware-compatibility", "ampere-plus"], "by their compute capabilities"),
        (["--compute-capability", "6.1"], "cannot build for compute capability 6.1"),
    ],
)
def test_what_cannot_be_built_is_refused_and_the_bundle_keeps_its_engines(options, says, compiled):
    path, _, _ = compiled
    before = {one: one.stat().st_mtime_ns for one in path.rglob("*")}
    done = dualmatch("compile", path, "--flavour", "tensorrt-rtx", *options)
    assert done.code == 1
    assert says in done.err
    assert load_bundle(path).manifest.engines
    assert {one: one.stat().st_mtime_ns for one in path.rglob("*") if one != path} == {
        one: value for one, value in before.items() if one != path
    }


def test_engines_are_not_written_out_of_the_bundle(small_bundle, tmp_path, monkeypatch):
    """Refused before anything is built: a link would lead out, and nothing opens a bundle with a linked file."""
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    (tmp_path / "outside").mkdir()
    monkeypatch.setattr("dualmatch.export.compile.build_engine", None)
    (bundle / "engines").symlink_to(tmp_path / "outside")
    with pytest.raises(DualmatchError, match=r"engines, which is a link, which may lead out of the bundle; remove it"):
        compile_bundle(bundle, flavour="tensorrt-rtx", profiles=["latency"])
    (bundle / "engines").unlink()
    (bundle / "engines").write_text("a file")
    with pytest.raises(DualmatchError, match=r"engines, which is a file; remove it"):
        compile_bundle(bundle, flavour="tensorrt-rtx", profiles=["latency"])
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize(
    ("options", "length", "wanted"),
    [
        ({"max_length": 0}, None, (1, 16, 64)),
        ({"max_length": 0}, "1:16:300", (1, 16, 300)),
        ({"max_length": 12}, None, (1, 12, 12)),
        ({"max_length": 12}, "1:8:12", (1, 8, 12)),
        ({"max_length": 12}, "1:8:13", "the bundle cuts captions at 12"),
        ({"max_length": 0, "fixed_length": 20}, None, (20, 20, 20)),
        ({"max_length": 0, "fixed_length": 20}, "1:8:21", "the bundle cuts captions at 20"),
        ({"max_length": 0}, "1:16:65537", "take at most 65536"),
    ],
)
def test_lengths_end_where_the_tokenizer_cuts_and_nowhere_if_it_does_not(options, length, wanted, small_bundle):
    bundle = load_bundle(small_bundle)
    bundle = replace(bundle, manifest=replace(bundle.manifest, tokenizer=TokenizerOptions(**options)))
    if isinstance(wanted, str):
        with pytest.raises(DualmatchError, match=wanted):
            _caption_lengths(bundle, length)
    else:
        assert _caption_lengths(bundle, length) == wanted


def test_the_engines_are_asked_for_by_the_backend_of_their_flavour(compiled):
    """Without a GPU that is where it ends, in a sentence; with one, the engine loads or TensorRT-RTX says why not."""
    bundle = load_bundle(compiled[0])
    with pytest.raises(DualmatchError, match="has no tensorrt engine of the image encoder \\(only of tensorrt-rtx\\)"):
        open_encoder(bundle, "image", backend="tensorrt")
    try:
        open_encoder(bundle, "image", backend="tensorrt-rtx").close()
    except DualmatchError as error:
        assert "GPU" in str(error)  # noqa: PT017  (a GPU may be there)


def gpu_is_here():
    try:
        return bool(gpu_compute_capability())
    except DualmatchError:
        return False


@pytest.mark.skipif(gpu_is_here(), reason="there is a GPU: tests/gpu goes further")
def test_the_real_runtime_is_asked_about_the_real_engine_as_far_as_it_answers_without_a_gpu(compiled, monkeypatch):
    """Past the check of the GPU, which alone is pretended: TensorRT-RTX reads the plan's header and says that it cannot ask the driver."""
    monkeypatch.setattr("dualmatch.runtime.backends.tensorrt.gpu_compute_capability", lambda: "8.9")
    bundle = load_bundle(compiled[0])
    for encoder in ("image", "text"):
        with pytest.raises(DualmatchError, match=r"refuses engines/.* on this machine: .*CUDA GPU properties"):
            open_encoder(bundle, encoder, backend="tensorrt-rtx")
    trt = load_flavour("tensorrt-rtx")
    log = tensorrt_logger("tensorrt-rtx")
    runtime = trt.Runtime(log)
    plan = (compiled[0] / bundle.manifest.engines[0]["file"]).read_bytes()
    assert 0 < runtime.engine_header_size < len(plan)
    assert runtime.get_engine_validity(plan)[0] == trt.EngineValidity.INVALID
    assert runtime.deserialize_cuda_engine(plan) is None


def test_a_changed_engine_never_reaches_tensorrt(compiled, tmp_path):
    path = tmp_path / "bundle"
    shutil.copytree(compiled[0], path)
    engine = next((path / "engines").glob("*.engine"))
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    done = dualmatch("runtime", "encode-captions", path, "x.txt", "--out", tmp_path / "g", "--backend", "tensorrt-rtx")
    assert done.code == 1
    assert "does not match the SHA-256" in done.err


# In fresh processes.

BLOCKED = ("dualmatch", "torch", "transformers", "onnx", "onnxruntime", "numpy")
BLOCKER = """
import importlib.abc, runpy, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
blocked = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocker())
"""


def fresh(code, *arguments, blocked, cwd):
    command = [sys.executable, "-c", BLOCKER + code, ",".join(blocked), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd)


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_the_script_beside_an_engine_builds_it_again_without_dualmatch(encoder, compiled, tmp_path):
    path, _, _ = compiled
    script = path / "engines" / f"{encoder}_encoder.tensorrt-rtx.reproduce.py"
    code = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = fresh(code, script, tmp_path / "again.engine", blocked=BLOCKED[:-1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = script.with_name(f"{encoder}_encoder.tensorrt-rtx.engine").stat().st_size
    assert abs((tmp_path / "again.engine").stat().st_size - size) < 0.01 * size
    assert "bytes as" in done.stdout or "not byte for byte" in done.stdout
    assert str(path) not in script.read_text()
    assert "dualmatch." not in script.read_text()


def test_the_script_refuses_another_graph(compiled, tmp_path):
    path = tmp_path / "bundle"
    shutil.copytree(compiled[0], path)
    (path / "text_encoder.onnx").write_bytes(b"another")
    script = path / "engines" / "text_encoder.tensorrt-rtx.reproduce.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "not the graph" in done.stderr


def test_compiling_works_where_torch_transformers_onnx_and_onnxruntime_are_not_installed(compiled, tmp_path):
    path = tmp_path / "bundle"
    shutil.copytree(compiled[0], path)
    code = "from dualmatch.cli.main import main\nmain()"
    blocked = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "cuda", "psutil")
    done = fresh(
        code, "compile", path, "--flavour", "tensorrt-rtx", "--profile", "latency", blocked=blocked, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "tensorrt-rtx" in done.stdout


def test_ctrl_c_ends_a_compile_at_the_terminal_and_the_bundle_is_as_it_was(compiled, tmp_path):
    path = tmp_path / "bundle"
    shutil.copytree(compiled[0], path)
    before = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
    # Enough profiles that the build takes a while.
    profiles = [word for top in range(2, 40) for word in ("--profile", f"1:1:{top}")]
    command = [
        sys.executable,
        "-c",
        "from dualmatch.cli.main import main; main()",
        "compile",
        path,
        "--flavour",
        "tensorrt-rtx",
    ]
    process = subprocess.Popen([*command, *profiles], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(one.name.startswith(".engines-") for one in path.iterdir()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, process.stderr.read()
    assert "stopped" in process.stderr.read()
    assert {one: one.read_bytes() for one in path.rglob("*") if one.is_file()} == before


def test_an_error_while_building_leaves_the_old_engines(compiled, monkeypatch, tmp_path):
    path = tmp_path / "bundle"
    shutil.copytree(compiled[0], path)
    before = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}

    def fail(what, done, of):
        if what.startswith("text"):
            raise RuntimeError(what)

    with pytest.raises(RuntimeError, match="text encoder: "):
        compile_bundle(path, flavour="tensorrt-rtx", profiles=["latency"], progress=fail)
    assert {one: one.read_bytes() for one in path.rglob("*") if one.is_file()} == before
