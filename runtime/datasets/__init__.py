"""Data sets: images with captions, read from several layouts through one interface, or generated (`scenes`).

Torch-free, because `evaluate` and `verify` read the same data as training does. `open_dataset` is the door.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dualmatch.runtime.errors import DualmatchError

from .base import Dataset, ImageItem
from .captions import CAPTIONS_FILE, read_captions_folder
from .scenes import make_scenes

__all__ = ["Dataset", "ImageItem", "make_scenes", "open_dataset"]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    looks_like: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], Dataset]


# A new layout is one more reader and one more line here; the first that fits is taken.
_LAYOUTS = (
    _Layout(
        looks_like=f"images/ and {CAPTIONS_FILE}",
        fits=lambda folder: (folder / CAPTIONS_FILE).exists(),
        read=read_captions_folder,
    ),
)


def open_dataset(name_or_path: str | Path) -> Dataset:
    """Open `scenes`, the embedded data set, or a folder in one of the layouts that are read (told by the files in it).

    A folder that is called `scenes` too is opened as `./scenes` (given as text) or by its full path.

    Raises:
        DualmatchError: no such folder, no layout fits, or the folder's content is not what its layout asks for.
    """
    if str(name_or_path) == "scenes":
        return make_scenes()
    folder = Path(name_or_path)
    known = "; or ".join(layout.looks_like for layout in _LAYOUTS)
    try:
        if not folder.is_dir():
            raise DualmatchError(
                f"data set {name_or_path}: there is no such folder; give a folder with {known}, or `scenes`."
            )
        fitting = next((layout for layout in _LAYOUTS if layout.fits(folder)), None)
        if fitting is None:
            raise DualmatchError(
                f"data set {folder}: found {_entries(folder)}, but a data set is a folder with {known}."
            )
    except OSError as error:
        raise DualmatchError(f"data set {folder} cannot be opened ({error}).") from None
    return fitting.read(folder)


def _entries(folder: Path, shown: int = 5) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
