"""`dualmatch gallery remove`."""

from pathlib import Path

import click

from .common import existing, printable


@click.command("remove")
@click.argument("gallery", type=existing)
@click.argument("ids", nargs=-1)
@click.option("--ids", "ids_file", type=existing, metavar="FILE", help="More ids, one a line.")
def command(gallery: Path, ids: tuple[str, ...], ids_file: Path | None) -> None:
    """Remove the items with these IDS from GALLERY: nothing finds them any more; `compact` takes them off the disk."""
    if not ids and ids_file is None:
        raise click.UsageError("give ids, or a file of them with --ids.")
    from dualmatch.runtime.galleries.edit import read_ids, remove_items

    removed = remove_items(gallery, [*ids, *(read_ids(ids_file) if ids_file is not None else ())])
    click.echo(f"{printable(str(gallery))}: {removed} items removed")
