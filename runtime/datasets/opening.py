"""Which layout a data set has, told by its files."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import FOLDER_KINDS

from . import karpathy, scan, vsepp
from .base import Dataset, ImageItem
from .captions import CAPTIONS_FILE, IMAGES_FOLDER, read_captions_folder
from .entries import MISSING_FILES, Faults, is_file
from .scenes import make_scenes


@dataclass(frozen=True, kw_only=True)
class _Layout:
    needs: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, Faults], Dataset]


# A new layout is one more reader and one more entry here.
_LAYOUTS = {
    "captions": _Layout(
        needs=f"{IMAGES_FOLDER}/ and {CAPTIONS_FILE}",
        fits=lambda path: (path / CAPTIONS_FILE).exists(),
        read=read_captions_folder,
    ),
    "karpathy": _Layout(
        needs=f"{karpathy.PATTERN} (Karpathy's splits) beside the images",
        fits=lambda path: (
            any(path.glob(karpathy.PATTERN)) if path.is_dir() else Path(path.name).match(karpathy.PATTERN)
        ),
        read=karpathy.read_karpathy,
    ),
    "vsepp": _Layout(
        needs=f"annotations/ with {vsepp.PATTERN} and COCO's captions_*2014.json, and images/train2014, images/val2014",
        fits=lambda path: path.is_dir() and vsepp.ids_folder(path) is not None,
        read=vsepp.read_vsepp,
    ),
    "scan": _Layout(
        needs=f"*{scan.CAPTIONS_SUFFIX} and *{scan.IMAGES_SUFFIX} (SCAN's region features)",
        fits=lambda path: bool(scan.splits_in(path)),
        read=scan.read_scan,
    ),
}
_KNOWN = "; or ".join(layout.needs for layout in _LAYOUTS.values())


def open_dataset(name_or_path: str | Path, faults: Faults | None = None) -> Dataset:
    """Open `scenes`, the embedded data set, or a folder (of Karpathy's splits also the JSON file) in the layout that its files tell.

    `LAYOUT:PATH` names the layout where several fit. A folder that is called `scenes` too is opened as `./scenes` (given as text) or by
    its full path.

    Args:
        faults: collects faults of single entries (missing images, empty captions, …), which are then left out; without it the first is
            an error.

    Raises:
        DualmatchError: no such folder, no layout fits or several do, or the content is not what its layout asks for.
    """
    if not str(name_or_path):
        raise DualmatchError("the data set has no name; give a folder, or scenes.")
    if str(name_or_path) == "scenes":
        return make_scenes()
    named, path = _named(name_or_path)
    faults = faults or Faults()
    try:
        layout = _LAYOUTS[named or _detected(path)]
        if named and path.is_dir() and not layout.fits(path):
            raise DualmatchError(f"data set {path}: found {_entries(path)}, but the {named} layout is {layout.needs}.")
        dataset = layout.read(path, faults)
        gone = _missing(dataset.items)
    except (OSError, ValueError) as error:
        if isinstance(error, DualmatchError):
            raise
        raise DualmatchError(f"data set {path} cannot be opened ({error}).") from None
    if gone and not faults.collect:
        raise DualmatchError(
            f"data set {path}: {len(gone)} of {len(dataset.items)} listed images are not in it, the first is {gone[0].id!r} "
            f"({gone[0].path})."
        )
    for item in gone:
        faults.add(MISSING_FILES, f"{item.id} ({item.split}): {item.path}")
    absent = {item.id for item in gone}
    return replace(dataset, items=tuple(item for item in dataset.items if item.id not in absent)) if gone else dataset


def _named(name_or_path: str | Path) -> tuple[str | None, Path]:
    """The layout, where it is named before a colon, and the path."""
    prefix, colon, rest = str(name_or_path).partition(":")
    if colon and prefix in _LAYOUTS and not isinstance(name_or_path, Path):
        if not rest:
            raise DualmatchError(f"data set {name_or_path}: give the path after the colon, e.g. {prefix}:FOLDER.")
        path = Path(rest)
        if not path.exists():
            raise DualmatchError(f"data set {path}: there is no such folder.")
        return prefix, path
    return None, Path(name_or_path)


def _detected(path: Path) -> str:
    """The name of the layout that fits.

    Raises:
        DualmatchError: none does, or several.
    """
    if path.is_file():
        if not _LAYOUTS["karpathy"].fits(path):
            raise DualmatchError(
                f"data set {path} is a file; give its folder (of Karpathy's splits also the file, {karpathy.PATTERN} or karpathy:FILE)."
            )
        return "karpathy"
    if not path.is_dir():
        raise DualmatchError(
            f"data set {path}: there is no such folder; give `scenes`, or a folder with {_KNOWN}. "
            f"`LAYOUT:PATH` names the layout: {', '.join(_LAYOUTS)}."
        )
    fitting = [name for name, layout in _LAYOUTS.items() if layout.fits(path)]
    if len(fitting) > 1:
        raise DualmatchError(
            f"data set {path} fits the layouts {' and '.join(fitting)}; name the one to read: "
            f"{' or '.join(f'--data {name}:{path}' for name in fitting)}."
        )
    if not fitting:
        raise DualmatchError(
            f"data set {path}: found {_entries(path)}{_hint(path)}, but a data set is a folder with {_KNOWN}."
        )
    return fitting[0]


def _hint(path: Path) -> str:
    """What a folder that is no data set seems to be."""
    for file, (kind, _) in FOLDER_KINDS.items():
        if (path / file).is_file():
            return f" ({kind})"
    if any(path.glob("*_feat???.h5")) or any(path.glob("*_cls_prob.npy")):
        return " (VLP's region features, which --regions takes; --data is the folder with images and captions)"
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir())[:20]
    data_sets = [folder for folder in inside if any(layout.fits(folder) for layout in _LAYOUTS.values())]
    return f" ({', '.join(str(folder) for folder in data_sets)} can be read)" if data_sets else ""


def _missing(items: Sequence[ImageItem]) -> list[ImageItem]:
    """The images whose file is not there; each folder is listed once, which on a network disk is faster than to ask for each file."""
    listings: dict[Path, set[str]] = {}
    gone = []
    for item in items:
        if item.path is None:
            continue
        folder = item.path.parent
        if folder not in listings:
            listings[folder] = _files_in(folder)
        # The second question is for file systems that ignore case or spell accents in another way.
        if item.path.name not in listings[folder] and not is_file(item.path):
            gone.append(item)
    return gone


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def _entries(folder: Path, shown: int = 5) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
