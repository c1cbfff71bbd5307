"""Do attention pictures tell the truth? The places that they show brightest are greyed out, and how much the score falls is measured.

`python -m dualmatch.bench.attention BUNDLE --data DATA [--split val,test] [--photographs 48]`
"""

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime import ImageEncoder, TextEncoder, load_bundle
from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.errors import DualmatchError

Array = NDArray[np.float32]
SHARE = 1 / 3
ORDERS = ("best", "random", "worst")


def greyed(pixels_CHW: Array, boxes: NDArray[np.floating]) -> Array:
    """Pre-processed pixels with the boxes (n, 4; fractions of the sides) at 0, the mean of what the trunk was trained on."""
    side = pixels_CHW.shape[1]
    changed = pixels_CHW.copy()
    for left, top, right, bottom in np.rint(boxes * side).astype(int):
        changed[:, top:bottom, left:right] = 0
    return changed


def falls(
    bundle: Path, data: str, *, splits: list[str], photographs: int, threads: int, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """What greying out a third of the grid's cells takes off a photograph's similarity with its first caption, by which third it is.

    Returns:
        `best`, `random`, `worst`, by the cells' products with the caption's embedding: (photographs,) each.

    Raises:
        DualmatchError: the bundle gives no nodes of a grid.
    """
    opened = load_bundle(bundle)
    items = open_dataset(data).select(splits).items
    items = items[:: max(1, len(items) // photographs)][:photographs]
    chance = np.random.default_rng(seed)
    found: dict[str, list[float]] = {order: [] for order in ORDERS}
    with (
        ImageEncoder(opened, attention=True, threads=threads) as images,
        TextEncoder(opened, threads=threads) as texts,
    ):
        assert images.nodes is not None
        first = images.nodes.groups[0]
        if first.kind != "global":
            raise DualmatchError(f"the network of {bundle} has no grid of cells to grey out.")
        boxes, number = np.array(first.boxes), max(1, round(first.count * SHARE))
        captions = texts.encode([item.captions[0] for item in items])
        for item, caption in zip(items, captions, strict=True):
            prepared = images.prepare(item.read_bytes(), item.id)
            (embedding,), (nodes,) = images.encode_with_nodes([prepared])
            order = np.argsort(-(nodes[: first.count] @ caption), kind="stable")
            chosen = (order[:number], chance.permutation(first.count)[:number], order[-number:])
            changed = [prepared | {"pixels": greyed(prepared["pixels"], boxes[cells])} for cells in chosen]
            for name, after in zip(ORDERS, images.encode_prepared(changed), strict=True):
                found[name].append(float((embedding - after) @ caption))
    return {name: np.array(values) for name, values in found.items()}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True)
@click.option("--split", default="val,test", show_default=True)
@click.option("--photographs", type=click.IntRange(2), default=48, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=1, show_default=True)
def main(bundle: Path, data: str, split: str, photographs: int, threads: int) -> None:
    """Grey out the cells that fit a caption best, at random, worst: mean fall of the similarity, and its standard error."""
    for name, values in falls(bundle, data, splits=split.split(","), photographs=photographs, threads=threads).items():
        error = values.std(ddof=1) / len(values) ** 0.5
        click.echo(f"{name:8} {values.mean():+.4f} ± {error:.4f}   ({len(values)} photographs)")


if __name__ == "__main__":
    main()
