"""AIPerf's metric schema: a metric is a block of statistics in display units, and fields that do not apply are absent.

Source: NVIDIA AIPerf's `profile_export_aiperf.json` (schema 1.5) and `profile_export.jsonl`. A record metric (one value a request)
has unit, avg, min, max, std, sum, count and percentiles; a derived one has unit and avg only. Beside AIPerf's fields stand ours,
which its readers ignore: `p99.9`, `intervals` (95 %), `early_stopping` (LoadGen's bound) and `withheld`, the percentiles that the
samples have not earned.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from .measure import QUANTILES, Nanoseconds, Percentile, samples_needed

SCHEMA_VERSION = "1.5"
CSV_FIELDS = ("avg", "min", "max", "std", "sum", "count", *QUANTILES)
Block = dict[str, Any]


class Distribution(Protocol):
    """What has percentiles with intervals."""

    def percentile(self, quantile: float) -> Percentile | None: ...


def value_metric(value: float, unit: str) -> Block:
    """A derived metric: one value."""
    return {"unit": unit, "avg": float(value)}


def record_metric(raw: Nanoseconds, distribution: Distribution, early: Mapping[str, int | None] | None = None) -> Block:
    """A metric with one value a request, from ns to ms.

    Args:
        raw: all values, (n,) ns.
        distribution: where the percentiles come from.
        early: LoadGen's bounds by percentile, in ns.
    """
    values = raw / 1e6
    earned = {name: distribution.percentile(quantile) for name, quantile in QUANTILES.items()}
    block: Block = {
        "unit": "ms",
        "avg": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "sum": float(values.sum()),
        "count": len(values),
        **{name: p.value / 1e6 for name, p in earned.items() if p is not None},
        "interval_confidence": 0.95,
        "intervals": {name: [p.low / 1e6, p.high / 1e6] for name, p in earned.items() if p is not None},
        "withheld": {
            name: f"needs {samples_needed(QUANTILES[name])} samples, has {len(values)}"
            if len(values) < samples_needed(QUANTILES[name])
            else "has too few independent busy periods"
            for name, p in earned.items()
            if p is None
        },
    }
    if early is not None:
        block["early_stopping"] = {name: bound / 1e6 for name, bound in early.items() if bound is not None}
    return block


def profile_export(
    metrics: Mapping[str, Block],
    *,
    benchmark_id: str,
    version: str,
    config: Mapping[str, Any],
    seed: int,
    ended_ns: int,
) -> dict[str, Any]:
    """One case as AIPerf would export it: metrics at the top level, beside where they come from."""
    duration_s = metrics["benchmark_duration"]["avg"]
    start, end = (datetime.fromtimestamp(ended_ns / 1e9 - back, UTC).isoformat() for back in (duration_s, 0))
    return {
        "schema_version": SCHEMA_VERSION,
        "dualmatch_version": version,
        "benchmark_id": benchmark_id,
        "start_time": start,
        "end_time": end,
        "was_cancelled": False,
        "input_config": dict(config),
        "run_info": {"benchmark_id": benchmark_id, "random_seed": seed, "trial": 0, "run_label": benchmark_id,
                     "variation_label": benchmark_id, "variation_index": 0, "variation_values": {}},
        "error_summary": [],
        **metrics,
    }  # fmt: skip


def record_lines(latencies: Nanoseconds, starts: Nanoseconds, *, phase: str, benchmark_id: str) -> Iterator[str]:
    """One line a request as in AIPerf's `profile_export.jsonl`; `starts` in ns since 1970."""
    for number, (latency, start) in enumerate(zip(latencies.tolist(), starts.tolist(), strict=True)):
        metadata = {
            "session_num": number,
            "request_start_ns": start,
            "request_end_ns": start + latency,
            "worker_id": benchmark_id,
            "record_processor_id": benchmark_id,
            "benchmark_phase": phase,
            "was_cancelled": False,
        }
        metrics = {"request_latency": {"value": latency / 1e6, "unit": "ms"}}
        yield json.dumps({"metadata": metadata, "metrics": metrics, "error": None})


def csv_text(rows: list[tuple[str, Mapping[str, Block]]]) -> str:
    """Every metric of every case as a row: case, metric, unit, then the statistics; an empty cell does not apply."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "metric", "unit", *CSV_FIELDS])
    for case, metrics in rows:
        for name, block in metrics.items():
            writer.writerow([case, name, block["unit"], *(block.get(field, "") for field in CSV_FIELDS)])
    return text.getvalue()
