"""Files that are complete or not there: hashing, atomic writes, directories built aside and renamed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DualmatchError


def sha256_of_bytes(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal; read in blocks, so memory stays bounded."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `data` so that `path` holds either what it held before or all of `data`, also after a power cut."""
    payload = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; `what` names it in the error.

    Raises:
        DualmatchError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DualmatchError(f"{what}: there is no file {path}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DualmatchError(f"{what}: {path} cannot be read as JSON ({error}).") from None


def refuse_existing(path: Path, what: str, *, force: bool = False) -> None:
    """Refuse to write over something that is there, unless `force`."""
    if path.exists() and not force and not (path.is_dir() and not any(path.iterdir())):
        raise DualmatchError(f"{what} {path} exists already; give another path, or remove it first.")


@contextmanager
def directory_built_aside(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target`; it becomes `target` on success and disappears on any failure.

    An older `target` is replaced only at the end, so a failure never costs what was there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    building.chmod(0o755)
    try:
        yield building
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
            target.rename(old / target.name)
            building.rename(target)
            shutil.rmtree(old)
        else:
            building.rename(target)
    finally:
        if building.exists():
            shutil.rmtree(building)
