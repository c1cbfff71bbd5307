"""Which photographs a tar archive holds and where, and whether it is whole."""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from dualmatch.runtime.errors import DualmatchError

from .photos import is_photo_name


def photo_members(file: Any) -> Iterator[tarfile.TarInfo | str]:
    """The members of an archive that are called as photographs are, then, where it is damaged, what is wrong with it."""
    tar = None
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (closed with its file)
        while (member := tar.next()) is not None:
            vars(tar)["members"] = []  # else the headers of a million members stay in memory
            if is_photo_name(PurePosixPath(member.name).name):
                yield member
        problem = _problem_at_end(file.seek(tar.offset), file.read(512))
    except DualmatchError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError) as error:
        problem = str(error) or type(error).__name__
    if problem:
        yield f"cannot be read {'from its first byte' if tar is None else f'behind byte {tar.offset}'} ({problem})"


def _problem_at_end(offset: int, block: bytes) -> str | None:
    """`tarfile` takes a damaged header, and a missing one, for the end; the real end is a block of zeros."""
    if len(block) < 512:
        return f"it ends at byte {offset + len(block)} without an end mark"
    return "a damaged header" if any(block) else None
