"""The report's sections on speed: latency distributions, variants against each other, roofline."""

from collections.abc import Mapping, Sequence

import numpy as np

from dualmatch.bench import pareto, roofline
from dualmatch.bench.measure import Nanoseconds
from dualmatch.bench.report_table import format_number
from dualmatch.runtime.page import Markup, shown, table
from dualmatch.runtime.plot import Axis, Row, rows, tone_of

from .found import Findings, FoundReport, Values
from .parts import Section, figure

NUM_BINS = 40
SHOWN_UP_TO = 0.995  # of the samples: the axis would belong to a single stall; max stands in the table
PERCENTILES = ("p50", "p90", "p99")


def latency_section(found: Findings) -> Section | None:
    """A distribution for every case of every `bench latency` and `bench throughput`."""
    body: list[str] = []
    for report in found.latencies:
        body += _latency(report)
    return Section(key="latency", title="Latency and throughput", body=body) if body else None


def _latency(report: FoundReport) -> list[str]:
    subject = report.values["subject"]
    words = [str(subject[key]) for key in ("backend", "scenario") if subject.get(key)]
    precision = "+".join(dict.fromkeys((subject.get("precision") or {}).values()))
    facts = ", ".join(
        [
            *([precision] if precision else []),
            *words,
            *([f"{subject['threads']} thread{'s' * (subject['threads'] != 1)}"] if subject.get("threads") else []),
        ]
    )
    figures = []
    for encoder in dict.fromkeys(case["encoder"] for case in report.values["cases"]):
        cases = [(n, case) for n, case in enumerate(report.values["cases"]) if case["encoder"] == encoder]
        title = f"{encoder} encoder, milliseconds per call"
        lines = [_distribution(case, report.samples.get(n), tone_of(at)) for at, (n, case) in enumerate(cases)]
        plot = rows(title, lines, Axis(label="ms per call of a whole batch", log=True))
        figures.append(figure(plot, _latency_table([case for _, case in cases]), heading=title))
    note = "Shape: samples. " if report.samples else "Box: middle half. "
    note += (
        "Line: 95 % interval of the median; point: the median."
        if report.samples
        else "Line: from the fastest to p99; point: the median."
    )
    parts = [f"<h3>{shown(report.name)}</h3>", f'<p class="soft">{shown(report.machine)}. {shown(facts)}. {note}</p>']
    if not all(case["stable"] for case in report.values["cases"]):
        parts.append('<p class="bad">UNSTABLE cases are marked: their windows disagree, do not quote them.</p>')
    return [*parts, *figures, *_stages(report)]


def _distribution(case: Values, samples: Nanoseconds | None, tone: int) -> Row:
    block = case["request_latency"]
    label = f"batch {case['batch']}" + ("" if case["stable"] else " UNSTABLE")
    median = block.get("p50")
    dots = [] if median is None else [(float(median), True)]
    if median is not None:
        label += f": median {format_number(median)} ms"
    if samples is not None and len(samples) >= 2 * NUM_BINS:
        interval = (block.get("intervals") or {}).get("p50")
        return Row(
            label=label, outline=_outline(samples), line=tuple(interval) if interval else None, dots=dots, tone=tone
        )
    box = (block["p25"], block["p75"]) if "p25" in block and "p75" in block else None
    far = next((block[p] for p in reversed(PERCENTILES) if p in block), block["max"])
    return Row(label=label, box=box, line=(block["min"], far), dots=dots, tone=tone)


def _outline(samples: Nanoseconds) -> list[tuple[float, float]]:
    """The shape of a sample: a histogram in logarithms, its highest bin 1."""
    logs = np.log(samples / 1e6)
    logs = logs[logs <= np.quantile(logs, SHOWN_UP_TO)]
    counts, edges = np.histogram(logs, bins=NUM_BINS)
    heights, middles = counts / counts.max(), np.exp((edges[:-1] + edges[1:]) / 2)
    return [(float(at), float(height)) for at, height in zip(middles, heights, strict=True)]


def _latency_table(cases: Sequence[Values]) -> Markup:
    cells = []
    for case in cases:
        block = case["request_latency"]
        intervals = block.get("intervals") or {}
        row = [str(case["batch"]), str(block["count"])]
        for p in PERCENTILES:
            row.append("-" if p not in block else format_number(block[p]))
            if p == "p50":
                row.append(_interval(intervals.get(p)))
        row += [format_number(block["max"]), format_number(case["item_throughput"]["avg"])]
        row += [format_number(case[name]["avg"]) for name in ("load_time", "first_request_latency")]
        row += [
            f"{case['peak_resident_memory']['avg'] / 2**20:.0f}",
            Markup("yes") if case["stable"] else Markup('<b class="bad">UNSTABLE</b>'),
        ]
        cells.append(row)
    heads = ("batch", "samples", "p50", "95 %", "p90", "p99", "max", "items/s", "load", "first", "RSS, MiB", "stable")
    return table(heads, cells)


def _stages(report: FoundReport) -> list[str]:
    """Medians of decode, pre-process, tokenise, copies and compute, where they were timed."""
    names = list(dict.fromkeys(
        key for case in report.values["cases"] for key, block in case.items()
        if key.endswith("_time") and _stage_median(block) != "-" and key not in ("queue_time", "service_time")
    ))  # fmt: skip
    if not names:
        return []
    cells = [
        (case["encoder"], str(case["batch"]), *(_stage_median(case.get(n)) for n in names))
        for case in report.values["cases"]
    ]
    heads = ("encoder", "batch", *(name.removesuffix("_time").replace("_", " ") for name in names))
    return [f"<details><summary>stages, median ms per call</summary>{table(heads, cells)}</details>"]


def _stage_median(block: object) -> str:
    median = block.get("p50") if isinstance(block, Mapping) else None
    return format_number(median) if isinstance(median, int | float) else "-"


def _interval(pair: Sequence[float] | None) -> str:
    return "-" if not pair else f"{format_number(pair[0])} to {format_number(pair[1])}"


def compare_section(found: Findings) -> Section | None:
    """Speed beside recall, for every encoder and batch size of every `bench compare`."""
    body: list[str] = []
    for report in found.comparisons:
        figures = [_compared(*key, group) for key, group in _groups(report).items()]
        sources = sorted({case["recall"]["source"] for case in report.values["cases"] if case["recall"]})
        note = f"{report.machine}. Variants took turns, A B B A. Recall: {'; '.join(sources) or 'not known'}."
        body += [f"<h3>{shown(report.name)}</h3>", f'<p class="soft">{shown(note)}</p>', *figures]
    return Section(key="compare", title="Speed beside recall", body=body) if body else None


def _groups(report: FoundReport) -> dict[tuple[str, int], list[Values]]:
    groups: dict[tuple[str, int], list[Values]] = {}
    for case in report.values["cases"]:
        groups.setdefault((case["encoder"], case["batch"]), []).append(case)
    return groups


def _compared(encoder: str, batch: int, cases: Sequence[Values]) -> Markup:
    title = f"{encoder} encoder, batch {batch}"
    known = [case for case in cases if case["recall"]]
    comparable = len({str(case["recall"].get("protocol")) for case in known}) <= 1  # each gate had its own pairs
    cells = []
    for case in cases:
        low, high = case["times_as_fast"]["interval"]
        reference = case["label"] == case["times_as_fast"]["against"]
        number = str(known.index(case) + 1) if case in known else "-"
        cells.append((
            number, case["label"] + ("" if case["stable"] else " UNSTABLE"), format_number(case["request_latency"]["p50"]), _interval(case["request_latency"]["intervals"]["p50"]),
            f"{case['times_as_fast']['value']:.2f}", "reference" if reference else f"{low:.2f} to {high:.2f}",
            f"{case['recall']['rsum']:.1f}" if case["recall"] else "-", {True: "yes", False: "no", None: "-"}[case["pareto"] if comparable else None],
        ))  # fmt: skip
    numbers = table(("", "variant", "p50 ms", "95 %", "times as fast", "95 %", "Rsum", "on the front"), cells)
    if not comparable:
        numbers = Markup(
            f"{numbers}<p class='bad'>The recalls were measured on different pairs and do not compare: measure them with --data.</p>"
        )
    elif known:
        points = [(case["label"], case["request_latency"]["p50"], case["recall"]["rsum"]) for case in known]
        return figure(pareto.plot(f"Speed beside recall: {title}", points), numbers, heading=title)
    lines = [
        Row(
            label=f"{case['label']}: {format_number(case['request_latency']['p50'])} ms",
            line=tuple(case["request_latency"]["intervals"]["p50"]),
            dots=[(case["request_latency"]["p50"], True)],
            tone=tone_of(number),
        )
        for number, case in enumerate(cases)
    ]
    return figure(
        rows(f"Median latency: {title}", lines, Axis(label="median latency, ms", log=True)), numbers, heading=title
    )


def roofline_section(found: Findings) -> Section | None:
    """What each encoder reaches of the machine's arithmetic and memory."""
    body: list[str] = []
    for report in found.comparisons:
        roofs, cases = report.values.get("roofs"), [case for case in report.values["cases"] if case.get("roofline")]
        if roofs and cases:
            body += [
                f"<h3>{shown(report.name)}</h3>",
                f'<p class="soft">Roofs measured on the same machine: {shown(report.machine)}. {_roof_words(roofs)}</p>',
                *(
                    _roofline(encoder, [case for case in cases if case["encoder"] == encoder], roofs)
                    for encoder in dict.fromkeys(case["encoder"] for case in cases)
                ),
            ]
    return Section(key="roofline", title="Roofline", body=body) if body else None


def _roof_words(roofs: Values) -> str:
    rates = ", ".join(f"{shown(name)} {block['avg'] / 1e9:.0f}" for name, block in roofs["gemm"].items())
    return f"GEMM in G operations/s: {rates}; copy in GB/s: {roofs['copy']['avg'] / 1e9:.1f}."


def _roofline(encoder: str, cases: Sequence[Values], roofs: Values) -> Markup:
    points = [(f"{case['label']}, batch {case['batch']}", case["roofline"]) for case in cases]
    cells = [
        (
            str(number), label, f"{one['intensity']:.1f}", f"{one['achieved']['operations_per_s'] / 1e9:.1f}",
            f"{one['percent']['gemm']:.0f}", f"{one['percent']['copy']:.0f}", "GEMM" if one["bound"] == "gemm" else "copy",
        )
        for number, (label, one) in enumerate(points, 1)
    ]  # fmt: skip
    title = f"{encoder} encoder against the roofs of this machine"
    heads = ("", "variant", "op/byte", "G op/s", "% of GEMM", "% of copy", "roof")
    return figure(roofline.plot(title, roofs, points), table(heads, cells), heading=title)
