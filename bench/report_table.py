"""A report as a table that fits 80 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .measure import TABLE_QUANTILES, samples_needed
from .result import CaseResult
from .roofline import roofs_line
from .stages import END_TO_END

if TYPE_CHECKING:
    from .report import LatencyReport

TITLES = {
    "single-stream": "Latency, single stream",
    "server": "Latency under load, from the scheduled start",
    "offline": "Throughput, offline",
}
OVERHEAD_LIMIT_US = 50


def format_number(value: float) -> str:
    """Three significant digits, or the whole number where it has more: no latency repeats better than that."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _percentile_cell(case: CaseResult, quantile: float) -> str:
    if len(case.raw) < samples_needed(quantile):
        return f"n<{samples_needed(quantile)}"
    percentile = case.distribution.percentile(quantile)
    return "?" if percentile is None else format_number(percentile.value / 1e6)


def _caption(cases: Sequence[CaseResult]) -> str:
    needed = ", ".join(f"{name} from {samples_needed(quantile)}" for name, quantile in TABLE_QUANTILES.items())
    overhead_us = max(case.overhead_ns for case in cases) / 1e3
    caption = (
        f"Milliseconds per call of a whole batch; items/s from the mean. A percentile needs samples: {needed}. "
        f"The harness itself takes {format_number(overhead_us)} µs of each call."
    )
    if overhead_us > OVERHEAD_LIMIT_US:
        caption += f" That is above {OVERHEAD_LIMIT_US} µs: this machine is busy."
    if any(case.server is not None and case.server.overloaded for case in cases):
        caption += " OVERLOADED: requests arrive faster than they are answered; lower the rate."
    if any(_percentile_cell(case, quantile) == "?" for case in cases for quantile in TABLE_QUANTILES.values()):
        caption += " ?: the queue was empty too rarely to tell."
    if not all(case.stable for case in cases):
        caption += (
            " UNSTABLE: the windows disagree at the end; do not quote the row, measure longer or on a quieter machine."
        )
    return caption


def latency_table(cases: Sequence[CaseResult]) -> Table:
    """One row per case, in ms; a percentile without enough samples shows how many it lacks instead of a number."""
    table = _table(TITLES[cases[0].scenario], _caption(cases))
    table.add_column("encoder", overflow="fold")
    for header in ("batch", "load", "first", "samples", *TABLE_QUANTILES, "max", "items/s"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("stable", no_wrap=True)
    for case in cases:
        overloaded = case.server is not None and case.server.overloaded
        table.add_row(
            case.encoder,
            str(case.batch),
            *(format_number(ns / 1e6) for ns in (case.load_ns, case.first_ns)),
            str(len(case.raw)),
            *(_percentile_cell(case, quantile) for quantile in TABLE_QUANTILES.values()),
            format_number(case.raw.max() / 1e6),
            format_number(case.items_per_s),
            Text("yes") if case.stable else Text("OVERLOADED" if overloaded else "UNSTABLE", style="bold red"),
        )
    return table


def intervals_table(cases: Sequence[CaseResult]) -> Table:
    """The 95 % interval of each percentile and the memory of each case; for throughput, that of the rate."""
    table = _table("95 % intervals, and memory (MiB)", "")
    table.add_column("encoder", overflow="fold")
    offline = all(case.offline is not None for case in cases)
    headers = ("batch", *(("items/s",) if offline else ()), *TABLE_QUANTILES, "p99.9", "RSS", "device")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for case in cases:
        cells = [str(case.batch)]
        if case.offline is not None:
            rate = case.offline.interval()
            cells.append("-" if rate is None else f"{format_number(rate[0])}-{format_number(rate[1])}")
        for quantile in TABLE_QUANTILES.values():
            p = case.distribution.percentile(quantile)
            cells.append("-" if p is None else f"{format_number(p.low / 1e6)}-{format_number(p.high / 1e6)}")
        extreme = case.distribution.percentile(0.999)
        cells.append("-" if extreme is None else format_number(extreme.value / 1e6))
        cells.append(f"{case.peak_memory_bytes / 2**20:.0f}")
        cells.append("-" if case.device_memory_bytes is None else f"{case.device_memory_bytes / 2**20:.0f}")
        table.add_row(case.encoder, *cells)
    return table


def stages_table(cases: Sequence[CaseResult]) -> Table:
    """The median of every stage of the whole way, in ms per call of a whole batch."""
    names = list(dict.fromkeys(name for case in cases for name in case.stages if name != END_TO_END))
    names.append(END_TO_END)
    caption = "Medians in ms per call; each stage is timed within the same pass from photograph or caption to vector."
    table = _table("Stages", caption)
    table.add_column("encoder", overflow="fold")
    for header in ("batch", *(name.replace("_", " ") for name in names)):
        table.add_column(header, justify="right")
    for case in cases:
        cells = []
        for name in names:
            median = case.stages[name].percentile(0.5) if name in case.stages else None
            cells.append("-" if median is None else format_number(median.value / 1e6))
        table.add_row(case.encoder, str(case.batch), *cells)
    return table


def roofline_table(report: "LatencyReport") -> Table:
    """Of each case the work of a call, and how much of the machine's roofs its median reaches."""
    assert report.roofs is not None
    table = _table("Roofline", f"{roofs_line(report.roofs)}. MB: the least that must move.")
    table.add_column("encoder", overflow="fold")
    for header in ("batch", "G operations", "MB", "GEMM", "copy"):
        table.add_column(header, justify="right", no_wrap=True)
    for case in report.cases:
        found, cells = report.roofline(case), ["-"] * 4
        if found is not None:
            cells = [format_number(found.work.matrix / 1e9), format_number(found.work.least_bytes / 1e6)]
            cells += [f"{found.gemm_percent:.0f} %", f"{found.copy_percent:.0f} %"]
        table.add_row(case.encoder, str(case.batch), *cells)
    return table


def tables(report: "LatencyReport") -> Group:
    """All that a terminal shows of a report."""
    cases = report.cases
    shown: list[Table | Text] = [latency_table(cases), Text(), intervals_table(cases)]
    if any(case.stages for case in cases):
        shown += [Text(), stages_table(cases)]
    if report.roofs is not None:
        shown += [Text(), roofline_table(report)]
    return Group(*shown)


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title, caption=caption or None, caption_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False
    )
