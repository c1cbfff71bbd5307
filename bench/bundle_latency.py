"""`bench latency` and `bench throughput` of a bundle: both encoders at the asked batch sizes, each case in a fresh process."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dualmatch.runtime.bundle import Bundle, load_bundle
from dualmatch.runtime.errors import DualmatchError

from .case import ON_CPU, Case, checked_backend
from .diagnostic import NULL, split_behaviour
from .environment import changing_state, environment
from .latency import checked_batches
from .measure import Plan
from .report import LatencyReport
from .worker import Worker, measure_in_process

if TYPE_CHECKING:
    from .roofs import Roofs

SERVER_TOLERANCE = 0.15
"""Medians of a queue vary more than those of a closed loop: a window holds few independent busy periods."""

WHOLE_BUDGET = 10**9
"""Samples that no open loop collects. What it is there to show, a rare stall, a run misses that ends as soon as p99 is earned."""

Progress = Callable[[str, int, int], None]


def caption_length(bundle: Bundle, length: int) -> int:
    """The tokens of a benchmark's captions.

    Raises:
        DualmatchError: more than the bundle keeps.
    """
    limits = bundle.manifest.tokenizer
    if limits.max_length and length > limits.max_length:
        raise DualmatchError(
            f"captions of {length} tokens were asked for, but the bundle cuts them at {limits.max_length}."
        )
    return limits.fixed_length or length


def bench_latency(
    path: Path,
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    batches: Sequence[int] = (1, 8, 32),
    length: int = 16,
    plan: Plan | None = None,
    rate: float | None = None,
    workers: int = 1,
    data: str | None = None,
    seed: int = 0,
    run: Path | None = None,
    roofline: bool = False,
    progress: Progress | None = None,
) -> LatencyReport:
    """Latency of both encoders of a bundle: single stream, or open loop where a rate is given.

    Args:
        batches: batch sizes.
        length: tokens of every caption.
        plan: how long and how exactly to measure each case.
        rate: requests per second of a Poisson schedule; None asks for the next only when the last is done.
        workers: requests that may be in work at the same time, with a rate.
        data: photographs and captions to time the stages before the graph on; None leaves the stages out.
        seed: of random inputs and of the schedule.
        run: the trained run, for the backends `torch-eager` and `torch-compile`.
        roofline: count the work of each case and measure what the CPU can do.

    Raises:
        DualmatchError: a setting that the bundle or the backend does not allow.
    """
    if roofline and (rate is not None or split_behaviour(backend)[0] not in ON_CPU):
        raise DualmatchError(
            "a roofline is of single calls on the CPU: leave the rate out, and take a backend of the CPU."
        )
    if rate is not None:
        tolerance = max((plan or Plan()).tolerance, SERVER_TOLERANCE)
        plan = replace(plan or Plan(), tolerance=tolerance, wanted_samples=WHOLE_BUDGET)
    template = Case(
        bundle=path, encoder="image", backend=backend, run=run, threads=threads, length=length, scenario="single-stream" if rate is None else "server",
        plan=plan or Plan(), rate=rate or 0.0, workers=workers, data=data, seed=seed, counted=roofline,
    )  # fmt: skip
    return _report(template, batches, progress)


def bench_throughput(
    path: Path,
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    batches: Sequence[int] = (1, 8, 32),
    length: int = 16,
    plan: Plan | None = None,
    streams: int = 1,
    data: str | None = None,
    end_to_end: bool = False,
    seed: int = 0,
    run: Path | None = None,
    progress: Progress | None = None,
) -> LatencyReport:
    """Items per second of both encoders with everything at hand at once (offline); arguments as for `bench_latency`.

    Args:
        streams: callers side by side.
        end_to_end: from photographs and captions of `data`, decoded and tokenised by the same streams, not from ready tensors.
    """
    template = Case(
        bundle=path, encoder="image", backend=backend, run=run, threads=threads, length=length, scenario="offline",
        plan=plan or Plan(), workers=streams, data=(data or "scenes") if end_to_end else None, end_to_end=end_to_end,
        seed=seed,
    )  # fmt: skip
    return _report(template, batches, progress)


def _report(template: Case, batches: Sequence[int], progress: Progress | None) -> LatencyReport:
    checked_batches(batches)
    checked_backend(template)
    bundle = load_bundle(template.bundle)
    template = replace(template, length=caption_length(bundle, template.length))
    cases = [replace(template, encoder=name, batch=batch) for name in bundle.manifest.encoders for batch in batches]
    before, results = environment(), []
    for number, case in enumerate(cases):
        if progress is not None:
            progress(f"measuring {case.encoder}, batch {case.batch}", number, len(cases))
        results.append(measure_in_process(case))
    roofs: Roofs | None = None
    if template.counted:
        if progress is not None:
            progress("measuring roofs", len(cases), len(cases))
        with Worker(replace(template, backend=NULL, data=None)) as worker:
            roofs = worker.call("roofs")
    subject = {
        "bundle": str(template.bundle),
        "bundle_hash": bundle.hash,
        "precision": {name: entry.precision for name, entry in bundle.manifest.encoders.items()},
        "backend": template.backend,
        "threads": template.threads,
        "caption_length": template.length,
        "scenario": template.scenario,
        "rate": template.rate or None,
        "workers": template.workers,
        "data": template.data,
        "end_to_end": template.end_to_end,
        "seed": template.seed,
    }
    return LatencyReport(
        environment=before | {"after": changing_state()},
        cases=results,
        plan=template.plan,
        subject=subject,
        roofs=roofs,
    )
