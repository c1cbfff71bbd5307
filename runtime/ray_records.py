"""What an unfinished gallery of `--engine ray` holds beside shards: its plan, and a record of every shard that is done."""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import DualmatchError
from .galleries.gallery import Gallery, Quarantined
from .galleries.index import INDEX_FILE, QUARANTINE_FILE, FileRecord, GalleryIndex, Shard
from .galleries.urls import Folder, folder_at, is_url

RECORDS = "ray-shards"
"""The folder inside the gallery; it is there from the start of a run to the moment when the index has been written."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished shard, and the lines that it adds to the quarantine list."""

    shard: Shard
    quarantine: bytes

    def to_json(self) -> bytes:
        return json.dumps(self.shard.to_json() | {"quarantine": self.quarantine.decode()}).encode()

    @classmethod
    def parsed(cls, data: bytes | None) -> "Record | None":
        """The record; None where there is none, or a torn one."""
        try:
            entry = json.loads(data or b"null")
            files = [FileRecord(**entry[name]) for name in ("vectors", "items")]
            first_row, end_row = entry["rows"]
            count, lines = int(entry["count"]), entry["quarantine"].encode()
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        shard = Shard(first_row=first_row, end_row=end_row, count=count, vectors=files[0], items=files[1])
        return cls(shard=shard, quarantine=lines)


def record_file(shard: int) -> str:
    """Where a shard's record is, seen from the gallery."""
    return f"{RECORDS}/{shard:05}.json"


def attempts_file(shard: int) -> str:
    """Where it is counted how often a shard was begun."""
    return f"{RECORDS}/{shard:05}.attempts"


def index_in(folder: Folder, name: str = INDEX_FILE) -> GalleryIndex | None:
    """The index that lies there; None where there is none.

    Raises:
        DualmatchError: it is damaged.
    """
    data = folder.read(name)
    return None if data is None else GalleryIndex.parsed(data, f"{folder}/{name}")


def plan_in(folder: Folder) -> GalleryIndex | None:
    """What the unfinished gallery is to become; None where none was begun."""
    return index_in(folder, f"{RECORDS}/{INDEX_FILE}")


def rows_kept(out: str | Path) -> tuple[int, int] | None:
    """Of an unfinished gallery: how many rows `resume` need not encode again, and how many there are; None where none was begun."""
    folder = folder_at(out)
    plan = plan_in(folder)
    if plan is None:
        return None
    records = [record for name in folder.sizes(RECORDS) if (record := Record.parsed(folder.read(f"{RECORDS}/{name}")))]
    return sum(record.shard.end_row - record.shard.first_row for record in records), plan.rows


def finished_gallery(out: str | Path) -> tuple[list[Quarantined], int]:
    """Quarantine list and dimension of a finished gallery, at a path or URL."""
    if not is_url(out):
        gallery = Gallery.open(Path(out))
        return gallery.quarantine, gallery.dimension
    folder = folder_at(out)
    index, lines = index_in(folder), folder.read(QUARANTINE_FILE)
    if index is None or lines is None:
        raise DualmatchError(f"there is no gallery at {out}.")
    return [Quarantined(**json.loads(line)) for line in lines.splitlines()], index.dimension
