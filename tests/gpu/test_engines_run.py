"""Engines on a GPU: parity with torch re-verified there, every shape, graphs, threads, memory, refusals, a lost context."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from dualmatch.bench.latency import random_feeds
from dualmatch.runtime.backends import open_encoder
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.flavours import cuda_runtime

from ..demo_fixture import dualmatch  # noqa: TID252  (tests are no package that has a name)

ENCODERS = ("image", "text")


def given(bundle, encoder, batch, length=9, seed=0):
    entry = bundle.manifest.encoders[encoder]
    return random_feeds(entry.inputs, batch=batch, length=length, vocabulary_size=20, seed=seed)


def embedding(session, feeds):
    (value,) = session.run(feeds).values()
    return value


def worst_cosine(a, b):
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def test_parity_holds_on_this_gpu(compiled, flavour, small_run):
    done = dualmatch("runtime", "verify", compiled, "--data", small_run.data, "--backend", flavour, "--json")
    assert done.out, done.err
    found = json.loads(done.out)
    assert found["verdict"] in ("pass", "too few pairs"), found["reason"]
    assert all("TensorRT" in provider for provider in found["providers"].values())
    is_int8 = load_bundle(compiled).manifest.encoders["image"].precision == "int8"
    assert max(found["samples"].values()) < (0.25 if is_int8 else 0.02)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_batch_and_length_gives_what_onnxruntime_gives(encoder, compiled, flavour):
    bundle = load_bundle(compiled)
    shapes = [(1, 9), (2, 3), (7, 9), (8, 17), (33, 9), (130, 5), (1, 9), (33, 9), (33, 9), (1, 9)]
    # An int8 engine has codes of its own: it is another rounding of the network than onnxruntime's graph.
    least = 0.95 if bundle.manifest.encoders[encoder].precision == "int8" else 0.999
    with (
        open_encoder(bundle, encoder, backend=flavour) as here,
        open_encoder(bundle, encoder, backend="onnxruntime") as cpu,
    ):
        for turn, (batch, length) in enumerate(shapes):
            feeds = given(bundle, encoder, batch, length, seed=turn)
            a, b = embedding(here, feeds), embedding(cpu, feeds)
            assert a.shape == b.shape
            assert worst_cosine(a, b) > least, (batch, length, here.provider)
            np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=2e-3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_item_alone_is_the_item_in_a_batch(encoder, compiled, flavour):
    bundle = load_bundle(compiled)
    feeds = given(bundle, encoder, 21)
    with open_encoder(bundle, encoder, backend=flavour) as session:
        together = embedding(session, feeds)
        for row in range(21):
            alone = embedding(session, {name: value[row : row + 1] for name, value in feeds.items()})
            assert worst_cosine(alone, together[row : row + 1]) > 0.9999


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_replayed_graph_gives_what_the_first_run_gave(encoder, compiled, flavour):
    bundle = load_bundle(compiled)
    with open_encoder(bundle, encoder, backend=flavour) as session:
        values = [given(bundle, encoder, 4, seed=seed) for seed in range(3)]
        first = [embedding(session, feeds) for feeds in values]
        for _ in range(4):
            for feeds, wanted in zip(values, first, strict=True):
                np.testing.assert_allclose(embedding(session, feeds), wanted, atol=1e-3)
        if flavour == "tensorrt":
            assert session.num_graphs >= 1 or "without CUDA graphs" in session.provider
        print(session.provider, session.num_graphs)


def test_threads_share_a_session(compiled, flavour):
    bundle = load_bundle(compiled)
    feeds = [given(bundle, "text", 5, seed=seed) for seed in range(6)]
    with open_encoder(bundle, "text", backend=flavour) as session:
        wanted = [embedding(session, one) for one in feeds]
        wrong = []

        def work(seed):
            for _ in range(50):
                np.allclose(embedding(session, feeds[seed]), wanted[seed], atol=1e-3) or wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_sessions_give_their_memory_back(compiled, flavour):
    cudart, bundle = cuda_runtime(), load_bundle(compiled)

    def free():
        cudart.cudaDeviceSynchronize()
        return cudart.cudaMemGetInfo()[1]

    def use():
        with open_encoder(bundle, "image", backend=flavour) as session:
            for batch in (1, 1, 1, 20):
                embedding(session, given(bundle, "image", batch))

    use()  # CUDA's own context and the kernels loaded into it stay
    use()
    before = free()
    for _ in range(5):
        use()
    assert before - free() < 8 * 2**20


def test_a_length_that_no_profile_has_is_refused_and_the_session_goes_on(compiled, flavour):
    bundle = load_bundle(compiled)
    with open_encoder(bundle, "text", backend=flavour) as session:
        with pytest.raises(DualmatchError, match="no profile of engines/text_encoder"):
            embedding(session, given(bundle, "text", 2, length=5000))
        assert embedding(session, given(bundle, "text", 2)).shape[0] == 2


def test_an_engine_for_another_gpu_or_version_is_refused(compiled, flavour):
    bundle = load_bundle(compiled)
    for name, value, says in (
        ("compute_capabilities", ["3.5"], "the GPU here has"),
        ("tensorrt_version", "9.9.9", "is installed"),
        ("onnx_sha256", "0" * 64, "another graph"),
    ):
        changed = [dict(engine) | {name: value} for engine in bundle.manifest.engines]
        object.__setattr__(bundle.manifest, "engines", tuple(changed))
        with pytest.raises(DualmatchError, match=says):
            open_encoder(bundle, "text", backend=flavour)
        bundle = load_bundle(compiled)


LOSE = """
import sys
import numpy as np
from dualmatch.bench.latency import random_feeds
from dualmatch.runtime.backends import open_encoder
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.errors import DualmatchError

bundle = load_bundle(sys.argv[1])
feeds = random_feeds(bundle.manifest.encoders["text"].inputs, batch=2, length=9, vocabulary_size=20)
session = open_encoder(bundle, "text", backend=sys.argv[2])
session.run(feeds)
for slot in session._lane()._slots.values():  # where nothing is
    for allocation in slot.device.values():
        allocation.pointer = 0x1000
for _ in range(2):
    try:
        session.run(feeds)
    except DualmatchError as error:
        print("REFUSED", error)
"""


def test_a_lost_context_is_told_and_ends_the_process_work(compiled, flavour):
    done = subprocess.run(
        [sys.executable, "-c", LOSE, compiled, flavour], capture_output=True, text=True, check=False, timeout=300
    )
    refusals = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refusals) == 2, done.stdout + done.stderr
    # A copy to a bad address may be noticed before anything runs, which costs nothing; a kernel's bad access is sticky.
    assert "cudaError" in refusals[0]
    if "any more" in refusals[0]:
        assert refusals[0] == refusals[1]
