"""onnxruntime's GPU providers on a GPU: the provider really got, embeddings as on the CPU, threads."""

import threading

import numpy as np
import pytest

from dualmatch.bench.latency import random_feeds
from dualmatch.runtime.backends import open_encoder
from dualmatch.runtime.backends.onnxruntime import PROVIDERS
from dualmatch.runtime.bundle import load_bundle


@pytest.fixture(params=[backend for backend in PROVIDERS if backend != "onnxruntime"])
def backend(request):
    onnxruntime = pytest.importorskip("onnxruntime")
    if PROVIDERS[request.param] not in onnxruntime.get_available_providers():
        pytest.skip(f"not run: this onnxruntime has no {PROVIDERS[request.param]}")
    return request.param


@pytest.mark.parametrize("encoder", ["image", "text"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_embeddings_are_those_of_the_cpu(encoder, precision, backend, bundles):
    bundle = load_bundle(bundles[precision])
    least = 0.95 if precision == "int8" and "tensorrt" in backend else 0.999  # TensorRT's graph has half as many codes
    inputs = bundle.manifest.encoders[encoder].inputs
    with (
        open_encoder(bundle, encoder, backend=backend) as here,
        open_encoder(bundle, encoder, backend="onnxruntime") as cpu,
    ):
        assert here.provider.startswith(PROVIDERS[backend])
        for turn, (batch, length) in enumerate([(1, 9), (5, 3), (5, 3), (32, 12), (1, 9)]):
            feeds = random_feeds(inputs, batch=batch, length=length, vocabulary_size=20, seed=turn)
            (a,), (b,) = here.run(feeds).values(), cpu.run(feeds).values()
            assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > least


def test_threads_share_a_session(backend, small_bundle):
    bundle = load_bundle(small_bundle)
    inputs = bundle.manifest.encoders["text"].inputs
    feeds = [random_feeds(inputs, batch=seed + 1, length=6, vocabulary_size=20, seed=seed) for seed in range(4)]
    with open_encoder(bundle, "text", backend=backend) as session:
        wanted = [next(iter(session.run(one).values())) for one in feeds]
        wrong = []

        def work(seed):
            for _ in range(20):
                (got,) = session.run(feeds[seed]).values()
                np.allclose(got, wanted[seed], atol=1e-3) or wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
