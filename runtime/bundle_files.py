"""What a bundle's manifest lists, checked before anything parses it: names, sizes, SHA-256, and what the graphs ask for."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import DualmatchError
from .files import sha256_of_file
from .onnx_files import external_files
from .signature import SIGNATURE

MANIFEST = "manifest.json"
MAX_FILES = 10_000
MAX_BYTES = {"tokenizer.json": 2**28, "parity.json": 2**30, "parity.safetensors": 2**34}
"""Most bytes of the files that are parsed whole; graphs end at MAX_GRAPH_BYTES, and engines at what the disk holds."""
MAX_GRAPH_BYTES = 2**31  # protobuf's own limit
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*){0,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the bundle: SHA-256 in hexadecimal, size in bytes."""

    sha256: str
    bytes: int


def file_entry(path: Path) -> FileEntry:
    """Hash and size of a file."""
    return FileEntry(sha256=sha256_of_file(path), bytes=path.stat().st_size)


def check_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Check every listed file of a bundle.

    Raises:
        DualmatchError: a name that leads outside, a size beyond reason, a file that is missing, a link, or not what was hashed, or a
            graph that asks for a file which is not listed.
    """
    _check_names(folder, files)
    for name, entry in files.items():
        if name.endswith(".onnx"):
            _check_graph(folder, name, files)
        else:
            _check_file(folder, name, entry)


def _check_names(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Plain names only: relative, without dots that climb, and nothing that some file system reads in another way."""
    if len(files) > MAX_FILES:
        raise DualmatchError(f"the bundle {folder} lists {len(files)} files; more than {MAX_FILES} are refused.")
    folded: dict[str, str] = {}
    for name, entry in files.items():
        if not _PLAIN_NAME.fullmatch(name):
            raise DualmatchError(
                f"the bundle {folder} lists {name[:200]!r}, which lies outside it or is no plain file name; it is refused."
            )
        if name.casefold() in folded:
            raise DualmatchError(
                f"the bundle {folder} lists {folded[name.casefold()]!r} and {name!r}, which some disks take for one."
            )
        folded[name.casefold()] = name
        if not _SHA256.fullmatch(entry.sha256) or entry.bytes < 0:
            raise DualmatchError(
                f"{folder / MANIFEST} gives {name} no SHA-256 and size; the bundle is damaged, export it again."
            )
        most = MAX_GRAPH_BYTES if name.endswith(".onnx") else MAX_BYTES.get(name)
        if most is not None and entry.bytes > most:
            raise DualmatchError(
                f"the bundle {folder} lists {name} with {entry.bytes} bytes; more than {most} are refused."
            )
    if folded.keys() & {MANIFEST, SIGNATURE}:
        raise DualmatchError(
            f"the bundle {folder} lists its own manifest or signature, which cannot hold their own hash."
        )


def _checked_path(folder: Path, name: str, entry: FileEntry) -> Path:
    """The path of a listed file that is there, no link, and of the listed size."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise DualmatchError(
                f"{path} is a link, which may lead outside it; a bundle holds its files itself, `cp -rL` copies one so."
            )
    if not path.is_file():
        raise DualmatchError(f"the bundle {folder} lacks {name}; export it again.")
    size = path.stat().st_size
    if size != entry.bytes:
        raise DualmatchError(
            f"{path} has {size} bytes, the manifest says {entry.bytes}; the bundle is damaged, export it again."
        )
    return path


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = _checked_path(folder, name, entry)
    _check_hash(path, sha256_of_file(path), entry)


def read_checked(folder: Path, name: str, entry: FileEntry) -> bytes:
    path = _checked_path(folder, name, entry)
    with path.open("rb") as file:
        data = file.read(entry.bytes + 1)  # one more tells a file that grows while it is read
    _check_hash(path, hashlib.sha256(data).hexdigest(), entry)
    return data


def _check_hash(path: Path, digest: str, entry: FileEntry) -> None:
    if digest != entry.sha256:
        raise DualmatchError(
            f"{path} does not match the SHA-256 in the manifest; the bundle is damaged or was changed, export it again."
        )


def _check_graph(folder: Path, name: str, files: Mapping[str, FileEntry]) -> None:
    """A graph's hash, and that all external data it asks for are files of the bundle, which are hashed like any other."""
    data = read_checked(folder, name, files[name])
    for location in sorted(external_files(data, str(folder / name))):
        listed = (PurePosixPath(name).parent / location).as_posix()
        # As written, not as resolved: `./weights` or `sub/../weights` is nothing that export writes.
        if not _PLAIN_NAME.fullmatch(location) or listed not in files:
            raise DualmatchError(
                f"{folder / name} keeps weights in {location[:200]!r}, which the manifest does not list as a file of the bundle; it is refused."
            )


def refuse_unlisted(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """A signature vouches for all that a bundle holds; hidden files (.gitattributes) are nothing that dualmatch reads."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and name not in (*files, MANIFEST, SIGNATURE) and (path.is_symlink() or not path.is_dir()):
            raise DualmatchError(
                f"the bundle {folder} holds {name}, which its signed manifest does not list; remove it."
            )
