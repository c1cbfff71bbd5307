"""`dualmatch bench latency`."""

from pathlib import Path

import click

from .common import backend_options, existing, json_option, print_json


@click.command("latency")
@click.argument("bundle", type=existing)
@backend_options
@click.option("--batch-sizes", default="1,8,32", show_default=True, help="Batch sizes, separated by commas.")
@click.option("--length", type=click.IntRange(1, 4096), default=16, show_default=True, help="Tokens of every caption.")
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds for each encoder and batch size.",
)
@click.option("--out", type=existing, metavar="FILE", help="Write the report as JSON.")
@click.option("--samples", type=existing, metavar="FILE", help="Write every sample as JSON lines.")
@json_option
def command(
    bundle: Path,
    backend: str,
    threads: int,
    batch_sizes: str,
    length: int,
    budget: float,
    out: Path | None,
    samples: Path | None,
    *,
    as_json: bool,
) -> None:
    """Latency of both encoders of BUNDLE: load, first run and steady state apart."""
    from dualmatch.bench.bundle_latency import bench_latency
    from dualmatch.bench.measure import Plan

    try:
        batches = [int(part) for part in batch_sizes.split(",")]
    except ValueError:
        raise click.UsageError(f"--batch-sizes takes whole numbers separated by commas, got {batch_sizes!r}.") from None
    report = bench_latency(
        bundle, backend=backend, threads=threads, batches=batches, length=length, plan=Plan(budget_s=budget)
    )
    if out is not None:
        report.write(out, samples=samples)
    if as_json:
        print_json(report.to_json())
        return
    from rich.console import Console

    Console().print(report.table())
    if out is not None:
        click.echo(f"{out}: report written")
