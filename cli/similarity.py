"""`dualmatch runtime similarity`."""

from pathlib import Path

import click

from .common import existing, progress_reports


@click.command("similarity")
@click.argument("images_gallery", type=existing)
@click.argument("captions_gallery", type=existing)
@click.option("--out", required=True, type=existing, help="SIMS: an .npy file, with a .json beside it.")
def command(images_gallery: Path, captions_gallery: Path, out: Path) -> None:
    """Similarity of every image with every caption, float32 (images, captions), written a few rows at a time."""
    from dualmatch.runtime.evaluate import write_sims
    from dualmatch.runtime.files import refuse_existing
    from dualmatch.runtime.galleries.gallery import Gallery
    from dualmatch.runtime.similarity import sims_paths

    for path in sims_paths(out):
        refuse_existing(path, "similarity matrix")
    with progress_reports() as progress:
        info = write_sims(Gallery.open(images_gallery), Gallery.open(captions_gallery), out, progress)
    click.echo(f"{sims_paths(out)[0]}: {len(info.image_ids)} images x {len(info.caption_ids)} captions")
