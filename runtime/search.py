"""Search a gallery by text or by a photograph, and the evaluation of a whole data set."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import rerank
from .bundle import Bundle, load_bundle
from .datasets import Dataset
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .galleries.gallery import Gallery
from .recall import FOLDS, Recall, evaluate
from .regions import RegionFile
from .sheet import Hit
from .similarity import SimsInfo, ensemble, similarity_matrix

Progress = Callable[[str, int, int], None]


def bundle_of(gallery: Gallery, given: Path | None) -> Bundle:
    """The bundle that encoded a gallery: where the gallery says it is, or where it has moved.

    Raises:
        DualmatchError: no bundle there, or another one.
    """
    path = given or gallery.bundle_path
    if given is None and not path.is_dir():
        raise DualmatchError(
            f"the gallery was encoded by the bundle {path}, which is not there; say where it is with --bundle."
        )
    bundle = load_bundle(path)
    gallery.require_bundle(bundle.hash)
    return bundle


def search(
    gallery: Gallery,
    bundle: Bundle,
    *,
    text: str | None = None,
    image: Path | None = None,
    k: int = 10,
    backend: str = "onnxruntime",
    threads: int = 0,
    regions: RegionFile | None = None,
) -> list[Hit]:
    """The `k` items of the gallery nearest to a text or a photograph, best first.

    Raises:
        DualmatchError: not exactly one query, a query that cannot be read, or a gallery of another bundle.
    """
    if (text is None) == (image is None):
        raise DualmatchError("a search takes one query: a text or an image.")
    gallery.require_bundle(bundle.hash)
    if text is not None:
        if not text.strip():
            raise DualmatchError("the text to search for is empty.")
        with TextEncoder(bundle, backend=backend, threads=threads) as captions:
            query = captions.encode([text])
    else:
        assert image is not None
        with ImageEncoder(bundle, backend=backend, threads=threads, regions=regions) as images:
            query = images.encode([image])
    scores, positions = gallery.search(query, k)
    return [_hit(gallery, float(score), int(position)) for score, position in zip(scores[0], positions[0], strict=True)]


def _hit(gallery: Gallery, score: float, position: int) -> Hit:
    item = gallery.item(position)
    photo = gallery.photo_path(position) if gallery.kind == "images" else None
    return Hit(score=score, id=item.id, image=photo, caption=item.caption)


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


def evaluate_bundles(
    bundles: Sequence[Bundle],
    dataset: Dataset,
    *,
    protocol: str = "full",
    rerank_k1: int | None = None,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 32,
    regions: RegionFile | None = None,
    progress: Progress | None = None,
) -> Recall:
    """Recall of a bundle, or of the averaged similarities of several, on all images of `dataset` ranked together.

    Args:
        protocol: a key of `recall.FOLDS`.
        rerank_k1: re-rank image-to-text with so many candidates (DSRAN section III-G re-ranks that direction only).
    """
    if protocol not in FOLDS:
        raise DualmatchError(f"there is no protocol {protocol!r}; choose one of {', '.join(FOLDS)}.")
    matrices = []
    for bundle in bundles:
        images, captions = encode_dataset(
            bundle, dataset, backend=backend, threads=threads, batch_size=batch_size, regions=regions, progress=progress
        )
        matrices.append(similarity_matrix(images, captions))
    return evaluate(
        matrices[0] if len(matrices) == 1 else ensemble(matrices),
        caption_image=dataset.caption_image,
        folds=FOLDS[protocol],
        i2t=partial(rerank.i2t, k1=rerank_k1) if rerank_k1 else None,
        split=", ".join(dataset.splits),
        ensemble=len(matrices),
    )


def sims_of_galleries(images: Gallery, captions: Gallery) -> tuple[NDArray[np.float32], SimsInfo]:
    """Similarity of every image with every caption of two galleries, and what its rows and columns are.

    Raises:
        DualmatchError: galleries of the wrong kind, or encoded by different bundles.
    """
    if images.kind != "images" or captions.kind != "captions":
        raise DualmatchError(
            f"similarity takes a gallery of images and one of captions, got {images.kind} and {captions.kind}."
        )
    captions.require_bundle(images.bundle_hash)
    row_of = {item.id: row for row, item in enumerate(images.items)}
    named = [item.image for item in captions.items]
    owners = None
    if all(name is not None for name in named):
        if unknown := [name for name in named if name not in row_of]:
            raise DualmatchError(
                f"{len(unknown)} captions belong to images that the gallery does not hold, the first {unknown[0]!r}; "
                "encode the same photographs, or captions of these only."
            )
        owners = tuple(row_of[str(name)] for name in named)
    info = SimsInfo(
        image_ids=tuple(item.id for item in images.items),
        caption_ids=tuple(item.id for item in captions.items),
        caption_image=owners,
        bundle=images.bundle_hash,
    )
    return similarity_matrix(images.vectors(), captions.vectors()), info
