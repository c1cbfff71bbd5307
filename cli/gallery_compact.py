"""`dualmatch gallery compact`."""

from pathlib import Path

import click

from .common import existing, printable, progress_reports


@click.command("compact")
@click.argument("gallery", type=existing)
def command(gallery: Path) -> None:
    """Rewrite the shards of GALLERY that hold removed items without them."""
    from dualmatch.runtime.galleries.edit import compact

    with progress_reports() as progress:
        dropped = compact(gallery, lambda done, of: progress("shards", done, of))
    what = f"{dropped} removed vectors are off the disk" if dropped else "nothing was removed since the last time"
    click.echo(f"{printable(str(gallery))}: {what}")
