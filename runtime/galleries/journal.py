"""`journal.bin`: what is encoded beyond the last finished shard, so that a killed run loses a batch and not a shard.

Records are appended and not synced: a kill leaves all of them, a power cut some. Each carries its hash, so that what is
torn is seen; reading stops there, and the rows behind it are encoded again, to the same bytes.
"""

import json
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.files import sha256_of_bytes

from .index import GalleryIndex

JOURNAL_FILE = "journal.bin"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Encoded rows: vectors (n, dimension) in the gallery's dtype, and JSON lines of items and of quarantined rows."""

    rows: range
    vectors: NDArray[Any]
    items: list[bytes]
    quarantined: list[bytes]


def append_record(gallery: Path, stored: Stored) -> None:
    """Add one record."""
    parts = stored.vectors.tobytes(), b"".join(stored.items), b"".join(stored.quarantined)
    header = {"rows": [stored.rows.start, stored.rows.stop], "bytes": [len(part) for part in parts]}
    record = json.dumps(header).encode() + b"\n" + b"".join(parts)
    with (gallery / JOURNAL_FILE).open("ab", buffering=0) as file:
        left = memoryview(record + sha256_of_bytes(record).encode() + b"\n")
        while left:  # an unbuffered write may take a part
            left = left[file.write(left) :]


def records(gallery: Path, index: GalleryIndex) -> list[Stored]:
    """The whole records that go on where the shards stop; everything else is cut off the file."""
    path = gallery / JOURNAL_FILE
    data = path.read_bytes() if path.is_file() else b""
    found = []
    end = 0
    for stored, behind in _parsed(data, index):
        found.append(stored)
        end = behind
    if end < len(data):
        os.truncate(path, end)
    return found


def rows_kept(gallery: Path) -> tuple[int, int]:
    """Of an unfinished gallery: how many rows a resumed run need not encode again, and how many there are.

    Raises:
        DualmatchError: it has no index, or a damaged one.
    """
    index = GalleryIndex.read(gallery)
    path = gallery / JOURNAL_FILE
    stored = [one for one, _ in _parsed(path.read_bytes() if path.is_file() else b"", index)]
    first, end = index.part
    return (stored[-1].rows.stop if stored else index.next_row) - first, end - first


def clear_journal(gallery: Path, *, remove: bool) -> None:
    """Forget the records: a shard holds them now."""
    path = gallery / JOURNAL_FILE
    if remove:
        path.unlink(missing_ok=True)
    elif path.exists():
        os.truncate(path, 0)


def _parsed(data: bytes, index: GalleryIndex) -> Iterator[tuple[Stored, int]]:
    at, row, dtype = 0, index.next_row, np.dtype(index.dtype)
    while True:
        header_end = data.find(b"\n", at) + 1
        if not header_end:
            return
        try:
            header = json.loads(data[at:header_end])
            (start, stop), sizes = header["rows"], header["bytes"]
            cuts = [header_end + sum(map(operator.index, sizes[:n])) for n in range(4)]
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        digest = data[cuts[3] : cuts[3] + 65]
        if start != row or digest != sha256_of_bytes(data[at : cuts[3]]).encode() + b"\n":
            return
        vectors, items, quarantined = (data[a:b] for a, b in pairwise(cuts))
        yield (
            Stored(
                rows=range(start, stop),
                vectors=np.frombuffer(vectors, dtype).reshape(-1, index.dimension),
                items=items.splitlines(keepends=True),
                quarantined=quarantined.splitlines(keepends=True),
            ),
            at := cuts[3] + 65,
        )
        row = stop
