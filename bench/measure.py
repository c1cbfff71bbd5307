"""The measuring core: warm up until stable, measure in windows until they agree, and claim only what the samples earn.

Latencies are nanoseconds here; only reports turn them into milliseconds.
"""

import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

Clock = Callable[[], int]
Nanoseconds = NDArray[np.int64]
T = TypeVar("T")

QUANTILES = {
    **{f"p{percent}": percent / 100 for percent in (1, 5, 10, 25, 50, 75, 90, 95, 99)},
    "p99.9": 0.999,
}
TABLE_QUANTILES = {name: QUANTILES[name] for name in ("p50", "p90", "p99")}
EARLY_STOPPING_ERROR = 0.01
AGREEING_WINDOWS = 3
WINDOWS_PER_BUDGET = 20


@cache
def samples_needed(quantile: float, error: float = EARLY_STOPPING_ERROR) -> int:
    """Samples before `quantile` may be printed: 11 for p50, 64 for p90, 662 for p99, 6636 for p99.9.

    The smallest n for which, but for a chance of `error`, at least two of n independent samples lie above the true quantile
    q (below it where q < 1/2): q^n + n (1 - q) q^(n - 1) <= error. Then the figure does not hang on one lucky or unlucky
    sample. Source: MLPerf LoadGen's early stopping, the least n = h + t with P(Binomial(n, 1 - q) <= t) <= error at t = 1.
    """
    assert 0 < quantile < 1
    quantile = max(quantile, 1 - quantile)
    return next(n for n in count(2) if quantile**n + n * (1 - quantile) * quantile ** (n - 1) <= error)


def _binomial_cdf(n: int, probability: float) -> NDArray[np.float64]:
    """P(Binomial(n, probability) <= k) for k = 0 … n, shape (n + 1,)."""
    k = np.arange(n)
    log_steps = np.log((n - k) / (k + 1)) + math.log(probability / (1 - probability))
    log_first = n * math.log1p(-probability)
    return np.cumsum(np.exp(log_first + np.concatenate(([0.0], np.cumsum(log_steps)))))


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """One percentile and the ends of its interval, in ns."""

    value: int
    low: int
    high: int


@dataclass(frozen=True)
class Samples:
    """Raw latencies in ns, in the order in which they were taken, shape (n,)."""

    raw: Nanoseconds

    def __len__(self) -> int:
        return len(self.raw)

    def percentile(self, quantile: float, confidence: float = 0.95) -> Percentile | None:
        """The nearest-rank percentile (always a latency that occurred) with its order-statistic interval.

        None where there are fewer than `samples_needed` samples.

        The interval assumes nothing about the distribution, but it does assume independent samples: where slow calls come
        in clusters it is too narrow.
        """
        n = len(self)
        if n < samples_needed(quantile):
            return None
        ordered, cdf, tail = np.sort(self.raw), _binomial_cdf(n, quantile), (1 - confidence) / 2
        # low is the last sample that lies above the true quantile with at most the tail's probability; high mirrors it.
        low = int(np.searchsorted(cdf, tail, side="right")) - 1
        high = int(np.searchsorted(cdf, 1 - tail))
        assert 0 <= low <= high < n, "samples_needed grants enough samples for both ends"
        value = int(np.quantile(ordered, quantile, method="inverted_cdf"))
        return Percentile(value=value, low=int(ordered[low]), high=int(ordered[high]))

    def early_stopping(self, quantile: float, error: float = EARLY_STOPPING_ERROR) -> int | None:
        """LoadGen's estimate: a sample that, but for a chance of `error`, is no less than the true percentile, in ns.

        The t-th largest of n, for the largest t with P(Binomial(n, 1 - quantile) <= t) <= error; None before it is earned.
        """
        n = len(self)
        if n < samples_needed(quantile, error):
            return None
        discarded = int(np.searchsorted(_binomial_cdf(n, 1 - quantile), error, side="right")) - 1
        assert discarded >= 1, "samples_needed grants it"
        return int(np.sort(self.raw)[n - discarded])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure one case, and when to believe it.

    Args:
        budget_s: seconds for warm-up and measuring together; only calls too slow for it run over, since the least is one
            warm-up window and three measuring windows of `window_samples` calls each.
        warmup_share: the part of the budget after which warm-up ends, settled or not.
        wanted_samples: measuring may stop before the budget once it is stable and has this many; the default earns p99.
        window_samples: calls that a window holds at least.
        tolerance: relative spread within which window medians agree.

    Raises:
        DualmatchError: a value outside its range.
    """

    budget_s: float = 10.0
    warmup_share: float = 0.3
    wanted_samples: int = samples_needed(0.99)
    window_samples: int = 5
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        # `not a <= x` rather than `x < a`, so that NaN is refused too.
        if not 0 < self.budget_s < math.inf:
            raise DualmatchError(
                f"the time budget of a case must be a positive number of seconds, got {self.budget_s}."
            )
        if not 0 < self.warmup_share < 1:
            raise DualmatchError(f"warm-up's share of the budget must lie between 0 and 1, got {self.warmup_share}.")
        if not 0 < self.tolerance < 1:
            raise DualmatchError(f"the tolerance of the windows must lie between 0 and 1, got {self.tolerance}.")
        if self.wanted_samples < 1 or self.window_samples < 1:
            raise DualmatchError("a case needs at least one sample, and so does a window.")

    @property
    def window_ns(self) -> int:
        return int(self.budget_s * 1e9 / WINDOWS_PER_BUDGET)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What `measure` saw of one workload.

    Attributes:
        warmup, windows: raw latencies per window, before and after the workload was taken to be warm.
        warmed_up: whether warm-up ended because its windows agreed, not because its share of the budget was spent.
        stable: whether the last three windows agree with one another and with the median of all samples.
    """

    warmup: tuple[Nanoseconds, ...]
    windows: tuple[Nanoseconds, ...]
    warmed_up: bool
    stable: bool

    @property
    def samples(self) -> Samples:
        """Every latency of the steady state: no window and no outlier is left out."""
        return Samples(np.concatenate(self.windows))


def agree(medians: Sequence[float], tolerance: float) -> bool:
    """Whether the largest exceeds the smallest by no more than `tolerance` of it."""
    return bool(max(medians) - min(medians) <= tolerance * min(medians))


def _settled(windows: Sequence[Nanoseconds], tolerance: float) -> bool:
    """Whether the last three windows have medians within the tolerance."""
    last = windows[-AGREEING_WINDOWS:]
    return len(last) == AGREEING_WINDOWS and agree([float(np.median(window)) for window in last], tolerance)


def _stable(windows: Sequence[Nanoseconds], tolerance: float) -> bool:
    """As `_settled`, and at the level that will be reported: a late step or a slow drift parts the two."""
    if not _settled(windows, tolerance):
        return False
    last = [float(np.median(window)) for window in windows[-AGREEING_WINDOWS:]]
    return agree([*last, float(np.median(np.concatenate(windows)))], tolerance)


def run_window(workload: Callable[[], object], plan: Plan, clock: Clock = time.perf_counter_ns) -> Nanoseconds:
    """Latencies of calls until the plan's window is over: a share of its budget, and at least `window_samples` of them."""
    latencies = array("q")
    opened = now = clock()
    while len(latencies) < plan.window_samples or now - opened < plan.window_ns:
        start = clock()
        workload()
        now = clock()
        latencies.append(now - start)
    return np.array(latencies, dtype=np.int64)


def measure(
    workload: Callable[[], object], plan: Plan | None = None, *, clock: Clock = time.perf_counter_ns
) -> Measurement:
    """Call `workload` one call after another (single stream) until the plan is satisfied or its budget is spent.

    Load and first run are not in here: time them with `timed` before.
    """
    plan = plan or Plan()
    started = clock()

    def spent_s() -> float:
        return (clock() - started) / 1e9

    warmup = [run_window(workload, plan, clock)]
    while not _settled(warmup, plan.tolerance) and spent_s() < plan.warmup_share * plan.budget_s:
        warmup.append(run_window(workload, plan, clock))

    windows = [run_window(workload, plan, clock)]
    while True:
        stable, num_samples = _stable(windows, plan.tolerance), sum(map(len, windows))
        if stable and num_samples >= plan.wanted_samples:
            break
        if len(windows) >= AGREEING_WINDOWS and spent_s() >= plan.budget_s:
            break
        windows.append(run_window(workload, plan, clock))
    return Measurement(
        warmup=tuple(warmup), windows=tuple(windows), warmed_up=_settled(warmup, plan.tolerance), stable=stable
    )


def timed(action: Callable[[], T], *, clock: Clock = time.perf_counter_ns) -> tuple[T, int]:
    """The action's result and the nanoseconds that it took."""
    start = clock()
    result = action()
    return result, clock() - start
