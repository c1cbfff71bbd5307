"""Galleries from a bundle: photographs or captions through an encoder into shards on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .galleries.photos import Photo
from .galleries.sources import CaptionSource, captions_in, photos_in, photos_root
from .galleries.writer import GalleryEncoder, OnError, Summary, write_gallery
from .preprocess import MAX_PIXELS, pixel_limit
from .regions import RegionFile

RowProgress = Callable[[int, int], None]
# Captions of similar length share a batch within so many batches: nearly all that sorting everything would gain.
WINDOW_BATCHES = 16


class PhotoGalleryEncoder(GalleryEncoder[Photo]):
    """Photographs for the gallery writer."""

    def __init__(self, encoder: ImageEncoder) -> None:
        self.encoder = encoder
        self.dimension = encoder.dimension

    def prepare(self, source: Photo) -> dict[str, NDArray[Any]]:
        # As bytes, so that a quarantine reason names no path: a gallery is the same wherever the photographs lie.
        return self.encoder.prepare(source.read(), source.id)

    def collate(self, prepared: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        return {name: np.stack([one[name] for one in prepared]) for name in sorted(prepared[0])}

    def encode(self, batch: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        return self.encoder.run(batch)


class CaptionGalleryEncoder(GalleryEncoder[CaptionSource]):
    """Captions for the gallery writer; only under the `masked` policy is an embedding free of its batch's longest caption."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.dimension = encoder.dimension
        self.window_batches = WINDOW_BATCHES if encoder.bundle.manifest.pad_policy == "masked" else 1

    def prepare(self, source: CaptionSource) -> list[int]:
        if source.problem is not None:
            raise DualmatchError(source.problem)
        return self.encoder.tokenizer.ids([source.text])[0]

    def size(self, prepared: list[int]) -> int:
        return len(prepared) if self.window_batches > 1 else 0

    def encode(self, batch: Sequence[list[int]]) -> NDArray[np.float32]:
        return self.encoder.encode_prepared(batch)


def encode_gallery(
    bundle: Bundle,
    photos: str | Path,
    out: Path,
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 32,
    dtype: Literal["float16", "float32"] = "float16",
    regions: RegionFile | None = None,
    column: str | None = None,
    max_pixels: int = MAX_PIXELS,
    rows: tuple[int, int | None] | None = None,
    rows_per_shard: int | None = None,
    prepare_threads: int | None = None,
    resume: bool = False,
    on_error: OnError = "quarantine",
    progress: RowProgress | None = None,
) -> tuple[Summary, str]:
    """Encode photographs (see `galleries.sources.photos_in` for where from) into a gallery; see `galleries.writer.write_gallery`.

    Args:
        column: of parquet and arrow files.
        max_pixels: photographs with more are quarantined before they are decoded.
        prepare_threads: threads that read and pre-process, `threads` being the backend's.

    Returns:
        What was done, and what the encoder really ran on.
    """
    sources = photos_in(photos, column=column)
    with (
        ImageEncoder(bundle, backend=backend, threads=threads, batch_size=batch_size, regions=regions) as encoder,
        pixel_limit(max_pixels),
    ):
        summary = write_gallery(
            out,
            sources,
            PhotoGalleryEncoder(encoder),
            kind="images",
            bundle_path=bundle.path,
            bundle_hash=bundle.hash,
            root=photos_root(photos),
            rows=rows,
            batch_size=batch_size,
            rows_per_shard=rows_per_shard,
            dtype=dtype,
            threads=prepare_threads,
            resume=resume,
            on_error=on_error,
            progress=progress,
        )
        return summary, encoder.provider


def encode_caption_gallery(
    bundle: Bundle,
    captions: Path,
    out: Path,
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 128,
    dtype: Literal["float16", "float32"] = "float16",
    rows: tuple[int, int | None] | None = None,
    rows_per_shard: int | None = None,
    prepare_threads: int | None = None,
    resume: bool = False,
    on_error: OnError = "quarantine",
    progress: RowProgress | None = None,
) -> tuple[Summary, str]:
    """Encode a caption file into a gallery, in the file's order; a `captions.json` must find its images beside it."""
    sources = captions_in(captions, images=_images_beside(captions))
    with TextEncoder(bundle, backend=backend, threads=threads, batch_size=batch_size) as encoder:
        summary = write_gallery(
            out,
            sources,
            CaptionGalleryEncoder(encoder),
            kind="captions",
            bundle_path=bundle.path,
            bundle_hash=bundle.hash,
            rows=rows,
            batch_size=batch_size,
            rows_per_shard=rows_per_shard,
            dtype=dtype,
            threads=prepare_threads,
            resume=resume,
            on_error=on_error,
            progress=progress,
        )
        return summary, encoder.provider


def _images_beside(captions: Path) -> list[str] | None:
    """Ids of the photographs that lie beside a `captions.json`, to notice one that it names and that is not there."""
    folder = captions.parent / "images"
    return (
        [source.id for source in photos_in(folder)] if captions.suffix.lower() == ".json" and folder.is_dir() else None
    )
