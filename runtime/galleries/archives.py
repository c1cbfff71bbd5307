"""Photographs in tar archives, webdataset's layout: headers are read once, then any photograph is one read at an offset (if not compressed)."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dualmatch.runtime.errors import DualmatchError

from .compressed import COMPRESSED_SUFFIXES, CompressedArchive, CompressedTarPhoto, Inflated
from .photos import LostPhoto, OnlyIds, Photo, SourceGoneError, require_size
from .tar_members import photo_members

ARCHIVE_SUFFIXES = (".tar", *COMPRESSED_SUFFIXES)


def is_archive_name(name: str) -> bool:
    """Whether a file's name is that of an archive which can be read."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


@dataclass(frozen=True, kw_only=True, slots=True)
class TarPhoto(OnlyIds):
    """A member of an archive: its id is the archive's path, a slash, and the member's name."""

    id: str
    archive: Path
    offset: int
    size: int

    def read(self) -> bytes:
        require_size(self.size)
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except FileNotFoundError:
            raise SourceGoneError(
                f"the archive {self.archive} has vanished; bring it back and go on with --resume."
            ) from None
        if len(data) < self.size:
            raise DualmatchError(f"the archive ends inside it ({len(data)} of {self.size} bytes).")
        return data


def photos_of_tars(archives: Sequence[Path], root: Path) -> list[Photo]:
    """Every photograph of the archives, in their order; captions and other members are passed over.

    An archive that is cut or damaged gives the photographs before the damage, then one row under its own name that says so.

    Raises:
        DualmatchError: an archive that cannot be opened, or no photograph in all of them.
    """
    return photos_of_archives([(archive, archive.relative_to(root).as_posix()) for archive in archives], TarPhoto)


def photos_of_archives(archives: Sequence[tuple[Any, str]], member_type: Callable[..., Photo]) -> list[Photo]:
    """As `photos_of_tars`, of (archive, its name in ids): an archive is whatever opens as a path does, a photograph of an uncompressed one a `member_type`."""
    photos = [photo for archive, name in archives for photo in _photos(archive, name, member_type)]
    if not photos:
        raise DualmatchError(f"no photograph in the {len(archives)} archive(s) {archives[0][0]} …")
    return photos


def _photos(archive: Any, name: str, member_type: Callable[..., Photo]) -> Iterator[Photo]:
    place = archive
    compressed = name.lower().endswith(COMPRESSED_SUFFIXES)
    if compressed:
        place, member_type = CompressedArchive(archive), CompressedTarPhoto
    try:
        with archive.open("rb") as file:
            stream = Inflated(file) if compressed else None
            for member in photo_members(stream or file):
                if isinstance(member, str):
                    yield LostPhoto(id=name, reason=f"the archive {member}: what follows is lost")
                    return
                yield _photo(place, name, member, member_type)
            if stream is not None and (damage := stream.damage_behind()):
                yield LostPhoto(
                    id=name, reason=f"the archive is damaged ({damage}): some of its photographs may be, too"
                )
    except OSError as error:
        raise DualmatchError(f"archive {archive} cannot be read: {error.strerror or error}.") from None


def _photo(archive: Any, name: str, member: tarfile.TarInfo, member_type: Callable[..., Photo]) -> Photo:
    id_ = f"{name}/{PurePosixPath(member.name).as_posix().lstrip('/')}"
    if not member.isreg() or member.issparse():
        return LostPhoto(id=id_, reason="it is not a plain file in its archive")
    return member_type(id=id_, archive=archive, offset=member.offset_data, size=member.size)
