"""Photographs in gzipped tar archives: one pass lists them, another hands them out while they are encoded, and neither unpacks to disk.

A compressed stream can only be read forwards. Threads ask for photographs nearly in order, so those that are passed over wait
in memory until they are asked for; going back further starts the archive again, which is slow but right.
"""

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from gzip import BadGzipFile, GzipFile
from threading import Lock
from typing import Any, Self

from dualmatch.runtime.errors import DualmatchError

from .photos import OnlyIds, SourceGoneError, require_size, size_limit
from .tar_members import photo_members

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz")
WAITING_BYTES = 256 * 2**20  # of photographs that were passed over; more are forgotten, the earliest first
HEADER_BYTES = 16 * 2**20  # at most, of one extended header
# Photographs hardly shrink, gzip makes a thousandth of zeros: beyond this an archive is a bomb.
MAX_RATIO = 200
STEP = 2**20


class Inflated:
    """The unpacked bytes of a gzip file as `tarfile` wants them: forwards, and back by what was read last."""

    def __init__(self, packed: Any) -> None:
        self._packed, self._gzip = packed, GzipFile(fileobj=packed, mode="rb")
        self._position, self._last, self._behind = 0, b"", 0

    def tell(self) -> int:
        return self._position - self._behind

    def seek(self, offset: int) -> int:
        back = self._position - offset
        if back > 0:
            assert back <= len(self._last), "only what was read last can be read again"
            self._behind = back
            return offset
        self._behind = 0
        while self._position < offset and self._inflate(min(STEP, offset - self._position)):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        """A header's bytes, fewer at the end.

        Raises:
            tarfile.ReadError: what is no header's size, damage, or a bomb.
        """
        if size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.take(size)

    def take(self, size: int) -> bytes:
        """As `read`, of any size."""
        again, self._behind = self._last[len(self._last) - self._behind :][:size] if self._behind else b"", 0
        parts = [again]
        missing = size - len(again)
        while missing and (part := self._inflate(min(STEP, missing))):
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        self._last = data[-tarfile.BLOCKSIZE :]
        return data

    def damage_behind(self) -> str | None:
        """What is wrong with the rest, down to the checksum of all that was unpacked."""
        try:
            while self._inflate(STEP):
                pass
        except tarfile.ReadError as error:
            return str(error)
        return None

    def _inflate(self, size: int) -> bytes:
        try:
            data = self._gzip.read(size)
        except (BadGzipFile, zlib.error, EOFError) as error:
            raise tarfile.ReadError(str(error)) from None
        self._position += len(data)
        if self._position > size_limit() + MAX_RATIO * self._packed.tell():
            raise tarfile.ReadError(f"it unpacks to more than {MAX_RATIO} times its size: a decompression bomb")
        return data


class CompressedArchive:
    """One archive, read by all its photographs together; anything that opens as a path does."""

    def __init__(self, archive: Any) -> None:
        self.archive = archive
        self._lock = Lock()
        self._rest: Iterator[tuple[int, bytes]] | None = None
        self._reached = -1
        self._waiting: dict[int, bytes] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[Any]]:
        return type(self), (self.archive,)

    def read(self, offset: int) -> bytes:
        """The photograph whose unpacked bytes begin at `offset`.

        Raises:
            DualmatchError: the archive is damaged before its end, or it has vanished.
        """
        with self._lock:
            while offset not in self._waiting:
                if self._rest is None or self._reached >= offset:
                    self._rest, self._reached = self._contents(), -1
                try:
                    self._reached, data = next(self._rest)
                except StopIteration:
                    raise DualmatchError("the archive has changed since it was listed.") from None
                except OSError as error:  # of the disk or the store: no photograph is to blame
                    self._rest = None
                    gone = isinstance(error, FileNotFoundError)
                    what = "has vanished" if gone else f"cannot be read now: {error.strerror or error}"
                    raise SourceGoneError(f"the archive {self.archive} {what}; go on with --resume.") from None
                except BaseException:
                    self._rest = None
                    raise
                self._waiting[self._reached] = data
                self._forget(offset)
            return self._waiting.pop(offset)

    def _forget(self, wanted: int) -> None:
        held = sum(map(len, self._waiting.values()))
        for offset in sorted(self._waiting):
            if held <= WAITING_BYTES or offset == wanted:
                return
            held -= len(self._waiting.pop(offset))

    def _contents(self) -> Iterator[tuple[int, bytes]]:
        with self.archive.open("rb") as packed:
            stream = Inflated(packed)
            for member in photo_members(stream):
                if isinstance(member, str):
                    raise DualmatchError(f"the archive {member}.")
                if not member.isreg() or member.issparse() or not 0 < member.size <= size_limit():
                    continue
                try:
                    stream.seek(member.offset_data)
                    data = stream.take(member.size)
                except tarfile.ReadError as error:
                    raise DualmatchError(f"the archive is damaged inside it ({error}).") from None
                if len(data) < member.size:
                    raise DualmatchError(f"the archive ends inside it ({len(data)} of {member.size} bytes).")
                yield member.offset_data, data


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedTarPhoto(OnlyIds):
    """A member of a compressed archive; `offset` counts unpacked bytes. See `archives.TarPhoto`."""

    id: str
    archive: CompressedArchive
    offset: int
    size: int

    def read(self) -> bytes:
        require_size(self.size)
        return self.archive.read(self.offset)
