"""A gallery's directory while it grows: whatever happens, what counts on disk is a prefix of the finished gallery.

A shard's files are written whole, then the quarantine list grows, then the index says so: only the index makes a shard
count. Batches on their way to the next shard wait in the journal. Nothing depends on time, chance or an earlier interruption, so a resumed gallery has the bytes of an uninterrupted one.
"""

import errno
import fcntl
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes, sha256_of_file, write_atomically

from .gallery import Gallery
from .index import INDEX_FILE, QUARANTINE_FILE, FileRecord, GalleryIndex, Shard, shard_files
from .journal import JOURNAL_FILE, Stored, clear_journal, records

LOCK_FILE = ".lock"
OWN_FILES = re.compile(r"vectors-\d{5}\.npy|items-\d{5}\.jsonl|quarantine\.jsonl|index\.json|journal\.bin")
OWN_LEFTOVERS = re.compile(rf"\.({OWN_FILES.pattern})\.\w+\.part")  # as write_atomically names them
_held: dict[tuple[int, Path], object] = {}  # by this process; a fork's own number makes what it inherits not its own


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the directory and be its only writer; the lock goes when the process that holds it does, however that ends.

    Raises:
        DualmatchError: another writer holds it, or the directory cannot be made.
    """
    # A POSIX lock: workers that the holder has forked do not inherit it and cannot keep it alive. It also does not
    # exclude the holder's own threads, and any closing of the file would drop it: so the file is not even opened twice.
    mine, key = object(), (os.getpid(), out.resolve())
    if _held.setdefault(key, mine) is not mine:
        raise _taken(out, str(os.getpid()))
    try:
        with _lock_file(out) as handle:
            try:
                with suppress(OSError):  # a full disk: what is refused would only have been told the holder's number
                    os.truncate(handle, 0)
                    os.write(handle, f"{os.getpid()}\n".encode())
                yield
            finally:
                (out / LOCK_FILE).unlink(missing_ok=True)
    finally:
        del _held[key]


@contextmanager
def _lock_file(out: Path) -> Iterator[int]:
    path = out / LOCK_FILE
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # an earlier holder has just removed the directory: make it again
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                break
        except OSError as error:
            raise DualmatchError(f"gallery {out} cannot be written: {error.strerror}.") from None
    try:
        _take(handle, out)
        yield handle
    finally:
        os.close(handle)


def _take(handle: int, out: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _taken(out, os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown") from None
        raise DualmatchError(f"gallery {out} cannot be locked: {error.strerror}.") from None
    # Between our opening and locking it, a holder may have finished and removed the file: then we locked nothing.
    if os.fstat(handle).st_nlink == 0:
        raise DualmatchError(f"gallery {out} was being written by another process until now; try again.")


def _taken(out: Path, holder: str) -> DualmatchError:
    return DualmatchError(
        f"gallery {out} is being written by another process ({holder}); wait for it or give another path."
    )


def begin(out: Path, plan: GalleryIndex, *, resume: bool) -> tuple[GalleryIndex, list[Stored]]:
    """The index to go on from, and what is encoded beyond it: an earlier run's if resuming, else `plan`, written as a gallery without shards.

    Raises:
        DualmatchError: there is something else, or a gallery without `resume`, or one that was begun otherwise than planned.
    """
    if not (out / INDEX_FILE).exists():
        if foreign := sorted(path.name for path in out.iterdir() if not is_own(path.name)):
            raise DualmatchError(f"{out} is no gallery but holds {foreign[0]}; give a path that does not exist yet.")
        with writing(out, plan):
            try:
                remove(out)
                write_atomically(out / QUARANTINE_FILE, b"")
                commit(out, plan)
            except BaseException:
                remove(out)
                raise
        return plan, []
    index = GalleryIndex.read(out)
    if not resume:
        state = "finished" if index.complete else "unfinished"
        advice = "remove it first" if index.complete else "go on with --resume"
        raise DualmatchError(f"gallery {out} exists and is {state}: {advice}, or give another path.")
    require_same(out, index, plan)
    Gallery(out, index)  # checks sizes and shapes of the finished shards
    with writing(out, index):
        _cut_back(out, index)
    if index.complete:
        return index, []
    # The bundle may have moved since; its hash says that it is the same.
    return replace(index, bundle_path=plan.bundle_path), records(out, index)


def append_shard(out: Path, index: GalleryIndex, stored: Sequence[Stored]) -> GalleryIndex:
    """Write the shard of the rows that `stored` holds, from `index.next_row` on, and commit it; gives the new index."""
    assert stored[0].rows.start == index.next_row
    items = [line for one in stored for line in one.items]
    quarantined = [line for one in stored for line in one.quarantined]
    written, listed = write_shard(out, len(index.shards), np.concatenate([one.vectors for one in stored]), items)
    shard = Shard(
        first_row=index.next_row, end_row=stored[-1].rows.stop, count=len(items), vectors=written, items=listed
    )
    log = index.quarantine
    if quarantined:
        path = out / QUARANTINE_FILE
        with path.open("ab") as file:
            file.write(b"".join(quarantined))
            file.flush()
            os.fsync(file.fileno())
        log = FileRecord(file=QUARANTINE_FILE, bytes=path.stat().st_size, sha256=sha256_of_file(path))
    index = replace(index, shards=(*index.shards, shard), quarantine=log)
    commit(out, index)
    clear_journal(out, remove=index.complete)
    return index


def write_shard(out: Path, number: int, vectors: NDArray[Any], lines: Sequence[bytes]) -> tuple[FileRecord, FileRecord]:
    """Write a shard's two files, vectors and items (a JSON line each); nothing counts before an index names them."""
    npy = BytesIO()
    np.save(npy, np.ascontiguousarray(vectors), allow_pickle=False)
    items = b"".join(line.rstrip(b"\n") + b"\n" for line in lines)
    records = []
    for name, data in zip(shard_files(number), (npy.getvalue(), items), strict=True):
        write_atomically(out / name, data)
        records.append(FileRecord(file=name, bytes=len(data), sha256=sha256_of_bytes(data)))
    return records[0], records[1]


def remove(out: Path) -> None:
    """Remove the gallery's files and leftovers, and nothing else; the index goes first, so that no half of it counts."""
    (out / INDEX_FILE).unlink(missing_ok=True)
    remove_all_but(out, {LOCK_FILE})


def remove_all_but(out: Path, kept: Collection[str]) -> None:
    """Remove those of the gallery's own files and leftovers that are not named."""
    for path in list(out.iterdir()):
        if is_own(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)


def files_of(index: GalleryIndex) -> set[str]:
    """Names of the shards' files."""
    return {record.file for shard in index.shards for record in (shard.vectors, shard.items)}


@contextmanager
def disk_errors(out: Path, state: str) -> Iterator[None]:
    """Turn the operating system's refusal to read or write (full disk, rights) into a sentence that says what state things are in."""
    try:
        yield
    except OSError as error:
        raise DualmatchError(f"gallery {out} cannot be written: {error.strerror or error}; {state}.") from None


def writing(out: Path, index: GalleryIndex) -> AbstractContextManager[None]:
    """`disk_errors` of an encoding that can be resumed."""
    kept = f"its first {index.rows_done} rows are" if index.shards else "what it held is"
    return disk_errors(out, f"{kept} safe, go on with --resume")


def require_same(out: Path | str, index: GalleryIndex, plan: GalleryIndex) -> None:
    """Refuse to go on with a gallery that was begun otherwise than planned.

    Raises:
        DualmatchError: another source list, bundle or cut into shards.
    """
    for name, what in {
        "kind": "kind",
        "bundle_hash": "bundle hash",
        "dimension": "dimension",
        "dtype": "dtype",
        "batch_size": "batch size",
        "rows_per_shard": "number of rows per shard",
        "rows": "number of sources",
        "source_hash": "source list (hash)",
        "root": "folder of photographs",
        "part": "part of the rows",
    }.items():
        was, asked = getattr(index, name), getattr(plan, name)
        if was != asked:
            raise DualmatchError(
                f"gallery {out} was begun with another {what}: {str(was)[:64]} then, {str(asked)[:64]} now; "
                "resume with the same, or give another path."
            )


def _cut_back(out: Path, index: GalleryIndex) -> None:
    """Take away what an interrupted run wrote beyond its last commit, but for the journal of what it was to write next."""
    confirmed = {LOCK_FILE, INDEX_FILE, QUARANTINE_FILE} | (set() if index.complete else {JOURNAL_FILE})
    remove_all_but(out, confirmed | files_of(index))
    log = out / QUARANTINE_FILE
    if log.stat().st_size > index.quarantine.bytes:
        os.truncate(log, index.quarantine.bytes)
    if sha256_of_file(log) != index.quarantine.sha256:
        raise DualmatchError(f"gallery {out}: {log.name} has been changed, so it cannot be resumed; encode it again.")


def commit(out: Path, index: GalleryIndex) -> None:
    """Let the index say what the files hold already; the directory is synced so that a power cut keeps that order."""
    _sync(out)
    write_atomically(out / INDEX_FILE, index.to_json())
    _sync(out)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_own(name: str) -> bool:
    """Whether a file of this name in a gallery's directory is the gallery's."""
    return name == LOCK_FILE or bool(OWN_FILES.fullmatch(name) or OWN_LEFTOVERS.fullmatch(name))
