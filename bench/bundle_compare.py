"""`bench compare`: bundles on backends, interleaved; beside the speed of each its recall, and how near it comes to the machine's roofs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dualmatch.runtime.bundle import Bundle, EncoderName, load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically

from .bundle_latency import caption_length
from .case import ON_CPU, TORCH, Case, checked_backend, work_of_backend
from .compare import Ratio, Variant, VariantResult, compare, ratio
from .diagnostic import NULL, split_behaviour
from .environment import changing_state, environment
from .latency import checked_batches
from .operations import Work
from .pareto import front, picture
from .report_table import format_number
from .roofline import Roofline, roofs_line
from .roofline import picture as roofline_picture
from .roofs import Roofs
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
    roofs: Roofs | None = None
    uncounted: Sequence[str] = ()  # why some variants have no roofline, a sentence each

    def roofline(self, result: VariantResult) -> Roofline | None:
        """How near a variant's median comes to the roofs; None where it runs on no CPU or its work could not be counted."""
        if self.roofs is None or result.work is None:
            return None
        return Roofline(work=result.work, roofs=self.roofs, seconds=result.median.value / 1e9)

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
                against, median, roofline = _against(result, group), result.median, self.roofline(result)
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
                        "roofline": None if roofline is None else roofline.to_json(),
                    }
                )
        return {
            "schema": dict(SCHEMA),
            "subject": dict(self.subject),
            "environment": dict(self.environment),
            "stable": self.stable,
            "roofs": None if self.roofs is None else self.roofs.to_json(),
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
        """Pictures as SVG by name: of each encoder and batch size the variants whose recall is known, of each encoder the roofline."""
        drawn = {}
        for (encoder, batch), group in self.groups.items():
            points = [(r.label, r.median.value / 1e6, float(r.recall["rsum"])) for r in group if r.recall is not None]
            if points and _same_protocol(group):
                drawn[f"pareto-{encoder}-{batch}.svg"] = picture(f"{encoder} encoder, batch {batch}", points)
        for encoder in dict.fromkeys(r.encoder for r in self.results):
            rooflines = [(r, self.roofline(r)) for r in self.results if r.encoder == encoder]
            marks = [(f"{r.label}, batch {r.batch}", found) for r, found in rooflines if found is not None]
            if marks and self.roofs is not None:
                drawn[f"roofline-{encoder}.svg"] = roofline_picture(f"{encoder} encoder, roofline", self.roofs, marks)
        return drawn

    def tables(self) -> Group:
        """A table for every encoder and batch size."""
        shown: list[Any] = []
        for (encoder, batch), group in self.groups.items():
            table = Table(
                title=f"{encoder}, batch {batch}", box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left"
            )
            table.add_column("variant", overflow="fold")
            for header in ("p50 ms", "95 %", "as fast", "95 %", "Rsum", "Pareto", "GEMM", "copy"):
                table.add_column(header, justify="right", no_wrap=True)
            for result, is_on in zip(group, _on_front(group), strict=True):
                against, median, roofline = _against(result, group), result.median, self.roofline(result)
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
                    "-" if roofline is None else f"{roofline.gemm_percent:.0f} %",
                    "-" if roofline is None else f"{roofline.copy_percent:.0f} %",
                )
            shown += [table, Text()]
        sources = sorted({r.recall["source"] for r in self.results if r.recall is not None})
        shown.append(Text(f"Variants took turns, A B B A. Recall: {'; '.join(sources) or 'not known'}."))
        if not _same_protocol(self.results):
            shown.append(
                Text("No Pareto front: the variants' recall is of different pairs; --data measures all on the same.")
            )
        if self.roofs is not None:
            shown.append(Text(f"{roofs_line(self.roofs)}. GEMM, copy: the share of each that the median call reaches."))
        shown += [Text(f"No roofline: {reason}") for reason in self.uncounted]
        return Group(*shown)


def _against(result: VariantResult, group: Sequence[VariantResult]) -> Ratio:
    return ratio(result.round_medians, group[0].round_medians)


def _same_protocol(results: Sequence[VariantResult]) -> bool:
    """Whether all recalls that are known are of the same pairs."""
    protocols = [r.recall["protocol"] for r in results if r.recall is not None]
    return all(one == protocols[0] for one in protocols)


def _on_front(group: Sequence[VariantResult]) -> list[bool | None]:
    """Whether each variant is on the front; None where its recall is not known, and for all where recalls are not of the same pairs."""
    if not _same_protocol(group):
        return [None] * len(group)
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
    if progress is not None:
        progress("counting operations, measuring roofs", 0, 1)
    roofs, works, uncounted = _counted(templates, groups)
    results: list[VariantResult] = []
    for number, (encoder, batch) in enumerate(groups):
        if progress is not None:
            progress(f"comparing {encoder}, batch {batch}", number, len(groups))
        results += compare(
            [
                Variant(
                    label=label,
                    case=replace(case, encoder=encoder, batch=batch),
                    recall=recall,
                    work=_work_of(case, works.get((bundle.hash, encoder, batch))),
                )
                for label, (bundle, case), recall in zip(labels, templates, recalls, strict=True)
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
    return Comparison(
        environment=before | {"after": changing_state()},
        subject=subject,
        results=results,
        roofs=roofs,
        uncounted=uncounted,
    )


def _counted(
    templates: Sequence[tuple[Bundle, Case]], groups: Sequence[tuple[EncoderName, int]]
) -> tuple[Roofs | None, dict[tuple[str, str, int], Work], list[str]]:
    """The roofs, the work of each bundle's encoders at each batch size, and why some of it could not be counted.

    In processes of their own, as all that is measured. Where no variant runs on the CPU there is nothing to hold against its roofs.
    """
    roofs: Roofs | None = None
    works: dict[tuple[str, str, int], Work] = {}
    uncounted: dict[str, None] = {}
    for bundle, case in templates:
        if split_behaviour(case.backend)[0] not in ON_CPU:
            continue
        for encoder, batch in groups:
            if (bundle.hash, encoder, batch) in works:
                continue
            with Worker(replace(case, backend=NULL, encoder=encoder, batch=batch)) as worker:
                roofs = roofs or worker.call("roofs")
                try:
                    works[bundle.hash, encoder, batch] = worker.call("work")
                except DualmatchError as error:
                    uncounted[f"{bundle.path}: {error}"] = None
    return roofs, works, list(uncounted)


def _work_of(case: Case, work: Work | None) -> Work | None:
    return None if work is None else work_of_backend(case.backend, work)


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
