"""Variants of a bundle against each other in one run: backends, precisions, torch; speed with the recall of each beside it.

The variants take turns in an order that reads the same backwards (A B B A), each in a process of its own that waits while another
runs: a drift of the machine meets all of them alike and drops out of the ratios.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

from .case import Case
from .measure import Nanoseconds, Percentile, Samples
from .operations import Work
from .worker import Worker

RESAMPLES = 2000
LEAST_ROUNDS = 4
WARMUP_SHARE = 0.2
LEAST_CALLS = 5

Progress = Callable[[str, int, int], None]
Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast as the reference: above 1 is faster; with the ends of a 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One variant at one encoder and batch size.

    Attributes:
        label: what the variant is called in the report.
        provider: what it really ran on.
        blocks: latencies in ns of each block, two a round, in the order measured.
        warmed_up: whether its warm-up settled.
        recall: of the whole variant, as `Recall.to_json`; None where there is none.
        work: of one call; None where it could not be counted.
    """

    label: str
    encoder: str
    batch: int
    provider: str
    blocks: tuple[Nanoseconds, ...]
    warmed_up: bool
    load_ns: int
    recall: Mapping[str, Any] | None = None
    work: Work | None = None

    @property
    def round_medians(self) -> Points:
        """The median latency of each round, (rounds,) ns: the mean of its two blocks' medians."""
        medians = np.array([float(np.median(block)) for block in self.blocks])
        return medians.reshape(-1, 2).mean(1)

    @property
    def samples(self) -> Samples:
        """Every latency."""
        return Samples(np.concatenate(self.blocks))

    @property
    def median(self) -> Percentile:
        """Over all calls."""
        found = self.samples.percentile(0.5)
        assert found is not None, "four rounds of two blocks of five calls earn a median"
        return found


def ratio(variant: Points, reference: Points, *, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """How many times as fast `variant` is, from the medians of the same rounds, with a bootstrap interval over rounds.

    Rounds are drawn in pairs, so what slowed down both in a round cancels. The value is the median over rounds: a round that something
    else disturbed for one variant alone would pull a mean with it, and a second run would not repeat that.

    Args:
        variant, reference: (rounds,) ns.
    """
    logs = np.log(reference / variant)
    drawn = np.random.default_rng(seed).integers(len(logs), size=(RESAMPLES, len(logs)))
    low, high = np.quantile(np.median(logs[drawn], axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Ratio(value=float(np.exp(np.median(logs))), low=float(np.exp(low)), high=float(np.exp(high)))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A label and its case, whose encoder and batch size are filled in for each comparison."""

    label: str
    case: Case
    recall: Mapping[str, Any] | None = None
    work: Work | None = None


def compare(
    variants: Sequence[Variant], *, budget_s: float, progress: Callable[[], None] = lambda: None
) -> list[VariantResult]:
    """Measure variants of one encoder at one batch size in turns, A B … B A, until the budget is spent.

    Args:
        budget_s: seconds for each variant, warm-up included; at least four rounds are measured.
        progress: called after every round.

    Raises:
        DualmatchError: fewer than two variants, and what opening or running one raises.
    """
    if len(variants) < 2:
        raise DualmatchError("a comparison needs at least two variants: several bundles, several --backends, or both.")
    workers: list[Worker] = []
    try:
        workers += [Worker(variant.case) for variant in variants]
        warmed = [worker.call("warm_up", WARMUP_SHARE * budget_s) for worker in workers]
        facts = [worker.call("facts") for worker in workers]
        blocks: list[list[Nanoseconds]] = [[] for _ in workers]
        rounds = 10
        seconds = (1 - WARMUP_SHARE) * budget_s / (2 * rounds)
        spent = np.zeros(len(workers))
        for number in range(rounds):
            if number >= LEAST_ROUNDS and spent.max() > budget_s:
                break  # calls slower than the budget
            for index in (*range(len(workers)), *reversed(range(len(workers)))):
                block = workers[index].call("block", seconds, LEAST_CALLS)
                blocks[index].append(block)
                spent[index] += block.sum() / 1e9
            progress()
    finally:
        for worker in workers:
            worker.close()
    return [
        VariantResult(
            label=variant.label,
            encoder=variant.case.encoder,
            batch=variant.case.batch,
            provider=fact["provider"],
            blocks=tuple(own),
            warmed_up=warm,
            load_ns=fact["load_ns"],
            recall=variant.recall,
            work=variant.work,
        )
        for variant, fact, own, warm in zip(variants, facts, blocks, warmed, strict=True)
    ]
