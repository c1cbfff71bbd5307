"""Trained networks run on a data set, once each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime import streaming
from dualmatch.runtime.attention import has_attention
from dualmatch.runtime.bundle import Bundle
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.evaluate import encode_dataset
from dualmatch.runtime.recall import Ranks, Recall
from dualmatch.runtime.regions import RegionFile

from .found import FoundBundle

Progress = Callable[[str, int, int], None]
Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One trained network on the data set.

    Attributes:
        label: for people.
        images, captions: embeddings, (n, d).
        image_ranks, caption_ranks: of the best right answer, counted from 0.
    """

    label: str
    bundle: Bundle
    images: Vectors
    captions: Vectors
    image_ranks: Ranks
    caption_ranks: Ranks
    recall: Recall


def one_of_each(bundles: Iterable[FoundBundle]) -> list[FoundBundle]:
    """A bundle of every trained network: the first by name, of those that show what they look at if there are any. Others of the same
    network differ in the flips that the gate counts.
    """
    chosen: dict[str, FoundBundle] = {}
    for one in sorted(bundles, key=lambda one: not has_attention(one.bundle)):
        chosen.setdefault(one.checkpoint, one)
    return sorted(chosen.values(), key=lambda one: one.name)


def run_models(
    bundles: Iterable[FoundBundle],
    dataset: Dataset,
    *,
    regions: RegionFile | None,
    backend: str,
    threads: int,
    batch_size: int,
    progress: Progress | None,
) -> list[Model]:
    """Encode `dataset` with each bundle, and rank it both ways.

    Raises:
        DualmatchError: a bundle cannot run on this data or backend.
    """
    image_of, models = np.array(dataset.caption_image), []
    for one in bundles:
        encoded = encode_dataset(
            one.bundle,
            dataset,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            regions=regions,
            progress=progress,
        )
        of_images, of_captions, _ = streaming.ranks([encoded], image_of)
        models.append(
            Model(
                label=one.name if one.network in one.name.upper() else f"{one.network} ({one.name})",
                bundle=one.bundle,
                images=encoded[0],
                captions=encoded[1],
                image_ranks=of_images,
                caption_ranks=of_captions,
                recall=streaming.evaluate([encoded], caption_image=image_of, split=", ".join(dataset.splits)),
            )
        )
    return models
