"""Options, files and endings that the commands which time a bundle share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .common import backend_options, existing, json_option, print_json

if TYPE_CHECKING:
    from dualmatch.bench.report import LatencyReport

F = TypeVar("F", bound=Callable[..., Any])

budget_option = click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds for each encoder and batch size.",
)
length_option = click.option(
    "--length", type=click.IntRange(1, 4096), default=16, show_default=True, help="Tokens of every caption."
)
strict_option = click.option("--strict", is_flag=True, help="Exit with 1 where a case is UNSTABLE.")
run_option = click.option(
    "--run", type=existing, metavar="RUN", help="The trained run, for the backends torch-eager and torch-compile."
)
seed_option = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)


def timing_options(command: F) -> F:
    """What `bench latency` and `bench throughput` both take."""
    for option in (
        json_option,
        strict_option,
        click.option("--aiperf", type=existing, metavar="DIR", help="Write AIPerf's files, a folder for each case."),
        click.option("--csv", type=existing, metavar="FILE", help="Write every metric as CSV."),
        click.option("--samples", type=existing, metavar="FILE", help="Write every sample as JSON lines."),
        click.option("--out", type=existing, metavar="FILE", help="Write the report as JSON."),
        seed_option,
        run_option,
        budget_option,
        length_option,
        click.option("--batch-sizes", default="1,8,32", show_default=True, help="Batch sizes, separated by commas."),
        backend_options,
    ):
        command = option(command)
    return command


def batch_sizes_of(text: str) -> list[int]:
    """`1,8,32` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--batch-sizes takes whole numbers separated by commas, got {text!r}.") from None


def percent_of(text: str) -> float:
    """`10%` or `10` as 0.1."""
    if not re.fullmatch(r"\d+(\.\d+)?%?", text):
        raise click.UsageError(f"a percentage such as 10% is needed, got {text!r}.")
    return float(text.rstrip("%")) / 100


def finish(
    report: "LatencyReport",
    *,
    out: Path | None,
    samples: Path | None,
    csv: Path | None,
    aiperf: Path | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Write what was asked for, print, and fail where `strict` and a case is unstable."""
    from dualmatch.bench.report_table import tables
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.runtime.files import write_atomically

    if out is not None:
        report.write(out)
    if samples is not None:
        write_atomically(samples, "".join(f"{line}\n" for line in report.sample_lines()))
    if csv is not None:
        write_atomically(csv, report.csv())
    if aiperf is not None:
        report.write_aiperf(aiperf)
    if as_json:
        print_json(report.to_json())
    else:
        from rich.console import Console

        Console().print(tables(report))
        for path, what in ((out, "report"), (samples, "samples"), (csv, "metrics"), (aiperf, "AIPerf's files")):
            if path is not None:
                click.echo(f"{path}: {what} written")
    if strict and not report.stable:
        unstable = ", ".join(case.name for case in report.cases if not case.stable)
        raise DualmatchError(
            f"UNSTABLE, and --strict was asked for: {unstable}. Measure longer (--budget) or on a quieter machine."
        )
