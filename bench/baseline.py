"""A comparison against an earlier one of the same machine: which cases have become slower."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json

from .bundle_compare import SCHEMA


@dataclass(frozen=True, kw_only=True)
class Slowdown:
    """One case against the same case of the baseline: `value` above 1 is slower now, with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    failed: bool

    def __str__(self) -> str:
        change = f"{100 * (self.value - 1):+.1f} % ({100 * (self.low - 1):+.1f} to {100 * (self.high - 1):+.1f})"
        return f"{self.name}: {change}{' SLOWER' if self.failed else ''}"


def against_baseline(report: Mapping[str, Any], baseline: Path, limit: float) -> list[Slowdown]:
    """Each case's median against the baseline's; a case fails where it is slower by more than `limit` and the interval is above 1.

    Args:
        report: `Comparison.to_json` of now.
        baseline: the JSON of an earlier `bench compare`.
        limit: 0.1 for 10 %.

    Raises:
        DualmatchError: no report of `bench compare`, of another processor or GPU, or with other cases.
    """
    before = read_json(baseline, "report of `bench compare`")
    if not isinstance(before, dict) or before.get("schema") != SCHEMA:
        raise DualmatchError(f"{baseline} is not a report of `bench compare --out`.")
    machines = [_machine(values["environment"]) for values in (report, before)]
    if machines[0] != machines[1]:
        raise DualmatchError(
            f"the baseline {baseline} was measured on {machines[1]}, this is {machines[0]}: measure a baseline here."
        )
    medians = [
        {f"{c['label']}, {c['encoder']}, batch {c['batch']}": np.array(c["round_medians_ms"]) for c in values["cases"]}
        for values in (report, before)
    ]
    if missing := sorted(set(medians[1]) - set(medians[0])):
        raise DualmatchError(f"the baseline {baseline} has cases that this run has not: {'; '.join(missing)}.")
    found = []
    for name, earlier in medians[1].items():
        value, low, high = _slowdown(medians[0][name], earlier)
        found.append(Slowdown(name=name, value=value, low=low, high=high, failed=value > 1 + limit and low > 1))
    return found


def _slowdown(now: Any, before: Any) -> tuple[float, float, float]:
    """The ratio of the medians of two runs, with a bootstrap over the rounds of each, which are not pairs."""
    generator, medians = np.random.default_rng(0), []
    for rounds in (now, before):
        drawn = rounds[generator.integers(len(rounds), size=(2000, len(rounds)))]
        medians.append(np.median(drawn, axis=1))
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(np.median(now) / np.median(before)), float(low), float(high)


def _machine(values: Mapping[str, Any]) -> str:
    gpus = ", ".join(gpu["name"] for gpu in values.get("gpus") or ())
    return f"{values['cpu']['model']}, {values['cpu']['logical_cores']} cores" + (f", {gpus}" if gpus else "")
