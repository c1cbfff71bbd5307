"""fp32, fp16 and int8 bundles of one run against torch eager in the same process: size, latency, cosine, Rsum. A row of docs/precision.md.

    python -m dualmatch.bench.precision RUN --data DATA --json precision.json

Exports what `--bundles DIR` does not hold yet (through the command line, so that the gate decides as for a user; a refusal is a row too),
then times every encoder: in each round torch and each bundle once, one after the other, so that a machine that slows down slows all of
them. A ratio is that of the medians, and its interval the bootstrap's over rounds.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.backends import Session, open_session
from dualmatch.runtime.bundle import Bundle, EncoderName, load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically

from .environment import environment
from .latency import random_feeds
from .torch_baseline import TorchSession, torch_encoders

PRECISIONS = ("fp32", "fp16", "int8")
MIB = 2**20


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, metavar="DATA", help="Pairs for the gate and for calibration.")
@click.option(
    "--regions", metavar="FILE", help="Precomputed regions, for networks that take them, as `dualmatch export`."
)
@click.option("--bundles", type=click.Path(path_type=Path), help="Keep the bundles here and use those that are there.")
@click.option("--precisions", default=",".join(PRECISIONS), show_default=True)
@click.option("--batches", default="1,32", show_default=True)
@click.option("--length", default=16, show_default=True, help="Tokens of a caption.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option(
    "--seconds", default=60.0, show_default=True, help="Of one encoder at one batch size; three rounds at least."
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write every figure and raw latency here.")
def main(
    run: Path,
    *,
    data: str,
    regions: str | None,
    bundles: Path | None,
    precisions: str,
    batches: str,
    length: int,
    threads: int,
    rounds: int,
    seconds: float,
    out: Path | None,
) -> None:
    """Measure RUN at every precision."""
    try:
        chosen = precisions.split(",")
        if unknown := sorted(set(chosen) - set(PRECISIONS)):
            raise DualmatchError(f"there is no precision {unknown[0]!r}; choose among {', '.join(PRECISIONS)}.")
        with TemporaryDirectory() as scratch:
            folder = bundles or Path(scratch)
            exports = {one: exported(run, data, folder / one, one, regions) for one in chosen}
            opened = {one: load_bundle(folder / one) for one in chosen if exports[one]["bundle"]}
            if not opened:
                raise DualmatchError("no precision left the gate, so there is nothing to time.")
            sizes = [int(one) for one in batches.split(",")]
            timed = [
                case
                for name in ("image", "text")
                for case in latencies(
                    run, opened, name, sizes,
                    length=length, threads=threads, rounds=rounds, seconds=seconds,
                )
            ]  # fmt: skip
    except DualmatchError as error:
        raise SystemExit(f"precision: {error}") from None
    report = {
        "recipe": next(iter(opened.values())).manifest.model["recipe"],
        "data": Path(data).name,
        "environment": environment(),
        "exports": exports,
        "cases": timed,
    }
    if out is not None:
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    click.echo(table(report))


def exported(run: Path, data: str, out: Path, precision: str, regions: str | None = None) -> dict[str, Any]:
    """What the gate said of a precision, from an export now or from the bundle that is there."""
    facts: dict[str, Any] = {"bundle": True}
    if not out.exists():
        started = time.perf_counter()
        command = [
            *(sys.executable, "-c", "from dualmatch.cli.main import main; main()", "export", run, "--out", out),
            *(f"--{precision}", "--data", data, "--json"),
            *(() if regions is None else ("--regions", regions)),
        ]
        returncode, stdout, stderr, peak = measured([*map(str, command)])
        sys.stderr.write(stderr)
        facts["export_seconds"] = round(time.perf_counter() - started, 1)
        facts["export_peak_mib"] = round(peak / MIB)
        if returncode:
            if stdout.strip():
                return {**facts, "bundle": False, **_gate(json.loads(stdout))}
            why = stderr.strip().splitlines()[-1:]
            return {**facts, "bundle": False, "verdict": "refused", "reason": "".join(why)}
    bundle = load_bundle(out)
    encoders = bundle.manifest.encoders
    return {
        **facts,
        **_gate(bundle.manifest.parity),
        "precision": {name: entry.precision for name, entry in encoders.items()},
        "mib": {name: round(bundle.manifest.files[entry.file].bytes / MIB, 2) for name, entry in encoders.items()},
        "quantisation": {name: dict(entry.quantisation) for name, entry in encoders.items() if entry.quantisation},
    }


def measured(command: Sequence[str]) -> tuple[int, str, str, int]:
    """Run a command: its exit code, what it wrote, and the largest resident set of its process in bytes."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)  # noqa: S603  (our own command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return process.returncode, out.read(), err.read(), usage.ru_maxrss * 1024


def _gate(parity: Any) -> dict[str, Any]:
    comparison = parity.get("comparison") or {}
    found = {"verdict": parity["verdict"], "reason": parity["reason"]}
    if comparison:
        found |= {
            "rsum_before": comparison["before"]["rsum"],
            "rsum_after": comparison["after"]["rsum"],
            "rsum_change": -comparison["rsum_loss"],
            "rsum_change_interval": comparison.get("rsum_change_interval"),  # bundles from before it was kept lack it
            "bound_of_loss": comparison["bound"],
            "worst_cosine": {"image": comparison["image_cosine"][0], "text": comparison["caption_cosine"][0]},
            "images": comparison["before"]["protocol"]["images"],
        }
    return found


def latencies(
    run: Path,
    bundles: dict[str, Bundle],
    name: EncoderName,
    batches: Sequence[int],
    *,
    length: int,
    threads: int,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """One encoder in torch and from each bundle, interleaved, at each batch size."""
    first = next(iter(bundles.values()))
    entry, limits = first.manifest.encoders[name], first.manifest.tokenizer
    sessions: dict[str, Session] = {"torch": TorchSession(torch_encoders(run)[name], entry, threads=threads)}
    for precision, bundle in bundles.items():
        sessions[precision] = open_session(bundle.encoder_path(name), threads=threads)
    cases = []
    for batch in batches:
        feeds = random_feeds(
            entry.inputs,
            batch=batch,
            length=limits.fixed_length or min(length, limits.max_length or length),
            vocabulary_size=first.manifest.model["config"]["text"]["vocabulary_size"],
        )
        taken: dict[str, list[float]] = {one: [] for one in sessions}
        for session in sessions.values():  # allocation and choice of kernels are no latency
            session.run(feeds)
        started = time.perf_counter()
        for number in range(rounds):
            for one, session in sessions.items():
                begun = time.perf_counter()
                session.run(feeds)
                taken[one].append(time.perf_counter() - begun)
            if number >= 2 and time.perf_counter() - started > seconds:
                break
        baseline = np.array(taken["torch"])
        case: dict[str, Any] = {
            "encoder": name, "batch": batch, "threads": threads, "providers": {k: s.provider for k, s in sessions.items()},
            "median_ms": {one: 1e3 * float(np.median(values)) for one, values in taken.items()},
            "faster_than_torch": {one: ratio(baseline, np.array(v)) for one, v in taken.items() if one != "torch"},
            "raw_s": taken,
        }  # fmt: skip
        cases.append(case)
        told = ", ".join(f"{one} {found[0]:.2f} x" for one, found in case["faster_than_torch"].items())
        click.echo(f"{name}, batch {batch}: torch {case['median_ms']['torch']:.1f} ms; {told}", err=True)
    for session in sessions.values():
        session.close()
    return cases


def ratio(baseline: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median of the baseline over median of the other, and the ends of its 95% interval over resampled rounds."""
    rows = np.random.default_rng(0).integers(len(other), size=(2000, len(other)))
    found = np.median(baseline[rows], axis=1) / np.median(other[rows], axis=1)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(np.median(baseline) / np.median(other)), float(low), float(high)


def table(report: dict[str, Any]) -> str:
    """The report as the rows of a Markdown table."""
    batches = sorted({case["batch"] for case in report["cases"]})
    columns = [f"{encoder} x{batch}" for encoder in ("image", "text") for batch in batches]
    head = [
        "recipe",
        "precision",
        "MiB image + text",
        *columns,
        "worst cosine image / text",
        "Rsum",
        "change [95 %] (bound of the loss)",
        "gate",
        "export, s and MiB at its peak",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cases = {(case["encoder"], case["batch"]): case for case in report["cases"]}
    for precision, found in report["exports"].items():
        cells = [report["recipe"], precision]
        cells.append(" + ".join(f"{value:.1f}" for value in found["mib"].values()) if found["bundle"] else "-")
        for encoder in ("image", "text"):
            for batch in batches:
                measured = cases[encoder, batch]["faster_than_torch"].get(precision)
                cells.append("-" if measured is None else f"{measured[0]:.2f} ({measured[1]:.2f} to {measured[2]:.2f})")
        if "rsum_change" in found:
            cosines = " / ".join(f"{value:.5f}" for value in found["worst_cosine"].values())
            interval = "" if (ends := found["rsum_change_interval"]) is None else f" [{ends[0]:+.2f}, {ends[1]:+.2f}]"
            cells += [
                cosines,
                f"{found['rsum_after']:.1f}",
                f"{found['rsum_change']:+.2f}{interval} ({found['bound_of_loss']:.2f})",
            ]
        else:
            cells += ["-", "-", "-"]
        took = f"{found['export_seconds']:.0f}, {found['export_peak_mib']}" if "export_seconds" in found else "-"
        lines.append("| " + " | ".join([*cells, found["verdict"], took]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
