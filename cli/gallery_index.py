"""`dualmatch gallery index`."""

from pathlib import Path

import click

from .common import existing, printable, progress_reports, threads_option


@click.command("index")
@click.argument("gallery", type=existing)
@click.option(
    "--effort",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Candidates that a search keeps: more find more, slower.",
)
@click.option(
    "--queries",
    type=existing,
    metavar="GALLERY",
    help="Measure recall with a sample of this gallery, as captions asking for images.",
)
@threads_option
def command(gallery: Path, effort: int, queries: Path | None, threads: int) -> None:
    """Build an approximate index of GALLERY for `search --ann`, and print its recall against exact search."""
    from dualmatch.runtime.galleries.ann import build, describe
    from dualmatch.runtime.galleries.gallery import Gallery

    asked = None if queries is None else Gallery.open(queries)
    with progress_reports() as progress:
        record = build(
            gallery,
            effort=effort,
            queries=asked,
            threads=threads,
            progress=lambda done, of: progress("indexing", done, of),
        )
    click.echo(f"{printable(str(gallery))}: {describe(record)}")
