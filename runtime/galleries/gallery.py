"""A gallery on disk, read: memory-mapped shards of embeddings, the items they belong to, and exact search over them."""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes, sha256_of_file

from .index import QUARANTINE_FILE, GalleryIndex, Kind, Shard

SEARCH_BLOCK_BYTES = 16 * 2**20  # of float32 vectors, and of scores, held at a time

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What one vector stands for: its source row, its id, and for a caption its text and (if known) its image's id."""

    row: int
    id: str
    caption: str | None = None
    image: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantined:
    """A source row that could not be read, and why."""

    row: int
    id: str
    reason: str


class Gallery:
    """Embeddings with their items; `position` counts the vectors, best thought of as a row of one matrix (count, dimension).

    Use `Gallery.open`. Vectors stay on disk (memory-mapped) and items are parsed shard by shard when asked for.
    """

    def __init__(self, path: Path, index: GalleryIndex) -> None:
        self.path = path
        self.index = index
        self._starts = [0, *accumulate(shard.count for shard in index.shards)]
        self._shards = [self._map(shard) for shard in index.shards]
        log = index.quarantine
        # A run that is still going may have written beyond what the index has confirmed.
        self._require_size(log.file, log.bytes, at_least=not index.complete)
        self._items: dict[int, list[Item]] = {}

    @classmethod
    def open(cls, path: Path, *, allow_incomplete: bool = False) -> Self:
        """Open a gallery: the index, and every file's size and shape, are checked; hashes are `check`'s work.

        Raises:
            DualmatchError: not a gallery, another version, unfinished (unless `allow_incomplete`), or a file missing or cut.
        """
        index = GalleryIndex.read(path)
        if not index.complete and not allow_incomplete:
            raise DualmatchError(
                f"gallery {path} is unfinished ({index.rows_done} of {index.rows} rows): "
                "run the command that began it again with --resume."
            )
        return cls(path, index)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def kind(self) -> Kind:
        return self.index.kind

    @property
    def dimension(self) -> int:
        return self.index.dimension

    @property
    def bundle_hash(self) -> str:
        return self.index.bundle_hash

    @property
    def bundle_path(self) -> Path:
        """Where the bundle was when the gallery was encoded, seen from where the gallery is now."""
        return (self.path.resolve() / self.index.bundle_path).resolve()

    @property
    def items(self) -> list[Item]:
        """All items, by position."""
        return [item for number in range(len(self._shards)) for item in self._items_of(number)]

    def item(self, position: int) -> Item:
        """The item at `position`; only its shard's items are read."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a gallery of {len(self)}")
        number = bisect_right(self._starts, position) - 1
        return self._items_of(number)[position - self._starts[number]]

    def photo_path(self, position: int) -> Path:
        """The photograph at `position`: the recorded folder, seen from where the gallery is now, and the item's id.

        Raises:
            DualmatchError: a gallery of captions, or one encoded without a folder.
        """
        if self.index.root is None:
            raise DualmatchError(f"gallery {self.path} holds {self.kind} and names no folder of photographs.")
        return (self.path.resolve() / self.index.root).resolve() / self.item(position).id

    @property
    def quarantine(self) -> list[Quarantined]:
        """The source rows that could not be read, in row order."""
        path = self.path / QUARANTINE_FILE
        try:
            entries = [json.loads(line) for line in path.read_bytes()[: self.index.quarantine.bytes].splitlines()]
            return [Quarantined(row=entry["row"], id=entry["id"], reason=entry["reason"]) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DualmatchError(f"gallery {self.path}: {path.name} is damaged ({error}).") from None

    def vectors(self) -> Float32:
        """All vectors in memory, float32 (count, dimension)."""
        return np.concatenate([np.empty((0, self.dimension), np.float32), *(block for _, block in self.blocks())])

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Float32]]:
        """Vectors block by block: (position of the first, float32 (≤ rows, dimension)); by default 16 MiB at a time."""
        step = rows or max(1, SEARCH_BLOCK_BYTES // (4 * self.dimension))
        for start, vectors in zip(self._starts, self._shards, strict=False):
            for first in range(0, len(vectors), step):
                yield start + first, vectors[first : first + step].astype(np.float32)

    def search(self, queries: Float32, k: int = 10) -> tuple[Float32, NDArray[np.int64]]:
        """The k best by dot product (cosine, as embeddings have unit norm): exact, in float32, equal scores by position.

        Args:
            queries: float32 (num_queries, dimension).
            k: how many; a smaller gallery gives all it has.

        Returns:
            scores float32 and positions int64, each (num_queries, min(k, count)), best first.

        Raises:
            DualmatchError: queries of another shape or dtype or not finite, k < 1, or vectors that are not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimension or queries.dtype != np.float32:
            raise DualmatchError(
                f"queries must be float32 (n, {self.dimension}), got {queries.dtype} {list(queries.shape)}."
            )
        if k < 1 or not np.isfinite(queries).all():
            raise DualmatchError(f"a search needs finite queries and k of at least 1, got k = {k}.")
        # Filled with -inf and in position order, so a later block enters only by scoring strictly higher.
        best_scores = np.full((len(queries), min(k, len(self))), -np.inf, dtype=np.float32)
        best_positions = np.zeros(best_scores.shape, dtype=np.int64)
        for start, vectors in self.blocks():
            step = max(1, SEARCH_BLOCK_BYTES // (4 * len(vectors)))
            for first in range(0, len(queries), step):
                chosen = slice(first, first + step)
                scores = queries[chosen] @ vectors.T
                highest = scores.max(axis=1)
                if not np.isfinite(highest).all():
                    raise DualmatchError(
                        f"gallery {self.path} holds NaN or infinity: run `dualmatch gallery check` on it."
                    )
                if (highest <= best_scores[chosen, -1]).all():
                    continue
                columns = top_k(scores, k)
                merged = np.concatenate([best_scores[chosen], np.take_along_axis(scores, columns, axis=1)], axis=1)
                positions = np.concatenate([best_positions[chosen], columns + start], axis=1)
                order = np.argsort(-merged, axis=1, kind="stable")[:, : best_scores.shape[1]]
                best_scores[chosen] = np.take_along_axis(merged, order, axis=1)
                best_positions[chosen] = np.take_along_axis(positions, order, axis=1)
        return best_scores, best_positions

    def require_bundle(self, bundle_hash: str) -> None:
        """Refuse to be searched with embeddings of another bundle.

        Raises:
            DualmatchError: `bundle_hash` is not the hash of the bundle that encoded the gallery.
        """
        if bundle_hash != self.bundle_hash:
            raise DualmatchError(
                f"gallery {self.path} was encoded by bundle {self.bundle_hash[:12]}, not by the given {bundle_hash[:12]}: "
                "their embeddings do not compare; give that bundle, or encode the gallery again."
            )

    def check(self) -> None:
        """Read everything: hashes, that vectors are finite, and that items, quarantine and source rows account for each other.

        Raises:
            DualmatchError: one sentence that names every damaged file.
        """
        files = [record for shard in self.index.shards for record in (shard.vectors, shard.items)]
        problems = [
            f"{record.file} (hash)" for record in files if sha256_of_file(self.path / record.file) != record.sha256
        ]
        log = self.index.quarantine
        if sha256_of_bytes((self.path / log.file).read_bytes()[: log.bytes]) != log.sha256:
            problems.append(f"{log.file} (hash)")
        if not problems:  # else items may not even be readable
            if not all(np.isfinite(vectors).all() for vectors in self._shards):
                problems.append("vectors (not finite)")
            rows = [item.row for item in self.items]
            if rows != sorted(rows):
                problems.append("items (order)")
            if sorted(rows + [entry.row for entry in self.quarantine]) != list(range(self.index.rows_done)):
                problems.append("items and quarantine (rows lost or counted twice)")
        if problems:
            raise DualmatchError(f"gallery {self.path} is damaged: {', '.join(problems)}; encode it again.")

    def _map(self, shard: Shard) -> NDArray[np.floating[Any]]:
        for record in (shard.vectors, shard.items):
            self._require_size(record.file, record.bytes)
        path, shape = self.path / shard.vectors.file, (shard.count, self.index.dimension)
        try:
            # An empty mapping is not possible, and a shard of unreadable photographs only is empty.
            vectors = np.load(path, mmap_mode="r" if shard.count else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DualmatchError(f"gallery {self.path}: {path.name} is no array ({error}).") from None
        if vectors.shape != shape or vectors.dtype != np.dtype(self.index.dtype) or not vectors.flags.c_contiguous:
            raise DualmatchError(
                f"gallery {self.path}: {path.name} holds {vectors.dtype} {list(vectors.shape)}, "
                f"the index says {self.index.dtype} {list(shape)}."
            )
        return cast("NDArray[np.floating[Any]]", vectors)

    def _require_size(self, name: str, expected: int, *, at_least: bool = False) -> None:
        path = self.path / name
        size = path.stat().st_size if path.is_file() else -1
        if size != expected and not (at_least and size > expected >= 0):
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise DualmatchError(f"gallery {self.path}: {name} {found}, the index says {expected} bytes.")

    def _items_of(self, number: int) -> list[Item]:
        if number not in self._items:
            shard = self.index.shards[number]
            try:
                entries = [json.loads(line) for line in (self.path / shard.items.file).read_bytes().splitlines()]
                items = [
                    Item(row=entry["row"], id=entry["id"], caption=entry.get("caption"), image=entry.get("image"))
                    for entry in entries
                ]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DualmatchError(f"gallery {self.path}: {shard.items.file} is damaged ({error}).") from None
            if len(items) != shard.count:
                raise DualmatchError(
                    f"gallery {self.path}: {shard.items.file} has {len(items)} items, the index says {shard.count}."
                )
            self._items[number] = items
        return self._items[number]


def top_k(scores: Float32, k: int) -> NDArray[np.int64]:
    """Columns of the k highest scores of every row, best first, equal scores by the smaller column.

    Args:
        scores: (rows, columns), without NaN.

    Returns:
        int64 (rows, min(k, columns)).
    """
    num_columns = scores.shape[1]
    if num_columns <= k:
        return np.argsort(-scores, axis=1, kind="stable")
    columns = np.argpartition(scores, num_columns - k, axis=1)[:, num_columns - k :]
    threshold = np.take_along_axis(scores, columns, axis=1).min(axis=1, keepdims=True)
    # A partition picks among columns equal to the k-th score as it likes: rows where more of them exist than fit choose again.
    for row in np.flatnonzero((scores >= threshold).sum(axis=1) > k):
        above, tied = np.flatnonzero(scores[row] > threshold[row]), np.flatnonzero(scores[row] == threshold[row])
        columns[row] = np.concatenate([above, tied[: k - len(above)]])
    columns.sort(axis=1)
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
