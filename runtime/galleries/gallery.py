"""A gallery on disk, read: memory-mapped shards of embeddings, the items they belong to, exact search and a check of it all."""

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes, sha256_of_file

from .exact import FEW_QUERIES, SCORE_BYTES, Engine, Positions, choose_engine, exact_search, top_k
from .index import QUARANTINE_FILE, GalleryIndex, Kind, Shard

__all__ = ["Gallery", "Item", "Quarantined", "top_k"]

SEARCH_BLOCK_BYTES = 8 * 2**20  # of float32 vectors held at a time
MAPPED_SHARDS = 256  # at a time: a mapping costs a file descriptor, of which a process often has 1024

Float32 = NDArray[np.float32]
T = TypeVar("T")


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

    Use `Gallery.open`. Vectors stay on disk (memory-mapped) and items are parsed when asked for. Removed items are not there:
    they have no position.
    """

    def __init__(self, path: Path, index: GalleryIndex) -> None:
        self.path = path
        self.index = index
        self._starts = [0, *accumulate(shard.living for shard in index.shards)]
        for shard in index.shards:
            for record in (shard.vectors, shard.items):
                self._require_size(record.file, record.bytes)
        # A run that is still going, or one that was killed, may have written beyond what the index has confirmed.
        self._require_size(index.quarantine.file, index.quarantine.bytes, at_least=True)
        self._vectors_of = lru_cache(MAPPED_SHARDS)(lambda number: self._map(self.index.shards[number]))
        self._lines_of = lru_cache(MAPPED_SHARDS)(self.lines)

    @classmethod
    def open(cls, path: Path, *, allow_incomplete: bool = False) -> Self:
        """Open a gallery: the index and every file's size are checked, shapes when vectors are used; hashes are `check`'s work.

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
        return list(self.iter_items())

    def iter_items(self) -> Iterator[Item]:
        """All items, by position, a shard's at a time in memory."""
        for number, shard in enumerate(self.index.shards):
            lines = self.lines(number)
            living = living_of(shard)
            for local in range(shard.count) if living is None else living:
                yield self._parse(number, lines[local])

    def item(self, position: int) -> Item:
        """The item at `position`; no other is parsed."""
        number, local = self.place(position)
        return self._parse(number, self._lines_of(number)[local])

    def stored(self, number: int) -> NDArray[Any]:
        """A shard's vectors as stored, removed ones included, memory-mapped (count, dimension)."""
        return self._vectors_of(number)

    def place(self, position: int) -> tuple[int, int]:
        """The shard of a position, and where in its files."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a gallery of {len(self)}")
        number = bisect_right(self._starts, position) - 1
        living, local = living_of(self.index.shards[number]), position - self._starts[number]
        return number, local if living is None else int(living[local])

    def photo_path(self, position: int) -> Path:
        """The photograph at `position`: the recorded folder, seen from where the gallery is now, and the item's id.

        Raises:
            DualmatchError: a gallery of captions, or one encoded without a folder.
        """
        root = self._root_of(position)
        if root is None:
            raise DualmatchError(f"gallery {self.path} holds {self.kind} and names no folder of photographs.")
        return (self.path.resolve() / root).resolve() / self.item(position).id

    def has_photos(self, position: int) -> bool:
        """Whether a folder of photographs is known for the item at `position`."""
        return self._root_of(position) is not None

    def _root_of(self, position: int) -> str | None:
        shard = self.index.shards[self.place(position)[0]]
        return self.index.root if shard.root is None else shard.root

    @property
    def quarantine(self) -> list[Quarantined]:
        """The source rows that could not be read, in row order."""
        path = self.path / QUARANTINE_FILE
        try:
            entries = [json.loads(line) for line in path.read_bytes()[: self.index.quarantine.bytes].splitlines()]
            return [
                Quarantined(row=_of(int, entry["row"]), id=_of(str, entry["id"]), reason=_of(str, entry["reason"]))
                for entry in entries
            ]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DualmatchError(f"gallery {self.path}: {path.name} is damaged ({error}).") from None

    def vectors(self) -> Float32:
        """All vectors in memory, float32 (count, dimension)."""
        return np.concatenate([np.empty((0, self.dimension), np.float32), *(block for _, block in self.blocks())])

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Float32]]:
        """Vectors block by block: (position of the first, float32 (≤ rows, dimension)); by default 16 MiB at a time."""
        step = rows or max(1, SEARCH_BLOCK_BYTES // (4 * self.dimension))
        for positions, vectors in self.pieces(step):
            yield int(positions[0]), vectors.astype(np.float32)

    def pieces(self, rows: int, among: NDArray[np.bool_] | None = None) -> Iterator[tuple[Positions, NDArray[Any]]]:
        """(positions, vectors as stored) of at most `rows` at a time; `among` (count,) says which positions are wanted."""
        for number, shard in enumerate(self.index.shards):
            start, living = self._starts[number], living_of(shard)
            if among is not None:
                wanted = np.flatnonzero(among[start : start + shard.living])
            for first in range(0, shard.living if among is None else len(wanted), rows):
                if among is None and living is None:  # nothing to pick out: no copy
                    vectors = self._vectors_of(number)[first : first + rows]
                    yield np.arange(start + first, start + first + len(vectors)), vectors
                else:
                    here = np.arange(first, min(first + rows, shard.living)) if among is None else wanted[first:][:rows]
                    yield start + here, self._vectors_of(number)[here if living is None else living[here]]

    def vectors_at(self, positions: Positions) -> Float32:
        """Vectors at these positions, in their order, float32 (n, dimension)."""
        vectors = np.empty((len(positions), self.dimension), dtype=np.float32)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            local, living = positions[here] - self._starts[number], living_of(self.index.shards[number])
            vectors[here] = self._vectors_of(number)[local if living is None else living[local]]
        return vectors

    def select(self, wanted: Callable[[Item], bool]) -> NDArray[np.bool_]:
        """Which items are wanted, bool (count,), for `search`."""
        return np.fromiter(map(wanted, self.iter_items()), dtype=np.bool_, count=len(self))

    def search(
        self,
        queries: Float32,
        k: int = 10,
        *,
        among: NDArray[np.bool_] | None = None,
        engine: Engine | None = None,
        threads: int = 0,
    ) -> tuple[Float32, Positions]:
        """The k best by dot product (cosine, as embeddings have unit norm): exact, in float32, equal scores by position.

        Args:
            queries: float32 (num_queries, dimension).
            k: how many; a smaller gallery gives all it has.
            among: bool (count,), the positions to search; all if None.
            engine: what finds candidates, by default the fastest installed; the answer is the same.
            threads: 0 for one per core.

        Returns:
            scores float32 and positions int64, each (num_queries, min(k, how many are searched)), best first.

        Raises:
            DualmatchError: queries of another shape or dtype or not finite, k < 1, or vectors that are not finite.
        """
        self.require_queries(queries, k)
        count = len(self) if among is None else int(np.count_nonzero(among))
        engine = engine or self.engine_for(len(queries), count)
        # What multiplies float16 goes over a shard at once; a product of matrices over a block, which stays in the cache once widened.
        block = max(1, SEARCH_BLOCK_BYTES // (4 * self.dimension))
        whole = max(1, min(self.index.rows_per_shard, SCORE_BYTES // (4 * max(1, len(queries)))))
        rows = whole if engine == "numkong" or len(queries) <= FEW_QUERIES else block
        return exact_search(
            partial(self.pieces, rows, among),
            queries,
            k,
            fetch=self.vectors_at,
            count=count,
            engine=engine,
            threads=threads or len(os.sched_getaffinity(0)),
        )

    def engine_for(self, num_queries: int, count: int | None = None) -> Engine:
        """What `search` uses for so many queries on so many of the vectors (all if None)."""
        stored = np.dtype(self.index.dtype)
        return choose_engine(
            num_queries, (len(self) if count is None else count) * self.dimension * stored.itemsize, stored
        )

    def require_queries(self, queries: Float32, k: int) -> None:
        """Refuse queries that cannot be compared with the vectors.

        Raises:
            DualmatchError: another shape or dtype, not finite, or k < 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimension or queries.dtype != np.float32:
            raise DualmatchError(
                f"queries must be float32 (n, {self.dimension}), got {queries.dtype} {list(queries.shape)}."
            )
        if k < 1 or not np.isfinite(queries).all():
            raise DualmatchError(f"a search needs finite queries and k of at least 1, got k = {k}.")

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
            if not all(np.isfinite(self._vectors_of(number)).all() for number in range(len(self.index.shards))):
                problems.append("vectors (not finite)")
            problems += self._rows_out_of_step()
        if problems:
            raise DualmatchError(f"gallery {self.path} is damaged: {', '.join(problems)}; encode it again.")

    def _rows_out_of_step(self) -> list[str]:
        """Whether items, quarantine and rows removed for good account for every source row once."""
        quarantined = [entry.row for entry in self.quarantine]
        stored = [
            [self._parse(number, line).row for line in self.lines(number)] for number in range(len(self.index.shards))
        ]
        for shard, rows in zip(self.index.shards, stored, strict=True):
            within = range(shard.first_row, shard.end_row)
            if rows != sorted(rows) or not all(row in within for row in rows):
                return [f"{shard.items.file} (order)"]
        rows = [row for of_shard in stored for row in of_shard] + quarantined
        missing = self.index.rows_done - len(rows)
        if (
            len(set(rows)) != len(rows)
            or quarantined != sorted(quarantined)
            or missing != sum(shard.dropped for shard in self.index.shards)
            or not all(row in range(self.index.part[0], self.index.next_row) for row in quarantined)
        ):
            return ["items and quarantine (rows lost or counted twice)"]
        return []

    def _map(self, shard: Shard) -> NDArray[np.floating[Any]]:
        path, shape = self.path / shard.vectors.file, (shard.count, self.index.dimension)
        try:
            # An empty mapping is not possible, and a shard of unreadable photographs only is empty.
            vectors = np.load(path, mmap_mode="r" if shard.count else None, allow_pickle=False)
        except Exception as error:  # noqa: BLE001  (NumPy reads a header as Python, and fails on a damaged one in as many ways)
            reason = str(error).partition("\n")[0]
            raise DualmatchError(f"gallery {self.path}: {path.name} is no array ({reason}).") from None
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

    def lines(self, number: int) -> list[bytes]:
        """The JSON lines of a shard's items, removed ones included."""
        shard = self.index.shards[number]
        try:
            lines = (self.path / shard.items.file).read_bytes().splitlines()
        except OSError as error:
            raise DualmatchError(
                f"gallery {self.path}: {shard.items.file} cannot be read ({error.strerror})."
            ) from None
        if len(lines) != shard.count:
            raise DualmatchError(
                f"gallery {self.path}: {shard.items.file} has {len(lines)} items, the index says {shard.count}."
            )
        return lines

    def _parse(self, number: int, line: bytes) -> Item:
        try:
            entry = json.loads(line)
            caption, image = (None if entry.get(key) is None else _of(str, entry[key]) for key in ("caption", "image"))
            return Item(row=_of(int, entry["row"]), id=_of(str, entry["id"]), caption=caption, image=image)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            name = self.index.shards[number].items.file
            raise DualmatchError(f"gallery {self.path}: {name} is damaged ({error}).") from None


def _of(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is not of type {kind.__name__}")
    return value


@lru_cache(MAPPED_SHARDS)
def living_of(shard: Shard) -> Positions | None:
    """Places in a shard's files that count, ascending; None for all of them."""
    if not shard.removed:
        return None
    living = np.ones(shard.count, dtype=np.bool_)
    for first, end in shard.removed:
        living[first:end] = False
    return np.flatnonzero(living)
