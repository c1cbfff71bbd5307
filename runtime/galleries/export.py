"""A gallery's living items for other programs: Parquet, plain NumPy, a faiss index, or points for Qdrant.

Everything is written beside its place and renamed, block by block, so memory stays bounded (faiss holds its index in memory).
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import directory_built_aside, refuse_existing

from .gallery import Gallery, Item

EXPORT_ROWS = 4096  # at a time
Progress = Callable[[int, int], None]


def export(gallery: Gallery, out: Path, to: str, progress: Progress | None = None) -> None:
    """Write the gallery's items and vectors into `out`, which appears complete or not at all.

    Args:
        gallery: what to export.
        out: a file for `parquet` and `qdrant-jsonl`, a directory for `npy` and `faiss`.
        to: a key of `FORMATS`.
        progress: called with (items done, of).

    Raises:
        DualmatchError: no such format, `out` exists or cannot be written, or an extra that is not installed.
    """
    if to not in FORMATS:
        raise DualmatchError(f"galleries are not exported to {to!r}; choose one of {', '.join(FORMATS)}.")
    refuse_existing(out, "output")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        FORMATS[to](gallery, out, progress or (lambda _done, _of: None))
    except OSError as error:
        raise DualmatchError(f"{out} cannot be written: {error.strerror or error}.") from None


def fields_of(gallery: Gallery, item: Item) -> dict[str, Any]:
    """An item as another program gets it: its row and id, its caption and image where it has them, None left out."""
    fields = {"row": item.row, "id": printed(item.id), "caption": item.caption, "image": item.image}
    return {name: value for name, value in fields.items() if value is not None} | {"kind": gallery.kind}


def printed(text: str) -> str:
    """Text that every reader of UTF-8 takes: bytes of a file name that are none become U+FFFD."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _blocks(gallery: Gallery, progress: Progress) -> Iterator[tuple[list[Item], NDArray[Any]]]:
    """Items and vectors as stored, side by side."""
    items, done = gallery.iter_items(), 0
    progress(0, len(gallery))
    for _, vectors in gallery.pieces(EXPORT_ROWS):
        yield list(islice(items, len(vectors))), vectors
        done += len(vectors)
        progress(done, len(gallery))


def _npy(gallery: Gallery, out: Path, progress: Progress) -> None:
    with directory_built_aside(out) as folder:
        shape = (len(gallery), gallery.dimension)
        with (folder / "vectors.npy").open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(gallery.index.dtype)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            with _items_file(folder / "items.jsonl") as write_item:
                for items, vectors in _blocks(gallery, progress):
                    file.write(np.ascontiguousarray(vectors).tobytes())
                    for item in items:
                        write_item(fields_of(gallery, item))
            _to_disk(file)


def _faiss(gallery: Gallery, out: Path, progress: Progress) -> None:
    faiss = import_faiss()
    index = faiss.IndexFlatIP(gallery.dimension)
    if gallery.index.dtype == "float16":  # no copy in float32, and nothing to learn from data
        quantizer = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexScalarQuantizer(gallery.dimension, quantizer, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
    with directory_built_aside(out) as folder:
        with _items_file(folder / "items.jsonl") as write_item:
            for items, vectors in _blocks(gallery, progress):
                index.add(vectors.astype(np.float32))
                for item in items:
                    write_item(fields_of(gallery, item))
        write_faiss(index, folder / "index.faiss")


def _parquet(gallery: Gallery, out: Path, progress: Progress) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DualmatchError(
            "Parquet needs pyarrow, which is not installed: pip install 'dualmatch[parquet]'."
        ) from None
    # float32, because few readers of Parquet know half precision.
    vector = pa.list_(pa.float32(), gallery.dimension)
    columns = {"row": pa.int64(), "id": pa.string(), "caption": pa.string(), "image": pa.string(), "vector": vector}
    metadata = {"dualmatch.bundle": gallery.bundle_hash, "dualmatch.kind": gallery.kind}
    schema = pa.schema(list(columns.items()), metadata=metadata)
    with _file_built_aside(out) as file, pq.ParquetWriter(file, schema) as writer:
        for items, vectors in _blocks(gallery, progress):
            flat = pa.array(vectors.astype(np.float32).ravel())
            rows = [fields_of(gallery, item) for item in items]
            arrays = [pa.array([row.get(name) for row in rows], kind) for name, kind in list(columns.items())[:4]]
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, gallery.dimension))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _qdrant(gallery: Gallery, out: Path, progress: Progress) -> None:
    with _file_built_aside(out) as file:
        for items, vectors in _blocks(gallery, progress):
            for item, vector in zip(items, vectors.astype(np.float32), strict=True):
                # Qdrant's ids are whole numbers or UUIDs; a source row never changes its meaning.
                point = {"id": item.row, "vector": vector.tolist(), "payload": fields_of(gallery, item)}
                file.write(json.dumps(point).encode() + b"\n")


FORMATS: dict[str, Callable[[Gallery, Path, Progress], None]] = {
    "parquet": _parquet,
    "npy": _npy,
    "faiss": _faiss,
    "qdrant-jsonl": _qdrant,
}


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        DualmatchError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise DualmatchError("this needs faiss, which is not installed: pip install 'dualmatch[ann]'.") from None
    return faiss


def write_faiss(index: Any, path: Path) -> None:
    """A faiss index into a file, synced; a full disk is an OSError, as with every other file."""
    faiss = import_faiss()
    try:
        faiss.write_index(index, os.fspath(path))
    except RuntimeError as error:
        raise OSError(f"faiss could not write it ({str(error).splitlines()[0][:200]})") from None
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _items_file(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    with path.open("wb") as file:

        def write(fields: dict[str, Any]) -> None:
            file.write(json.dumps(fields).encode() + b"\n")

        yield write
        _to_disk(file)


@contextmanager
def _file_built_aside(out: Path) -> Iterator[Any]:
    """A file that becomes `out` on success and disappears on any failure."""
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            _to_disk(file)
        Path(temporary).chmod(0o644)
        if out.is_dir():  # refuse_existing lets an empty one pass
            out.rmdir()
        Path(temporary).replace(out)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
