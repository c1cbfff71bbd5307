"""A report: all cases, with what is needed to judge them; as JSON, JSON lines, CSV, a table, and AIPerf's files."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dualmatch.runtime.files import write_atomically

from .aiperf import csv_text, profile_export, record_lines
from .measure import Plan
from .result import CaseResult
from .roofline import Roofline
from .roofs import Roofs

SCHEMA = {"name": "dualmatch.bench.latency", "version": 2}


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """All cases of one run.

    Args:
        environment: of `dualmatch.bench.environment.environment`.
        cases: in the order measured.
        plan: the plan that every case was measured by.
        subject: what was measured and how it was set: bundle, hash, precision, threads…, ready for JSON.
        roofs: of this machine, where they were asked for.
    """

    environment: Mapping[str, Any]
    cases: Sequence[CaseResult]
    plan: Plan = field(default_factory=Plan)
    subject: Mapping[str, Any] = field(default_factory=dict)
    roofs: Roofs | None = None

    def roofline(self, case: CaseResult) -> Roofline | None:
        """How near a case's median comes to the roofs, where they were measured."""
        if self.roofs is None or case.work is None:
            return None
        return Roofline(work=case.work, roofs=self.roofs, seconds=float(np.median(case.raw)) / 1e9)

    @property
    def stable(self) -> bool:
        """Whether every case is."""
        return all(case.stable for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Each case's metrics in AIPerf's schema, beside the case, the plan, the subject and the environment."""
        report: dict[str, Any] = {
            "schema": dict(SCHEMA),
            "subject": dict(self.subject),
            "environment": dict(self.environment),
            "plan": asdict(self.plan),
            "stable": self.stable,
            "cases": [case.to_json() for case in self.cases],
        }
        if self.roofs is not None:
            report["roofs"] = self.roofs.to_json()
            for case, values in zip(self.cases, report["cases"], strict=True):
                found = self.roofline(case)
                values["roofline"] = None if found is None else found.to_json()
        return report

    def sample_lines(self) -> Iterator[str]:
        """Every raw latency as a JSON line, in the order taken: case (index into `cases`), phase, latency in ns.

        Warm-up and single-stream lines name their window; server lines say when the request was scheduled and taken up, offline
        lines when the call began, in ns after the first of them. Lines of a stage carry its name as the phase.
        """
        for index, case in enumerate(self.cases):
            same = {"case": index, "encoder": case.encoder, "batch": case.batch}
            phases = [("warmup", case.measurement.warmup)]
            if case.scenario == "single-stream":
                phases.append(("steady", case.measurement.windows))
            for phase, windows in phases:
                for window, latencies in enumerate(windows):
                    for latency in latencies.tolist():
                        yield json.dumps(same | {"phase": phase, "window": window, "latency_ns": latency})
            for line in _timed_lines(case):
                yield json.dumps(same | line)
            for stage, samples in case.stages.items():
                for latency in samples.raw.tolist():
                    yield json.dumps(same | {"phase": stage, "latency_ns": latency})

    def csv(self) -> str:
        """Every metric of every case as a row."""
        return csv_text([(case.name, case.metrics()) for case in self.cases])

    def write(self, path: Path, *, samples: Path | None = None, csv: Path | None = None) -> None:
        """Write the report as JSON, and where files are named for them the raw latencies as JSON lines and the metrics as CSV."""
        if samples is not None:
            write_atomically(samples, "".join(f"{line}\n" for line in self.sample_lines()))
        if csv is not None:
            write_atomically(csv, self.csv())
        write_atomically(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    def write_aiperf(self, folder: Path) -> None:
        """For every case a folder as AIPerf leaves one: `profile_export_aiperf.json`, `.csv`, and `profile_export.jsonl`."""
        for case in self.cases:
            name = re.sub(r"[^a-z0-9]+", "-", case.name.lower())
            own, metrics = folder / name, case.metrics()
            own.mkdir(parents=True, exist_ok=True)
            export = profile_export(
                metrics,
                benchmark_id=name,
                version=str(self.environment.get("packages", {}).get("dualmatch", "")),
                config={**self.subject, "encoder": case.encoder, "batch": case.batch, "scenario": case.scenario},
                seed=int(self.subject.get("seed", 0)),
                ended_ns=case.ended_ns,
            )
            write_atomically(own / "profile_export_aiperf.json", json.dumps(export, indent=2, allow_nan=False) + "\n")
            write_atomically(own / "profile_export_aiperf.csv", csv_text([(case.name, metrics)]))
            lines = record_lines(case.raw, _starts(case), phase="profiling", benchmark_id=name)
            write_atomically(own / "profile_export.jsonl", "".join(f"{line}\n" for line in lines))

    def table(self) -> Table:
        """The report for a terminal of 80 columns."""
        from .report_table import latency_table

        return latency_table(self.cases)


def _timed_lines(case: CaseResult) -> Iterator[dict[str, Any]]:
    """The lines of scenarios whose requests have instants of their own."""
    if case.server is not None:
        server = case.server
        columns = (server.scheduled, server.started, server.finished)
        for number, (due, start, end) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            zero = int(server.scheduled[0])
            phase = "steady" if number >= server.window else "ramp"
            yield {"phase": phase, "scheduled_ns": due - zero, "started_ns": start - zero, "latency_ns": end - due}
    elif case.offline is not None:
        for start, end in zip(case.offline.started.tolist(), case.offline.finished.tolist(), strict=True):
            yield {"phase": "steady", "started_ns": start - case.offline.origin, "latency_ns": end - start}


def _starts(case: CaseResult) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """When each request of `case.raw` began (server: was due), ns since 1970; single stream: as if no time lay between calls."""
    if case.server is not None:
        starts = case.server.scheduled[case.server.window :]
    elif case.offline is not None:
        starts = case.offline.started
    else:
        starts = np.concatenate(([0], np.cumsum(case.raw)[:-1]))
    ended = starts[-1] + case.raw[-1]
    return np.asarray(starts + (case.ended_ns - ended), dtype=np.int64)
