"""Latency of one encoder at several batch sizes: load, first run and steady state are three numbers, never one."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dualmatch.runtime.backends import Session, TensorSpec
from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically

from .environment import peak_memory_bytes
from .measure import QUANTILES, Clock, Measurement, Plan, measure, samples_needed, timed

SCHEMA = {"name": "dualmatch.bench.latency", "version": 1}


class NullSession(Session):
    """The null backend: every check of a session and no graph, so that what it takes is the harness's own."""

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        self.inputs, self.outputs = tuple(inputs), ()
        self.backend = self.provider = "null"

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ARG002
        return {}

    def _release(self) -> None: ...


def random_feeds(
    inputs: Sequence[TensorSpec],
    *,
    batch: int,
    length: int | None = None,
    vocabulary_size: int | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """One batch that a graph with these inputs accepts; the same seed gives the same batch.

    Floats are standard normal, as normalised pixels are; uint8 is 0 … 255; masks (bool, or `mask` in the name) are all on;
    integers of rank 2 are token ids in [1, vocabulary_size), 0 being the padding; integers of rank 1 are caption lengths.

    Args:
        batch: the size of the axes named `batch`.
        length: the size of the axes named `length` (tokens); needed only where there are any.
        vocabulary_size: needed only where there are token ids.

    Raises:
        DualmatchError: an axis of another name, an input that none of these rules covers, or a size that is missing.
    """
    sizes = {"batch": batch, "length": length}
    if any(size is not None and size < 1 for size in sizes.values()):
        raise DualmatchError(f"batch and length must be at least 1, got {batch} and {length}.")

    def size_of(axis: int | str, spec: TensorSpec) -> int:
        size = axis if isinstance(axis, int) else sizes.get(axis)
        if size is None:
            known = "no length was given" if axis == "length" else "only `batch` and `length` are known"
            raise DualmatchError(f"input {spec.name!r} has the dynamic axis {axis!r}; {known}.")
        return size

    generator, feeds = np.random.default_rng(seed), {}
    for spec in inputs:
        shape, dtype = tuple(size_of(axis, spec) for axis in spec.shape), np.dtype(spec.dtype)
        if dtype == np.bool_ or "mask" in spec.name:
            value: Array = np.ones(shape)
        elif np.issubdtype(dtype, np.floating):
            value = generator.standard_normal(shape, dtype=np.float32)
        elif dtype == np.uint8:
            value = generator.integers(256, size=shape)
        elif len(shape) == 2:
            if vocabulary_size is None or vocabulary_size < 2:
                raise DualmatchError(
                    f"input {spec.name!r} takes token ids: a vocabulary of at least 2 is needed, got {vocabulary_size}."
                )
            value = generator.integers(1, vocabulary_size, size=shape)
        elif len(shape) == 1 and length is not None:
            value = np.full(shape, length)
        else:
            raise DualmatchError(f"there is no rule to fill input {spec.name!r} ({spec.dtype} {list(spec.shape)}).")
        feeds[spec.name] = value.astype(dtype)
    return feeds


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One encoder at one batch size on one backend, in a session of its own.

    Attributes:
        load_ns: opening the session, its package imported and its file read once before.
        first_ns: the first call after loading, where engines allocate and choose kernels.
        overhead_ns: median of the same loop around the null backend; never subtracted.
        peak_memory_bytes: largest resident set of the process up to the end of this case.
    """

    encoder: str
    batch: int
    backend: str
    provider: str
    input_shapes: dict[str, tuple[int, ...]]
    load_ns: int
    first_ns: int
    measurement: Measurement
    overhead_ns: int
    peak_memory_bytes: int

    @property
    def items_per_s(self) -> float:
        """Items per second of one stream of calls, from the mean, so that stalls count."""
        return self.batch * 1e9 / float(self.measurement.samples.raw.mean())

    def to_json(self) -> dict[str, Any]:
        """The case without its raw samples; a percentile that was not earned is null and named in `withheld`."""
        samples, steady_ms = self.measurement.samples, self.measurement.samples.raw / 1e6
        percentiles = {name: samples.percentile(quantile) for name, quantile in QUANTILES.items()}
        return {
            "encoder": self.encoder,
            "batch": self.batch,
            "backend": self.backend,
            "provider": self.provider,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "load_ms": self.load_ns / 1e6,
            "first_run_ms": self.first_ns / 1e6,
            "latency": {
                "unit": "ms",
                "count": len(samples),
                "avg": steady_ms.mean(),
                "std": steady_ms.std(),
                "min": steady_ms.min(),
                "max": steady_ms.max(),
                **{name: p and p.value / 1e6 for name, p in percentiles.items()},
                "interval_confidence": 0.95,
                "intervals": {name: p and [p.low / 1e6, p.high / 1e6] for name, p in percentiles.items()},
                "withheld": {
                    name: f"needs {samples_needed(QUANTILES[name])} samples, has {len(samples)}"
                    for name, p in percentiles.items()
                    if p is None
                },
            },
            "throughput": {"unit": "items/s", "avg": self.items_per_s},
            "stable": self.measurement.stable,
            "warmup": {
                "count": sum(map(len, self.measurement.warmup)),
                "settled": self.measurement.warmed_up,
            },
            "harness_overhead_us": self.overhead_ns / 1e3,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def measure_case(
    open_session: Callable[[], Session],
    make_feeds: Callable[[int], Mapping[str, Array]],
    *,
    encoder: str,
    batch: int,
    plan: Plan | None = None,
    clock: Clock = time.perf_counter_ns,
) -> CaseResult:
    """Open a session, run it once, then measure it warm. Needs nothing but its arguments, so it can have a process of its own.

    Raises:
        DualmatchError: what opening the session or running the feeds raises.
    """
    feeds = make_feeds(batch)
    session, load_ns = timed(open_session, clock=clock)
    with session:
        _, first_ns = timed(lambda: session.run(feeds), clock=clock)
        measurement = measure(lambda: session.run(feeds), plan, clock=clock)
        null = NullSession(session.inputs)
        overhead = measure(lambda: null.run(feeds), Plan(budget_s=0.1), clock=clock).samples.percentile(0.5)
        assert overhead is not None, "three windows of five calls earn a median"
        return CaseResult(
            encoder=encoder,
            batch=batch,
            backend=session.backend,
            provider=session.provider,
            input_shapes={name: value.shape for name, value in feeds.items()},
            load_ns=load_ns,
            first_ns=first_ns,
            measurement=measurement,
            overhead_ns=overhead.value,
            peak_memory_bytes=peak_memory_bytes(),
        )


def measure_session(
    open_session: Callable[[], Session],
    make_feeds: Callable[[int], Mapping[str, Array]],
    *,
    encoder: str,
    batches: Sequence[int] = (1,),
    plan: Plan | None = None,
    clock: Clock = time.perf_counter_ns,
) -> list[CaseResult]:
    """Measure one encoder at each batch size, each in a fresh session.

    Args:
        open_session: opens the graph; called once per batch size, and once before, untimed: else the first case alone would
            pay for importing the engine and for a cold file cache.
        make_feeds: the inputs for a batch size.
        encoder: the name in the report.

    Raises:
        DualmatchError: no batch size or one below 1, and what opening the session or running the feeds raises.
    """
    if not batches or min(batches) < 1:
        raise DualmatchError(f"batch sizes must be at least 1, and at least one is needed; got {list(batches)}.")
    open_session().close()
    return [
        measure_case(open_session, make_feeds, encoder=encoder, batch=batch, plan=plan, clock=clock)
        for batch in batches
    ]


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """All cases with what is needed to judge them.

    Args:
        environment: of `dualmatch.bench.environment.environment`.
        cases: in the order measured.
        plan: the plan that every case was measured by.
        subject: what was measured and how it was set: bundle, hash, precision, threads…, ready for JSON.
    """

    environment: Mapping[str, Any]
    cases: Sequence[CaseResult]
    plan: Plan = field(default_factory=Plan)
    subject: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stable(self) -> bool:
        """Whether every case is."""
        return all(case.measurement.stable for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": dict(SCHEMA),
            "subject": dict(self.subject),
            "environment": dict(self.environment),
            "plan": asdict(self.plan),
            "cases": [case.to_json() for case in self.cases],
        }

    def sample_lines(self) -> Iterator[str]:
        """Every raw latency as a JSON line, in the order taken: case (index into `cases`), phase, window, latency in ns."""
        for index, case in enumerate(self.cases):
            for phase, windows in (("warmup", case.measurement.warmup), ("steady", case.measurement.windows)):
                for window, latencies in enumerate(windows):
                    for latency in latencies.tolist():
                        line = {"case": index, "encoder": case.encoder, "batch": case.batch, "phase": phase}
                        yield json.dumps(line | {"window": window, "latency_ns": latency})

    def write(self, path: Path, *, samples: Path | None = None) -> None:
        """Write the report as JSON, and the raw latencies as JSON lines where `samples` names a file."""
        if samples is not None:
            write_atomically(samples, "".join(f"{line}\n" for line in self.sample_lines()))
        write_atomically(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    def table(self) -> Table:
        """The report for a terminal of 80 columns."""
        from .report_table import latency_table

        return latency_table(self.cases)
