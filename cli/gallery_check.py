"""`dualmatch gallery check`."""

from pathlib import Path

import click

from .common import existing, printable


@click.command("check")
@click.argument("gallery", type=existing)
def command(gallery: Path) -> None:
    """Verify every hash, size and count of GALLERY, and its approximate index."""
    from dualmatch.runtime.galleries import ann
    from dualmatch.runtime.galleries.gallery import Gallery

    opened = Gallery.open(gallery)
    opened.check()
    approximate = ann.check(opened)
    index = opened.index
    removed = f", {index.count - index.living} removed but not compacted" if index.living < index.count else ""
    part = "" if index.part == (0, index.rows) else f", rows {index.part[0]}:{index.part[1]} of {index.rows}"
    click.echo(
        f"{printable(str(gallery))}: {len(opened)} vectors, {index.quarantined} quarantined{removed}{part}, all hashes match"
    )
    if approximate is not None:
        click.echo(approximate)
