"""Region features in VLP's files, which DSRAN reads.

They are what `regions.RegionFile` reads from. Where the authors' code returns random numbers for a missing file, these raise.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DualmatchError

NUM_BOX_COLUMNS = 6
_CLASSES_SUFFIX = "_cls_prob"


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
        self.prefix, self.box_file = prefix, boxes
        if not any(prefix.parent.glob(f"{prefix.name}_feat*.h5")):
            raise DualmatchError(
                f"no region file begins with {prefix}: `{prefix.name}_feat###.h5` is needed. The path is a prefix, not a folder."
            )

    @cached_property
    def feature_shape(self) -> tuple[int, int]:
        """(regions, channels) of the first image of the first file."""
        return _first_shape(min(self.prefix.parent.glob(f"{self.prefix.name}_feat*.h5")))

    @cached_property
    def position_dim(self) -> int:
        """6 + classes; 0 without a box file or class probabilities."""
        classes = sorted(self.prefix.parent.glob(f"{self.prefix.name}_cls*.h5"))
        return NUM_BOX_COLUMNS + _first_shape(classes[0])[1] if self.box_file is not None and classes else 0

    def features(self, image_id: str) -> NDArray[np.float32]:
        """Features of one image, (regions, channels) float32.

        Raises:
            DualmatchError: the file, or the image in it, is missing or of another shape.
        """
        return _read_h5(self._file("feat", image_id), image_id)

    def positions(self, image_id: str) -> NDArray[np.float32]:
        """Position features of one image, (regions, 6 + classes) float32: see `position_features`."""
        return position_features(_read_boxes(self.box_file, image_id), _read_h5(self._file("cls", image_id), image_id))

    def boxes(self, image_id: str, width: int, height: int) -> NDArray[np.float32] | None:
        """(regions, 4) in fractions of the photograph's sides; None without a box file."""
        return _fractions(self.box_file, image_id, width, height)

    def missing(self, image_ids: Sequence[str]) -> list[str]:
        """Those without features; each file is opened once."""
        by_file: dict[Path, list[str]] = {}
        for image_id in image_ids:
            by_file.setdefault(self._file("feat", image_id), []).append(image_id)
        gone: set[str] = set()
        for path, asked in by_file.items():
            try:
                with _h5py().File(path, "r") as file:
                    gone.update(image_id for image_id in asked if Path(image_id).stem not in file)
            except FileNotFoundError:
                gone.update(asked)
            except OSError as error:
                raise DualmatchError(f"the region file {path} cannot be read: {error}.") from None
        return [image_id for image_id in image_ids if image_id in gone]

    def _file(self, kind: str, image_id: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}_{kind}{Path(image_id).stem[-3:]}.h5")


class FlickrRegions:
    """VLP's features of Flickr30K: `<stem>.npy` (regions, channels) and `<stem>_cls_prob.npy` (regions, classes) for each image.

    Args:
        boxes: the box file, where the network embeds positions. Without it the class probabilities are not needed either.

    Raises:
        DualmatchError: no such folder, or h5py is not installed and there is a box file.
    """

    def __init__(self, folder: Path, boxes: Path | None = None) -> None:
        self.folder, self.box_file = folder, boxes
        if not folder.is_dir():
            raise DualmatchError(f"there is no folder {folder} with region features.")
        if boxes is not None:
            _h5py()

    @cached_property
    def feature_shape(self) -> tuple[int, int]:
        """(regions, channels) of the first file."""
        path = min(path for path in self.folder.glob("*.npy") if not path.stem.endswith(_CLASSES_SUFFIX))
        num_regions, channels = _two_axes(load_npy(path, f"the region file {path}"), path, path.stem).shape
        return num_regions, channels

    @cached_property
    def position_dim(self) -> int:
        """6 + classes; 0 without a box file or class probabilities."""
        classes = sorted(self.folder.glob(f"*{_CLASSES_SUFFIX}.npy")) if self.box_file is not None else []
        if not classes:
            return 0
        shape = load_npy(classes[0], f"the region file {classes[0]}").shape
        return NUM_BOX_COLUMNS + int(shape[-1])

    def features(self, image_id: str) -> NDArray[np.float32]:
        """Features of one image, (regions, channels) float32.

        Raises:
            DualmatchError: the image's file is missing or of another shape.
        """
        return self._read("", image_id)

    def positions(self, image_id: str) -> NDArray[np.float32]:
        """Position features of one image, (regions, 6 + classes) float32: see `position_features`."""
        return position_features(_read_boxes(self.box_file, image_id), self._read(_CLASSES_SUFFIX, image_id))

    def boxes(self, image_id: str, width: int, height: int) -> NDArray[np.float32] | None:
        """(regions, 4) in fractions of the photograph's sides; None without a box file."""
        return _fractions(self.box_file, image_id, width, height)

    def missing(self, image_ids: Sequence[str]) -> list[str]:
        """Those without a file."""
        there = {path.name for path in self.folder.iterdir()}
        return [image_id for image_id in image_ids if f"{Path(image_id).stem}.npy" not in there]

    def _read(self, suffix: str, image_id: str) -> NDArray[np.float32]:
        path = self.folder / f"{Path(image_id).stem}{suffix}.npy"
        return _two_axes(load_npy(path, f"the region file {path} for image {image_id!r}"), path, image_id)


def position_features(boxes: NDArray[np.floating], class_probabilities: NDArray[np.floating]) -> NDArray[np.float32]:
    """What DSRAN-BERT embeds beside a region's feature: six numbers of the box, then the detector's class probabilities.

    The authors take the farthest box edges for the image's size, and normalise the six and the probabilities each by themselves.

    Args:
        boxes: (regions, 6): x1 y1 x2 y2 in pixels, a class (unused), a score. All boxes of the image: they set the scale.
        class_probabilities: (regions, classes); 1601 in the authors' files.

    Returns:
        (regions, 6 + classes) float32.

    Raises:
        DualmatchError: the shapes do not fit each other.
    """
    if boxes.ndim != 2 or boxes.shape[1] != NUM_BOX_COLUMNS or not len(boxes):
        raise DualmatchError(f"boxes must be (regions, 6): x1 y1 x2 y2 class score; they are {list(boxes.shape)}.")
    if class_probabilities.ndim != 2 or len(class_probabilities) != len(boxes):
        raise DualmatchError(
            f"class probabilities must be (regions, classes) for {len(boxes)} boxes; they are {list(class_probabilities.shape)}."
        )
    corners_R4 = boxes[:, :4].astype(np.float32)
    size = corners_R4.reshape(-1, 2).max(axis=0) + np.float32(1e-5)  # width, height
    corners_R4 = corners_R4 / np.tile(size, 2)
    x1, y1, x2, y2 = corners_R4.T
    area_R1 = np.maximum((y2 - y1) * (x2 - x1), np.float32(0))[:, None]
    six_R6 = np.concatenate([corners_R4, area_R1, boxes[:, 5:].astype(np.float32)], axis=1)
    return np.concatenate([_normalised(six_R6), _normalised(class_probabilities)], axis=1)


def _normalised(rows_RC: NDArray[np.floating]) -> NDArray[np.float32]:
    """Layer normalisation of every row, without weights, summed in float64."""
    rows = rows_RC.astype(np.float32).astype(np.float64)
    centred = rows - rows.mean(axis=1, keepdims=True)
    normal: NDArray[np.float64] = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return normal.astype(np.float32)


def load_npy(path: Path, what: str, *, mapped: bool = False) -> NDArray[Any]:
    """The array of an `.npy` file; `what` names it in errors.

    Raises:
        DualmatchError: it is missing, damaged, or an archive.
    """
    try:
        loaded = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise DualmatchError(f"there is no {what.removeprefix('the ')}; nothing is made up in its place.") from None
    except (OSError, ValueError, EOFError) as error:
        raise DualmatchError(f"{what} cannot be read: {error}.") from None
    if not isinstance(loaded, np.ndarray):
        raise DualmatchError(f"{what} is an archive; a single array is needed.")
    return loaded


def _fractions(path: Path | None, image_id: str, width: int, height: int) -> NDArray[np.float32] | None:
    if path is None:
        return None
    sides: NDArray[np.float32] = np.array([width, height] * 2, np.float32)
    return _read_boxes(path, image_id)[:, :4] / sides


def _read_boxes(path: Path | None, image_id: str) -> NDArray[np.float32]:
    if path is None:
        raise DualmatchError(
            f"positions of image {image_id!r} need the box file, and none was found: name it after a comma, FEATURES,BOXES.h5."
        )
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


def _first_shape(path: Path) -> tuple[int, int]:
    """The shape of the first image's array in an HDF5 file."""
    try:
        with _h5py().File(path, "r") as file:
            shape = next((tuple(value.shape) for value in file.values() if hasattr(value, "shape")), ())
    except OSError as error:
        raise DualmatchError(f"the region file {path} cannot be read: {error}.") from None
    if len(shape) != 2:
        raise DualmatchError(f"the region file {path} must hold (regions, numbers) by image; it holds {list(shape)}.")
    return int(shape[0]), int(shape[1])


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
            "VLP's HDF5 files (features of COCO, boxes of both) need h5py, which is not installed: pip install 'dualmatch[authors]'."
        ) from None
    return h5py
