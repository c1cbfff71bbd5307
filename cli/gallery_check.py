"""`dualmatch gallery check`."""

from pathlib import Path

import click

from .common import existing


@click.command("check")
@click.argument("gallery", type=existing)
def command(gallery: Path) -> None:
    """Verify every hash, size and count of GALLERY."""
    from dualmatch.runtime.galleries.gallery import Gallery

    opened = Gallery.open(gallery)
    opened.check()
    click.echo(f"{gallery}: {len(opened)} vectors, {len(opened.quarantine)} quarantined, all hashes match")
