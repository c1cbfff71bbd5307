"""The `captions` layout: a folder with `images/` and a `captions.json`, what a user with own photographs has.

    {"dataset": "my photos", "images": [{"filename": "a.jpg", "split": "train", "captions": ["two dogs on a beach", …]}, …]}

`dataset` defaults to the folder's name, and an image's `split` to `train`: who divides nothing wants to train on everything,
and asking for a split that is not there is an error that says so. Other keys are ignored.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json

from .base import Dataset, ImageItem

CAPTIONS_FILE = "captions.json"
IMAGES_FOLDER = "images"
DEFAULT_SPLIT = "train"


def read_captions_folder(folder: Path) -> Dataset:
    """Read the folder; the images are looked for but not opened. An image's id is its file name below `images/`.

    Raises:
        DualmatchError: the folder, `images/` or `captions.json` is missing, the JSON has another shape, an image has no
            caption or an empty one, is listed twice, lies outside `images/`, or is not there.
    """
    if not folder.is_dir():
        raise DualmatchError(f"data set {folder}: there is no such folder.")
    file = folder / CAPTIONS_FILE
    content = read_json(file, f"data set {folder}")
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DualmatchError(f'{file}: expected an object with a list "images", found {_kind(content)}.')
    if not content["images"]:
        raise DualmatchError(f'{file}: the list "images" is empty; list at least one image with its captions.')
    name = content.get("dataset", folder.resolve().name)
    if not isinstance(name, str) or not name:
        raise DualmatchError(f'{file}: "dataset" must be a name, found {_kind(name)}.')
    images = folder / IMAGES_FOLDER
    if not images.is_dir():
        raise DualmatchError(f"data set {folder}: there is no folder {IMAGES_FOLDER}/ beside {CAPTIONS_FILE}.")

    items: dict[str, ImageItem] = {}
    for number, entry in enumerate(content["images"], start=1):
        item = _item_from_entry(entry, images, f"{file}: image {number}")
        if item.id in items:
            raise DualmatchError(f"{file}: {item.id!r} is listed twice; give all captions of an image in one entry.")
        items[item.id] = item
    missing = [item.id for item in items.values() if not _is_file(images / item.id)]
    if missing:
        raise DualmatchError(
            f"{file}: {len(missing)} of {len(items)} listed images are not in {images}, the first is {missing[0]!r}."
        )
    return Dataset(name=name, layout="captions", items=tuple(items.values()), root=folder)


def _item_from_entry(entry: Any, images: Path, where: str) -> ImageItem:
    if not isinstance(entry, dict):
        raise DualmatchError(f'{where} must be an object with "filename" and "captions", found {_kind(entry)}.')
    filename = entry.get("filename")
    if not isinstance(filename, str) or not filename:
        raise DualmatchError(f'{where} needs a "filename", found {_kind(filename)}.')
    where = f"{where} ({filename!r})"
    path = PurePosixPath(filename)
    if path.is_absolute() or ".." in path.parts or "\\" in filename:
        raise DualmatchError(
            f"{where} must lie below {IMAGES_FOLDER}/; write its path from there, with forward slashes."
        )
    split = entry.get("split", DEFAULT_SPLIT)
    if not isinstance(split, str) or not split:
        raise DualmatchError(f'{where}: "split" must be a name such as "train", found {_kind(split)}.')
    captions = entry.get("captions")
    if not isinstance(captions, list) or not captions:
        raise DualmatchError(
            f'{where} has no captions: "captions" must be a list of at least one, found {_kind(captions)}.'
        )
    for position, caption in enumerate(captions, start=1):
        if not isinstance(caption, str) or not caption.strip():
            raise DualmatchError(
                f"{where}: caption {position} must be a text that is not empty, found {_kind(caption)}."
            )
        if any("\ud800" <= character <= "\udfff" for character in caption):
            raise DualmatchError(f"{where}: caption {position} is not valid Unicode (half of a surrogate pair).")
    return ImageItem(id=str(path), split=split, captions=tuple(captions), path=images / path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _kind(value: Any) -> str:
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
