"""SCAN's `precomp` layout, which VSRN reads: `<split>_ims.npy` with region features and `<split>_caps.txt` with a caption a line.

There are no photographs: an image is a row of features. Five captions belong to each, or as many as there are rows: then a row is written once for
each of its captions, or every image has one. `dev` is called `val` here.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.region_readers import load_npy

from .base import Dataset, ImageItem
from .entries import DEV_CAPTIONS, EMPTY_CAPTIONS, SPLIT_NAMES, Faults

CAPTIONS_SUFFIX, IMAGES_SUFFIX = "_caps.txt", "_ims.npy"
CAPTIONS_PER_IMAGE = 5


class ScanSplit:
    """One split of SCAN's precomputed data, which VSRN reads: `<split>_ims.npy` and `<split>_caps.txt`.

    Attributes:
        captions: the lines of the caption file; of `dev` the first 5000, as the authors cut it.
        caption_image: the image of each: its place divided by five, or its place itself where there are as many images as captions.
        images: (images, regions, channels) float32, mapped, not loaded.
        num_lines: captions in the file.

    Raises:
        DualmatchError: a file is missing, damaged, or the counts of images and captions do not fit.
    """

    def __init__(self, folder: Path, split: str, faults: Faults | None = None) -> None:
        path, text = folder / f"{split}{IMAGES_SUFFIX}", folder / f"{split}{CAPTIONS_SUFFIX}"
        self.images: NDArray[np.float32] = open_images(path)
        lines = _read_lines(text, faults or Faults())
        if len(lines) not in (len(self.images), CAPTIONS_PER_IMAGE * len(self.images)):
            raise DualmatchError(
                f"{text} has {len(lines)} captions for the {len(self.images)} images of {path}; five an image, or one, are needed."
            )
        self.path = path
        self.per_image = 1 if len(lines) == len(self.images) else CAPTIONS_PER_IMAGE
        self.num_lines = len(lines)
        self.captions = lines[:DEV_CAPTIONS] if split == "dev" else lines
        self.caption_image = [index // self.per_image for index in range(len(self.captions))]

    @property
    def first_row(self) -> list[int]:
        """For every caption the first row that holds its image: where rows are repeated for each caption, those five are one image."""
        if self.per_image == 1 and _repeated(self.images):
            return [index // CAPTIONS_PER_IMAGE * CAPTIONS_PER_IMAGE for index in self.caption_image]
        return self.caption_image


def open_images(path: Path) -> NDArray[np.float32]:
    """The features of a split, (images, regions, channels) float32, mapped.

    Raises:
        DualmatchError: the file is missing, damaged, or holds another array.
    """
    images = load_npy(path, f"the region file {path}", mapped=True)
    if images.ndim != 3 or images.dtype != np.float32 or not images.size:
        raise DualmatchError(
            f"{path} must hold float32 (images, regions, channels); it holds {images.dtype} {list(images.shape)}."
        )
    return images


def splits_in(folder: Path) -> list[str]:
    """The splits that have a file here, by SCAN's names; training first."""
    names = {path.name.removesuffix(CAPTIONS_SUFFIX) for path in folder.glob(f"*{CAPTIONS_SUFFIX}")}
    names |= {path.name.removesuffix(IMAGES_SUFFIX) for path in folder.glob(f"*{IMAGES_SUFFIX}")}
    return sorted(names, key=lambda name: (name != "train", name))


def read_scan(folder: Path, faults: Faults) -> Dataset:
    """Read all splits. An image's id is its split and row, e.g. `test/12`; its region features come with the data set.

    Raises:
        DualmatchError: as `ScanSplit`, or two splits have one name.
    """
    items: dict[str, ImageItem] = {}
    notes = []
    for name in splits_in(folder):
        split = ScanSplit(folder, name, faults)
        if len(split.captions) < split.num_lines:
            notes.append(f"val: the first {DEV_CAPTIONS} of {split.num_lines} captions, as the authors cut it")
        captions: dict[int, list[str]] = {}
        for row, caption in zip(split.first_row, split.captions, strict=True):
            captions.setdefault(row, []).append(caption)
        for row, texts in captions.items():
            written = tuple(text for text in texts if text)
            item = ImageItem(
                id=f"{SPLIT_NAMES.get(name, name)}/{row}",
                split=SPLIT_NAMES.get(name, name),
                captions=written,
                region_row=(split.path, row),
            )
            if item.id in items:
                raise DualmatchError(f"data set {folder} has both dev and val, which are one; remove one of them.")
            if written:
                items[item.id] = item
    if not items:
        raise DualmatchError(f"data set {folder}: there is no *{CAPTIONS_SUFFIX} with *{IMAGES_SUFFIX} in it.")
    return Dataset(
        name=folder.resolve().name,
        layout="scan",
        items=tuple(items.values()),
        root=folder,
        regions=folder,
        notes=tuple(notes),
    )


class ScanRegions:
    """The features of SCAN's files by the ids of their data set.

    Args:
        path: a folder, or the `.npy` file of one split.

    Raises:
        DualmatchError: a file is damaged or of another width than the others.
    """

    position_dim = 0

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob(f"*{IMAGES_SUFFIX}")) if path.is_dir() else [path]
        names = [file.name.removesuffix(IMAGES_SUFFIX).removesuffix(".npy") for file in files]
        self.path = path
        self.images = {SPLIT_NAMES.get(name, name): open_images(file) for name, file in zip(names, files, strict=True)}
        shapes = {array.shape[1:] for array in self.images.values()}
        if len(shapes) > 1:
            raise DualmatchError(f"the region files in {path} differ in shape: {', '.join(map(str, sorted(shapes)))}.")
        ((num_regions, channels),) = shapes
        self.feature_shape = (int(num_regions), int(channels))

    def features(self, image_id: str) -> NDArray[np.float32]:
        """Features of the image `split/row`, (regions, channels) float32."""
        place = self._find(image_id)
        if place is None:
            splits = ", ".join(self.images)
            raise DualmatchError(
                f"the region file {self.path} has no features for image {image_id!r}; it holds rows of {splits}, "
                "which only a data set in the scan layout names."
            )
        split, row = place
        return np.array(self.images[split][row])

    def positions(self, image_id: str) -> NDArray[np.float32]:
        """There are none in this format."""
        raise DualmatchError(
            f"the region file {self.path} has no positions, which this network needs for image {image_id!r}."
        )

    def boxes(self, image_id: str, width: int, height: int) -> None:
        """There are none in this format either."""

    def missing(self, image_ids: list[str]) -> list[str]:
        """Those that have no row."""
        return [image_id for image_id in image_ids if self._find(image_id) is None]

    def _find(self, image_id: str) -> tuple[str, int] | None:
        split, _, row = image_id.rpartition("/")
        if split in self.images and row.isdecimal() and int(row) < len(self.images[split]):
            return split, int(row)
        return None


def _repeated(images: NDArray[np.float32]) -> bool:
    """Whether every five rows are one image. Their first and last region tell; the whole may be many gigabytes."""
    if len(images) % CAPTIONS_PER_IMAGE:
        return False
    return all(
        np.array_equal(images[start + later, region], images[start, region])
        for start in range(0, len(images), CAPTIONS_PER_IMAGE)
        for later in range(1, CAPTIONS_PER_IMAGE)
        for region in (0, -1)
    )


def _read_lines(path: Path, faults: Faults) -> list[str]:
    """The captions by their place; one that is empty is a fault and stays, since its place counts."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DualmatchError(f"there is no caption file {path}.") from None
    lines = []
    # Only line feeds divide, as in the authors' reader; str.splitlines would also cut at a form feed inside a caption.
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            lines.append(line.decode().strip())
        except UnicodeDecodeError as error:
            raise DualmatchError(f"{path}, line {number} is not UTF-8: {error.reason}.") from None
        if not lines[-1]:
            faults.add(EMPTY_CAPTIONS, f"{path}, line {number} is empty; every line must be a caption.")
    return lines
