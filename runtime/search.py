"""Search a gallery by texts, by photographs, or by both averaged into one query."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, load_bundle
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .galleries.ann import AnnIndex
from .galleries.gallery import Gallery
from .regions import RegionFile
from .sheet import Hit


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to search for: texts and photographs; several are averaged into one embedding."""

    texts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return " + ".join([*self.texts, *(path.name for path in self.images)])


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
    """The `k` items of the gallery nearest to a text, to a photograph, or to both averaged, best first.

    Raises:
        DualmatchError: no query, a query that cannot be read, or a gallery of another bundle.
    """
    query = Query(texts=() if text is None else (text,), images=() if image is None else (image,))
    return search_all(gallery, bundle, [query], k=k, backend=backend, threads=threads, regions=regions)[0]


def search_all(
    gallery: Gallery,
    bundle: Bundle,
    queries: Sequence[Query],
    *,
    k: int = 10,
    among: NDArray[np.bool_] | None = None,
    ann: AnnIndex | None = None,
    backend: str = "onnxruntime",
    threads: int = 0,
    regions: RegionFile | None = None,
) -> list[list[Hit]]:
    """For every query its `k` nearest items, best first; all queries pass over the gallery together.

    Args:
        gallery: of images or of captions.
        bundle: the one that encoded it.
        queries: at least one.
        k: how many hits each.
        among: bool (count,), the items to search (`galleries.filters.select`).
        ann: search through this approximate index.
        backend, threads, regions: of the encoders.

    Raises:
        DualmatchError: as `search`.
    """
    gallery.require_bundle(bundle.hash)
    embeddings = embed(bundle, queries, backend=backend, threads=threads, regions=regions)
    if ann is not None:
        scores, positions = ann.search(embeddings, k, among=among)
    else:
        scores, positions = gallery.search(embeddings, k, among=among, threads=threads)
    return [
        [_hit(gallery, score, position) for score, position in zip(*pair, strict=True)]
        for pair in zip(scores.tolist(), positions.tolist(), strict=True)
    ]


def embed(
    bundle: Bundle, queries: Sequence[Query], *, backend: str, threads: int, regions: RegionFile | None
) -> NDArray[np.float32]:
    """Queries as embeddings of unit norm, float32 (queries, dimension); a query of several parts is their mean, normalised."""
    if not queries or any(not query.texts and not query.images for query in queries):
        raise DualmatchError("a search takes at least one query: a text, an image, or both.")
    if any(not text.strip() for query in queries for text in query.texts):
        raise DualmatchError("the text to search for is empty.")
    texts = list(dict.fromkeys(text for query in queries for text in query.texts))
    images = list(dict.fromkeys(image for query in queries for image in query.images))
    vectors: dict[str | Path, NDArray[np.float32]] = {}
    if texts:
        with TextEncoder(bundle, backend=backend, threads=threads) as captions:
            vectors.update(zip(texts, captions.encode(texts), strict=True))
    if images:
        with ImageEncoder(bundle, backend=backend, threads=threads, regions=regions) as photographs:
            vectors.update(zip(images, photographs.encode(images), strict=True))
    parts: list[list[str | Path]] = [[*query.texts, *query.images] for query in queries]
    means = np.stack([np.mean([vectors[part] for part in of_query], axis=0) for of_query in parts])
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    if not norms.all():
        raise DualmatchError("the parts of a query cancel each other out: their mean has no direction.")
    averaged = np.array([len(of_query) > 1 for of_query in parts])
    # A single embedding stays as the encoder gave it, to the last bit.
    return np.asarray(np.where(averaged[:, None], means / norms, means), dtype=np.float32)


def read_queries(path: Path) -> list[Query]:
    """Queries from a file: `.txt`, a text a line; `.jsonl`, objects with `text` and/or `image` (a path relative to the file).

    Raises:
        DualmatchError: another suffix, an unreadable file or line, or no query in it.
    """
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise DualmatchError(f"queries: {path} is neither .txt (a text a line) nor .jsonl (text and/or image).")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
        raise DualmatchError(f"queries: {path} cannot be read: {reason}.") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DualmatchError(f"queries: {path} holds none.")
    if path.suffix.lower() == ".txt":
        return [Query(texts=(line,)) for _, line in numbered]
    return [_query_of(line, f"{path}, line {number}", path.parent) for number, line in numbered]


def _query_of(line: str, place: str, folder: Path) -> Query:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DualmatchError(f"{place}: not JSON ({error}).") from None
    known = isinstance(entry, dict) and entry and not {*entry} - {"text", "image"}
    if not known or not all(isinstance(value, str) and value.strip() for value in entry.values()):
        raise DualmatchError(f"{place}: expected an object with 'text' and/or 'image', found {line[:60]}.")
    return Query(
        texts=(entry["text"],) if "text" in entry else (), images=(folder / entry["image"],) if "image" in entry else ()
    )


def _hit(gallery: Gallery, score: float, position: int) -> Hit:
    item = gallery.item(position)
    photo = gallery.photo_path(position) if gallery.kind == "images" and gallery.has_photos(position) else None
    return Hit(score=score, id=item.id, image=photo, caption=item.caption, image_id=item.image)
