"""Files that are complete or not there: hashing, atomic writes, directories built aside and renamed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

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
    except (OSError, ValueError, RecursionError) as error:
        raise DualmatchError(f"{what}: {path} cannot be read as JSON ({error}).") from None


MAX_JSON_DEPTH = 64
FOLDER_KINDS = {
    "manifest.json": ("a bundle", "`dualmatch export RUN --out BUNDLE`"),
    "run.json": ("a training run", "`dualmatch train RECIPE --data DATA --out RUN`"),
    "index.json": ("a gallery", "`dualmatch runtime encode-gallery BUNDLE PHOTOS --out GALLERY`"),
}
"""The file that tells each kind of folder, what to call it, and the command that makes one."""


def strict_json(data: bytes) -> Any:
    """JSON that means one thing to every reader: UTF-8, no key twice, no NaN or infinity, whole numbers of 64 bits, bounded depth.

    Raises:
        ValueError: it is not; the text says why.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            (key, times), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {key!r} stands there {times} times")
        return values

    def whole(text: str) -> int:
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise ValueError(f"a number of {len(text)} digits does not fit 64 bits")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError("a number is too large for 64-bit floating point")
        return value

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is no number in JSON")

    try:
        values = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_int=whole, parse_float=real, parse_constant=constant
        )
    except RecursionError:
        raise ValueError(f"it nests deeper than {MAX_JSON_DEPTH} levels") from None
    level = [values]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
    if level:
        raise ValueError(f"it nests deeper than {MAX_JSON_DEPTH} levels")
    return values


def refuse_other_kind(path: Path, wanted: str) -> None:
    """Say so where `path` is plainly something else than `wanted` (`a bundle`, `a training run`, `a gallery`).

    Raises:
        DualmatchError: it is another kind of folder, or a file.
    """
    if path.is_file():
        raise DualmatchError(f"{path} is a file, but {wanted} is a folder.")
    how = dict(FOLDER_KINDS.values())[wanted]
    found = [kind for name, (kind, _) in FOLDER_KINDS.items() if (path / name).is_file()]
    if found and wanted not in found:
        raise DualmatchError(f"{path} is {found[0]}, not {wanted}; {how} makes {wanted}.")


def refuse_existing(path: Path, what: str, *, force: bool = False) -> None:
    """Refuse, before any work is done, to write over something that is there, unless `force`, or where nothing can be written.

    Raises:
        DualmatchError: `path` exists, is a link to nothing, or lies where nothing can be written.
    """
    refuse_unwritable(path, what)
    if path.is_symlink() and not path.exists():
        raise DualmatchError(f"{what} {path} is a link to nothing; give another path, or remove it first.")
    if path.exists() and not force and not (path.is_dir() and not any(path.iterdir())):
        raise DualmatchError(f"{what} {path} exists already; give another path, or remove it first.")


def refuse_unwritable(path: Path, what: str) -> None:
    """Refuse, before any work is done, a path whose folder neither takes files nor can be made.

    Raises:
        DualmatchError: a file or a link to nothing stands in a folder's place, or the nearest folder that is there takes no files.
    """
    try:
        above = next(one for one in path.absolute().parents if one.exists() or one.is_symlink())
        if not above.is_dir():
            kind = "a file" if above.exists() else "a link to nothing"
            raise DualmatchError(
                f"{what} {path} cannot be written: {above} is {kind}, not a folder; give another path."
            )
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise DualmatchError(f"{what} {path} cannot be written: {error.strerror}; give another path.") from None


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
