"""Changing a finished gallery: join, remove, compact. New files are written beside the old; the index, replaced whole, decides which count.

So a kill at any moment leaves the gallery as it was or as it was meant to be, and at most files that nobody names, which
the next change sweeps away. Item rows never change their meaning within a gallery: removed rows leave holes.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes, write_atomically

from .gallery import Gallery, living_of
from .index import INDEX_FILE, QUARANTINE_FILE, FileRecord, GalleryIndex, Shard, relative, shard_files, shard_number
from .store import LOCK_FILE, commit, disk_errors, files_of, locked, remove_all_but, write_shard

Duplicates = Literal["refuse", "first", "last"]
Progress = Callable[[int, int], None]


@contextmanager
def editing(path: Path) -> Iterator[Gallery]:
    """The gallery, opened under its lock, with the leftovers of killed changes swept away.

    Raises:
        DualmatchError: no finished gallery, another process is writing it, or the disk refuses.
    """
    Gallery.open(path)  # before the lock, which would make the directory
    with locked(path), disk_errors(path, "it is as it was before"):
        gallery = Gallery.open(path)
        sweep(gallery)
        yield gallery


def sweep(gallery: Gallery) -> None:
    """Remove what no index names: files of killed changes."""
    remove_all_but(gallery.path, {INDEX_FILE, QUARANTINE_FILE, LOCK_FILE, *files_of(gallery.index)})
    os.truncate(gallery.path / QUARANTINE_FILE, gallery.index.quarantine.bytes)


def remove_items(path: Path, ids: Collection[str]) -> int:
    """Put a tombstone on the items with these ids: they are found no more, until `compact` their vectors stay on disk.

    Returns:
        How many were removed.

    Raises:
        DualmatchError: an id that the gallery does not hold; then nothing is removed.
    """
    wanted = set(ids)
    with editing(path) as gallery:
        places: list[list[int]] = [[] for _ in gallery.index.shards]
        for position, item in enumerate(gallery.iter_items()):
            if item.id in wanted:
                number, local = gallery.place(position)
                places[number].append(local)
                wanted.discard(item.id)
        if wanted:
            raise DualmatchError(
                f"gallery {path} holds no item {min(wanted)!r}"
                + (f", nor {len(wanted) - 1} more of the given ids" if len(wanted) > 1 else "")
                + "; nothing was removed."
            )
        shards = [with_tombstones(shard, found) for shard, found in zip(gallery.index.shards, places, strict=True)]
        commit(path, replace(gallery.index, shards=tuple(shards)))
        return sum(map(len, places))


def with_tombstones(shard: Shard, places: Sequence[int]) -> Shard:
    """The shard without the vectors at these places of its files."""
    if not places:
        return shard
    dead = np.zeros(shard.count + 2, dtype=np.int8)
    dead[1 + np.asarray(places)] = 1
    for first, end in shard.removed:
        dead[1 + first : 1 + end] = 1
    edges = np.flatnonzero(np.diff(dead)).tolist()
    return replace(shard, removed=tuple(zip(edges[::2], edges[1::2], strict=True)))


def compact(path: Path, progress: Progress | None = None) -> int:
    """Rewrite the shards that hold removed items without them; gives how many vectors that took off the disk."""
    with editing(path) as gallery:
        index = gallery.index
        if index.living == index.count:
            return 0
        number = 1 + max(shard_number(shard) for shard in index.shards)
        shards = list(index.shards)
        for place, shard in enumerate(index.shards):
            living = living_of(shard)
            if living is not None:
                lines = gallery.lines(place)
                vectors, items = write_shard(
                    path, number, gallery.stored(place)[living], [lines[local] for local in living]
                )
                dropped = shard.dropped + shard.count - len(living)
                shards[place] = replace(
                    shard, count=len(living), vectors=vectors, items=items, removed=(), dropped=dropped
                )
                number += 1
            if progress is not None:
                progress(place + 1, len(shards))
        new = replace(index, shards=tuple(shards))
        commit(path, new)
        sweep(Gallery(path, new))
        return index.count - index.living


def append_gallery(
    path: Path, other: Gallery, *, duplicates: Duplicates = "refuse", progress: Progress | None = None
) -> int:
    """Add another gallery's items behind those of `path`, in place; gives how many items are new.

    Raises:
        DualmatchError: another bundle, kind, dimension or dtype, an id that both hold (unless told which to keep), a part.
    """
    with editing(path) as gallery:
        if is_part(gallery.index):
            raise DualmatchError(f"gallery {path} is a part of a list: merge the parts first.")
        if other.path.resolve() == path.resolve():
            raise DualmatchError(f"gallery {path} cannot be appended to itself.")
        number = 1 + max((shard_number(shard) for shard in gallery.index.shards), default=-1)
        index = joined(path, gallery.index, other, number, progress)
        commit(path, without_duplicates([gallery, other], index, duplicates))
        return len(other)


def holds_already(gallery: Gallery, other: Gallery) -> bool:
    """Whether the gallery ends with the other's very vectors: it was joined, and only the tidying up is missing."""
    theirs = [shard.vectors.sha256 for shard in other.index.shards]
    return [shard.vectors.sha256 for shard in gallery.index.shards][-len(theirs) :] == theirs


def is_part(index: GalleryIndex) -> bool:
    """Whether this is a gallery of some rows only of its source list."""
    return index.part != (0, index.rows)


def joined(
    out: Path,
    index: GalleryIndex,
    other: Gallery,
    number: int,
    progress: Progress | None = None,
    *,
    offset: int | None = None,
) -> GalleryIndex:
    """Copy a gallery's shards and quarantine into `out`; gives the index of both, to be committed.

    Args:
        out: the directory that `index` describes.
        other: the gallery to copy; its hashes are checked on the way.
        number: of the first shard's files.
        progress: called with (shards copied, of).
        offset: added to the other's rows; by default they go on where the rows of `index` end.
    """
    index.require_alike(other.path, other.index)
    by = index.rows - other.index.part[0] if offset is None else offset
    shards = []
    for place, shard in enumerate(other.index.shards):
        vectors = _copied(other.path, shard.vectors, out, shard_files(number + place)[0], by=0)
        items = _copied(other.path, shard.items, out, shard_files(number + place)[1], by=by)
        root = other.index.root if shard.root is None else shard.root
        here = None if root is None else relative(other.path / root, out)
        first_row, end_row = shard.first_row + by, shard.end_row + by
        shards.append(
            replace(
                shard,
                first_row=first_row,
                end_row=end_row,
                vectors=vectors,
                items=items,
                root=None if here == index.root else here,
            )
        )
        if progress is not None:
            progress(place + 1, len(other.index.shards))
    log = _quarantine(out, index, other, by)
    source_hash, rows = index.source_hash, index.rows
    if offset is None:
        source_hash = sha256_of_bytes(f"{index.source_hash}\n{other.index.source_hash}\n".encode())
        rows = index.rows + other.index.rows_done
    return replace(
        index, rows=rows, part=(0, rows), source_hash=source_hash, quarantine=log, shards=(*index.shards, *shards)
    )


def without_duplicates(galleries: Sequence[Gallery], index: GalleryIndex, duplicates: Duplicates) -> GalleryIndex:
    """The index of the joined galleries with tombstones on items whose id occurs again, or a refusal.

    Args:
        galleries: as joined, in order.
        index: of all of them; its shards are theirs, in order.
    """
    seen: dict[str, tuple[int, int]] = {}
    dead: dict[int, list[int]] = {}
    before = 0
    for gallery in galleries:
        for position, item in enumerate(gallery.iter_items()):
            number, local = gallery.place(position)
            here = (before + number, local)
            if item.id in seen:
                if duplicates == "refuse":
                    raise DualmatchError(
                        f"the id {item.id!r} occurs twice, the second time in gallery {gallery.path}; "
                        "keep one of the two with --duplicates first or last."
                    )
                loser = here if duplicates == "first" else seen[item.id]
                dead.setdefault(loser[0], []).append(loser[1])
                if duplicates == "first":
                    continue
            seen[item.id] = here
        before += len(gallery.index.shards)
    shards = [with_tombstones(shard, dead.get(number, ())) for number, shard in enumerate(index.shards)]
    return replace(index, shards=tuple(shards))


def _copied(source: Path, record: FileRecord, out: Path, name: str, *, by: int) -> FileRecord:
    """Copy a file of a shard, items with `by` added to their rows; refused if it is not what its index says."""
    data = (source / record.file).read_bytes()
    if sha256_of_bytes(data) != record.sha256:
        raise DualmatchError(f"gallery {source} is damaged: {record.file} (hash); encode it again.")
    if by:
        data = _moved(data, by)
    write_atomically(out / name, data)
    return FileRecord(file=name, bytes=len(data), sha256=sha256_of_bytes(data) if by else record.sha256)


def _moved(lines: bytes, by: int) -> bytes:
    """JSON lines with `by` added to their rows."""
    entries = [json.loads(line) for line in lines.splitlines()]
    return b"".join(json.dumps({**entry, "row": entry["row"] + by}).encode() + b"\n" for entry in entries)


def _quarantine(out: Path, index: GalleryIndex, other: Gallery, by: int) -> FileRecord:
    log = other.index.quarantine
    added = (other.path / log.file).read_bytes()[: log.bytes]
    if sha256_of_bytes(added) != log.sha256:
        raise DualmatchError(f"gallery {other.path} is damaged: {log.file} (hash); encode it again.")
    if not added:
        return index.quarantine
    path = out / QUARANTINE_FILE
    with path.open("ab") as file:
        file.write(_moved(added, by) if by else added)
        file.flush()
        os.fsync(file.fileno())
    data = path.read_bytes()
    return FileRecord(file=QUARANTINE_FILE, bytes=len(data), sha256=sha256_of_bytes(data))


def refuse_duplicates(gallery: Gallery, ids: Collection[str]) -> None:
    """Refuse ids that a gallery holds already.

    Raises:
        DualmatchError: it holds one of them.
    """
    wanted = set(ids)
    for item in gallery.iter_items():
        if item.id in wanted:
            raise DualmatchError(
                f"the id {item.id!r} is in gallery {gallery.path} already; keep one of the two with --duplicates first or last."
            )


def read_ids(path: Path) -> list[str]:
    """Ids from a file, one a line; empty lines are left out.

    Raises:
        DualmatchError: it cannot be read, or holds none.
    """
    try:
        # As file names are read, so that one that is not UTF-8 can be named.
        ids = [line for line in os.fsdecode(path.read_bytes()).replace("\r\n", "\n").split("\n") if line]
    except OSError as error:
        raise DualmatchError(f"{path} cannot be read: {error.strerror}.") from None
    if not ids:
        raise DualmatchError(f"{path} holds no ids.")
    return ids
