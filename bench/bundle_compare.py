"""`bench compare`: bundles on backends, interleaved, the recall of each beside it; and the check against an earlier run."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dualmatch.runtime.bundle import Bundle, EncoderName, load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json, write_atomically

from .bundle_latency import caption_length
from .case import TORCH, Case, checked_backend
from .compare import Ratio, Variant, VariantResult, compare, ratio
from .diagnostic import split_behaviour
from .environment import changing_state, environment
from .latency import checked_batches
from .pareto import front, picture
from .report_table import format_number
from .variant_recall import recorded_recall
from .worker import Worker

SCHEMA = {"name": "dualmatch.bench.compare", "version": 1}
Progress = Callable[[str, int, int], None]
Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All variants at all encoders and batch sizes; the first variant is the reference of every ratio."""

    environment: Mapping[str, Any]
    subject: Mapping[str, Any]
    results: Sequence[VariantResult]

    @property
    def groups(self) -> dict[Key, list[VariantResult]]:
        """The variants of each encoder and batch size, the reference first."""
        groups: dict[Key, list[VariantResult]] = {}
        for result in self.results:
            groups.setdefault((result.encoder, result.batch), []).append(result)
        return groups

    @property
    def stable(self) -> bool:
        """Whether every variant's warm-up settled."""
        return all(result.warmed_up for result in self.results)

    def to_json(self) -> dict[str, Any]:
        cases = []
        for group in self.groups.values():
            on = _on_front(group)
            for result, is_on in zip(group, on, strict=True):
                against, median = _against(result, group), result.median
                cases.append(
                    {
                        "label": result.label,
                        "encoder": result.encoder,
                        "batch": result.batch,
                        "provider": result.provider,
                        "load_time": {"unit": "ms", "avg": result.load_ns / 1e6},
                        "request_latency": {
                            "unit": "ms",
                            "avg": float(result.samples.raw.mean() / 1e6),
                            "p50": median.value / 1e6,
                            "intervals": {"p50": [median.low / 1e6, median.high / 1e6]},
                            "count": len(result.samples),
                        },
                        "times_as_fast": {
                            "against": group[0].label,
                            "value": against.value,
                            "interval": [against.low, against.high],
                            "interval_confidence": 0.95,
                        },
                        "round_medians_ms": (result.round_medians / 1e6).tolist(),
                        "stable": result.warmed_up,
                        "recall": result.recall,
                        "pareto": is_on,
                    }
                )
        return {
            "schema": dict(SCHEMA),
            "subject": dict(self.subject),
            "environment": dict(self.environment),
            "stable": self.stable,
            "cases": cases,
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        write_atomically(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    def sample_lines(self) -> list[str]:
        """Every latency with its block, in the order measured."""
        return [
            json.dumps(
                {"label": r.label, "encoder": r.encoder, "batch": r.batch, "block": number, "latency_ns": latency}
            )
            for r in self.results
            for number, block in enumerate(r.blocks)
            for latency in block.tolist()
        ]

    def pictures(self) -> dict[str, str]:
        """The Pareto picture of each encoder and batch size, as SVG by name; of those variants whose recall is known."""
        drawn = {}
        for (encoder, batch), group in self.groups.items():
            points = [(r.label, r.median.value / 1e6, float(r.recall["rsum"])) for r in group if r.recall is not None]
            if points:
                drawn[f"pareto-{encoder}-{batch}.svg"] = picture(f"{encoder} encoder, batch {batch}", points)
        return drawn

    def tables(self) -> Group:
        """A table for every encoder and batch size."""
        shown: list[Any] = []
        for (encoder, batch), group in self.groups.items():
            table = Table(
                title=f"{encoder}, batch {batch}", box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left"
            )
            table.add_column("variant", overflow="fold")
            for header in ("p50 ms", "95 %", "times as fast", "95 %", "Rsum", "Pareto"):
                table.add_column(header, justify="right", no_wrap=True)
            for result, is_on in zip(group, _on_front(group), strict=True):
                against, median = _against(result, group), result.median
                label = Text(result.label)
                if not result.warmed_up:
                    label.append(" UNSTABLE", style="bold red")
                table.add_row(
                    label,
                    format_number(median.value / 1e6),
                    f"{format_number(median.low / 1e6)}-{format_number(median.high / 1e6)}",
                    f"{against.value:.2f}",
                    "reference" if result is group[0] else f"{against.low:.2f}-{against.high:.2f}",
                    "-" if result.recall is None else f"{result.recall['rsum']:.1f}",
                    {True: "yes", False: "no", None: "-"}[is_on],
                )
            shown += [table, Text()]
        sources = sorted({r.recall["source"] for r in self.results if r.recall is not None})
        shown.append(Text(f"Variants took turns, A B B A. Recall: {'; '.join(sources) or 'not known'}."))
        return Group(*shown)


def _against(result: VariantResult, group: Sequence[VariantResult]) -> Ratio:
    return ratio(result.round_medians, group[0].round_medians)


def _on_front(group: Sequence[VariantResult]) -> list[bool | None]:
    """Whether each variant is on the front; None where its recall is not known."""
    known = [r for r in group if r.recall is not None]
    on = iter(front([(r.median.value, float(r.recall["rsum"])) for r in known if r.recall is not None]))
    return [None if r.recall is None else next(on) for r in group]


def compare_bundles(
    paths: Sequence[Path],
    *,
    backends: Sequence[str],
    run: Path | None = None,
    encoders: Sequence[EncoderName] = ("image", "text"),
    batches: Sequence[int] = (1, 32),
    threads: int = 0,
    length: int = 16,
    budget_s: float = 10.0,
    data: str | None = None,
    splits: Sequence[str] = ("test",),
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare every bundle on every backend; torch backends run the trained run once, beside the first bundle.

    Args:
        paths: bundles, such as the same run at several precisions. The first on the first backend is the reference.
        budget_s: seconds for each variant at each encoder and batch size.
        data: measure recall on this data set; None takes what each bundle's gate recorded.

    Raises:
        DualmatchError: fewer than two variants, or one that cannot run here.
    """
    checked_batches(batches)
    bundles = [load_bundle(path) for path in paths]
    templates = [
        (bundle, Case(bundle=path, encoder="image", backend=backend, run=run, threads=threads, seed=seed,
                      length=caption_length(bundle, length)))
        for index, (path, bundle) in enumerate(zip(paths, bundles, strict=True))
        for backend in backends
        if index == 0 or split_behaviour(backend)[0] not in TORCH
    ]  # fmt: skip
    labels = _labels(templates)
    if len(templates) < 2:
        raise DualmatchError("a comparison needs at least two variants: several bundles, several --backends, or both.")
    if len(set(labels)) < len(labels):
        raise DualmatchError("a bundle or a backend was given twice: every variant needs a name of its own.")
    for _, case in templates:
        checked_backend(case)
    before = environment()
    recalls: list[Mapping[str, Any] | None] = []
    measured: dict[tuple[str, str], Mapping[str, Any] | None] = {}
    for number, (bundle, case) in enumerate(templates):
        if progress is not None:
            progress("recall", number, len(templates))
        if data is None:
            recalls.append(recorded_recall(case, bundle))
            continue
        key = (bundle.hash, split_behaviour(case.backend)[0])  # a built-in fault changes the speed only
        if key not in measured:
            with Worker(replace(case, backend=key[1])) as worker:
                measured[key] = worker.call("recall", data, list(splits))
        recalls.append(measured[key])
    groups = [(encoder, batch) for encoder in encoders for batch in batches]
    results: list[VariantResult] = []
    for number, (encoder, batch) in enumerate(groups):
        if progress is not None:
            progress(f"comparing {encoder}, batch {batch}", number, len(groups))
        results += compare(
            [
                Variant(label=label, case=replace(case, encoder=encoder, batch=batch), recall=recall)
                for label, (_, case), recall in zip(labels, templates, recalls, strict=True)
            ],
            budget_s=budget_s,
        )
    subject = {
        "bundles": {bundle.hash: str(bundle.path) for bundle in bundles},
        "backends": list(backends),
        "run": None if run is None else str(run),
        "threads": threads,
        "caption_length": length,
        "budget_s": budget_s,
        "data": data,
        "splits": list(splits),
        "seed": seed,
    }
    return Comparison(environment=before | {"after": changing_state()}, subject=subject, results=results)


def _labels(templates: Sequence[tuple[Bundle, Case]]) -> list[str]:
    """What tells the variants apart: precision and backend, and the bundle's folder where there are several of a precision."""
    labels = []
    for bundle, case in templates:
        if split_behaviour(case.backend)[0] in TORCH:
            labels.append(f"fp32 {case.backend}")
            continue
        precisions = dict.fromkeys(entry.precision for entry in bundle.manifest.encoders.values())
        labels.append(f"{'+'.join(precisions)} {case.backend}")
    if len(set(labels)) == len(labels):
        return labels
    return [f"{bundle.path.name} {label}" for (bundle, _), label in zip(templates, labels, strict=True)]


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
