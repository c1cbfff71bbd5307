"""`dualmatch data check`."""

from pathlib import Path

import click

from .common import json_option, print_json, printable, progress_reports, regions_option


@click.command("check")
@click.argument("data")
@regions_option
@click.option(
    "--max-words", type=click.IntRange(1), default=50, show_default=True, help="Count captions of more words than this."
)
@click.option("--workers", type=click.IntRange(1, 256), help="Threads that read and decode. [default: one a processor]")
@json_option
def command(data: str, regions: Path | None, max_words: int, workers: int | None, *, as_json: bool) -> None:
    """Read all of DATA (a folder, LAYOUT:PATH, or `scenes`) before a long run: counts, duplicates, and what cannot be read or is missing.

    Exit 1 where a run would fail, or where one image is in two splits.
    """
    from dualmatch.runtime.datasets.check import check_dataset, report_lines

    from .common import region_file

    with progress_reports() as progress:
        report = check_dataset(
            data, regions=region_file(regions), max_words=max_words, workers=workers, progress=progress
        )
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(printable(report_lines(report), keep="\n"))
    report.require()
