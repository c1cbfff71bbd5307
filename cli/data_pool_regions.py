"""`dualmatch data pool-regions`."""

from pathlib import Path
from typing import Literal

import click

from .common import data_option, existing, progress_reports


@click.command("pool-regions")
@data_option
@click.option(
    "--boxes",
    required=True,
    type=existing,
    help="An .npz with `filenames` (n,) and `boxes` (n, regions, 4): x1 y1 x2 y2 in pixels.",
)
@click.option(
    "--trunk",
    type=click.Choice(["efficientnet-lite0", "resnet152"]),
    required=True,
    help="The network whose last map is pooled.",
)
@click.option("--trunk-weights", type=existing, help="Weights of resnet152: safetensors with torchvision's names.")
@click.option(
    "--image-size",
    type=click.IntRange(32, 1024),
    default=320,
    show_default=True,
    help="Side that photographs are scaled to.",
)
@click.option(
    "--order",
    type=click.Choice(["file", "confidence", "size", "random"]),
    default="file",
    show_default=True,
    help="Of an image's regions; it matters to VSRN, whose GRU runs over them.",
)
@click.option(
    "--cache",
    type=existing,
    help="Folder of cached trunk features, which `dualmatch train --cache` shares: no photograph passes the trunk twice; float16.",
)
@click.option("--out", required=True, type=existing, help="The region file to write, .npz.")
def command(
    data: str,
    boxes: Path,
    trunk: str,
    trunk_weights: Path | None,
    image_size: int,
    order: Literal["file", "confidence", "size", "random"],
    cache: Path | None,
    out: Path,
) -> None:
    """Pool a feature for each given box of each photograph, for networks with precomputed regions."""
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.training.regions import pool_regions

    with progress_reports() as progress:
        shape = pool_regions(
            open_dataset(data),
            boxes,
            out,
            trunk=trunk,
            trunk_weights=trunk_weights,
            image_size=image_size,
            order=order,
            cache=cache,
            progress=progress,
        )
    click.echo(f"{out}: {shape[0]} images x {shape[1]} regions x {shape[2]} channels")
