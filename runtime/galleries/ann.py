"""An approximate index of a gallery (faiss's HNSW graph over float16), its recall against exact search, and searches through it.

`ann.json` in the gallery names the index file, the state of the gallery it was built from and the recall measured then.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json, sha256_of_bytes, sha256_of_file, write_atomically

from .edit import editing
from .exact import SPARE_CANDIDATES, Positions, scored_again
from .export import import_faiss, write_faiss
from .gallery import Gallery

ANN_FILE = "ann.json"
ANN_NAMES = re.compile(r"ann-[0-9a-f]{12}\.faiss")
ANN_LEFTOVERS = re.compile(rf"{ANN_NAMES.pattern}|\.{ANN_NAMES.pattern}\.part")
FORMAT, VERSION = "dualmatch-ann", 1
NEIGHBOURS, BUILD_EFFORT, EFFORT = 16, 128, 64  # of the graph; candidates kept while building, and while searching
ADD_ROWS = 20_000  # at a time
SAMPLE = 256  # queries that measure recall
RECALL_K = 10

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class AnnRecord:
    """`ann.json`: an approximate index, what it was built from, and how well it finds.

    Attributes:
        file, sha256: the index.
        state: SHA-256 of the gallery's `index.json` when it was built.
        effort: candidates a search keeps (faiss's efSearch).
        recall: share of the exact top 10 that it found.
        queries: whose recall that is, in words.
    """

    file: str
    sha256: str
    state: str
    effort: int
    recall: float
    queries: str


class AnnIndex:
    """An approximate index, opened: memory-mapped, so that a first query does not wait for all of it."""

    def __init__(self, gallery: Gallery, record: AnnRecord, index: Any) -> None:
        self.gallery, self.record, self._index = gallery, record, index

    @classmethod
    def open(cls, gallery: Gallery) -> "AnnIndex":
        """Open the gallery's approximate index.

        Raises:
            DualmatchError: there is none, it is damaged, the gallery has changed since, or faiss is not installed.
        """
        record = read_record(gallery)
        if record.state != state_of(gallery):
            raise DualmatchError(
                f"gallery {gallery.path} has changed since its approximate index was built: run `dualmatch gallery index` again."
            )
        faiss = import_faiss()
        path = gallery.path / record.file
        try:
            index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError:
            raise DualmatchError(
                f"gallery {gallery.path}: {record.file} is missing or damaged: run `dualmatch gallery index` again."
            ) from None
        if (index.ntotal, index.d) != (len(gallery), gallery.dimension):
            raise DualmatchError(f"gallery {gallery.path}: {record.file} is of another gallery.")
        return cls(gallery, record, index)

    def search(
        self, queries: Float32, k: int = 10, *, among: NDArray[np.bool_] | None = None, effort: int | None = None
    ) -> tuple[Float32, Positions]:
        """As `Gallery.search`, but it may miss some; the scores of what it finds are exact.

        Args:
            queries: float32 (num_queries, dimension).
            k: how many.
            among: bool (count,), the positions to search.
            effort: candidates kept; more find more and take longer. By default what the index was measured with.
        """
        self.gallery.require_queries(queries, k)
        count = len(self.gallery) if among is None else int(np.count_nonzero(among))
        k = min(k, count)
        if not k or not len(queries):
            return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        num_candidates = min(k + SPARE_CANDIDATES, count)
        faiss = import_faiss()
        selector = None if among is None else faiss.IDSelectorBitmap(np.packbits(among, bitorder="little"))
        parameters = faiss.SearchParametersHNSW(
            efSearch=max(effort or self.record.effort, num_candidates), sel=selector
        )
        _, found = self._index.search(queries, num_candidates, params=parameters)
        if (found < 0).any():  # a filter can cut the graph apart
            raise DualmatchError(
                f"the approximate index found fewer than {num_candidates} of {count} items for some query; "
                "search exactly, without --ann."
            )
        return scored_again(found, queries, k, self.gallery.vectors_at)


def build(
    path: Path,
    *,
    effort: int = EFFORT,
    queries: Gallery | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> AnnRecord:
    """Build the approximate index of a gallery, measure it, and put it in the place of an earlier one.

    Args:
        path: the gallery.
        effort: candidates that searches keep.
        queries: a gallery of the other kind, of which a sample is asked (texts look for photographs in another way than
            photographs do); by default a sample of the gallery's own vectors.
        threads: 0 for one per core.
        progress: called with (vectors added, of).

    Raises:
        DualmatchError: an empty gallery, queries of another bundle, faiss is not installed, or the disk is full.
    """
    faiss = import_faiss()
    with editing(path) as gallery:
        if not len(gallery):
            raise DualmatchError(f"gallery {path} has no items to index.")
        if queries is not None:
            queries.require_bundle(gallery.bundle_hash)
        faiss.omp_set_num_threads(threads or len(os.sched_getaffinity(0)))
        index = faiss.IndexHNSWSQ(
            gallery.dimension, faiss.ScalarQuantizer.QT_fp16, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT
        )
        index.hnsw.efConstruction = BUILD_EFFORT
        index.is_trained = index.storage.is_trained = True  # float16 has nothing to learn
        for first, vectors in gallery.blocks(ADD_ROWS):
            index.add(vectors)
            if progress is not None:
                progress(first + len(vectors), len(gallery))
        state = state_of(gallery)
        record = AnnRecord(
            file=f"ann-{state[:12]}.faiss",
            sha256="",
            state=state,
            effort=effort,
            recall=0.0,
            queries=_in_words(queries),
        )
        recall = recall_of(AnnIndex(gallery, record, index), _sample(queries or gallery))
        write_faiss(index, path / f".{record.file}.part")
        (path / f".{record.file}.part").replace(path / record.file)
        record = AnnRecord(**{**vars(record), "sha256": sha256_of_file(path / record.file), "recall": recall})
        write_atomically(
            path / ANN_FILE, json.dumps({"format": FORMAT, "version": VERSION, **vars(record)}, indent=1) + "\n"
        )
        for other in path.iterdir():
            if ANN_LEFTOVERS.fullmatch(other.name) and other.name != record.file:
                other.unlink()
        return record


def recall_of(index: AnnIndex, queries: Float32, k: int = RECALL_K) -> float:
    """Share of the exact top k that the index finds, over all queries."""
    exact, found = index.gallery.search(queries, k)[1], index.search(queries, k)[1]
    return float(np.mean([len({*a} & {*b}) / len(a) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]))


def read_record(gallery: Gallery) -> AnnRecord:
    """Read `ann.json`.

    Raises:
        DualmatchError: there is none, or it is damaged.
    """
    path = gallery.path / ANN_FILE
    if not path.exists():
        raise DualmatchError(
            f"gallery {gallery.path} has no approximate index: build it with `dualmatch gallery index`."
        )
    content = read_json(path, f"gallery {gallery.path}")
    try:
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError("another format or version")
        record = AnnRecord(**content)
        kinds = {"file": str, "sha256": str, "state": str, "effort": int, "recall": float, "queries": str}
        if any(type(getattr(record, name)) is not kind for name, kind in kinds.items()) or record.effort < 1:
            raise ValueError("a field of another type")
        if not ANN_NAMES.fullmatch(record.file):
            raise ValueError("no name of an index")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DualmatchError(f"{path} is damaged ({error}): run `dualmatch gallery index` again.") from None
    return record


def check(gallery: Gallery) -> str | None:
    """What to say about a gallery's approximate index; None if it has none.

    Raises:
        DualmatchError: its file is not what `ann.json` says.
    """
    if not (gallery.path / ANN_FILE).exists():
        return None
    record = read_record(gallery)
    file = gallery.path / record.file
    if not file.is_file() or sha256_of_file(file) != record.sha256:
        raise DualmatchError(
            f"gallery {gallery.path}: {record.file} is missing or damaged: run `dualmatch gallery index` again."
        )
    return describe(record) + (
        "" if record.state == state_of(gallery) else "; the gallery has changed since: build it again"
    )


def describe(record: AnnRecord) -> str:
    """The index in one line."""
    return f"approximate index: recall@{RECALL_K} {record.recall:.3f} against exact search on {record.queries}, effort {record.effort}"


def state_of(gallery: Gallery) -> str:
    """What an index belongs to: every file of the gallery's shards and every tombstone."""
    return sha256_of_bytes(gallery.index.to_json().encode())


def _in_words(queries: Gallery | None) -> str:
    return "a sample of its own vectors" if queries is None else f"a sample of {queries.kind} of another gallery"


def _sample(gallery: Gallery) -> Float32:
    generator = np.random.default_rng(0)
    return gallery.vectors_at(np.sort(generator.choice(len(gallery), min(SAMPLE, len(gallery)), replace=False)))
