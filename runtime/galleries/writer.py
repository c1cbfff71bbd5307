"""Encoding into a gallery: sources are read in threads, encoded in batches cut by source row, and stored shard by shard."""

import errno
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes

from .gallery import Gallery
from .index import QUARANTINE_FILE, FileRecord, GalleryIndex, Kind
from .store import append_shard, begin, locked, remove, writing

DEFAULT_ROWS_PER_SHARD = 4096
LOOKAHEAD = 2  # batches read ahead of the one being encoded
# Troubles of the machine, not of the photograph that met them.
MACHINE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

OnError = Literal["quarantine", "fail"]


class Source(Protocol):
    """Something to encode, not yet read; `fields` is what the gallery records about it beside row and id."""

    @property
    def id(self) -> str: ...

    def fields(self) -> dict[str, str]: ...


SourceT = TypeVar("SourceT", bound=Source)
SourceT_contra = TypeVar("SourceT_contra", bound=Source, contravariant=True)


class GalleryEncoder(Protocol[SourceT_contra]):
    """What turns sources into vectors."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def prepare(self, source: SourceT_contra, /) -> Any:
        """Read and pre-process one source; called from several threads.

        DualmatchError and OSError mean that this source cannot be used; anything else is a fault of the program.
        """
        ...

    def encode(self, prepared: Sequence[Any], /) -> NDArray[np.float32]:
        """Up to a batch of prepared sources to float32 (n, dimension); called from one thread, in row order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did: of `rows` sources `count` are in the gallery, `quarantined` are not; `resumed_rows` were done before it."""

    path: Path
    rows: int
    count: int
    quarantined: int
    resumed_rows: int


@dataclass(frozen=True, kw_only=True)
class _Unreadable:
    reason: str


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
    keeps its finished shards, marked unfinished, for `resume`; if it has finished none, it leaves nothing behind.

    Args:
        out: the gallery's directory; must not exist, unless `resume`.
        sources: what to encode; ids and fields (not the photographs' contents) identify the list when resuming.
        encoder: reads, pre-processes and encodes.
        kind: what is encoded.
        bundle_path, bundle_hash: the bundle that the encoder runs, recorded so that search can refuse another.
        root: the folder that photographs' ids are relative to, recorded so that search can show them.
        batch_size, rows_per_shard: how rows are cut; a shard is whole batches (by default about 4096 rows).
        dtype: of the stored vectors.
        resume: go on where an earlier run stopped; does nothing where it had finished, begins where there is nothing.
        on_error: put unreadable sources on the quarantine list, or stop at the first.
        threads: reading threads; by default one per core, at most four.
        progress: called at the start and after every batch with (rows done, rows in all).

    Raises:
        DualmatchError: `out` exists, is being written by another process, or was begun with other settings; no sources, or
            repeated ids; a source that cannot be read under `on_error="fail"`, or none that can; an encoder that gives
            another shape or dtype, NaN, infinity or a zero vector; a disk that cannot be written.
    """
    if batch_size < 1:
        raise DualmatchError(f"the batch size must be at least 1, got {batch_size}.")
    if rows_per_shard is None:
        rows_per_shard = max(1, DEFAULT_ROWS_PER_SHARD // batch_size) * batch_size
    if rows_per_shard < 1 or rows_per_shard % batch_size:
        raise DualmatchError(f"rows per shard ({rows_per_shard}) must be a multiple of the batch size ({batch_size}).")
    plan = GalleryIndex(
        kind=kind,
        bundle_path=_relative(bundle_path, out),
        bundle_hash=bundle_hash,
        dimension=encoder.dimension,
        dtype=dtype,
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        root=None if root is None else _relative(root, out),
        rows=len(sources),
        source_hash=_hash_of(sources),
        quarantine=FileRecord(file=QUARANTINE_FILE, bytes=0, sha256=sha256_of_bytes(b"")),
    )
    existed = out.exists()
    try:
        with locked(out):
            begun = begin(out, plan, resume=resume)
            if on_error == "fail" and begun.count < begun.rows_done:
                first = Gallery(out, begun).quarantine[0]
                raise DualmatchError(f"gallery {out} has an unreadable source already: {first.id}: {first.reason}.")
            run = _Run(out=out, index=begun, sources=sources, encoder=encoder, on_error=on_error, progress=progress)
            try:
                run.encode(threads or min(4, os.cpu_count() or 1))
            except BaseException as error:
                if isinstance(error, _NothingReadableError) or not run.index.shards:
                    remove(out)
                raise
    except BaseException:
        if not existed:
            with suppress(OSError):  # not empty: finished shards stay
                out.rmdir()
        raise
    done = run.index
    return Summary(
        path=out, rows=done.rows, count=done.count, quarantined=done.rows - done.count, resumed_rows=begun.rows_done
    )


@dataclass(kw_only=True)
class _Run(Generic[SourceT]):
    """One run's way through the rows that are missing; `index` follows what is on disk."""

    out: Path
    index: GalleryIndex
    sources: Sequence[SourceT]
    encoder: GalleryEncoder[SourceT]
    on_error: OnError
    progress: Callable[[int, int], None] | None

    def encode(self, threads: int) -> None:
        starts = range(self.index.rows_done, self.index.rows, self.index.batch_size)
        batches = (range(start, min(start + self.index.batch_size, self.index.rows)) for start in starts)
        vectors: list[NDArray[Any]] = []
        items: list[bytes] = []
        quarantined: list[bytes] = []
        self._report(self.index.rows_done)
        with closing(self._prepared(batches, threads)) as prepared_batches:
            for rows, prepared in prepared_batches:
                good = {row: value for row, value in prepared.items() if not isinstance(value, _Unreadable)}
                for row, value in prepared.items():
                    if isinstance(value, _Unreadable):
                        quarantined.append(self._quarantine(row, value.reason))
                if good:
                    encoded = self.encoder.encode(list(good.values()))
                    vectors.append(_storable(encoded, self.index, [self.sources[row].id for row in good]))
                    items += [self._line(row, self.sources[row].fields()) for row in good]
                if rows.stop == self.index.rows and not self.index.count and not items:
                    first = json.loads(quarantined[0])
                    raise _NothingReadableError(
                        f"none of the {rows.stop} sources could be read; {first['id']}: {first['reason']}."
                    )
                if rows.stop == self.index.rows or rows.stop % self.index.rows_per_shard == 0:
                    with writing(self.out, self.index):
                        self.index = append_shard(
                            self.out,
                            self.index,
                            end_row=rows.stop,
                            vectors=vectors,
                            items=items,
                            quarantined=quarantined,
                        )
                    vectors, items, quarantined = [], [], []
                self._report(rows.stop)

    def _prepared(self, batches: Iterable[range], threads: int) -> Generator[tuple[range, dict[int, Any]], None, None]:
        """Batches in order, each row's prepared source or why there is none; reading stays `LOOKAHEAD` batches ahead."""
        pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
        pending: deque[tuple[range, dict[int, Future[Any]]]] = deque()
        try:
            for rows in batches:
                pending.append((rows, {row: pool.submit(self._prepare, self.sources[row]) for row in rows}))
                if len(pending) > LOOKAHEAD:
                    yield _collected(*pending.popleft())
            while pending:
                yield _collected(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, source: SourceT) -> Any:
        try:
            return self.encoder.prepare(source)
        except OSError as error:
            if error.errno in MACHINE_ERRORS:
                raise DualmatchError(
                    f"{source.id} cannot be read now: {error.strerror}; go on with --resume."
                ) from None
            return _Unreadable(reason=_reason(error))
        except DualmatchError as error:
            return _Unreadable(reason=_reason(error))

    def _quarantine(self, row: int, reason: str) -> bytes:
        if self.on_error == "fail":
            raise DualmatchError(f"cannot read {self.sources[row].id} (row {row}): {reason}.")
        return self._line(row, {"reason": reason})

    def _line(self, row: int, fields: dict[str, str]) -> bytes:
        return _json_line({"row": row, "id": self.sources[row].id, **fields})

    def _report(self, rows_done: int) -> None:
        if self.progress is not None:
            self.progress(rows_done, self.index.rows)


def _collected(rows: range, futures: dict[int, Future[Any]]) -> tuple[range, dict[int, Any]]:
    return rows, {row: future.result() for row, future in futures.items()}


def _reason(error: Exception) -> str:
    """Why a source cannot be used, without what differs between two runs (addresses of objects)."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text).rstrip(".") or type(error).__name__


def _storable(encoded: NDArray[np.float32], index: GalleryIndex, ids: Sequence[str]) -> NDArray[Any]:
    """The batch in the gallery's dtype, refused if the encoder broke its contract."""
    shape = (len(ids), index.dimension)
    if encoded.dtype != np.float32 or encoded.shape != shape:
        raise DualmatchError(
            f"the encoder gave {encoded.dtype} {list(encoded.shape)} for {ids[0]} and following, "
            f"expected float32 {list(shape)}."
        )
    with np.errstate(over="ignore"):  # found below, with the name of the item
        stored = encoded.astype(index.dtype)
    bad = ~np.isfinite(stored).all(axis=1) | ~stored.any(axis=1)
    if bad.any():
        raise DualmatchError(
            f"the encoder gave NaN, infinity or a zero vector for {ids[int(bad.argmax())]} "
            f"(as {index.dtype}): nothing can be found by it, so the model or its precision is at fault."
        )
    return stored


def _hash_of(sources: Sequence[Source]) -> str:
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


def _relative(path: Path, gallery: Path) -> str:
    return Path(os.path.relpath(path.resolve(), gallery.resolve())).as_posix()
