"""Our own logic above TensorRT and CUDA: profiles, pieces, buffers, graphs, errors, refusals. The API itself: `test_tensorrt_api.py`."""

import gc
import threading
from collections import deque
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dualmatch.runtime.backends import TensorSpec, open_encoder, open_session, tensorrt
from dualmatch.runtime.backends.cuda import Cuda, CudaError, Stickiness
from dualmatch.runtime.backends.engine_record import (
    EngineRecord,
    Profile,
    ShapeRange,
    check_engine,
    engine_file,
    find_engine,
)
from dualmatch.runtime.backends.profiles import GraphCache, choose_profile, plan_pieces
from dualmatch.runtime.errors import DualmatchError

from .fake_tensorrt import FakeCudart, FakeEngine, Status, fake_trt

IDS = (TensorSpec(name="token_ids", dtype="int64", shape=("batch", "length")),)
EMBEDDING = (TensorSpec(name="text_embedding", dtype="float32", shape=("batch", 2)),)


def profile(name, low, tuned, high):
    return Profile(name=name, shapes={"token_ids": ShapeRange(low, tuned, high)})


LATENCY = profile("latency", (1, 1), (1, 16), (1, 40))
THROUGHPUT = profile("throughput", (1, 1), (4, 16), (8, 40))
BOTH = (LATENCY, THROUGHPUT)


def record(**changes):
    values = {
        "flavour": "tensorrt",
        "tensorrt_version": "10.13.2",
        "compute_capabilities": ("9.0",),
        "profiles": BOTH,
        "file": engine_file("text", "tensorrt"),
        "sha256": "1" * 64,
        "bytes": 4,
        "onnx_sha256": "a" * 64,
        "seconds": 1.0,
        "strongly_typed": True,
    }
    return EngineRecord(**(values | changes))


# Profiles and pieces.


def ids(batch, length):
    return {"token_ids": (batch, length)}


def test_the_profile_tuned_for_the_nearest_size_is_chosen():
    wide = profile("wide", (1, 1), (64, 40), (64, 40))
    assert choose_profile(BOTH, ids(1, 16)) == 0
    assert choose_profile(BOTH, ids(5, 16)) == 1
    assert choose_profile((wide, THROUGHPUT), ids(8, 16)) == 1
    assert (
        choose_profile((wide, THROUGHPUT), ids(8, 40)) == 1
    )  # 320 elements: 64 are five times fewer, 2560 eight times more
    assert choose_profile((wide, THROUGHPUT), ids(9, 40)) == 0
    assert choose_profile(BOTH, ids(1, 41)) is None
    assert choose_profile(BOTH, ids(9, 16)) is None


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [1]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (20, [8, 8, 4]), (127, [8] * 15 + [7])]
)
def test_a_batch_beyond_the_largest_profile_is_cut(batch, sizes):
    pieces = plan_pieces(BOTH, IDS, ids(batch, 16), engine="e")
    assert [piece.stop - piece.start for piece in pieces] == sizes
    assert (pieces[0].start, pieces[-1].stop) == (0, batch)
    assert all(first.stop == second.start for first, second in pairwise(pieces))
    assert all(piece.profile == (0 if piece.stop - piece.start == 1 else 1) for piece in pieces)


def test_a_rest_below_the_smallest_batch_is_spread_over_the_pieces():
    only = (profile("6:8:8", (6, 1), (8, 16), (8, 40)),)
    assert [p.stop - p.start for p in plan_pieces(only, IDS, ids(13, 16), engine="e")] == [7, 6]
    with pytest.raises(DualmatchError, match=r"no profile of e takes token_ids \[9, 16\]\. It has 6:8:8"):
        plan_pieces(only, IDS, ids(9, 16), engine="e")


@pytest.mark.parametrize("shape", [(1, 41), (20, 41), (0, 16), (3, 0)])
def test_what_no_cut_makes_fit_is_refused_with_the_profiles(shape):
    with pytest.raises(DualmatchError, match=r"latency: token_ids \[1, 1\] to \[1, 40\].*--profile, --length"):
        plan_pieces(BOTH, IDS, ids(*shape), engine="e")


def test_graphs_are_made_at_the_second_use_and_the_unused_are_dropped():
    made, dropped = [], []
    cache = GraphCache(2, dropped.append)

    def use(key):
        return cache.get(key, lambda: made.append(key) or key)

    assert [use("a"), use("a"), use("a")] == [None, "a", "a"]
    assert [use("b"), use("b"), use("a")] == [None, "b", "a"]
    use("c")
    assert (use("c"), dropped) == ("c", ["b"])
    assert made == ["a", "b", "c"]
    cache.clear()
    assert sorted(dropped) == ["a", "b", "c"]
    assert len(cache) == 0


# Refusals by the manifest.


def check(one, **here):
    values = {"tensorrt_version": "10.13.2", "compute_capability": "9.0", "here": "linux-x86_64"}
    check_engine(one, bundle=Path("/b"), **(values | here))


def test_an_engine_for_this_machine_passes():
    check(record())
    check(record(platform="linux-x86_64"))
    check(record(version_compatible=True), tensorrt_version="10.14.0")
    check(record(hardware_compatibility="ampere-plus"), compute_capability="8.6")
    check(record(flavour="tensorrt-rtx", compute_capabilities=()), compute_capability="12.0")
    check(record(flavour="tensorrt-rtx", compute_capabilities=("8.6", "8.9")), compute_capability="8.9")


@pytest.mark.parametrize(
    ("changes", "here", "says"),
    [
        (
            {},
            {"tensorrt_version": "10.14.0"},
            r"built by tensorrt 10\.13\.2, and 10\.14\.0 is installed.*another version",
        ),
        ({"version_compatible": True}, {"tensorrt_version": "10.12.0"}, "later or another major version"),
        ({"version_compatible": True}, {"tensorrt_version": "11.0.0"}, "later or another major version"),
        ({}, {"compute_capability": "8.9"}, r"compute capability 9\.0, the GPU here has 8\.9"),
        ({"hardware_compatibility": "same-compute-capability"}, {"compute_capability": "8.9"}, r"has 8\.9"),
        (
            {"hardware_compatibility": "ampere-plus"},
            {"compute_capability": "7.5"},
            r"8\.0 and later, the GPU here has 7\.5",
        ),
        ({"flavour": "tensorrt-rtx", "compute_capabilities": ()}, {"compute_capability": "7.5"}, r"8\.0 and later"),
        ({"platform": "linux-aarch64"}, {}, "built for linux-aarch64, this machine is linux-x86_64"),
    ],
)
def test_an_engine_for_another_machine_is_refused_with_what_to_do(changes, here, says):
    with pytest.raises(DualmatchError, match=rf"{says}.*`dualmatch compile /b --flavour tensorrt"):
        check(record(**changes), **here)


def found(engines, flavour="tensorrt", graph="a" * 64):
    return find_engine(tuple(engines), bundle=Path("/b"), encoder="text", flavour=flavour, graph_sha256=graph)


def test_the_record_comes_back_from_json_as_it_went():
    import json

    for one in (record(), record(peak_memory_bytes=5, platform="linux-x86_64", hardware_compatibility="ampere-plus")):
        assert found([json.loads(json.dumps(one.to_json()))]) == one
    older = record().to_json()
    for name in ("platform", "peak_memory_bytes", "workspace_bytes", "version_compatible", "hardware_compatibility"):
        del older[name]
    assert found([older]) == record()


def test_a_missing_engine_or_one_of_another_graph_is_refused():
    with pytest.raises(DualmatchError, match=r"no tensorrt engine of the text encoder \(none\); `dualmatch compile /b"):
        found([])
    with pytest.raises(DualmatchError, match=r"no tensorrt-rtx engine of the text encoder \(only of tensorrt\)"):
        found([record().to_json()], flavour="tensorrt-rtx")
    with pytest.raises(DualmatchError, match="another graph than this bundle's text encoder"):
        found([record().to_json()], graph="b" * 64)
    with pytest.raises(DualmatchError, match="manifest's engine of the text encoder"):
        found([record().to_json() | {"profiles": "all"}])


# A session over fakes.


class Machine:
    """A bundle with one engine, and a GPU, all imagined."""

    def __init__(self, monkeypatch, *, seed=0, flavour="tensorrt", capability="9.0", profiles=BOTH, **changes) -> None:
        self.cudart = FakeCudart(seed)
        self.log = SimpleNamespace(errors=deque())
        self.engine = FakeEngine([{"token_ids": list(p.shapes["token_ids"])} for p in profiles], self.cudart, self.log)
        self.trt = fake_trt(self.engine)
        self.stickiness = Stickiness()
        self.read = []
        one = record(flavour=flavour, file=engine_file("text", flavour), profiles=profiles, **changes)
        entry = SimpleNamespace(
            file="text_encoder.onnx", engine_graph="text_encoder.onnx", inputs=IDS, outputs=EMBEDDING
        )
        files = {"text_encoder.onnx": SimpleNamespace(sha256="a" * 64), one.file: SimpleNamespace(sha256="1" * 64)}
        manifest = SimpleNamespace(encoders={"text": entry}, files=files, engines=(one.to_json(),))
        self.bundle = SimpleNamespace(
            path=Path("/b"), manifest=manifest, read=lambda name: self.read.append(name) or b"plan"
        )
        monkeypatch.setattr(tensorrt, "load_flavour", lambda _: self.trt)
        monkeypatch.setattr(tensorrt, "cuda_runtime", lambda: self.cudart)
        monkeypatch.setattr(tensorrt, "gpu_compute_capability", lambda: capability)
        monkeypatch.setattr(tensorrt, "tensorrt_logger", lambda _: self.log)
        monkeypatch.setattr(tensorrt, "PROCESS", self.stickiness)
        monkeypatch.setattr(tensorrt, "Cuda", lambda cudart: Cuda(cudart, self.stickiness))
        self.flavour = flavour

    def session(self):
        return open_encoder(self.bundle, "text", backend=self.flavour)


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, (batch, length))


def expected(value):
    return np.stack([value.sum(1), (value * np.arange(1, value.shape[1] + 1)).sum(1)], 1).astype(np.float32)


def embedded(session, value):
    return session.run({"token_ids": value})["text_embedding"]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_streams_order_every_row_gets_its_own_embedding(seed, monkeypatch):
    """Pieces, slots, events and graphs together, at the laziest schedules that CUDA allows."""
    machine = Machine(monkeypatch, seed=seed)
    with machine.session() as session:
        for turn, (batch, length) in enumerate([(1, 7), (61, 9), (61, 9), (61, 9), (8, 3), (1, 7), (1, 7), (30, 40)]):
            value = tokens(batch, length, seed=turn)
            np.testing.assert_array_equal(embedded(session, value), expected(value))
        assert session.num_graphs > 2
    assert not machine.cudart.memory, "all memory is given back"
    assert not machine.cudart.streams
    assert not machine.cudart.graphs


def test_the_fake_notices_a_missing_wait(monkeypatch):
    """The test above can fail: without the wait for the upload some schedule computes on rubbish."""
    monkeypatch.setattr(Cuda, "wait", lambda *_: None)
    wrong = 0
    for seed in range(12):
        with Machine(monkeypatch, seed=seed).session() as session:
            wrong += not np.array_equal(embedded(session, tokens(61, 9)), expected(tokens(61, 9)))
    assert wrong > 0


def test_a_slice_of_a_larger_array_and_a_transposed_one_are_taken(monkeypatch):
    with Machine(monkeypatch).session() as session:
        value = tokens(9, 30)[::2, 3:20]
        np.testing.assert_array_equal(embedded(session, value), expected(value))
        turned = np.asfortranarray(tokens(5, 6))
        np.testing.assert_array_equal(embedded(session, turned), expected(turned))


def test_a_graph_is_captured_after_a_warm_run_and_then_replayed(monkeypatch):
    machine = Machine(monkeypatch)
    with machine.session() as session:
        for turn in range(4):
            embedded(session, tokens(4, 5, seed=turn))
        # first: without a graph. Second: warm run and capture in a context of its own. Later: launches only.
        assert len(machine.engine.executed) == 3
        assert machine.cudart.calls.count("cudaGraphLaunch") == 3
        assert session.num_graphs == 1
        profile_context, graph_context = machine.engine.contexts
        assert graph_context.shapes == {"token_ids": (4, 5)}
        assert profile_context.memory == graph_context.memory == (machine.engine.contexts[0].memory[0], 2000)
        embedded(session, tokens(4, 6))
        assert graph_context.shapes == {"token_ids": (4, 5)}, "a context that a graph came from stays as it was"


def test_tensorrt_rtx_is_told_to_capture_graphs_itself(monkeypatch):
    machine = Machine(monkeypatch, flavour="tensorrt-rtx", compute_capabilities=(), tensorrt_version="10.13.2")
    with machine.session() as session:
        for turn in range(3):
            value = tokens(20, 5, seed=turn)
            np.testing.assert_array_equal(embedded(session, value), expected(value))
        assert "cudaGraphLaunch" not in machine.cudart.calls
        assert session.provider == "TensorRT-RTX 10.13.2 on Imaginary GPU"


def test_every_thread_has_a_context_of_its_own_and_gives_it_back(monkeypatch):
    machine = Machine(monkeypatch)
    with machine.session() as session:
        embedded(session, tokens(2, 3))
        own = len(machine.cudart.memory)
        results = []
        thread = threading.Thread(target=lambda: results.append(embedded(session, tokens(2, 3))))
        thread.start()
        thread.join()
        np.testing.assert_array_equal(results[0], expected(tokens(2, 3)))
        assert len(machine.engine.contexts) == 2
        del thread
        gc.collect()
        assert len(machine.cudart.memory) == own
    assert not machine.cudart.memory


def test_a_sticky_error_ends_all_work_of_the_process_and_says_so(monkeypatch):
    machine = Machine(monkeypatch)
    session, other = machine.session(), machine.session()
    embedded(session, tokens(2, 3))
    machine.cudart.broken = Status.cudaErrorIllegalAddress
    sentence = r"cannot be used by this process any more, because .* failed with cudaErrorIllegalAddress \(as told\); start the process again"
    with pytest.raises(CudaError, match=sentence) as error:
        embedded(session, tokens(2, 3))
    assert error.value.sticky
    calls = len(machine.cudart.calls)
    for one in (session, other):
        with pytest.raises(CudaError, match=sentence):
            embedded(one, tokens(2, 3))
    with pytest.raises(CudaError, match=sentence):
        machine.session()
    assert len(machine.cudart.calls) == calls, "nothing more is asked of the GPU"
    session.close()


@pytest.mark.parametrize(
    "call",
    ["cudaMalloc", "cudaHostAlloc", "cudaMemcpyAsync", "cudaEventRecord", "cudaGraphLaunch"],
)
def test_an_error_that_passes_leaves_a_session_that_works(call, monkeypatch):
    machine = Machine(monkeypatch)
    with machine.session() as session:
        machine.cudart.failures[call] = Status.cudaErrorMemoryAllocation
        with pytest.raises(CudaError, match=r"cudaErrorMemoryAllocation.*smaller batches") as error:
            [embedded(session, tokens(20, 3)) for _ in range(3)]
        assert not error.value.sticky
        for turn in range(3):
            np.testing.assert_array_equal(embedded(session, tokens(20, 3, turn)), expected(tokens(20, 3, turn)))
    assert not machine.cudart.memory


def test_an_engine_that_cannot_be_captured_runs_without_graphs_and_says_so(monkeypatch):
    machine = Machine(monkeypatch)
    with machine.session() as session:
        machine.cudart.failures["cudaStreamEndCapture"] = Status.cudaErrorMemoryAllocation
        assert "without" not in session.provider
        for turn in range(4):
            np.testing.assert_array_equal(embedded(session, tokens(4, 5, turn)), expected(tokens(4, 5, turn)))
        assert session.provider.startswith(
            "TensorRT 10.13.2 on Imaginary GPU, without CUDA graphs (capturing a CUDA graph"
        )
        assert session.provider.count("without") == 1
        assert session.num_graphs == 0
    assert not machine.cudart.memory


def test_tensorrts_own_failure_is_told_in_its_words(monkeypatch):
    machine = Machine(monkeypatch)
    with machine.session() as session:
        machine.engine.fails = True
        with pytest.raises(
            DualmatchError, match=r"text_encoder\.tensorrt\.engine: running the engine failed: .*Myelin"
        ):
            embedded(session, tokens(20, 3))
        machine.engine.fails = False
        np.testing.assert_array_equal(embedded(session, tokens(20, 3)), expected(tokens(20, 3)))


def test_refusals_come_before_anything_is_read(monkeypatch):
    for changes in ({"capability": "8.9"}, {"tensorrt_version": "10.12.0"}, {"onnx_sha256": "b" * 64}):
        machine = Machine(monkeypatch, **changes)
        with pytest.raises(DualmatchError, match="dualmatch compile"):
            machine.session()
        assert (machine.read, machine.trt.opened) == ([], 0)
    machine = Machine(monkeypatch)
    machine.bundle.manifest.files[engine_file("text", "tensorrt")].sha256 = "2" * 64
    with pytest.raises(DualmatchError, match="no file with the hash of its engine"):
        machine.session()
    assert machine.read == []


def test_tensorrt_rtx_diagnoses_come_as_words(monkeypatch):
    machine = Machine(monkeypatch, flavour="tensorrt-rtx", compute_capabilities=())
    machine.trt.validity = (2, 2 | 4)
    with pytest.raises(
        DualmatchError, match=r"not built for a GPU of this compute capability.*; the CUDA driver is too old;"
    ):
        machine.session()
    assert machine.trt.opened == 0


def test_an_engine_that_is_not_what_the_manifest_says_is_refused(monkeypatch):
    machine = Machine(monkeypatch)
    machine.engine.profiles[1] = {"token_ids": [(1, 1), (4, 16), (16, 40)]}
    with pytest.raises(DualmatchError, match="profile 'throughput' takes 'token_ids' as"):
        machine.session()
    machine = Machine(monkeypatch)
    machine.engine.get_tensor_dtype = lambda name: np.float16
    with pytest.raises(DualmatchError, match="the manifest promises"):
        machine.session()


def test_doors_refuse_what_they_do_not_open(monkeypatch, tmp_path):
    with pytest.raises(DualmatchError, match="takes no number of threads"):
        open_encoder(Machine(monkeypatch).bundle, "text", backend="tensorrt", threads=2)
    with pytest.raises(DualmatchError, match="compiled into a bundle, not an ONNX graph"):
        open_session(tmp_path / "x.onnx", backend="tensorrt-rtx")
    session = Machine(monkeypatch).session()
    session.close()
    with pytest.raises(RuntimeError, match="session is closed"):
        embedded(session, tokens(1, 3))
