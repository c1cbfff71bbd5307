"""Encoding into a gallery: units of rows are prepared ahead, encoded, and stored behind, so that the encoder waits for nothing."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes

from .gallery import Gallery
from .index import QUARANTINE_FILE, FileRecord, GalleryIndex, Kind, relative
from .journal import Stored, append_record
from .pipeline import GalleryEncoder, Source, SourceT, prepared_units
from .store import append_shard, begin, locked, remove, writing

__all__ = ["GalleryEncoder", "OnError", "Source", "Summary", "write_gallery"]

DEFAULT_ROWS_PER_SHARD = 4096
MAX_THREADS = 16  # of reading, by default
UNITS_BEHIND = 2  # encoded and waiting to be written

OnError = Literal["quarantine", "fail"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did: of `rows` sources `count` are in the gallery, `quarantined` are not; `resumed_rows` were done before it."""

    path: Path
    rows: int
    count: int
    quarantined: int
    resumed_rows: int


class _NothingReadableError(DualmatchError):
    pass


def write_gallery(
    out: Path,
    sources: Sequence[SourceT],
    encoder: GalleryEncoder[SourceT],
    *,
    kind: Kind,
    bundle_path: Path,
    bundle_hash: str,
    root: Path | None = None,
    source_hash: str | None = None,
    rows: tuple[int, int | None] | None = None,
    batch_size: int = 32,
    rows_per_shard: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    resume: bool = False,
    on_error: OnError = "quarantine",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Encode `sources`, in their order, into the gallery `out`.

    Batches are cut by source row: an unreadable source leaves its batch smaller and moves no other row. A run that fails
    keeps the batches it has finished, marked unfinished, for `resume`; if it has finished none, it leaves nothing behind.

    Args:
        out: the gallery's directory; must not exist, unless `resume`.
        sources: what to encode; ids and fields (not the photographs' contents) identify the list when resuming.
        encoder: reads, pre-processes and encodes.
        kind: what is encoded.
        bundle_path, bundle_hash: the bundle that the encoder runs, recorded so that search can refuse another.
        root: the folder that photographs' ids are relative to, recorded so that search can show them.
        source_hash: `hash_of(sources)`, where it is known: then only the asked rows of `sources` are looked at.
        rows: encode source rows [A, B) only; both are multiples of `rows_per_shard`, B may be the end of the sources, or None for it.
        batch_size, rows_per_shard: how rows are cut; a shard is whole batches (by default about 4096 rows).
        dtype: of the stored vectors.
        resume: go on where an earlier run stopped; does nothing where it had finished, begins where there is nothing.
        on_error: put unreadable sources on the quarantine list, or stop at the first.
        threads: reading threads; by default one per core, at most 16.
        progress: called at the start and after every batch that is stored with (rows done, rows in all).

    Raises:
        DualmatchError: `out` exists, is being written by another process, or was begun with other settings; no sources, or
            repeated ids; a source that cannot be read under `on_error="fail"`, or none that can; an encoder that gives
            another shape or dtype, NaN, infinity or a zero vector; a disk that cannot be written.
    """
    plan = planned(
        kind=kind,
        bundle_path=relative(bundle_path, out),
        bundle_hash=bundle_hash,
        dimension=encoder.dimension,
        dtype=dtype,
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        root=None if root is None else relative(root, out),
        total=len(sources),
        source_hash=source_hash or hash_of(sources),
        rows=rows,
    )
    existed = out.exists()
    try:
        with locked(out):
            begun, journal = begin(out, plan, resume=resume)
            run = _Run(out=out, index=begun, sources=sources, encoder=encoder, on_error=on_error, progress=progress)
            try:
                resumed_rows = run.take_up(journal)
                run.encode(threads or min(MAX_THREADS, len(os.sched_getaffinity(0))))
            except BaseException as error:
                if isinstance(error, _NothingReadableError) or run.next_row == run.index.part[0]:
                    remove(out)
                raise
    except BaseException:
        if not existed:
            with suppress(OSError):  # not empty: what is finished stays
                out.rmdir()
        raise
    done = run.index
    return Summary(
        path=out,
        rows=done.rows_done,
        count=done.count,
        quarantined=done.quarantined,
        resumed_rows=resumed_rows,
    )


def planned(
    *,
    kind: Kind,
    bundle_path: str,
    bundle_hash: str,
    dimension: int,
    dtype: Literal["float16", "float32"],
    batch_size: int,
    rows_per_shard: int | None,
    root: str | None,
    total: int,
    source_hash: str,
    rows: tuple[int, int | None] | None = None,
) -> GalleryIndex:
    """The index of a gallery that is yet to be encoded, without shards; arguments as of `write_gallery`, paths relative to the gallery."""
    if batch_size < 1:
        raise DualmatchError(f"the batch size must be at least 1, got {batch_size}.")
    if rows_per_shard is None:
        rows_per_shard = max(1, DEFAULT_ROWS_PER_SHARD // batch_size) * batch_size
    if rows_per_shard < 1 or rows_per_shard % batch_size:
        raise DualmatchError(f"rows per shard ({rows_per_shard}) must be a multiple of the batch size ({batch_size}).")
    return GalleryIndex(
        kind=kind,
        bundle_path=bundle_path,
        bundle_hash=bundle_hash,
        dimension=dimension,
        dtype=dtype,
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        root=root,
        rows=total,
        source_hash=source_hash,
        quarantine=FileRecord(file=QUARANTINE_FILE, bytes=0, sha256=sha256_of_bytes(b"")),
        part=_part(rows, total, rows_per_shard),
    )


@dataclass(kw_only=True)
class _Run(Generic[SourceT]):
    """One run's way through the rows that are missing; `index`, `unsharded` and `next_row` follow what is on disk."""

    out: Path
    index: GalleryIndex
    sources: Sequence[SourceT]
    encoder: GalleryEncoder[SourceT]
    on_error: OnError
    progress: Callable[[int, int], None] | None
    unsharded: list[Stored] = field(default_factory=list)
    next_row: int = field(init=False)

    def __post_init__(self) -> None:
        self.next_row = self.index.next_row

    def take_up(self, journal: list[Stored]) -> int:
        """Go on behind what an earlier run encoded; gives how many rows that is."""
        if self.on_error == "fail" and self.index.quarantined:
            first = Gallery(self.out, self.index).quarantine[0]
            raise DualmatchError(f"gallery {self.out} has an unreadable source already: {first.id}: {first.reason}.")
        for stored in journal:
            self._keep(stored)
        return self.next_row - self.index.part[0]

    def encode(self, threads: int) -> None:
        """Encode and store every row that is missing."""
        self._report(self.next_row)
        units = prepared_units(
            self.sources, self.encoder, self._units(), batch_size=self.index.batch_size, threads=threads
        )
        waiting: deque[tuple[int, Future[None]]] = deque()
        # One thread stores, in order, while the next unit is encoded; after a failure it refuses the rest.
        with ThreadPoolExecutor(1, thread_name_prefix="store") as store, closing(units) as prepared:
            for unit in prepared:
                encoded = [(rows, self.encoder.encode(batch)) for rows, batch in unit.batches]
                waiting.append((unit.rows.stop, store.submit(self._store, unit.rows, encoded, unit.unreadable)))
                while waiting and (len(waiting) > UNITS_BEHIND or waiting[0][1].done()):
                    self._report_when_stored(*waiting.popleft())
            while waiting:
                self._report_when_stored(*waiting.popleft())

    def _units(self) -> Iterator[range]:
        length = self.index.batch_size * self.encoder.window_batches
        row = self.next_row
        while row < self.index.part[1]:
            # Cut from the shard's first row, so that a unit ends with its shard whatever the window.
            shard_end = (row // self.index.rows_per_shard + 1) * self.index.rows_per_shard
            end = min(row + length, shard_end, self.index.part[1])
            yield range(row, end)
            row = end

    def _store(
        self, rows: range, encoded: list[tuple[list[int], NDArray[np.float32]]], unreadable: dict[int, str]
    ) -> None:
        if rows.start != self.next_row:
            return  # an earlier unit could not be stored, as its own future says: nothing may come behind a gap
        vectors = np.empty((len(rows) - len(unreadable), self.index.dimension), self.index.dtype)
        good = [row for row in rows if row not in unreadable]
        position = {row: number for number, row in enumerate(good)}
        for chosen, batch in encoded:
            vectors[[position[row] for row in chosen]] = _storable(
                batch, self.index, [self.sources[row].id for row in chosen]
            )
        quarantined = [self._quarantine(row, reason) for row, reason in unreadable.items()]
        stored = Stored(
            rows=rows,
            vectors=vectors,
            items=[self._line(row, self.sources[row].fields()) for row in good],
            quarantined=quarantined,
        )
        with writing(self.out, self.index):
            append_record(self.out, stored)
        self._keep(stored)

    def _keep(self, stored: Stored) -> None:
        """Count a unit that the journal holds, and write the shard that it completes."""
        if self.on_error == "fail" and stored.quarantined:
            entry = json.loads(stored.quarantined[0])
            raise DualmatchError(f"cannot read {entry['id']} (row {entry['row']}): {entry['reason']}.")
        self.unsharded.append(stored)
        end = stored.rows.stop
        # Of a part this is no verdict: the other parts may be readable, and the merge needs it.
        if (
            self._part() == range(self.index.rows)
            and end == self.index.rows
            and not self.index.count
            and not any(one.items for one in self.unsharded)
        ):
            entry = json.loads(next(one.quarantined[0] for one in self.unsharded))
            raise _NothingReadableError(
                f"none of the {len(self._part())} sources could be read; {entry['id']}: {entry['reason']}."
            )
        if end == self.index.part[1] or end % self.index.rows_per_shard == 0:
            with writing(self.out, self.index):
                self.index = append_shard(self.out, self.index, self.unsharded)
            self.unsharded = []
        self.next_row = end

    def _quarantine(self, row: int, reason: str) -> bytes:
        if self.on_error == "fail":
            raise DualmatchError(f"cannot read {self.sources[row].id} (row {row}): {reason}.")
        return self._line(row, {"reason": reason})

    def _line(self, row: int, fields: dict[str, str]) -> bytes:
        return _json_line({"row": row, "id": self.sources[row].id, **fields})

    def _part(self) -> range:
        return range(*self.index.part)

    def _report_when_stored(self, end: int, stored: "Future[None]") -> None:
        stored.result()
        self._report(end)

    def _report(self, next_row: int) -> None:
        if self.progress is not None:
            self.progress(next_row - self.index.part[0], len(self._part()))


def _part(rows: tuple[int, int | None] | None, total: int, rows_per_shard: int) -> tuple[int, int]:
    """The asked rows, checked: parts join to the bytes of one run only where both cut between the same shards."""
    first, asked_end = rows or (0, None)
    end = total if asked_end is None else asked_end
    if not 0 <= first < end <= total:
        raise DualmatchError(f"rows {first}:{end} are asked for, the sources have rows 0:{total}.")
    for row in (first, end):
        if row % rows_per_shard and row != total:
            below = row // rows_per_shard * rows_per_shard
            raise DualmatchError(
                f"row {row} lies inside a shard of {rows_per_shard} rows: cut at {below} or {min(below + rows_per_shard, total)}."
            )
    return first, end


def _storable(encoded: NDArray[np.float32], index: GalleryIndex, ids: Sequence[str]) -> NDArray[Any]:
    """The batch in the gallery's dtype, refused if the encoder broke its contract."""
    shape = (len(ids), index.dimension)
    if encoded.dtype != np.float32 or encoded.shape != shape:
        raise DualmatchError(
            f"the encoder gave {encoded.dtype} {list(encoded.shape)} for {ids[0]} and following, "
            f"expected float32 {list(shape)}."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # found below, with the name of the item
        stored = encoded.astype(index.dtype)
    bad = ~np.isfinite(stored).all(axis=1) | ~stored.any(axis=1)
    if bad.any():
        raise DualmatchError(
            f"the encoder gave NaN, infinity or a zero vector for {ids[int(bad.argmax())]} "
            f"(as {index.dtype}): nothing can be found by it, so the model or its precision is at fault."
        )
    return stored


def hash_of(sources: Sequence[Source]) -> str:
    """SHA-256 of ids and fields, in their order.

    Raises:
        DualmatchError: no sources, or an id that occurs twice.
    """
    if not sources:
        raise DualmatchError("there is nothing to encode: the list of sources is empty.")
    digest = hashlib.sha256()
    seen: set[str] = set()
    for source in sources:
        if source.id in seen:
            raise DualmatchError(f"the id {source.id!r} occurs twice among the sources.")
        seen.add(source.id)
        digest.update(_json_line({"id": source.id, **source.fields()}))
    return digest.hexdigest()


def _json_line(content: dict[str, Any]) -> bytes:
    # ASCII, because a file name that is not UTF-8 survives only escaped.
    return json.dumps(content).encode() + b"\n"
