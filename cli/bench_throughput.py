"""`dualmatch bench throughput`."""

from pathlib import Path
from typing import Any

import click

from .bench_common import batch_sizes_of, finish, timing_options
from .common import existing, progress_reports


@click.command("throughput")
@click.argument("bundle", type=existing)
@click.option(
    "--streams", type=click.IntRange(1, 256), default=1, show_default=True, help="Callers of the backend side by side."
)
@click.option(
    "--end-to-end", is_flag=True, help="From photographs and captions: decode and tokenise too, in the same streams."
)
@click.option(
    "--data", default="scenes", show_default=True, metavar="DATA", help="Photographs and captions for --end-to-end."
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
    streams: int,
    data: str,
    *,
    end_to_end: bool,
    **files: Any,
) -> None:
    """Items per second of both encoders of BUNDLE with all work at hand at once, each case in a fresh process."""
    from dualmatch.bench.bundle_latency import bench_throughput
    from dualmatch.bench.measure import Plan

    batches = batch_sizes_of(batch_sizes)
    with progress_reports() as progress:
        report = bench_throughput(
            bundle,
            backend=backend,
            threads=threads,
            batches=batches,
            length=length,
            plan=Plan(budget_s=budget),
            streams=streams,
            data=data,
            end_to_end=end_to_end,
            seed=seed,
            run=run,
            progress=progress,
        )
    finish(report, **files)
