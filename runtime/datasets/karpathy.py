"""Karpathy's splits: `dataset_flickr30k.json`, `dataset_coco.json` or `dataset_flickr8k.json` beside the images.

    {"dataset": "coco", "images": [{"filename": "COCO_val2014_….jpg", "filepath": "val2014", "split": "restval",
                                    "sentences": [{"raw": "a dog …", …}, …], …}, …]}

Splits keep their names; COCO's `restval` is trained on by recipes whose `train_splits` name it. The images lie below the JSON's folder or one of
its folders, COCO's with or without their `filepath`.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json

from .base import Dataset, ImageItem
from .entries import Faults, Items, checked_captions, is_file, json_kind, relative_file

PATTERN = "dataset_*.json"
# So many of the images, evenly spread over the list, tell which folder they are in.
_PROBED = 50


def read_karpathy(path: Path, faults: Faults) -> Dataset:
    """Read the JSON file, or the one in a folder. An image's id is its file name, below its `filepath` where it has one.

    Raises:
        DualmatchError: no such file or several, JSON of another shape, images that are in no folder here or in two, or (unless collected)
            an image without captions, or listed twice.
    """
    file = _json_file(path)
    content = read_json(file, f"data set {path}")
    if not isinstance(content, dict) or not isinstance(content.get("images"), list) or not content["images"]:
        raise DualmatchError(
            f'{file}: expected an object with a list "images" that is not empty, as Karpathy\'s files have; found {json_kind(content)}.'
        )
    parsed = [
        _parsed(entry, f"{file}: image {number}", faults) for number, entry in enumerate(content["images"], start=1)
    ]
    root, flat = _images_folder(file, [name for name, _, _ in parsed], faults)
    items = Items(faults)
    for name, split, captions in parsed:
        where = root / (name.name if flat else name)
        items.add(ImageItem(id=str(name), split=split, captions=captions, path=where), file)
    title = content.get("dataset")
    return Dataset(
        name=title if isinstance(title, str) and title else file.stem,
        layout="karpathy",
        items=items.done(file),
        root=file.parent,
    )


def _json_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob(PATTERN))
    if not found:
        raise DualmatchError(f"data set {path}: there is no {PATTERN} in it.")
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise DualmatchError(f"data set {path} holds {names}; name one: --data {found[0]}.")
    return found[0]


def _parsed(entry: Any, where: str, faults: Faults) -> tuple[PurePosixPath, str, tuple[str, ...]]:
    """An image's (path below the images, split, captions)."""
    if not isinstance(entry, dict):
        raise DualmatchError(
            f'{where} must be an object with "filename", "split" and "sentences", found {json_kind(entry)}.'
        )
    name = relative_file(entry.get("filename"), where, "the images' folder")
    if (folder := entry.get("filepath")) not in (None, ""):
        name = relative_file(folder, where, "the images' folder") / name
    where = f"{where} ({str(name)!r})"
    split, sentences = entry.get("split"), entry.get("sentences")
    if not isinstance(split, str) or not split:
        raise DualmatchError(f'{where}: "split" must be a name such as "train", found {json_kind(split)}.')
    if not isinstance(sentences, list) or not all(
        isinstance(sentence, dict) and "raw" in sentence for sentence in sentences
    ):
        raise DualmatchError(
            f'{where}: "sentences" must be a list of objects with "raw" texts, found {json_kind(sentences)}.'
        )
    return name, split, checked_captions([sentence["raw"] for sentence in sentences], where, faults)


def _images_folder(file: Path, names: Sequence[PurePosixPath], faults: Faults) -> tuple[Path, bool]:
    """Where the images are: the folder, and whether they lie in it without their `filepath`."""
    probed = names[:: max(1, len(names) // _PROBED)]
    nested = any(len(name.parts) > 1 for name in names)
    folders = [file.parent, *sorted(entry for entry in file.parent.iterdir() if entry.is_dir())]
    hits = {
        (folder, flat): sum(is_file(folder / (name.name if flat else name)) for name in probed)
        for folder in folders
        for flat in ((False, True) if nested else (False,))
    }
    most = max(hits.values())
    best = [place for place, found in hits.items() if found == most]
    if not most:
        if faults.collect:  # all of them are missing, which the report says
            return file.parent / "images", False
        raise DualmatchError(
            f"the images of {file} are not beside it: {names[0]} is in none of {', '.join(str(folder) for folder in folders[:5])}"
            f"{' …' if len(folders) > 5 else ''}. Put them, or a link to them, into {file.parent / 'images'}."
        )
    if len(best) > 1:
        best = [place for place in best if place[0].name == "images"] or best
    if len(best) > 1:
        raise DualmatchError(
            f"the images of {file} are in {best[0][0]} and in {best[1][0]}; call the folder to take {file.parent / 'images'}."
        )
    return best[0]
