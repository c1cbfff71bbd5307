"""Several files by one word: `shards/*.tar`, `shards/{000..099}.tar`, `{train,val}.parquet`."""

import glob
import re
from pathlib import Path

from dualmatch.runtime.errors import DualmatchError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_FILES = 1_000_000


def files_of(pattern: str | Path) -> list[Path]:
    """The files that a path or pattern names: braces in the order written, a `*`, `?` or `[…]` in the order of the names.

    Raises:
        DualmatchError: a part of the pattern that matches nothing, while another does: shards would be missing.
    """
    if Path(pattern).exists():
        return [Path(pattern)]
    found: list[Path] = []
    missing: list[str] = []
    for part in expanded(str(pattern)):
        matches = sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part] * Path(part).exists()  # noqa: PTH207  (a pattern may be absolute)
        found += map(Path, matches)
        if not matches:
            missing.append(part)
    if found and missing:
        raise DualmatchError(f"there is no file {missing[0]}, which {pattern} asks for ({len(missing)} missing).")
    return found


def expanded(pattern: str) -> list[str]:
    """Braces written out, as a shell does: `{a,b}` and `{000..011}`, whose leading zeros keep the width."""
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    inside = braces.group(1)
    if whole := RANGE.fullmatch(inside):
        first, last = whole.groups()
        if int(last) - int(first) >= MAX_FILES:
            raise DualmatchError(f"{pattern} names more than {MAX_FILES} files.")
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [before + choice + rest for choice in choices for rest in expanded(after)]
