"""The latency report as a table that fits 80 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from .measure import QUANTILES, Samples, samples_needed

if TYPE_CHECKING:
    from .latency import CaseResult


def format_number(value: float) -> str:
    """Three significant digits, or the whole number where it has more: no latency repeats better than that."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _percentile_cell(samples: Samples, quantile: float) -> str:
    percentile = samples.percentile(quantile)
    return f"n<{samples_needed(quantile)}" if percentile is None else format_number(percentile.value / 1e6)


def latency_table(cases: Sequence["CaseResult"]) -> Table:
    """One row per case, in ms; a percentile without enough samples shows how many it lacks instead of a number."""
    needed = ", ".join(f"{name} from {samples_needed(quantile)}" for name, quantile in QUANTILES.items())
    overhead_us = max(case.overhead_ns for case in cases) / 1e3
    caption = (
        f"Milliseconds per call of a whole batch; items/s from the mean. A percentile needs samples: {needed}. "
        f"The harness itself takes {format_number(overhead_us)} µs of each call."
    )
    if not all(case.measurement.stable for case in cases):
        caption += (
            " UNSTABLE: the windows disagree at the end; do not quote the row, measure longer or on a quieter machine."
        )
    table = Table(
        title="Latency",
        caption=caption,
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("encoder", overflow="fold")
    for header in ("batch", "load", "first", "samples", *QUANTILES, "max", "items/s"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("stable", no_wrap=True)
    for case in cases:
        samples = case.measurement.samples
        table.add_row(
            case.encoder,
            str(case.batch),
            *(format_number(ns / 1e6) for ns in (case.load_ns, case.first_ns)),
            str(len(samples)),
            *(_percentile_cell(samples, quantile) for quantile in QUANTILES.values()),
            format_number(samples.raw.max() / 1e6),
            format_number(case.items_per_s),
            Text("yes") if case.measurement.stable else Text("UNSTABLE", style="bold red"),
        )
    return table
