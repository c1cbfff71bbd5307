"""The page: which sections there are, in which order, what is missing and which command makes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from dualmatch.runtime.bundle import MANIFEST
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.page import Markup, page, shown, table
from dualmatch.runtime.plot import STYLE as PLOT_STYLE
from dualmatch.runtime.regions import RegionFile

from . import results, speed
from .found import Findings, discover
from .overview import overview_section
from .parts import STYLE, Section
from .pictures import PICTURES_STYLE, Pictures, pictures_of

REPORT = "report.html"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_report` made.

    Attributes:
        sections: their titles, in order.
        missing: what the folder does not hold, and the command that makes it.
        unreadable: (file, sentence).
    """

    path: Path
    sections: tuple[str, ...]
    missing: tuple[tuple[str, str], ...] = ()
    unreadable: tuple[tuple[str, str], ...] = field(default=())


def write_report(
    root: Path,
    out: Path | None = None,
    *,
    dataset: Dataset | None = None,
    regions: RegionFile | None = None,
    num_queries: int = 6,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Written:
    """Report on a folder in one HTML file that needs no other; the same folder gives the same bytes.

    Args:
        out: ROOT/report.html by default; replaced whole.
        dataset: run every trained network's bundle on it, for recall, retrieval sheets, failures and attention.
        regions: for networks with precomputed regions.
        num_queries: how many queries each way the sheets show.

    Raises:
        DualmatchError: nothing to report on, a place that cannot be written to, or a bundle that cannot run on `dataset`.
    """
    place = _checked_place(root, out)
    found = discover(root)
    pictures = None
    if dataset is not None:
        pictures = pictures_of(
            found, dataset, regions=regions, num_queries=num_queries, backend=backend, threads=threads,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
    sections = _sections(found, pictures)
    missing = _missing(root, found, pictures, dataset)
    title = f"dualmatch report: {root.resolve().name}"
    try:
        write_atomically(
            place, page(title, _body(title, found, sections, missing), style=PLOT_STYLE + STYLE + PICTURES_STYLE)
        )
    except OSError as error:
        raise DualmatchError(f"the report {place} cannot be written: {error.strerror}.") from None
    return Written(
        path=place,
        sections=tuple(one.title for one in sections),
        missing=tuple(missing),
        unreadable=tuple(found.unreadable),
    )


def _checked_place(root: Path, out: Path | None) -> Path:
    """Where the page goes; refused before the work."""
    if out is None:
        if any((root / name).is_file() for name in (MANIFEST, "index.json")):
            raise DualmatchError(
                f"{root} is complete in itself, and a report does not belong into it; say where to write it with --out FILE.html."
            )
        return root / REPORT
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise DualmatchError(f"the report is one .html file, not {out}; give another name.")
    if not out.parent.is_dir():
        raise DualmatchError(f"the report {out} cannot be written: there is no folder {out.parent}.")
    return out


def _sections(found: Findings, pictures: Pictures | None) -> list[Section]:
    models = [] if pictures is None else pictures.models
    measured = [(f"{model.label}, run for this report", model.recall.to_json()) for model in models]
    sections = [
        overview_section(found, {model.bundle.hash: model.recall.to_json() for model in models}),
        results.recall_section(found, measured),
        results.precision_section(found),
        speed.compare_section(found),
        speed.latency_section(found),
        speed.roofline_section(found),
        *([] if pictures is None else pictures.sections),
        results.training_section(found),
        results.bundles_section(found),
    ]
    return [one for one in sections if one is not None]


def _missing(root: Path, found: Findings, pictures: Pictures | None, dataset: Dataset | None) -> list[tuple[str, str]]:
    """What there is not, and how to make it."""
    bundle = _path(root, found.bundles[0].name) if found.bundles else "BUNDLE"
    run = _path(root, found.runs[0].name) if found.runs else "RUN"
    data = quote(str(found.data[0])) if found.data else "DATA"
    if dataset is not None:
        data = quote(str(dataset.root or dataset.name))
    split = "test" if dataset is None else quote(",".join(dataset.splits))
    second = _path(root, found.bundles[1].name) if len(found.bundles) > 1 else "BUNDLE2"
    here = quote(str(root))
    wanted = [
        (found.runs, "training curves", f"dualmatch train RECIPE --data {data} --out {here}/run"),
        (
            found.bundles,
            "recall before and after export",
            f"dualmatch export {run} --data {data} --out {here}/bundle --fp16",
        ),
        (
            found.latencies,
            "latency distributions",
            f"dualmatch bench latency {bundle} --out {here}/latency.json --samples {here}/latency-samples.jsonl",
        ),
        (
            found.comparisons,
            "speed beside recall, roofline",
            f"dualmatch bench compare {bundle} {second} --out {here}/compare.json",
        ),
        (
            found.recalls,
            "recall by kind of caption",
            f"dualmatch bench recall {bundle} --data {data} --split {split} --out {here}/recall.json",
        ),
        (pictures, "retrieval sheets and failures", f"dualmatch report {here} --data {data} --split {split}"),
    ]
    missing = [(what, command) for there, what, command in wanted if not there]
    if found.comparisons and not any(report.values.get("roofs") for report in found.comparisons):
        missing.append(("roofline", f"dualmatch bench compare {bundle} {second} --out {here}/compare.json"))
    if pictures is not None and not pictures.has_attention:
        missing.append(
            ("attention pictures", f"dualmatch export {run} --data {data} --out {here}/bundle-attention --attention")
        )
    return missing


def _path(root: Path, name: str) -> str:
    return quote(str(root if root.resolve().name == name and not (root / name).exists() else root / name))


def _body(title: str, found: Findings, sections: Sequence[Section], missing: Sequence[tuple[str, str]]) -> str:
    links = [(one.key, one.title) for one in sections]
    parts = ["<header>", f"<h1>{shown(title)}</h1>", _summary(found)]
    if missing:
        links.append(("missing", "Not here yet"))
    if found.unreadable:
        links.append(("unreadable", "Could not be read"))
    parts.append("<nav>" + "".join(f'<a href="#{key}">{shown(words)}</a>' for key, words in links) + "</nav></header>")
    parts += [one.html() for one in sections]
    if missing:
        items = "".join(
            f'<li class="todo">{shown(what)}: <code>{shown(command)}</code></li>' for what, command in missing
        )
        parts.append(Section(key="missing", title="Not here yet", body=[f"<ul>{items}</ul>"]).html())
    if found.unreadable:
        cells = [(name, Markup(f'<span class="bad">{shown(words)}</span>')) for name, words in found.unreadable]
        parts.append(Section(key="unreadable", title="Could not be read", body=[table(("file", "why"), cells)]).html())
    return "\n".join(parts)


def _summary(found: Findings) -> str:
    """One sentence on what was found."""
    counts = [
        (len(found.runs), "training run"), (len(found.bundles), "bundle"), (len(found.latencies), "latency or throughput report"),
        (len(found.comparisons), "comparison"), (len(found.recalls) + len(found.evaluations), "recall report"), (len(found.verifications), "verification"),
    ]  # fmt: skip
    words = [f"{number} {what}{'' if number == 1 else 's'}" for number, what in counts if number]
    return f'<p class="soft">Found: {shown(", ".join(words))}. Every plot has its numbers beside or below it.</p>'
