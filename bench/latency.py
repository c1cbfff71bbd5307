"""Latency of one session, one call after another, in this process."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dualmatch.runtime.backends import Session
from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.errors import DualmatchError

from .device import device_memory_bytes
from .diagnostic import NullSession
from .environment import peak_memory_bytes
from .feeds import random_feeds
from .measure import Clock, Plan, measure, timed
from .report import LatencyReport
from .result import CaseResult

__all__ = [
    "CaseResult",
    "LatencyReport",
    "NullSession",
    "measure_case",
    "measure_session",
    "null_overhead",
    "random_feeds",
]

OVERHEAD_BUDGET_S, OVERHEAD_LEAST, OVERHEAD_CALLS = 0.3, 3, 300


def null_overhead(session: Session, feeds: Mapping[str, Array], *, clock: Clock = time.perf_counter_ns) -> int:
    """What the harness itself, with the session's checks, takes of a call: the median in ns of the null backend.

    Each call of the null backend follows a real one, so that it meets the caches as a real one leaves them: in a loop of its own it
    takes a tenth of that.
    """
    null = NullSession(session.inputs, answer=session.run(feeds))
    taken: list[int] = []
    started = clock()
    while len(taken) < OVERHEAD_LEAST or (len(taken) < OVERHEAD_CALLS and clock() - started < OVERHEAD_BUDGET_S * 1e9):
        session.run(feeds)
        taken.append(timed(lambda: null.run(feeds), clock=clock)[1])
    return int(np.median(taken))


def measure_case(
    open_session: Callable[[], Session],
    make_feeds: Callable[[int], Mapping[str, Array]],
    *,
    encoder: str,
    batch: int,
    plan: Plan | None = None,
    clock: Clock = time.perf_counter_ns,
) -> CaseResult:
    """Open a session, run it once, then measure it warm, one call after another, in this process.

    Raises:
        DualmatchError: what opening the session or running the feeds raises.
    """
    feeds, device_before = make_feeds(batch), device_memory_bytes()
    session, load_ns = timed(open_session, clock=clock)
    with session:
        _, first_ns = timed(lambda: session.run(feeds), clock=clock)
        measurement = measure(lambda: session.run(feeds), plan, clock=clock)
        device_after = device_memory_bytes()
        return CaseResult(
            encoder=encoder,
            batch=batch,
            backend=session.backend,
            provider=session.provider,
            input_shapes={name: value.shape for name, value in feeds.items()},
            load_ns=load_ns,
            first_ns=first_ns,
            measurement=measurement,
            overhead_ns=null_overhead(session, feeds, clock=clock),
            peak_memory_bytes=peak_memory_bytes(),
            device_memory_bytes=None if device_after is None else device_after - (device_before or 0),
            ended_ns=time.time_ns(),
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
    """Measure one encoder at each batch size, each in a fresh session of this process.

    Args:
        open_session: opens the graph; called once per batch size, and once before, untimed: else the first case alone would
            pay for importing the engine and for a cold file cache.
        make_feeds: the inputs for a batch size.
        encoder: the name in the report.

    Raises:
        DualmatchError: no batch size or one below 1, and what opening the session or running the feeds raises.
    """
    checked_batches(batches)
    open_session().close()
    return [
        measure_case(open_session, make_feeds, encoder=encoder, batch=batch, plan=plan, clock=clock)
        for batch in batches
    ]


def checked_batches(batches: Sequence[int]) -> None:
    """Refuse batch sizes that cannot be measured."""
    if not batches or min(batches) < 1:
        raise DualmatchError(f"batch sizes must be at least 1, and at least one is needed; got {list(batches)}.")
