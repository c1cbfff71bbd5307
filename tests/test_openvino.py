"""OpenVINO as a backend: float32 for certain, nothing reported to anyone, and recall as in torch."""

import json
import subprocess
import sys
import threading
from importlib.util import find_spec

import numpy as np
import pytest

from dualmatch.runtime import ImageEncoder, TextEncoder, load_bundle
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.backends.openvino import _openvino
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.verify import verify

from .demo_fixture import dualmatch, one_sentence

# Not `importorskip`: importing OpenVINO in any other way than the backend's reports to its makers.
pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="not run: openvino is not installed")


def feeds_of(session, batch=3, length=9, seed=0):
    generator = np.random.default_rng(seed)
    sizes = {
        spec.name: [batch if i == 0 else length if isinstance(a, str) else a for i, a in enumerate(spec.shape)]
        for spec in session.inputs
    }
    return {
        spec.name: generator.integers(1, 20, sizes[spec.name])
        if spec.dtype == "int64"
        else generator.standard_normal(sizes[spec.name], dtype=np.float32)
        for spec in session.inputs
    }


@pytest.mark.parametrize("encoder", ["image", "text"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 5), (7, 40)])
def test_a_graph_gives_what_onnxruntime_gives(encoder, batch, length, small_bundle):
    bundle = load_bundle(small_bundle)
    with open_session(bundle.graph(encoder), backend="openvino", threads=1) as openvino:
        feeds = feeds_of(openvino, batch, length)
        got = openvino.run(feeds)
        assert [spec.name for spec in openvino.outputs] == list(got)
        with open_session(bundle.encoder_path(encoder)) as onnxruntime:
            for name, value in onnxruntime.run(feeds).items():
                assert got[name].dtype == value.dtype
                np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-6)
            assert openvino.inputs == onnxruntime.inputs, "the names of dynamic axes too"
            assert openvino.outputs == onnxruntime.outputs


def test_it_says_what_it_runs_on_and_that_is_float32(small_bundle):
    with open_session(load_bundle(small_bundle).graph("image"), backend="openvino", threads=1) as session:
        assert session.provider == "OpenVINO CPU f32"
        assert session.backend == "openvino"
        assert session._compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
        assert session._compiled.get_property("INFERENCE_NUM_THREADS") == 1
        precisions = {
            op.get_rt_info()["runtimePrecision"].astype(str) for op in session._compiled.get_runtime_model().get_ops()
        }
        assert not precisions & {"bf16", "f16"}, "what the operators really run in"


def test_another_precision_than_asked_for_is_refused(small_bundle, monkeypatch):
    """A hint may be ignored; then nothing is served under a false name."""
    openvino = _openvino()
    compile_model = openvino.Core.compile_model

    def ignoring(self, model, device, hints):
        return compile_model(
            self, model, device, hints | {"INFERENCE_PRECISION_HINT": "bf16", "EXECUTION_MODE_HINT": "PERFORMANCE"}
        )

    monkeypatch.setattr(openvino.Core, "compile_model", ignoring)
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("not run: this processor has no bfloat16")
    with pytest.raises(DualmatchError, match="in bf16"):
        open_session(load_bundle(small_bundle).graph("image"), backend="openvino")


def test_recall_is_as_in_torch(small_bundle, small_run):
    found = verify(load_bundle(small_bundle), small_run.dataset, backend="openvino", threads=1)
    assert found.decision.verdict == "pass"
    assert set(found.providers.values()) == {"OpenVINO CPU f32"}
    assert max(found.samples.values()) < 1e-5


def test_half_precision_graphs_too(demo):
    bundle = load_bundle(demo.bundle)
    assert bundle.manifest.encoders["image"].precision == "fp16"
    with TextEncoder(bundle, backend="openvino", threads=1) as ours, TextEncoder(bundle, threads=1) as theirs:
        captions = ["a red ball on a beach", "a dog", "two cats left of a tree at night"]
        np.testing.assert_allclose(ours.encode(captions), theirs.encode(captions), rtol=0, atol=1e-3)


def test_one_session_serves_several_threads(small_bundle):
    with ImageEncoder(small_bundle, backend="openvino", threads=1) as encoder:
        batches = [feeds_of(encoder.session, batch=2, seed=seed) for seed in range(8)]
        wanted = [encoder.run(feeds) for feeds in batches]
        got = [None] * len(batches)

        def work(index):
            for _ in range(5):
                got[index] = encoder.run(batches[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_results_are_not_overwritten_by_the_next_run(small_bundle):
    with ImageEncoder(small_bundle, backend="openvino", threads=1) as encoder:
        first = encoder.run(feeds_of(encoder.session, seed=1))
        kept = first.copy()
        encoder.run(feeds_of(encoder.session, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_what_is_no_graph(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind" * 20)
    for graph in (tmp_path / "bad.onnx", (tmp_path / "bad.onnx").read_bytes(), tmp_path / "none.onnx"):
        with pytest.raises(DualmatchError, match="cannot load") as found:
            open_session(graph, backend="openvino")
        assert "\n" not in str(found.value)
        assert "Exception from" not in str(found.value)


def test_wrong_feeds(small_bundle):
    with open_session(load_bundle(small_bundle).graph("text"), backend="openvino") as session:
        with pytest.raises(DualmatchError, match="takes inputs"):
            session.run({})
        with pytest.raises(DualmatchError, match="must be int64"):
            session.run({"token_ids": np.ones((2, 3), np.float32)})


def test_a_run_that_fails_is_a_sentence(small_bundle):
    with open_session(load_bundle(small_bundle).graph("text"), backend="openvino") as session:
        with pytest.raises(DualmatchError, match="cannot run the graph on inputs") as found:
            session._run({"token_ids": np.ones((2, 3, 4), np.int64)})
        assert "\n" not in str(found.value)


IMPORT = """
import json, os, sys, threading
from pathlib import Path
from dualmatch.runtime.backends import open_session
session = open_session(Path(sys.argv[1]), backend="openvino", threads=1)
print(json.dumps({"modules": list(sys.modules), "home": sorted(os.listdir(os.environ["HOME"])), "threads": threading.active_count()}))
"""


def test_opening_it_reports_nothing_to_anyone(small_bundle, tmp_path):
    """openvino_telemetry would write an id into the home folder, and send it off from threads of its own."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, small_bundle / "image_encoder.onnx"],
        capture_output=True, text=True, check=False, timeout=120, cwd="/", env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not [name for name in found["modules"] if name.startswith("openvino_telemetry")]
    assert found["home"] == []
    assert found["threads"] == 1


def test_without_openvino(small_bundle, monkeypatch):
    for name in [one for one in sys.modules if one.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = dualmatch("runtime", "verify", small_bundle, "--backend", "openvino")
    assert done.code == 1
    assert one_sentence(done.err)
    assert "dualmatch[openvino]" in done.err
