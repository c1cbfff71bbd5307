"""The `captions` layout: a folder with `images/` and a `captions.json`, what a user with own photographs has.

    {"dataset": "my photos", "images": [{"filename": "a.jpg", "split": "train", "captions": ["two dogs on a beach", …]}, …]}

`dataset` defaults to the folder's name, and an image's `split` to `train`: who divides nothing wants to train on everything,
and asking for a split that is not there is an error that says so. Other keys are ignored.
"""

from pathlib import Path
from typing import Any

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json

from .base import Dataset, ImageItem
from .entries import Faults, Items, checked_captions, json_kind, relative_file

CAPTIONS_FILE = "captions.json"
IMAGES_FOLDER = "images"
DEFAULT_SPLIT = "train"


def read_captions_folder(folder: Path, faults: Faults) -> Dataset:
    """Read the folder; images are neither opened nor looked for. An image's id is its file name below `images/`.

    Raises:
        DualmatchError: the folder, `images/` or `captions.json` is missing, the JSON has another shape, or (unless collected) an image
            has no caption or an empty one, or is listed twice.
    """
    if not folder.is_dir():
        raise DualmatchError(f"data set {folder}: there is no such folder.")
    file = folder / CAPTIONS_FILE
    content = read_json(file, f"data set {folder}")
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DualmatchError(f'{file}: expected an object with a list "images", found {json_kind(content)}.')
    if not content["images"]:
        raise DualmatchError(f'{file}: the list "images" is empty; list at least one image with its captions.')
    name = content.get("dataset", folder.resolve().name)
    if not isinstance(name, str) or not name:
        raise DualmatchError(f'{file}: "dataset" must be a name, found {json_kind(name)}.')
    images = folder / IMAGES_FOLDER
    if not images.is_dir():
        raise DualmatchError(f"data set {folder}: there is no folder {IMAGES_FOLDER}/ beside {CAPTIONS_FILE}.")
    items = Items(faults)
    for number, entry in enumerate(content["images"], start=1):
        items.add(_item_from_entry(entry, images, f"{file}: image {number}", faults), file)
    return Dataset(name=name, layout="captions", items=items.done(file), root=folder)


def _item_from_entry(entry: Any, images: Path, where: str, faults: Faults) -> ImageItem:
    if not isinstance(entry, dict):
        raise DualmatchError(f'{where} must be an object with "filename" and "captions", found {json_kind(entry)}.')
    path = relative_file(entry.get("filename"), where, f"{IMAGES_FOLDER}/")
    where = f"{where} ({str(path)!r})"
    split = entry.get("split", DEFAULT_SPLIT)
    if not isinstance(split, str) or not split:
        raise DualmatchError(f'{where}: "split" must be a name such as "train", found {json_kind(split)}.')
    captions = entry.get("captions", [])
    if not isinstance(captions, list):
        raise DualmatchError(
            f'{where} has no captions: "captions" must be a list of at least one, found {json_kind(captions)}.'
        )
    return ImageItem(id=str(path), split=split, captions=checked_captions(captions, where, faults), path=images / path)
