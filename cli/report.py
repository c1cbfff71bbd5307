"""`dualmatch report`."""

from pathlib import Path

import click

from .common import (
    backend_options,
    batch_size_option,
    existing,
    json_option,
    print_json,
    printable,
    progress_reports,
    regions_option,
    split_option,
)


@click.command("report")
@click.argument("folder", type=existing, metavar="DIR")
@click.option("--out", type=existing, metavar="FILE.html", help="The page.  [default: DIR/report.html]")
@click.option(
    "--data", metavar="DATA", help="Run the bundles on this data set: recall, retrieval sheets, failures, attention."
)
@split_option
@click.option(
    "--queries",
    "num_queries",
    type=click.IntRange(1, 50),
    default=6,
    show_default=True,
    help="Queries each way on the sheets.",
)
@backend_options
@batch_size_option
@regions_option
@json_option
def command(
    folder: Path,
    out: Path | None,
    data: str | None,
    split: str,
    num_queries: int,
    backend: str,
    threads: int,
    batch_size: int,
    regions: Path | None,
    *,
    as_json: bool,
) -> None:
    """One HTML page on all that DIR holds: runs, bundles, JSON of `bench latency | throughput | compare | recall` and of
    `runtime evaluate | verify`. The page needs no other file and no network.
    """
    from dualmatch.bench.html.report import write_report
    from dualmatch.runtime.datasets import open_dataset

    from .common import region_file, splits

    dataset = None if data is None else open_dataset(data).select(splits(split))
    with progress_reports() as progress:
        written = write_report(
            folder,
            out,
            dataset=dataset,
            regions=region_file(regions, dataset),
            num_queries=num_queries,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        print_json(
            {
                "report": str(written.path),
                "bytes": written.path.stat().st_size,
                "sections": list(written.sections),
                "missing": [{"what": what, "command": line} for what, line in written.missing],
                "unreadable": [{"file": name, "why": why} for name, why in written.unreadable],
            }
        )
        return
    click.echo(f"{printable(str(written.path))}: {', '.join(written.sections)}")
    for what, line in written.missing:
        click.echo(f"not there: {what}; make it with {printable(line)}")
    for name, why in written.unreadable:
        click.echo(f"could not be read: {printable(name)}: {printable(why)}", err=True)
