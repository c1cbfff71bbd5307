"""Open-loop server mode: requests arrive when a Poisson schedule says so, whether or not the last one is done.

A latency runs from the *scheduled* start. A closed loop, which waits for one answer before it asks again, charges a stall to one
request; here it is charged to everyone who waited, as it is in service. Source of the protocol: MLPerf LoadGen's server scenario.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

from .measure import Clock, Nanoseconds, Percentile, Plan, agree, samples_needed

WINDOWS = 10
LEAST_WINDOW = 5  # requests
AGREEING = 3
RESAMPLES = 1000
LEAST_CYCLES = 20
SPIN_NS = 200_000

Wait = Callable[[int], None]


def poisson_schedule(rate: float, count: int, seed: int) -> Nanoseconds:
    """When each of `count` requests is due, in ns after the start: independent exponential gaps of mean 1 / rate seconds."""
    gaps = np.random.default_rng(seed).exponential(1e9 / rate, count)
    return np.cumsum(gaps).astype(np.int64)


def wait_until(instant: int) -> None:
    """Sleep until shortly before `instant` of `perf_counter_ns`, then spin: a sleep alone wakes up to a millisecond late."""
    if (ahead := instant - time.perf_counter_ns() - SPIN_NS) > 0:
        time.sleep(ahead / 1e9)
    while time.perf_counter_ns() < instant:
        pass


@dataclass(frozen=True, kw_only=True)
class ServerMeasurement:
    """Every request of an open loop, in the order of the schedule; all shapes (n,), ns on one clock.

    Attributes:
        scheduled, started, finished: when a request was due, taken up, and answered.
        window: requests in a window; the first window is the ramp and is not in the samples.
        rate: requests per second that the schedule asked for.
        workers: requests that may be in work at the same time.
        overloaded: the backlog grew past the plan's budget, and the run was cut short.
        stable: the last windows' medians agree and the queue did not run away.
    """

    scheduled: Nanoseconds
    started: Nanoseconds
    finished: Nanoseconds
    window: int
    rate: float
    workers: int
    overloaded: bool
    stable: bool

    @property
    def latencies(self) -> Nanoseconds:
        """From the scheduled start to the answer, without the ramp."""
        return (self.finished - self.scheduled)[self.window :]

    @property
    def queued(self) -> Nanoseconds:
        """From the scheduled start to being taken up, without the ramp."""
        return (self.started - self.scheduled)[self.window :]

    @property
    def service(self) -> Nanoseconds:
        """From being taken up to the answer, without the ramp."""
        return (self.finished - self.started)[self.window :]

    @property
    def achieved_rate(self) -> float:
        """Requests answered per second, from the first scheduled one to the last answer."""
        return len(self.latencies) * 1e9 / float(self.finished.max() - self.scheduled[self.window])

    @property
    def busy(self) -> float:
        """The share of the workers' time that was spent on requests."""
        return float(self.service.sum()) / (float(self.finished.max() - self.scheduled[self.window]) * self.workers)

    @property
    def cycles(self) -> NDArray[np.int64]:
        """For each request of `latencies` the number of its busy period, shape (n,).

        A period begins with a request that found every worker idle. What happens in one owes nothing to the one before.
        """
        ended_before = np.maximum.accumulate(self.finished)[self.window - 1 : -1]
        begins = self.scheduled[self.window :] >= ended_before
        begins[0] = True
        return np.cumsum(begins) - 1

    def percentile(self, quantile: float, confidence: float = 0.95, seed: int = 0) -> Percentile | None:
        """The nearest-rank percentile with an interval from a bootstrap of whole busy periods.

        Requests behind one stall are one event, not many, so they are drawn together: the interval of independent samples
        would be far too narrow. None where there are fewer samples than `samples_needed`, or fewer than 20 busy periods.
        """
        latencies, cycles = self.latencies, self.cycles
        num_cycles = int(cycles[-1]) + 1
        if len(latencies) < samples_needed(quantile) or num_cycles < LEAST_CYCLES:
            return None
        order = np.argsort(latencies, kind="stable")
        ordered, cycle_of = latencies[order], cycles[order]
        generator, estimates = np.random.default_rng(seed), np.empty(RESAMPLES, np.int64)
        for index in range(RESAMPLES):
            drawn = np.bincount(generator.integers(num_cycles, size=num_cycles), minlength=num_cycles)
            weights = np.cumsum(drawn[cycle_of])
            estimates[index] = ordered[np.searchsorted(weights, quantile * weights[-1])]
        value = int(np.quantile(ordered, quantile, method="inverted_cdf"))
        low, high = np.quantile(estimates, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
        return Percentile(value=value, low=min(int(low), value), high=max(int(high), value))


def serve(
    workload: Callable[[], object],
    plan: Plan,
    *,
    rate: float,
    seed: int = 0,
    workers: int = 1,
    clock: Clock = time.perf_counter_ns,
    wait: Wait = wait_until,
) -> ServerMeasurement:
    """Offer requests at `rate` per second until the windows agree and p99 is earned, or the plan's budget is spent.

    Requests are taken up in order, each by the next free worker, so no request overtakes an earlier one's start.

    Args:
        workload: one request; called from several threads where `workers` is above 1.
        wait: returns when the clock has reached the given instant.

    Raises:
        DualmatchError: a rate or a number of workers that is not positive, and what the workload raises.
    """
    if not 0 < rate < 1e6 or workers < 1:
        raise DualmatchError(
            f"server mode needs a positive rate below a million a second and at least one worker, got {rate} and {workers}."
        )
    window = max(LEAST_WINDOW, int(rate * plan.budget_s / WINDOWS))
    most = window * (WINDOWS + 1)
    due = poisson_schedule(rate, most, seed) + clock() + 1_000_000
    started, finished = np.zeros(most, np.int64), np.zeros(most, np.int64)
    budget_ns, upto, overloaded = int(plan.budget_s * 1e9), most, False
    numbers, lock, done, failures = count(), threading.Lock(), 0, []

    def settled(answered: int) -> bool:
        last = [
            float(np.median((finished - due)[end - window : end]))
            for end in range(answered, answered - AGREEING * window, -window)
        ]
        return agree(last, plan.tolerance)

    def work() -> None:
        nonlocal upto, overloaded, done
        while True:
            with lock:
                number = next(numbers)
                if number >= upto:
                    return
            try:
                wait(int(due[number]))
                started[number] = clock()
                workload()
            except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
                failures.append(error)
                upto = 0
                return
            finished[number] = clock()
            with lock:
                done += 1
                if finished[number] - due[number] > budget_ns and number >= 1:
                    upto, overloaded = min(upto, number + 1), True
                # The judgement costs some ten microseconds, once a window; it is charged to the request that comes next.
                whole = done % window == 0 and done >= (AGREEING + 1) * window and finished[:done].all()
                if whole and done - window >= plan.wanted_samples and settled(done):
                    upto = min(upto, done)

    threads = [threading.Thread(target=work) for _ in range(workers - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    answered = int((finished > 0).sum())
    enough = answered >= (AGREEING + 1) * window
    return ServerMeasurement(
        scheduled=due[:answered],
        started=started[:answered],
        finished=finished[:answered],
        window=window if answered > window else answered // 2,
        rate=rate,
        workers=workers,
        overloaded=overloaded,
        stable=enough and not overloaded and settled(answered - answered % window),
    )
