"""Recall of bundles on a data set, and the similarity of two galleries."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import streaming
from .bundle import Bundle
from .datasets import Dataset
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .galleries.gallery import Gallery
from .recall import FOLDS, Ranks, Recall, checked_caption_image, require_folds
from .regions import RegionFile
from .similarity import SimsInfo, forget_pages, sims_being_written

Progress = Callable[[str, int, int], None]

_IMAGES_PER_BLOCK, _CAPTIONS_PER_BLOCK = 512, 4096


def encode_dataset(
    bundle: Bundle,
    dataset: Dataset,
    *,
    backend: str,
    threads: int,
    batch_size: int,
    regions: RegionFile | None,
    progress: Progress | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(images, captions) embeddings of a data set, every image once, float32."""
    with ImageEncoder(bundle, backend=backend, threads=threads, batch_size=batch_size, regions=regions) as encoder:
        images = encoder.encode_items(dataset.items, progress)
    with TextEncoder(
        bundle, backend=backend, threads=threads, batch_size=bundle.manifest.caption_batch
    ) as text_encoder:
        captions = text_encoder.encode(dataset.captions)
    return images, captions


def encode_each(
    bundles: Sequence[Bundle],
    dataset: Dataset,
    *,
    backend: str,
    threads: int,
    batch_size: int,
    regions: RegionFile | None,
    progress: Progress | None,
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """`encode_dataset` by several bundles."""
    for bundle in bundles[1:]:  # one that cannot run is known before hours of the first one's encoding
        with ImageEncoder(bundle, backend=backend, threads=threads, batch_size=batch_size, regions=regions):
            pass
    return [
        encode_dataset(
            bundle, dataset, backend=backend, threads=threads, batch_size=batch_size, regions=regions, progress=progress
        )
        for bundle in bundles
    ]


def evaluate_bundles(
    bundles: Sequence[Bundle],
    dataset: Dataset,
    *,
    protocol: str = "full",
    rerank_k1: int | None = None,
    rerank_t2i_k1: int | None = None,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 32,
    regions: RegionFile | None = None,
    progress: Progress | None = None,
) -> Recall:
    """Recall of a bundle, or of the averaged similarities of several, on all images of `dataset` ranked together.

    The similarity matrix is never in memory (`streaming`).

    Args:
        protocol: a key of `recall.FOLDS`.
        rerank_k1, rerank_t2i_k1: re-rank with so many candidates from image to text (what DSRAN section III-G reports), from text to image.

    Raises:
        DualmatchError: a protocol or a number of candidates that does not fit the data set, before anything is encoded; or as the encoders.
    """
    if protocol not in FOLDS:
        raise DualmatchError(f"there is no protocol {protocol!r}; choose one of {', '.join(FOLDS)}.")
    folds, k1_i2t, k1_t2i = FOLDS[protocol], rerank_k1 or 0, rerank_t2i_k1 or 0
    image_of = checked_caption_image(len(dataset.items), len(dataset.captions), dataset.caption_image)
    require_folds(image_of, len(dataset.items), folds, k1_i2t=k1_i2t, k1_t2i=k1_t2i)
    models = encode_each(
        bundles, dataset, backend=backend, threads=threads, batch_size=batch_size, regions=regions, progress=progress
    )
    return streaming.evaluate(
        models, caption_image=image_of, folds=folds, k1_i2t=k1_i2t, k1_t2i=k1_t2i, split=", ".join(dataset.splits)
    )


def sims_info(images: Gallery, captions: Gallery) -> SimsInfo:
    """What the rows and columns of the similarity of two galleries are.

    Raises:
        DualmatchError: galleries of the wrong kind, encoded by different bundles, empty, or captions of images that are not there.
    """
    if images.kind != "images" or captions.kind != "captions":
        raise DualmatchError(
            f"similarity takes a gallery of images and one of captions, got {images.kind} and {captions.kind}."
        )
    captions.require_bundle(images.bundle_hash)
    image_ids = tuple(item.id for item in images.iter_items())
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    caption_items = captions.items
    named = [item.image for item in caption_items]
    owners = None
    if all(name is not None for name in named):
        if unknown := [name for name in named if name not in row_of]:
            raise DualmatchError(
                f"{len(unknown)} captions belong to images that the gallery does not hold, the first {unknown[0]!r}; "
                "encode the same photographs, or captions of these only."
            )
        owners = tuple(row_of[str(name)] for name in named)
    return SimsInfo(
        image_ids=image_ids,
        caption_ids=tuple(item.id for item in caption_items),
        caption_image=owners,
        bundle=images.bundle_hash,
    )


def write_sims(images: Gallery, captions: Gallery, out: Path, progress: Progress | None = None) -> SimsInfo:
    """Similarity of every image with every caption of two galleries into the SIMS file `out`, a few rows in memory at a time.

    Raises:
        DualmatchError: as `sims_info`, vectors that are not finite, or no room.
    """
    info = sims_info(images, captions)
    for gallery in (images, captions):
        if not all(np.isfinite(block).all() for _, block in gallery.blocks()):
            raise DualmatchError(f"gallery {gallery.path} holds NaN or infinity: run `dualmatch gallery check` on it.")
    with sims_being_written(out, info) as matrix:
        for top, images_BD in images.blocks(_IMAGES_PER_BLOCK):
            rows = matrix[top : top + len(images_BD)]
            for left, captions_BD in captions.blocks(_CAPTIONS_PER_BLOCK):
                np.matmul(images_BD, captions_BD.T, out=rows[:, left : left + len(captions_BD)])
            forget_pages(matrix)
            if progress is not None:
                progress("images compared", top + len(images_BD), len(images))
    return info


def caption_neighbours(path: Path, info: SimsInfo, k: int) -> Ranks:
    """The k captions nearest to each caption of a SIMS, from the gallery of captions that it was made from, int64 (captions, k).

    Raises:
        DualmatchError: another gallery, or k outside 1 … captions.
    """
    gallery = Gallery.open(path)
    ids = tuple(item.id for item in gallery.iter_items())
    if (gallery.kind, gallery.bundle_hash, ids) != ("captions", info.bundle, info.caption_ids):
        raise DualmatchError(
            f"gallery {path} does not hold the captions that the similarity is about, in their order and encoded by its bundle; "
            "give the gallery that the similarity was made from."
        )
    return streaming.neighbours([gallery.vectors()], k)
