"""Object stores (`s3://`, `gs://`, `hdfs://`, whatever fsspec opens): photographs read from them, and the few files of a gallery written to them."""

import errno
import os
import posixpath
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically

from .archives import is_archive_name, photos_of_archives
from .patterns import expanded
from .photos import OnlyIds, Photo, SourceGoneError, require_size

LOCAL = "file://"


def is_url(place: str | Path) -> bool:
    """Whether this is for fsspec: `file://` is not, it is a path (see `local_path`)."""
    return "://" in str(place) and not str(place).startswith(LOCAL)


def local_path(place: str | Path) -> Path:
    """A path, or the path of a `file://` URL."""
    return Path(str(place).removeprefix(LOCAL))


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlFile:
    """A file in an object store, opened as a path is."""

    url: str

    def open(self, mode: str = "rb") -> Any:
        """The file, fetched in blocks as it is read."""
        files, path = _file_system(self.url)
        return files.open(path, mode)

    def read_range(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, in one request."""
        files, path = _file_system(self.url)
        return _asked(self.url, lambda: bytes(files.cat_file(path, start=offset, end=offset + size)))

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlPhoto(OnlyIds):
    """A line of a list: its id is the line, `listed_in` the list's URL."""

    id: str
    listed_in: str

    def read(self) -> bytes:
        url = self.id if "://" in self.id else posixpath.join(posixpath.dirname(self.listed_in), self.id)
        files, path = _file_system(url)
        try:
            size = _asked(url, lambda: files.size(path))
            require_size(size or 0)
            return _asked(url, lambda: bytes(files.cat_file(path)))
        except FileNotFoundError:
            # Of one photograph that is its own trouble; a store without the list itself has lost more.
            list_files, list_path = _file_system(self.listed_in)
            if not _asked(self.listed_in, lambda: list_files.exists(list_path)):
                raise SourceGoneError(f"the list {self.listed_in} has vanished; go on with --resume.") from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlTarPhoto(OnlyIds):
    """A member of an archive in an object store; see `archives.TarPhoto`."""

    id: str
    archive: UrlFile
    offset: int
    size: int

    def read(self) -> bytes:
        require_size(self.size)
        try:
            data = self.archive.read_range(self.offset, self.size)
        except FileNotFoundError:
            raise SourceGoneError(f"the archive {self.archive} has vanished; go on with --resume.") from None
        if len(data) < self.size:
            raise DualmatchError(f"the archive ends inside it ({len(data)} of {self.size} bytes).")
        return data


def photos_of_url(source: str, ids_of_lines: Callable[[bytes, str], list[str]]) -> Sequence[Photo]:
    """The photographs of a list (`.txt`, one name a line, relative to the list, or a URL), or of tar archives (a pattern for several).

    Raises:
        DualmatchError: neither, nothing there, or the store cannot be reached.
    """
    urls = [url for part in expanded(source) for url in _matches(part)]
    if urls and all(is_archive_name(url) for url in urls):
        common = posixpath.commonpath([posixpath.dirname(url.partition("://")[2]) for url in urls])
        names = [posixpath.relpath(url.partition("://")[2], common) for url in urls]
        archives = [UrlFile(url=url) for url in urls]
        return _asked(source, lambda: photos_of_archives(list(zip(archives, names, strict=True)), UrlTarPhoto))
    if len(urls) != 1 or not urls[0].lower().endswith(".txt"):
        raise DualmatchError(
            f"photographs: {source} is neither a list (.txt, one name a line) nor .tar or .tar.gz archives; in an object store these two can be read."
        )
    files, path = _file_system(urls[0])
    try:
        data = _asked(urls[0], lambda: bytes(files.cat_file(path)))
    except FileNotFoundError:
        raise DualmatchError(f"photographs: there is no list {urls[0]}.") from None
    return [UrlPhoto(id=id_, listed_in=urls[0]) for id_ in ids_of_lines(data, urls[0])]


class Folder(Protocol):
    """A gallery's directory, as far as shards and small records need one: names may hold one slash."""

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None where there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put a file there, whole or not at all, over what was there."""
        ...

    def sizes(self, inside: str = "") -> dict[str, int]:
        """Names and bytes of the files that lie there, or in one folder inside."""
        ...

    def remove(self, inside: str) -> None:
        """Remove one folder inside, with its files."""
        ...


class LocalFolder:
    """A folder of this machine, or of a file system that all machines mount."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, data)

    def sizes(self, inside: str = "") -> dict[str, int]:
        folder = self.path / inside
        return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}

    def remove(self, inside: str) -> None:
        shutil.rmtree(self.path / inside, ignore_errors=True)


class UrlFolder:
    """A prefix in an object store; its objects are replaced whole, as such stores do."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        files, path = _file_system(f"{self.url}/{name}")
        try:
            return _asked(self.url, lambda: bytes(files.cat_file(path)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        files, path = _file_system(f"{self.url}/{name}")

        def put() -> None:
            files.makedirs(posixpath.dirname(path), exist_ok=True)
            files.pipe_file(path, data)

        _asked(self.url, put)

    def sizes(self, inside: str = "") -> dict[str, int]:
        files, path = _file_system(f"{self.url}/{inside}".rstrip("/"))

        def listed() -> dict[str, int]:
            files.invalidate_cache()
            return {posixpath.basename(one["name"]): one["size"] or 0 for one in files.ls(path, detail=True)}

        try:
            return _asked(self.url, listed)
        except FileNotFoundError:
            return {}

    def remove(self, inside: str) -> None:
        files, path = _file_system(f"{self.url}/{inside}")
        _asked(self.url, lambda: files.rm(path, recursive=True) if files.exists(path) else None)


def folder_at(place: str | Path) -> Folder:
    """The folder or prefix at a path or URL."""
    return UrlFolder(str(place)) if is_url(place) else LocalFolder(local_path(place))


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL (kept by fsspec for the next call), and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise DualmatchError(
            f"{url} needs fsspec, which is not installed: pip install 'dualmatch[distributed]'."
        ) from None
    try:
        files, path = url_to_fs(url)
    except ImportError as error:
        raise DualmatchError(f"{url} cannot be opened: {error} beside dualmatch[distributed].") from None
    except ValueError as error:
        raise DualmatchError(f"{url} cannot be opened: {error}.") from None
    return files, path


def _asked(url: str, request: Callable[[], Any]) -> Any:
    """What a store answers; only "there is no such file" is about the file, everything else about the store or our rights."""
    try:
        return request()
    except (FileNotFoundError, DualmatchError):
        raise
    except Exception as error:  # noqa: BLE001  (each store's client has exceptions of its own)
        text = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise SourceGoneError(f"{url} cannot be reached now: {text}; go on with --resume.") from None


def _matches(url: str) -> list[str]:
    if not any(c in url for c in "*?["):
        return [url]
    files, path = _file_system(url)
    protocol = url.partition("://")[0]
    found = _asked(url, lambda: sorted(files.glob(path)))
    if not found:
        raise DualmatchError(f"photographs: nothing matches {url}.")
    return [f"{protocol}://{match}" for match in found]
