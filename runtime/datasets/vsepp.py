"""VSE++'s division of COCO: lists of annotation ids beside COCO's own JSON files.

`annotations/coco_train_ids.npy`, `coco_dev_ids.npy`, `coco_test_ids.npy`, `coco_restval_ids.npy`: the ids of captions, an image's five one after
another. `train` is looked up in `captions_train2014.json`, the others in `captions_val2014.json`; images lie in `images/train2014` and
`images/val2014`. Here `dev` is called `val`, and holds its first 5000 captions, as the authors cut it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json
from dualmatch.runtime.region_readers import load_npy

from .base import Dataset, ImageItem
from .entries import (
    DEV_CAPTIONS,
    SPLIT_NAMES,
    UNKNOWN_IDS,
    Faults,
    Items,
    checked_captions,
    json_kind,
    relative_file,
)

PATTERN = "coco_*_ids.npy"


def ids_folder(folder: Path) -> Path | None:
    """Where the lists of ids are: `annotations/`, or the folder itself; None where there are none."""
    return next((place for place in (folder / "annotations", folder) if any(place.glob(PATTERN))), None)


def read_vsepp(folder: Path, faults: Faults) -> Dataset:
    """Read all splits that have a list of ids. An image's id is its path below the images' folder, e.g. `val2014/COCO_val2014_….jpg`.

    Raises:
        DualmatchError: lists or JSON files are missing, damaged or of another shape, or (unless collected) an id is not in the JSON, an
            image is in two splits, or a caption is empty.
    """
    annotations = ids_folder(folder)
    if annotations is None:
        raise DualmatchError(f"data set {folder}: there is no {PATTERN} in it or in its annotations/.")
    files: dict[str, _CocoFile] = {}
    items, notes = Items(faults), []
    for path in sorted(annotations.glob(PATTERN), key=_train_first):
        split = path.name.removeprefix("coco_").removesuffix("_ids.npy")
        part = "train2014" if split == "train" else "val2014"
        if part not in files:
            files[part] = _CocoFile(annotations / f"captions_{part}.json", _images(folder, part))
        ids = _ids(path)
        if split == "dev" and len(ids) > DEV_CAPTIONS:
            notes.append(f"val: the first {DEV_CAPTIONS} of {len(ids)} captions of {path.name}, as the authors cut it")
            ids = ids[:DEV_CAPTIONS]
        for item in files[part].items(ids, SPLIT_NAMES.get(split, split), path, faults):
            items.add(item, path)
    return Dataset(
        name=folder.resolve().name, layout="vsepp", items=items.done(annotations), root=folder, notes=tuple(notes)
    )


def _train_first(path: Path) -> tuple[bool, str]:
    return path.name != "coco_train_ids.npy", path.name


def _images(folder: Path, part: str) -> Path:
    for place in (folder / "images" / part, folder / part):
        if place.is_dir():
            return place
    raise DualmatchError(f"data set {folder}: there is no folder images/{part} with COCO's photographs.")


def _ids(path: Path) -> NDArray[np.integer[Any]]:
    ids = load_npy(path, f"the list of ids {path}")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DualmatchError(
            f"{path} must hold annotation ids, whole numbers in one row; it holds {ids.dtype} {list(ids.shape)}."
        )
    if not len(ids):
        raise DualmatchError(f"{path} is empty: its split has no image.")
    return ids


class _CocoFile:
    """COCO's `captions_*2014.json`: captions by annotation id."""

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.images = path, images
        content = read_json(path, "COCO's captions")
        try:
            self.names = {int(image["id"]): image["file_name"] for image in content["images"]}
            self.annotations = {
                int(one["id"]): (int(one["image_id"]), one["caption"]) for one in content["annotations"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise DualmatchError(
                f'{path}: expected COCO\'s "images" (id, file_name) and "annotations" (id, image_id, caption), '
                f"found {json_kind(content)} ({type(error).__name__}: {error})."
            ) from None

    def items(self, ids: NDArray[np.integer[Any]], split: str, source: Path, faults: Faults) -> list[ImageItem]:
        """The images of these captions, in the order of their first."""
        captions: dict[int, list[Any]] = {}
        for annotation in ids.tolist():
            if annotation not in self.annotations:
                faults.add(UNKNOWN_IDS, f"{source} lists annotation {annotation}, which {self.path} does not have.")
                continue
            image, caption = self.annotations[annotation]
            captions.setdefault(image, []).append(caption)
        found = []
        for image, texts in captions.items():
            if image not in self.names:
                raise DualmatchError(f"{self.path}: its captions name image {image}, which it does not list.")
            where = f"{self.path}: image {image}"
            name = relative_file(self.names[image], where, str(self.images))
            found.append(
                ImageItem(
                    id=f"{self.images.name}/{name}",
                    split=split,
                    captions=checked_captions(texts, where, faults),
                    path=self.images / name,
                )
            )
        return found
