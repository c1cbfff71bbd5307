"""More photographs or captions into a finished gallery: encoded beside it, resumable, then joined to it in one step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

from .encode import encode_caption_gallery, encode_gallery
from .errors import DualmatchError
from .galleries.edit import Duplicates, append_gallery, holds_already, is_part, refuse_duplicates
from .galleries.gallery import Gallery
from .galleries.index import INDEX_FILE
from .galleries.sources import captions_in, photos_in
from .galleries.writer import OnError
from .regions import RegionFile
from .search import bundle_of

Progress = Callable[[str, int, int], None]


def append(
    path: Path,
    source: str,
    *,
    bundle: Path | None = None,
    backend: str = "onnxruntime",
    threads: int = 0,
    regions: RegionFile | None = None,
    on_error: OnError = "quarantine",
    duplicates: Duplicates = "refuse",
    progress: Progress | None = None,
) -> int:
    """Add to the gallery `path` another gallery, or photographs or captions encoded as its own were; gives how many items are new.

    New sources are encoded into `<path>.append`, which disappears once they are in; after a kill, the same call goes on.

    Args:
        path: the gallery.
        source: a gallery, or what it takes to encode one: photographs for a gallery of images, captions for one of captions.
        bundle: the bundle that encoded the gallery, if it has moved.
        backend, threads, regions: of the encoder.
        on_error: for sources that cannot be read.
        duplicates: which of two items with one id to keep, if any.
        progress: called with (what, done, of).

    Raises:
        DualmatchError: another bundle, sources that are in the gallery already (unless told which to keep), or what encoding
            and joining raise.
    """
    gallery = Gallery.open(path)
    if (Path(source) / INDEX_FILE).is_file():
        return append_gallery(path, Gallery.open(Path(source)), duplicates=duplicates)
    if is_part(gallery.index):
        raise DualmatchError(f"gallery {path} is a part of a list: merge the parts first.")
    aside = path.with_name(f"{path.name}.append")
    if not (aside / INDEX_FILE).is_file() and duplicates == "refuse":
        # Before hours of encoding rather than after.
        ids = photos_in(source) if gallery.kind == "images" else captions_in(Path(source))
        refuse_duplicates(gallery, {one.id for one in ids})
    found = bundle_of(gallery, bundle)
    report = None if progress is None else lambda done, of: progress("encoding", done, of)
    dtype = cast("Literal['float16', 'float32']", gallery.index.dtype)
    if gallery.kind == "images":
        encode_gallery(
            found, source, aside, backend=backend, threads=threads, batch_size=gallery.index.batch_size, dtype=dtype,
            rows_per_shard=gallery.index.rows_per_shard, regions=regions, resume=True, on_error=on_error, progress=report,
        )  # fmt: skip
    else:
        encode_caption_gallery(
            found, Path(source), aside, backend=backend, threads=threads, batch_size=gallery.index.batch_size, dtype=dtype,
            rows_per_shard=gallery.index.rows_per_shard, resume=True, on_error=on_error, progress=report,
        )  # fmt: skip
    more = Gallery.open(aside)
    # A kill after joining and before tidying up leaves nothing but the tidying up to do.
    if not holds_already(gallery, more):
        append_gallery(path, more, duplicates=duplicates)
    added = len(more)
    shutil.rmtree(aside)
    return added
