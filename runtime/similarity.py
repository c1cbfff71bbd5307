"""The similarity matrix of images and captions: computed in blocks, averaged over models, kept in a SIMS file.

SIMS is a `.npy` (images by captions, float32) with a `.json` beside it that says what the rows and columns are.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DualmatchError
from .files import read_json, write_atomically

Similarity = NDArray[np.float32]
Embeddings = NDArray[Any]

_FORMAT = "dualmatch-sims"
_VERSION = 1
_IMAGES_PER_BLOCK, _CAPTIONS_PER_BLOCK = 1024, 8192
_ROWS_PER_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class SimsInfo:
    """What a SIMS matrix is about.

    Attributes:
        image_ids, caption_ids: what its rows and its columns are.
        caption_image: for each caption the index of its image, or None where the captions belong to no image.
        bundle: hash of the bundle that made both sides' embeddings; of an ensemble, the hashes joined with `+`.
        protocol: further facts that a recall from this matrix must state (`split`, `ensemble`).
    """

    image_ids: tuple[str, ...]
    caption_ids: tuple[str, ...]
    caption_image: tuple[int, ...] | None
    bundle: str
    protocol: Mapping[str, Any] = field(default_factory=dict)


def similarity_matrix(images: Embeddings, captions: Embeddings, *, out: Similarity | None = None) -> Similarity:
    """Dot product of every image with every caption, float32 (images, captions).

    Args:
        images: (n, d) float16 or float32; may be memory-mapped: blocks of it are converted, never all.
        captions: (m, d), likewise.
        out: float32 (n, m) to write into, for example a memory-mapped file.

    Raises:
        DualmatchError: embeddings that are not two-dimensional, differ in d, or hold NaN or infinity.
    """
    check_embeddings(images, captions)
    out = _output(out, (len(images), len(captions)))
    for left, captions_BD in _blocks(captions, _CAPTIONS_PER_BLOCK):
        for top, images_BD in _blocks(images, _IMAGES_PER_BLOCK):
            np.matmul(images_BD, captions_BD.T, out=out[top : top + len(images_BD), left : left + len(captions_BD)])
    return out


def check_embeddings(images: Embeddings, captions: Embeddings) -> tuple[int, int]:
    """The numbers of images and captions, after a look at every embedding.

    Raises:
        DualmatchError: embeddings that are not two-dimensional, differ in d, or hold NaN, infinity or numbers whose products overflow.
    """
    for name, embeddings in (("image", images), ("caption", captions)):
        if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
            raise DualmatchError(
                f"{name} embeddings must be floats of shape (n, d), got {embeddings.dtype} {embeddings.shape}."
            )
    if images.shape[1] != captions.shape[1]:
        raise DualmatchError(
            f"images are embedded in {images.shape[1]} dimensions and captions in {captions.shape[1]}; encode both with one bundle."
        )
    for name, embeddings in (("image", images), ("caption", captions)):
        for start, block in _blocks(embeddings, _IMAGES_PER_BLOCK):
            # Where both squared norms are finite in float32, so is the dot product.
            finite = np.isfinite(np.einsum("nd,nd->n", block, block))
            if not finite.all():
                raise DualmatchError(
                    f"the embedding of {name} {start + int(finite.argmin())} holds NaN or infinity, or numbers too large to multiply; "
                    "encode it again."
                )
    return len(images), len(captions)


def order_similarity(images: Embeddings, captions: Embeddings) -> Similarity:
    """VSRN's order-embedding measure, -‖max(0, caption - image)‖, float32 (images, captions).

    Raises:
        DualmatchError: embeddings that do not fit each other.
    """
    if images.ndim != 2 or captions.ndim != 2 or images.shape[1] != captions.shape[1]:
        raise DualmatchError(
            f"embeddings of shapes {images.shape} and {captions.shape} cannot be compared; both must be (n, d)."
        )
    out = np.empty((len(images), len(captions)), np.float32)
    captions_MD = captions.astype(np.float32)
    for row, image_D in zip(out, images.astype(np.float32), strict=True):
        row[:] = -np.linalg.norm(np.maximum(captions_MD - image_D, 0), axis=1)
    return out


def ensemble(matrices: Sequence[Similarity], *, out: Similarity | None = None) -> Similarity:
    """The average of several models' similarities, float32; summed in float64 and rounded once.

    DSRAN's code adds two matrices and VSRN's averages them: the ranking is the same.

    Raises:
        DualmatchError: no matrix, or matrices of different shapes.
    """
    shapes = {matrix.shape for matrix in matrices}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise DualmatchError(
            f"an ensemble averages similarity matrices of one shape, got {[matrix.shape for matrix in matrices]}."
        )
    out = _output(out, matrices[0].shape)
    for top in range(0, len(out), _ROWS_PER_BLOCK):
        block = slice(top, top + _ROWS_PER_BLOCK)
        total = matrices[0][block].astype(np.float64)
        for matrix in matrices[1:]:
            total += matrix[block]
        out[block] = total / len(matrices)
    return out


def save_sims(path: Path, similarity: Similarity, info: SimsInfo) -> None:
    """Write `similarity` and `info` as SIMS; raises as `sims_being_written`."""
    if similarity.shape != (len(info.image_ids), len(info.caption_ids)):
        raise DualmatchError(
            f"a matrix of shape {similarity.shape} does not fit {len(info.image_ids)} image and {len(info.caption_ids)} caption ids."
        )
    with sims_being_written(path, info) as out:
        out[:] = similarity


@contextmanager
def sims_being_written(path: Path, info: SimsInfo) -> Iterator[Similarity]:
    """Yield a memory-mapped float32 (images, captions) to fill; it becomes the SIMS at `path` when the block ends.

    On any failure an older SIMS stays as it was and nothing new is left behind. The old `.json` goes first and the new one comes
    last, so a power cut in between leaves a matrix that `load_sims` refuses rather than one with another matrix's ids.

    Raises:
        DualmatchError: the disk has no room, `info` contradicts itself, or the matrix was filled with NaN.
    """
    _check_info(info)
    matrix_path, json_path = sims_paths(path)
    shape = (len(info.image_ids), len(info.caption_ids))
    matrix_path.parent.mkdir(parents=True, exist_ok=True)
    document = {"format": _FORMAT, "version": _VERSION, "shape": shape, "dtype": "float32", **asdict(info)}
    prefix, suffix = f".{matrix_path.name}.", ".part"
    with tempfile.TemporaryDirectory(dir=matrix_path.parent, prefix=prefix, suffix=suffix) as folder:
        new_matrix, new_json = Path(folder) / matrix_path.name, Path(folder) / json_path.name
        write_atomically(new_json, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        matrix = _mapped(new_matrix, shape)
        yield matrix
        _refuse_nan(matrix, "the similarity to be written")
        matrix.flush()
        json_path.unlink(missing_ok=True)
        new_matrix.replace(matrix_path)
        new_json.replace(json_path)


def load_sims(path: Path) -> tuple[Similarity, SimsInfo]:
    """The matrix, memory-mapped for reading, and what it is about.

    Raises:
        DualmatchError: a file is missing, is not SIMS, contradicts the other, or the matrix holds NaN.
    """
    matrix_path, json_path = sims_paths(path)
    try:
        matrix: Similarity = np.load(matrix_path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DualmatchError(f"similarity: there is no file {matrix_path}.") from None
    except (OSError, ValueError, EOFError) as error:
        raise DualmatchError(f"similarity: {matrix_path} cannot be read as a .npy matrix ({error}).") from None
    document = read_json(json_path, f"the description of {matrix_path}")
    info = _info_from_json(document, json_path)
    expected = (len(info.image_ids), len(info.caption_ids))
    if matrix.dtype != np.float32 or matrix.shape != expected:
        raise DualmatchError(
            f"{matrix_path} is {matrix.dtype} {matrix.shape}, its description {json_path.name} says float32 {expected}; write both again."
        )
    _refuse_nan(matrix, str(matrix_path))
    return matrix, info


def forget_pages(matrix: NDArray[Any]) -> None:
    """Let go of the memory that a mapped matrix's pages take up; what was written is kept by the file. Nothing for other arrays."""
    mapping: Any = matrix.base
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def sims_paths(path: Path) -> tuple[Path, Path]:
    """The `.npy` and the `.json` of a SIMS that may be named with or without `.npy`."""
    stem = path.name.removesuffix(".npy")
    return path.with_name(f"{stem}.npy"), path.with_name(f"{stem}.json")


def _output(out: Similarity | None, shape: tuple[int, ...]) -> Similarity:
    if out is None:
        return np.empty(shape, np.float32)
    if out.dtype != np.float32 or out.shape != shape:
        raise DualmatchError(f"the output must be float32 {shape}, got {out.dtype} {out.shape}.")
    return out


def _blocks(embeddings: Embeddings, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, len(embeddings), size):
        yield start, np.ascontiguousarray(embeddings[start : start + size], dtype=np.float32)


def _mapped(path: Path, shape: tuple[int, int]) -> "np.memmap[Any, np.dtype[np.float32]]":
    try:
        matrix: np.memmap[Any, np.dtype[np.float32]] = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        if hasattr(os, "posix_fallocate"):
            # A full disk must raise here: writing to a hole in a mapped file would kill the process.
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise DualmatchError(
            f"similarity: a matrix of {shape[0]} by {shape[1]} float32 cannot be kept in {path.parent.parent} ({error.strerror})."
        ) from None
    return matrix


def _refuse_nan(matrix: Similarity, what: str) -> None:
    for top in range(0, len(matrix), _ROWS_PER_BLOCK):
        if np.isnan(matrix[top : top + _ROWS_PER_BLOCK].max()):  # the maximum of a block with NaN is NaN
            raise DualmatchError(f"{what} holds NaN in rows {top} to {min(top + _ROWS_PER_BLOCK, len(matrix)) - 1}.")
        forget_pages(matrix)


def _check_info(info: SimsInfo) -> None:
    if not info.image_ids or not info.caption_ids:
        raise DualmatchError(
            f"similarity needs images and captions, got {len(info.image_ids)} and {len(info.caption_ids)}."
        )
    owners = info.caption_image
    if owners is not None and not (
        len(owners) == len(info.caption_ids) and all(0 <= owner < len(info.image_ids) for owner in owners)
    ):
        raise DualmatchError(
            f"caption_image must name one of {len(info.image_ids)} images for each of {len(info.caption_ids)} captions."
        )


def _info_from_json(document: Any, path: Path) -> SimsInfo:
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise DualmatchError(f"{path} does not describe a similarity matrix (format {_FORMAT!r} is missing).")
    if document.get("version") != _VERSION:
        raise DualmatchError(
            f"{path} is version {document.get('version')!r} of {_FORMAT}; this release reads version {_VERSION}."
        )
    keys = ("image_ids", "caption_ids", "caption_image", "bundle", "protocol")
    values: list[Any] = [document.get(key) for key in keys]
    image_ids, caption_ids, owners, bundle, protocol = values
    ids_are_strings = _all_are(image_ids, str) and _all_are(caption_ids, str)
    owners_are_indices = owners is None or _all_are(owners, int)
    if not (ids_are_strings and owners_are_indices and isinstance(bundle, str) and isinstance(protocol, dict)):
        raise DualmatchError(
            f"{path} must hold image_ids and caption_ids (lists of strings), caption_image (a list of integers, or null), "
            "bundle (a string) and protocol (an object)."
        )
    info = SimsInfo(
        image_ids=tuple(image_ids),
        caption_ids=tuple(caption_ids),
        caption_image=None if owners is None else tuple(owners),
        bundle=bundle,
        protocol=protocol,
    )
    _check_info(info)
    return info


def _all_are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
