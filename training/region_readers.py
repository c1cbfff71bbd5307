"""Region features in the files that the authors read: VLP's (DSRAN) and SCAN's (VSRN).

The VLP readers answer as `runtime.regions.RegionFile` does. Where the authors' code returns random numbers for a missing file, these
raise.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

from .authors_data import position_features

NUM_BOX_COLUMNS = 6


class CocoRegions:
    """VLP's features of COCO: HDF5 files that share a prefix and hold the images whose name ends in the same three characters.

    `<prefix>_feat895.h5` holds (regions, channels) under `COCO_val2014_000000391895`, `<prefix>_cls895.h5` its class probabilities.

    Args:
        prefix: e.g. `feat_cls_1000/coco_detection_vg_100dets_gvd_checkpoint_trainval`, no file itself.
        boxes: the box file, where the network embeds positions.

    Raises:
        DualmatchError: h5py is not installed, or no file has the prefix.
    """

    def __init__(self, prefix: Path, boxes: Path | None = None) -> None:
        _h5py()
        self.prefix, self.boxes = prefix, boxes
        if not any(prefix.parent.glob(f"{prefix.name}_feat*.h5")):
            raise DualmatchError(
                f"no region file begins with {prefix}: `{prefix.name}_feat###.h5` is needed. The path is a prefix, not a folder."
            )

    def features(self, image_id: str) -> NDArray[np.float32]:
        """Features of one image, (regions, channels) float32.

        Raises:
            DualmatchError: the file, or the image in it, is missing or of another shape.
        """
        return self._read("feat", image_id)

    def positions(self, image_id: str) -> NDArray[np.float32]:
        """Position features of one image, (regions, 6 + classes) float32: see `authors_data.position_features`."""
        return position_features(_read_boxes(self.boxes, image_id), self._read("cls", image_id))

    def _read(self, kind: str, image_id: str) -> NDArray[np.float32]:
        stem = Path(image_id).stem
        return _read_h5(self.prefix.with_name(f"{self.prefix.name}_{kind}{stem[-3:]}.h5"), image_id)


class FlickrRegions:
    """VLP's features of Flickr30K: `<stem>.npy` (regions, channels) and `<stem>_cls_prob.npy` (regions, classes) for each image.

    Args:
        boxes: the box file, where the network embeds positions. Without it the class probabilities are not needed either.

    Raises:
        DualmatchError: no such folder.
    """

    def __init__(self, folder: Path, boxes: Path | None = None) -> None:
        self.folder, self.boxes = folder, boxes
        if not folder.is_dir():
            raise DualmatchError(f"there is no folder {folder} with region features.")

    def features(self, image_id: str) -> NDArray[np.float32]:
        """Features of one image, (regions, channels) float32.

        Raises:
            DualmatchError: the image's file is missing or of another shape.
        """
        return self._read("", image_id)

    def positions(self, image_id: str) -> NDArray[np.float32]:
        """Position features of one image, (regions, 6 + classes) float32: see `authors_data.position_features`."""
        return position_features(_read_boxes(self.boxes, image_id), self._read("_cls_prob", image_id))

    def _read(self, suffix: str, image_id: str) -> NDArray[np.float32]:
        path = self.folder / f"{Path(image_id).stem}{suffix}.npy"
        return _two_axes(_load_npy(path, f"for image {image_id!r}"), path, image_id)


class ScanSplit:
    """One split of SCAN's precomputed data, which VSRN reads: `<split>_ims.npy` and `<split>_caps.txt`.

    Attributes:
        captions: the lines of the caption file; of `dev` the first 5000, as the authors cut it.
        caption_image: the image of each: its place divided by five, or its place itself where there are as many images as captions.
        images: (images, regions, channels) float32, mapped, not loaded.

    Raises:
        DualmatchError: a file is missing, damaged, or the counts of images and captions do not fit.
    """

    def __init__(self, folder: Path, split: str) -> None:
        path, text = folder / f"{split}_ims.npy", folder / f"{split}_caps.txt"
        images = _load_npy(path, f"for split {split!r}", mapped=True)
        if images.ndim != 3 or images.dtype != np.float32:
            raise DualmatchError(
                f"{path} must hold float32 (images, regions, channels); it holds {images.dtype} {list(images.shape)}."
            )
        lines = _read_lines(text)
        if len(lines) not in (len(images), 5 * len(images)):
            raise DualmatchError(
                f"{text} has {len(lines)} captions for the {len(images)} images of {path}; five an image, or one, are needed."
            )
        per_image = 1 if len(lines) == len(images) else 5
        self.images: NDArray[np.float32] = images
        self.captions = lines[:5000] if split == "dev" else lines
        self.caption_image = [index // per_image for index in range(len(self.captions))]


def _read_lines(path: Path) -> list[str]:
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
            raise DualmatchError(f"{path}, line {number} is empty; every line must be a caption.")
    return lines


def _load_npy(path: Path, purpose: str, *, mapped: bool = False) -> NDArray[Any]:
    try:
        loaded = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise DualmatchError(f"there is no region file {path} {purpose}; nothing is made up in its place.") from None
    except (OSError, ValueError, EOFError) as error:
        raise DualmatchError(f"the region file {path} {purpose} cannot be read: {error}.") from None
    if not isinstance(loaded, np.ndarray):
        raise DualmatchError(f"the region file {path} {purpose} is an archive; a single array is needed.")
    return loaded


def _read_boxes(path: Path | None, image_id: str) -> NDArray[np.float32]:
    if path is None:
        raise DualmatchError(f"positions of image {image_id!r} need the box file, and none was named.")
    return _read_h5(path, image_id, columns=NUM_BOX_COLUMNS)


def _read_h5(path: Path, image_id: str, *, columns: int | None = None) -> NDArray[np.float32]:
    """The data set named as the image's file without its ending."""
    h5py, stem = _h5py(), Path(image_id).stem
    try:
        with h5py.File(path, "r") as file:
            if stem not in file:
                raise DualmatchError(
                    f"the region file {path} has nothing for image {image_id!r}; nothing is made up in its place."
                )
            found = np.asarray(file[stem])
    except FileNotFoundError:
        raise DualmatchError(
            f"there is no region file {path} for image {image_id!r}; nothing is made up in its place."
        ) from None
    except OSError as error:
        raise DualmatchError(f"the region file {path} for image {image_id!r} cannot be read: {error}.") from None
    return _two_axes(found, path, image_id, columns=columns)


def _two_axes(found: NDArray[Any], path: Path, image_id: str, *, columns: int | None = None) -> NDArray[np.float32]:
    if found.ndim != 2 or found.dtype.kind != "f" or columns not in (None, found.shape[1]):
        raise DualmatchError(
            f"the region file {path} must hold numbers (regions, {columns or 'channels'}) for image {image_id!r}; "
            f"it holds {found.dtype} {list(found.shape)}."
        )
    if not np.isfinite(found).all():
        raise DualmatchError(f"the region file {path} has numbers that are not finite for image {image_id!r}.")
    return found.astype(np.float32)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise DualmatchError(
            "the authors' region files for COCO need h5py, which is not installed: pip install 'dualmatch[authors]'."
        ) from None
    return h5py
