"""`dualmatch gallery merge`."""

from pathlib import Path
from typing import Literal

import click

from .common import existing, printable, progress_reports

duplicates_option = click.option(
    "--duplicates",
    type=click.Choice(["refuse", "first", "last"]),
    default="refuse",
    show_default=True,
    help="What to do when two items have the same id: refuse, or keep the first or the last.",
)


@click.command("merge")
@click.argument("galleries", type=existing, nargs=-1, required=True)
@click.option("--out", type=existing, required=True, help="The new gallery.")
@duplicates_option
def command(galleries: tuple[Path, ...], out: Path, duplicates: Literal["refuse", "first", "last"]) -> None:
    """Merge GALLERIES of one bundle into a new one.

    Parts of one list (`encode-gallery --rows`), in any order, give the very files of a single run.
    """
    from dualmatch.runtime.galleries.merge import merge

    with progress_reports() as progress:
        index = merge(galleries, out, duplicates=duplicates, progress=progress)
    click.echo(
        f"{printable(str(out))}: {index.living} vectors of {len(galleries)} galleries, {index.quarantined} quarantined"
    )
