"""Galleries from a bundle: photographs or captions through an encoder into shards on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .galleries.sources import CaptionSource, PhotoSource, captions_in, photos_in, photos_root
from .galleries.writer import Summary, write_gallery
from .regions import RegionFile

OnError = Literal["quarantine", "fail"]
RowProgress = Callable[[int, int], None]


class _Photos:
    """Photographs for the gallery writer."""

    def __init__(self, encoder: ImageEncoder) -> None:
        self.encoder = encoder
        self.dimension = encoder.dimension

    def prepare(self, source: PhotoSource) -> dict[str, NDArray[Any]]:
        # As bytes, so that a quarantine reason names no path: a gallery is the same wherever the photographs lie.
        if not source.path.is_file() and source.path.exists():  # reading a pipe would wait forever
            raise DualmatchError("it is not a regular file.")
        return self.encoder.prepare(source.path.read_bytes(), source.id)

    def encode(self, prepared: Sequence[Any]) -> NDArray[np.float32]:
        return self.encoder.encode_prepared(prepared)


class _Captions:
    """Captions for the gallery writer."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.dimension = encoder.dimension

    def prepare(self, source: CaptionSource) -> list[int]:
        return self.encoder.tokenizer.ids([source.text])[0]

    def encode(self, prepared: Sequence[Any]) -> NDArray[np.float32]:
        return self.encoder.encode_prepared(prepared)


def encode_gallery(
    bundle: Bundle,
    photos: Path,
    out: Path,
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 32,
    dtype: Literal["float16", "float32"] = "float16",
    regions: RegionFile | None = None,
    resume: bool = False,
    on_error: OnError = "quarantine",
    progress: RowProgress | None = None,
) -> tuple[Summary, str]:
    """Encode a folder or list of photographs into a gallery; see `galleries.writer.write_gallery`.

    Returns:
        What was done, and what the encoder really ran on.
    """
    sources = photos_in(photos)
    with ImageEncoder(bundle, backend=backend, threads=threads, batch_size=batch_size, regions=regions) as encoder:
        summary = write_gallery(
            out,
            sources,
            _Photos(encoder),
            kind="images",
            bundle_path=bundle.path,
            bundle_hash=bundle.hash,
            root=photos_root(photos),
            batch_size=batch_size,
            dtype=dtype,
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
            _Captions(encoder),
            kind="captions",
            bundle_path=bundle.path,
            bundle_hash=bundle.hash,
            batch_size=batch_size,
            dtype=dtype,
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
