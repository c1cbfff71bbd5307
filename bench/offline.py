"""Offline mode: everything to encode is there at once, and what counts is items per second.

Source of the protocol: MLPerf LoadGen's offline scenario. Several streams may call the backend side by side.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

from .measure import AGREEING_WINDOWS, WINDOWS_PER_BUDGET, Clock, Nanoseconds, Plan, Samples, agree

LEAST_WINDOWS = 5
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class OfflineMeasurement:
    """Calls of all streams, by the time they ended.

    Attributes:
        started, finished: of every call, (n,) ns, after warm-up.
        origin: when the first window opened: the end of a call.
        edges: the calls that close a window, (windows,): a window ends when a call does, so no call is cut in two.
        batch: items of a call.
        streams: callers side by side.
        stable: the last windows' rates agree with each other and with the rate of all.
    """

    started: Nanoseconds
    finished: Nanoseconds
    origin: int
    edges: NDArray[np.int64]
    batch: int
    streams: int
    stable: bool

    @property
    def samples(self) -> Samples:
        """Latency of each call."""
        return Samples(self.finished - self.started)

    @property
    def window_rates(self) -> NDArray[np.float64]:
        """Items per second of each window, (windows,)."""
        return window_rates(self.finished, self.origin, self.edges, self.batch)

    @property
    def items_per_s(self) -> float:
        """Items per second over all windows."""
        last = int(self.edges[-1])
        return (last + 1) * self.batch * 1e9 / float(self.finished[last] - self.origin)

    def interval(self, confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
        """Bootstrap interval of `items_per_s` over windows; None with fewer than five of them."""
        closes = self.finished[self.edges]
        calls, lengths = np.diff(self.edges, prepend=-1), np.diff(closes, prepend=self.origin)
        n = len(calls)
        if n < LEAST_WINDOWS:
            return None
        drawn = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
        rates = calls[drawn].sum(1) * self.batch * 1e9 / lengths[drawn].sum(1)
        low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)


def window_rates(finished: Nanoseconds, origin: int, edges: NDArray[np.int64], batch: int) -> NDArray[np.float64]:
    """Items per second between the ends of the calls at `edges`."""
    lengths = np.diff(finished[edges], prepend=origin)
    return np.diff(edges, prepend=-1) * batch * 1e9 / lengths


def offline(
    workload: Callable[[int], object],
    plan: Plan,
    *,
    batch: int,
    streams: int = 1,
    clock: Clock = time.perf_counter_ns,
) -> OfflineMeasurement:
    """Run calls back to back until the windows' rates agree, or the plan's budget is spent.

    Args:
        workload: the call with this number; called from several threads where `streams` is above 1.
        batch: items of a call.

    Raises:
        DualmatchError: fewer than one stream, and what the workload raises.
    """
    if streams < 1:
        raise DualmatchError(f"offline mode needs at least one stream, got {streams}.")
    calls: list[tuple[int, int]] = []
    edges: list[int] = []
    lock, failures = threading.Lock(), []
    number, stop, origin = 0, False, 0
    budget_ns, window_ns = plan.budget_s * 1e9, plan.budget_s * 1e9 / WINDOWS_PER_BUDGET
    began = clock()
    warm_until = began + plan.warmup_share * budget_ns
    least = max(plan.window_samples, streams)

    def rates() -> NDArray[np.float64]:
        return window_rates(np.array([end for _, end in calls]), origin, np.array(edges), batch)

    def settled() -> bool:
        last = rates()[-AGREEING_WINDOWS:]
        return len(last) == AGREEING_WINDOWS and agree(list(last), plan.tolerance)

    def finished_call(start: int, end: int) -> None:
        """Record a call; called under the lock, so in the order of the ends as the lock saw them."""
        nonlocal origin, stop
        if not origin:
            origin = end
            return
        calls.append((start, end))
        opened = calls[edges[-1]][1] if edges else origin
        if len(calls) - (edges[-1] + 1 if edges else 0) < least or end - opened < window_ns:
            return
        edges.append(len(calls) - 1)
        if warm_until and (settled() or end >= warm_until) and len(edges) >= AGREEING_WINDOWS:
            _start_measuring(end)
        elif not warm_until:
            spent = end - began >= budget_ns and len(edges) >= AGREEING_WINDOWS
            stop = spent or (len(edges) >= LEAST_WINDOWS and _stable(rates(), plan.tolerance))

    def _start_measuring(end: int) -> None:
        nonlocal origin, warm_until
        calls.clear()
        edges.clear()
        origin, warm_until = end, 0

    def work() -> None:
        nonlocal number, stop
        while not stop:
            with lock:
                mine, number = number, number + 1
            try:
                start = clock()
                workload(mine)
                end = clock()
            except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
                failures.append(error)
                stop = True
                return
            with lock:
                if not stop:
                    finished_call(start, max(end, calls[-1][1] if calls else origin))

    threads = [threading.Thread(target=work) for _ in range(streams - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    started, finished = np.array(calls, dtype=np.int64).T
    return OfflineMeasurement(
        started=started,
        finished=finished,
        origin=origin,
        edges=np.array(edges),
        batch=batch,
        streams=streams,
        stable=_stable(rates(), plan.tolerance),
    )


def _stable(rates: NDArray[np.float64], tolerance: float) -> bool:
    """The last windows agree, and with the middle of all: a late step or a drift parts the two."""
    last = list(rates[-AGREEING_WINDOWS:])
    return len(last) == AGREEING_WINDOWS and agree([*last, float(np.median(rates))], tolerance)
