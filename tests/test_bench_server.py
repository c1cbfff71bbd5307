"""The open loop: its schedule, its clock, and what queueing theory says must come out. Every clock here is turned by hand."""

import numpy as np
import pytest

from dualmatch.bench.diagnostic import NullSession, StallingSession, ThrottledSession, split_behaviour
from dualmatch.bench.measure import Plan, Samples, measure
from dualmatch.bench.server import ServerMeasurement, poisson_schedule, serve
from dualmatch.runtime.errors import DualmatchError

MS = 1_000_000


class Clock:
    """Stands still but for `spend` and `wait`."""

    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now

    def spend(self, nanoseconds: float) -> None:
        self.now += round(nanoseconds)

    def wait(self, instant: int) -> None:
        self.now = max(self.now, instant)


def served(costs, *, rate, budget_s=10.0, tolerance=0.15, seed=0, wanted=662) -> ServerMeasurement:
    clock = Clock()
    plan = Plan(budget_s=budget_s, tolerance=tolerance, wanted_samples=wanted)
    return serve(lambda: clock.spend(next(costs)), plan, rate=rate, seed=seed, clock=clock, wait=clock.wait)


def constant(value):
    while True:
        yield value


def test_the_schedule_is_a_poisson_process_and_repeats() -> None:
    schedule = poisson_schedule(200, 20_000, seed=3)
    gaps = np.diff(schedule) / 1e9
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 200, rel=0.03)  # an exponential's deviation is its mean
    per_second = np.bincount((schedule // 10**9).astype(int))[:-1]
    assert per_second.var() == pytest.approx(per_second.mean(), rel=0.4)  # a Poisson count's variance is its mean
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    np.testing.assert_array_equal(schedule, poisson_schedule(200, 20_000, seed=3))
    assert not np.array_equal(schedule, poisson_schedule(200, 20_000, seed=4))


def test_latency_runs_from_the_scheduled_start() -> None:
    result = served(constant(30 * MS), rate=20)
    np.testing.assert_array_equal(result.finished - result.started, 30 * MS)
    np.testing.assert_array_equal(result.latencies, result.queued + result.service)
    # Lindley's recursion: a request waits for what the one before it had left.
    for due, start, end_before in zip(result.scheduled[1:], result.started[1:], result.finished[:-1], strict=True):
        assert start == max(due, end_before)
    assert result.queued.max() > 0
    assert result.busy == pytest.approx(0.6, abs=0.05)
    assert result.achieved_rate == pytest.approx(20, rel=0.15)


def test_a_stall_is_charged_to_everyone_who_waited_and_shows_in_p99_not_in_p50() -> None:
    def stalling():
        for call in range(10**9):
            yield 502 * MS if call % 1000 == 999 else 2 * MS

    open_loop = served(stalling(), rate=100, budget_s=60, wanted=5000)
    p50, p99 = (open_loop.percentile(quantile).value for quantile in (0.5, 0.99))
    assert p50 < 4 * MS
    assert p99 > 100 * MS
    # The closed loop asks one question at a time: one sample in a thousand lies beyond p99.9, and p99 cannot see it.
    clock, costs = Clock(), stalling()
    closed = measure(lambda: clock.spend(next(costs)), Plan(budget_s=60, wanted_samples=7000), clock=clock).samples
    assert closed.percentile(0.99).value == 2 * MS
    assert closed.raw.max() == 502 * MS


def test_percentiles_and_intervals_agree_with_queueing_theory() -> None:
    # M/M/1 answers after an exponential time of mean 1 / (mu - lambda).
    rate, service_rate, hits = 50.0, 100.0, []
    truth = -np.log(0.1) / (service_rate - rate) * 1e9
    independent = []
    for seed in range(60):
        generator = np.random.default_rng(1000 + seed)
        result = served(
            iter(generator.exponential(1e9 / service_rate, 10_000)), rate=rate, budget_s=40, tolerance=0.01, seed=seed
        )
        p90 = result.percentile(0.9)
        hits.append(p90.low <= truth <= p90.high)
        naive = Samples(result.latencies).percentile(0.9)
        independent.append(naive.low <= truth <= naive.high)
    assert np.mean(hits) >= 0.85
    assert np.mean(hits) > np.mean(independent)  # requests behind one another are not independent


def test_busy_periods_begin_where_a_request_finds_the_worker_idle() -> None:
    result = ServerMeasurement(
        scheduled=np.array([0, 100, 110, 300, 305, 400]),
        started=np.array([0, 100, 120, 300, 320, 400]),
        finished=np.array([10, 120, 140, 320, 340, 420]),
        window=1, rate=1, workers=1, overloaded=False, stable=True,
    )  # fmt: skip
    assert result.cycles.tolist() == [0, 0, 1, 1, 2]


def test_too_few_busy_periods_earn_no_percentile() -> None:
    result = served(constant(11 * MS), rate=100, budget_s=2)
    assert len(result.latencies) > 11
    assert result.percentile(0.5) is None


def test_an_overload_is_told_and_cut_short() -> None:
    result = served(constant(100 * MS), rate=100, budget_s=1)
    assert result.overloaded
    assert not result.stable
    assert len(result.finished) < 30
    assert len(result.latencies) > 1


def test_a_steady_server_is_stable_and_stops_early() -> None:
    result = served(constant(1 * MS), rate=100, budget_s=60)
    assert result.stable
    assert len(result.latencies) < 60 * 100
    assert len(result.latencies) >= 662


def test_a_server_that_slows_down_is_unstable() -> None:
    def slower():
        for call in range(10**9):
            yield MS * 1.002**call

    assert not served(slower(), rate=20, budget_s=30).stable


def test_two_workers_answer_twice_the_rate() -> None:
    # Real time, but no time is asserted on: only that requests overlapped and none started before it was due.
    import time

    result = serve(lambda: time.sleep(0.004), Plan(budget_s=0.4), rate=400, workers=2)
    assert result.busy > 0
    assert (result.started >= result.scheduled).all()
    assert (result.started[1:] < result.finished[:-1]).any()
    assert (np.diff(result.scheduled) >= 0).all()


def test_an_error_in_a_request_reaches_the_caller() -> None:
    def fail() -> None:
        raise DualmatchError("broken graph")

    for workers in (1, 2):
        with pytest.raises(DualmatchError, match="broken graph"):
            serve(fail, Plan(budget_s=0.1), rate=100, workers=workers)


@pytest.mark.parametrize(("rate", "workers"), [(0, 1), (-1, 1), (float("nan"), 1), (10, 0)])
def test_an_impossible_load_is_refused(rate, workers) -> None:
    with pytest.raises(DualmatchError, match="server mode"):
        serve(lambda: None, Plan(), rate=rate, workers=workers)


# Backends of known behaviour


def test_a_throttled_backend_takes_its_factor_longer() -> None:
    clock = Clock()

    class Slow(NullSession):
        def _run(self, feeds):
            clock.spend(2 * MS)
            return {}

    def ticking() -> int:
        clock.spend(1)
        return clock.now

    session = ThrottledSession(Slow([]), factor=3, clock=ticking)
    before = clock.now
    session.run({})
    assert clock.now - before == pytest.approx(6 * MS, rel=1e-4)
    assert session.backend == "null+throttled"
    assert "on purpose" in session.provider


def test_a_stalling_backend_stalls_once_in_a_thousand() -> None:
    slept = []
    session = StallingSession(NullSession([]), sleep=slept.append)
    for _ in range(2999):
        session.run({})
    assert slept == [0.5, 0.5]


def test_behaviours_are_named_or_refused() -> None:
    assert split_behaviour("onnxruntime") == ("onnxruntime", None)
    assert split_behaviour("null+stalling") == ("null", "stalling")
    for backend in ("null+slow", "null+"):
        with pytest.raises(DualmatchError, match="behaviour"):
            split_behaviour(backend)
