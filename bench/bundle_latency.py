"""`bench latency` of a bundle: both encoders at the asked batch sizes, through the runtime's own sessions."""

from collections.abc import Sequence
from pathlib import Path

from dualmatch.runtime.backends import open_encoder
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .environment import environment
from .latency import CaseResult, LatencyReport, measure_session, random_feeds
from .measure import Plan


def bench_latency(
    path: Path,
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    batches: Sequence[int] = (1, 8, 32),
    length: int = 16,
    plan: Plan | None = None,
) -> LatencyReport:
    """Measure both encoders of a bundle.

    Args:
        batches: batch sizes.
        length: tokens of every caption.
        plan: how long and how exactly to measure each case.
    """
    bundle = load_bundle(path)
    plan = plan or Plan()
    vocabulary_size = CaptionTokenizer(bundle.read("tokenizer.json"), bundle.manifest.tokenizer).vocabulary_size
    limits = bundle.manifest.tokenizer
    if limits.max_length and length > limits.max_length:
        raise DualmatchError(
            f"captions of {length} tokens were asked for, but the bundle cuts them at {limits.max_length}."
        )
    length = limits.fixed_length or length
    cases: list[CaseResult] = []
    for name, entry in bundle.manifest.encoders.items():
        cases += measure_session(
            lambda name=name: open_encoder(bundle, name, backend=backend, threads=threads),  # type: ignore[misc]
            lambda batch, entry=entry: random_feeds(
                entry.inputs, batch=batch, length=length, vocabulary_size=vocabulary_size
            ),  # type: ignore[misc]
            encoder=name,
            batches=batches,
            plan=plan,
        )
    subject = {
        "bundle": str(path),
        "bundle_hash": bundle.hash,
        "precision": {name: entry.precision for name, entry in bundle.manifest.encoders.items()},
        "backend": backend,
        "threads": threads,
        "caption_length": length,
    }
    return LatencyReport(environment=environment(), cases=cases, plan=plan, subject=subject)
