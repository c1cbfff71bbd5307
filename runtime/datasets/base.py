"""One reader interface for every data layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes


@dataclass(frozen=True, kw_only=True)
class ImageItem:
    """One image of a data set, not yet read.

    Attributes:
        id: unique in the data set and stable between runs (a relative file name, or a generated name).
        split: `train`, `val`, `test`, `none`, or what the data set calls it.
        captions: its captions, as written by their authors; any number, at least one.
        path: the file, or None where the image is drawn by `encoded`.
        encoded: the image file's bytes where there is no file.
        tags: facts about the item that a report may slice by (for `scenes`: the hard-pair kind and partner).
        region_row: where a data set has region features and no photographs, their `.npy` file and row.
    """

    id: str
    split: str
    captions: tuple[str, ...]
    path: Path | None = None
    encoded: bytes | None = None
    tags: tuple[tuple[str, str], ...] = ()
    region_row: tuple[Path, int] | None = None

    def read_bytes(self) -> bytes:
        """The encoded image file.

        Raises:
            DualmatchError: the data set has no photographs, only region features.
        """
        if self.path is not None:
            return self.path.read_bytes()
        if self.encoded is None:
            raise DualmatchError(
                f"image {self.id!r} is a row of region features, not a photograph: this data set serves networks without a trunk, "
                "which take precomputed regions only."
            )
        return self.encoded

    def open(self) -> Image.Image:
        """Decode the image (not yet converted to RGB)."""
        return Image.open(BytesIO(self.read_bytes()))

    def content_hash(self) -> str:
        """SHA-256 of the encoded file, or of the region features: the identity that `verify` matches images by."""
        if self.region_row is not None:
            file, row = self.region_row
            return sha256_of_bytes(np.load(file, mmap_mode="r", allow_pickle=False)[row].tobytes())
        return sha256_of_bytes(self.read_bytes())


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images with captions, in a fixed order.

    Attributes:
        name: what the data set calls itself.
        layout: which reader made it (`captions`, `scenes`, …).
        items: the images, in the order in which galleries and similarity matrices hold them.
        root: the folder, or None for generated data.
        regions: the region features that come with the data set, as `regions.RegionFile` opens them.
        notes: what a reader of a report should know about how it was read.
    """

    name: str
    layout: str
    items: tuple[ImageItem, ...]
    root: Path | None = None
    regions: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that occur, in order of first occurrence."""
        return tuple(dict.fromkeys(item.split for item in self.items))

    @property
    def captions(self) -> list[str]:
        """All captions, image by image."""
        return [caption for item in self.items for caption in item.captions]

    @property
    def caption_image(self) -> list[int]:
        """For every caption the index of its image in `items`."""
        return [index for index, item in enumerate(self.items) for _ in item.captions]

    def select(self, splits: Sequence[str]) -> "Dataset":
        """The images of the named splits joined into one set, in the data set's order.

        Raises:
            DualmatchError: a split that the data set does not have.
        """
        if not splits:
            raise DualmatchError(f"no split was named; data set {self.name!r} has {', '.join(self.splits)}.")
        for split in splits:
            if split not in self.splits:
                raise DualmatchError(f"data set {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}.")
        wanted = set(splits)
        chosen = tuple(item for item in self.items if item.split in wanted)
        return replace(self, items=chosen)
