"""`dualmatch runtime similarity`."""

from pathlib import Path

import click

from .common import existing


@click.command("similarity")
@click.argument("images_gallery", type=existing)
@click.argument("captions_gallery", type=existing)
@click.option("--out", required=True, type=existing, help="SIMS: an .npy file, with a .json beside it.")
def command(images_gallery: Path, captions_gallery: Path, out: Path) -> None:
    """Similarity of every image with every caption, float32 (images, captions)."""
    from dualmatch.runtime.galleries.gallery import Gallery
    from dualmatch.runtime.search import sims_of_galleries
    from dualmatch.runtime.similarity import save_sims, sims_paths

    similarity, info = sims_of_galleries(Gallery.open(images_gallery), Gallery.open(captions_gallery))
    save_sims(out, similarity, info)
    click.echo(f"{sims_paths(out)[0]}: {similarity.shape[0]} images x {similarity.shape[1]} captions")
