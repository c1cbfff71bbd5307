"""`dualmatch gallery export`."""

from pathlib import Path

import click

from .common import existing, printable, progress_reports


@click.command("export")
@click.argument("gallery", type=existing)
@click.option("--to", type=click.Choice(["parquet", "npy", "faiss", "qdrant-jsonl"]), required=True, help="The format.")
@click.option("--out", type=existing, required=True, help="A file (parquet, qdrant-jsonl) or a directory (npy, faiss).")
def command(gallery: Path, to: str, out: Path) -> None:
    """Write the items and vectors of GALLERY for another program."""
    from dualmatch.runtime.galleries.export import export
    from dualmatch.runtime.galleries.gallery import Gallery

    opened = Gallery.open(gallery)
    with progress_reports() as progress:
        export(opened, out, to, lambda done, of: progress("exporting", done, of))
    click.echo(f"{printable(str(out))}: {len(opened)} items as {to}")
