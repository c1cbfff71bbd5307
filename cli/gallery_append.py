"""`dualmatch gallery append`."""

from pathlib import Path
from typing import Literal

import click

from .common import backend_options, existing, printable, progress_reports, regions_option
from .gallery_merge import duplicates_option


@click.command("append")
@click.argument("gallery", type=existing)
@click.argument("source")
@click.option("--bundle", type=existing, help="The bundle that encoded the gallery, if it has moved.")
@backend_options
@regions_option
@click.option(
    "--on-error",
    type=click.Choice(["quarantine", "fail"]),
    default="quarantine",
    show_default=True,
    help="What to do with sources that cannot be read.",
)
@duplicates_option
def command(
    gallery: Path,
    source: str,
    bundle: Path | None,
    backend: str,
    threads: int,
    regions: Path | None,
    on_error: Literal["quarantine", "fail"],
    duplicates: Literal["refuse", "first", "last"],
) -> None:
    """Add SOURCE to GALLERY: photographs (or captions) as encode-gallery takes them, or another gallery.

    If it is stopped, the same command goes on.
    """
    from dualmatch.runtime.append import append

    from .common import region_file

    with progress_reports() as progress:
        added = append(
            gallery,
            source,
            bundle=bundle,
            backend=backend,
            threads=threads,
            regions=region_file(regions),
            on_error=on_error,
            duplicates=duplicates,
            progress=progress,
        )
    from dualmatch.runtime.galleries.gallery import Gallery

    click.echo(f"{printable(str(gallery))}: {added} items added, {len(Gallery.open(gallery))} now")
