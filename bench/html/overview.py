"""The report's first table: for every bundle whether it is right, and how fast."""

from collections.abc import Mapping

from dualmatch.bench.report_table import format_number
from dualmatch.runtime.page import Markup, shown, table

from .found import Findings, FoundBundle, Values
from .parts import Section
from .results import protocol_words


def overview_section(found: Findings, measured: Mapping[str, Values]) -> Section | None:
    """A row for every bundle; what is not known of one is left open.

    Args:
        measured: by the bundle's hash, the recall that the report measured itself.
    """
    if not found.bundles:
        return None
    cells = []
    for one in found.bundles:
        recall = measured.get(one.bundle.hash) or _reported_recall(found, one.bundle.hash)
        cells.append((
            one.name, one.network, one.precision, _gate(one), "-" if recall is None else f"{recall['rsum']:.1f}",
            *(_median(found, one.bundle.hash, encoder) for encoder in ("image", "text")),
            "" if recall is None else protocol_words(recall["protocol"]),
        ))  # fmt: skip
    heads = ("bundle", "network", "precision", "gate", "Rsum", "photo, ms", "caption, ms", "Rsum on")
    note = '<p class="soft">Gate: does the export retrieve as torch did? Milliseconds: median of one photograph or caption through the graph, from the latency reports below.</p>'
    return Section(key="overview", title="At a glance", body=[table(heads, cells), note])


def _gate(one: FoundBundle) -> Markup:
    verdict = str(one.bundle.manifest.parity.get("verdict", "not measured"))
    return Markup(f'<b class="{"good" if verdict == "pass" else "bad"}">{shown(verdict)}</b>')


def _reported_recall(found: Findings, bundle_hash: str) -> Values | None:
    """Of `bench recall`, the plain one of this bundle alone."""
    for report in found.recalls:
        labels = {
            model["label"] for model in report.values["subject"].get("models", ()) if model.get("bundle") == bundle_hash
        }
        for row in report.values["rows"]:
            if set(row["models"]) <= labels and not row["rerank"] and row.get("protocol_name", "full") == "full":
                recall: Values = row
                return recall
    return None


def _median(found: Findings, bundle_hash: str, encoder: str) -> str:
    """Of one item, single stream, in the first report that has it."""
    for report in found.latencies:
        if report.values["subject"].get("bundle_hash") != bundle_hash:
            continue
        for case in report.values["cases"]:
            same = (case["encoder"], case["batch"], case["scenario"]) == (encoder, 1, "single-stream")
            if same and "p50" in case["request_latency"]:
                return format_number(case["request_latency"]["p50"]) + ("" if case["stable"] else " UNSTABLE")
    return "-"
