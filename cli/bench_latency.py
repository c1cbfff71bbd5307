"""`dualmatch bench latency`."""

from pathlib import Path
from typing import Any

import click

from .bench_common import batch_sizes_of, finish, timing_options
from .common import existing, progress_reports


@click.command("latency")
@click.argument("bundle", type=existing)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Open loop: R requests per second on a Poisson schedule, latency from the scheduled start.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Requests in work at once, with --rate.",
)
@click.option(
    "--data",
    default="scenes",
    show_default=True,
    metavar="DATA",
    help="Photographs and captions to time the stages on.",
)
@click.option("--no-stages", is_flag=True, help="Time the graphs only, not decoding, pre-processing and tokenising.")
@click.option(
    "--roofline", is_flag=True, help="Hold each case against the machine's GEMM and copy rates, measured too."
)
@timing_options
def command(
    bundle: Path,
    backend: str,
    threads: int,
    batch_sizes: str,
    length: int,
    budget: float,
    run: Path | None,
    seed: int,
    rate: float | None,
    workers: int,
    data: str,
    *,
    no_stages: bool,
    roofline: bool,
    **files: Any,
) -> None:
    """Latency of both encoders of BUNDLE: load, first run and steady state apart, each case in a fresh process.

    Besides the usual backends: `null` (no graph: measures this benchmark), torch-eager and torch-compile (with --run); and
    `+throttled` or `+stalling` behind any of them, a fault built in on purpose.
    """
    from dualmatch.bench.bundle_latency import bench_latency
    from dualmatch.bench.measure import Plan

    batches = batch_sizes_of(batch_sizes)
    if workers > 1 and rate is None:
        raise click.UsageError(
            "--workers belongs to the open loop: give --rate too, or see `bench throughput --streams`."
        )
    with progress_reports() as progress:
        report = bench_latency(
            bundle,
            backend=backend,
            threads=threads,
            batches=batches,
            length=length,
            plan=Plan(budget_s=budget),
            rate=rate,
            workers=workers,
            data=None if no_stages else data,
            seed=seed,
            run=run,
            roofline=roofline,
            progress=progress,
        )
    finish(report, **files)
