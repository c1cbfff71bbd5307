"""A photograph that is yet to be read, from wherever it lies."""

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

from dualmatch.runtime import preprocess
from dualmatch.runtime.errors import DualmatchError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class SourceGoneError(DualmatchError):
    """What photographs lie in has vanished, so that none of them is to blame: a run stops, and can be resumed."""


class Photo(Protocol):
    """One photograph: `fields` is what a gallery records of it beside row and id."""

    @property
    def id(self) -> str: ...

    def fields(self) -> dict[str, str]: ...

    def read(self) -> bytes:
        """Its encoded bytes; called from any thread.

        Raises:
            DualmatchError, OSError: it cannot be read.
        """
        ...


class OnlyIds:
    """Photographs whose id says where they are, so that nothing else has to be recorded."""

    __slots__ = ()

    def fields(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePhoto(OnlyIds):
    """A file: its id is its path relative to `folder`, with forward slashes."""

    id: str
    folder: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.id

    def read(self) -> bytes:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            if not self.folder.is_dir():
                raise SourceGoneError(
                    f"the folder {self.folder} has vanished; bring it back and go on with --resume."
                ) from None
            raise
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
            raise DualmatchError("it is not a regular file.")
        require_size(status.st_size)
        return self.path.read_bytes()


class FilePhotos(Sequence[FilePhoto]):
    """Files of one folder: of a million of them only the ids are held."""

    def __init__(self, ids: list[str], folder: Path) -> None:
        self.ids, self.folder = ids, folder

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> FilePhoto: ...
    @overload
    def __getitem__(self, index: slice) -> list[FilePhoto]: ...
    def __getitem__(self, index: int | slice) -> FilePhoto | list[FilePhoto]:
        if isinstance(index, slice):
            return [FilePhoto(id=id_, folder=self.folder) for id_ in self.ids[index]]
        return FilePhoto(id=self.ids[index], folder=self.folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class LostPhoto(OnlyIds):
    """A row that is known to be unreadable before it is read: it goes on the quarantine list in its place."""

    id: str
    reason: str

    def read(self) -> bytes:
        raise DualmatchError(self.reason)


def is_photo_name(name: str) -> bool:
    """Whether a file's name is a photograph's: not hidden, and of a known suffix."""
    return not name.startswith(".") and name.lower().endswith(PHOTO_SUFFIXES)


def require_size(num_bytes: int) -> None:
    """Refuse what no photograph within the pixel limit needs, before its bytes fill the memory.

    Raises:
        DualmatchError: above four bytes for each pixel of the limit, or no bytes at all.
    """
    if num_bytes == 0:
        raise DualmatchError("it is empty.")
    if num_bytes > size_limit():
        raise DualmatchError(f"it has {num_bytes} bytes, above the limit of {size_limit()}.")


def size_limit() -> int:
    """Bytes of the largest file that is read as a photograph: four for each pixel of the limit, and some for what stands around them."""
    return 4 * preprocess.MAX_PIXELS + 2**20
