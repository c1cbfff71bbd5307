"""What the readers of annotation files share: faults of single entries, and words for what a file holds."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dualmatch.runtime.errors import DualmatchError

from .base import ImageItem

# The kinds of faults, as a report names them.
EMPTY_CAPTIONS = "empty captions"
NO_CAPTIONS = "images without captions"
LISTED_TWICE = "images listed twice"
IN_TWO_SPLITS = "images in two splits"
MISSING_FILES = "missing files"
UNKNOWN_IDS = "annotation ids that the JSON lacks"

# One reader interface: whoever says `--split val` means what VSE++ and SCAN call dev.
SPLIT_NAMES = {"dev": "val"}
# Both authors validate on the first 5000 captions of dev, 1000 images of COCO's 5000.
DEV_CAPTIONS = 5000


class Faults:
    """Faults of single entries: the first is refused at once, or all are collected by kind, for a report.

    Attributes:
        found: sentences by kind, where they are collected.
    """

    def __init__(self, *, collect: bool = False) -> None:
        self.collect = collect
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, sentence: str) -> None:
        """Note a fault; the entry is then left out.

        Raises:
            DualmatchError: faults are not collected.
        """
        if not self.collect:
            raise DualmatchError(sentence)
        self.found.setdefault(kind, []).append(sentence)


class Items:
    """The images of a data set while its file is read: each once, in one split."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.by_id: dict[str, ImageItem] = {}

    def add(self, item: ImageItem, file: Path) -> None:
        """Add an image with captions; one without was noted by `checked_captions`."""
        before = self.by_id.get(item.id)
        if before is None:
            if item.captions:
                self.by_id[item.id] = item
        elif before.split == item.split:
            self.faults.add(
                LISTED_TWICE, f"{file}: {item.id!r} is listed twice; give all captions of an image in one entry."
            )
        else:
            self.faults.add(
                IN_TWO_SPLITS,
                f"{file}: {item.id!r} is in the splits {before.split} and {item.split}; an image belongs to one, "
                "or what is trained on is also tested.",
            )

    def done(self, where: Path) -> tuple[ImageItem, ...]:
        """All of them.

        Raises:
            DualmatchError: there are none.
        """
        if not self.by_id:
            raise DualmatchError(f"{where} has no image with a caption.")
        return tuple(self.by_id.values())


def checked_captions(captions: Sequence[Any], where: str, faults: Faults) -> tuple[str, ...]:
    """The captions of one image as they were written, without empty ones, which are faults.

    Raises:
        DualmatchError: one is no text or not valid Unicode.
    """
    good = []
    for position, caption in enumerate(captions, start=1):
        if not isinstance(caption, str):
            raise DualmatchError(
                f"{where}: caption {position} must be a text that is not empty, found {json_kind(caption)}."
            )
        if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption):
            raise DualmatchError(f"{where}: caption {position} is not valid Unicode (half of a surrogate pair).")
        if caption.strip():
            good.append(caption)
        else:
            faults.add(
                EMPTY_CAPTIONS,
                f"{where}: caption {position} must be a text that is not empty, found {json_kind(caption)}.",
            )
    if not good:
        faults.add(NO_CAPTIONS, f"{where} has no captions.")
    return tuple(good)


def relative_file(name: Any, where: str, below: str) -> PurePosixPath:
    """A file's path below the folder `below`.

    Raises:
        DualmatchError: it is no text, absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name:
        raise DualmatchError(f'{where} needs a "filename", found {json_kind(name)}.')
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DualmatchError(
            f"{where} ({name!r}) must lie below {below}; write its path from there, with forward slashes."
        )
    return path


def json_kind(value: Any) -> str:
    """A JSON value in the words of JSON, for messages."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        keys = ", ".join(repr(key) for key in list(value)[:5])
        return f"an object with {keys}" if keys else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return f"the value {value!r}"


def is_file(path: Path) -> bool:
    """Whether it is a file; False too for a name that no file can have, or in a folder that may not be entered."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
