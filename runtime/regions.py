"""Region features from files: what a network with precomputed regions takes beside, or in place of, pixels."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from .datasets.scan import IMAGES_SUFFIX, ScanRegions
from .errors import DualmatchError
from .region_readers import CocoRegions, FlickrRegions

NUM_GEOMETRY = 6  # x1, y1, x2, y2, area and width: what `dualmatch data pool-regions` writes as positions
FORMATS = (
    f"an .npz of `dualmatch data pool-regions`, SCAN's *{IMAGES_SUFFIX} or their folder, VLP's prefix of *_feat###.h5, or VLP's folder of "
    "<image>.npy (each of VLP's with `,BOXES.h5` where the network embeds positions)"
)


class _Reader(Protocol):
    """One format; absent images are errors."""

    @property
    def feature_shape(self) -> tuple[int, int]: ...

    @property
    def position_dim(self) -> int: ...

    def features(self, image_id: str) -> NDArray[np.float32]: ...

    def positions(self, image_id: str) -> NDArray[np.float32]: ...

    def boxes(self, image_id: str, width: int, height: int) -> NDArray[np.float32] | None: ...

    def missing(self, image_ids: list[str]) -> list[str]: ...


class RegionFile:
    """Region features of a set of images, looked up by image id, in whichever format `path` is.

    - `FILE.npz`: `filenames` (n,), `features` (n, regions, channels) and, where the network embeds positions, `positions`
      (n, regions, numbers). `dualmatch data pool-regions` writes one from boxes.
    - SCAN: a `<split>_ims.npy`, or the folder of several. Its rows have no names: they belong to a data set in the `scan` layout.
    - VLP on COCO: the prefix that its `_feat###.h5` and `_cls###.h5` share, or their folder.
    - VLP on Flickr30K: a folder with `<image>.npy` and `<image>_cls_prob.npy`.

    VLP's box file is named after a comma (`FEATURES,BOXES.h5`); without, it is the one other `.h5` file beside the features or in the folder
    above.

    Raises:
        DualmatchError: nothing is there, it is in no known format or in two, or its arrays do not fit each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reader = _reader_of(self.path)
        self._shape = self._reader.feature_shape  # of the first image: a file of another kind shows here

    @property
    def num_regions(self) -> int:
        """Regions of an image."""
        return self._shape[0]

    @property
    def feature_dim(self) -> int:
        """Channels of a region."""
        return self._shape[1]

    @property
    def position_dim(self) -> int:
        """Numbers of a region's position; 0 where the file has none."""
        return self._reader.position_dim

    def features(self, image_id: str) -> NDArray[np.float32]:
        """Features of one image, (regions, channels) float32.

        Raises:
            DualmatchError: the file has none for this image (nothing is made up in its place), or not as many as for the others.
        """
        found = self._reader.features(image_id)
        if found.shape != self._shape:
            raise DualmatchError(
                f"the region file {self.path} has features {list(found.shape)} for image {image_id!r}, for others "
                f"{list(self._shape)}; a network takes one shape."
            )
        return found

    def positions(self, image_id: str) -> NDArray[np.float32]:
        """Position features of one image, (regions, numbers) float32."""
        return self._reader.positions(image_id)

    def boxes(self, image_id: str, width: int, height: int) -> NDArray[np.float32]:
        """Where the regions of one image lie, (regions, 4) float32: x1, y1, x2, y2 in fractions of the photograph's sides.

        Args:
            width, height: of the photograph, in pixels; some files have boxes in pixels.

        Raises:
            DualmatchError: the file does not tell.
        """
        found = self._reader.boxes(image_id, width, height)
        if found is None or found.shape != (self.num_regions, 4):
            raise DualmatchError(
                f"the region file {self.path} does not tell where its regions lie; `dualmatch data pool-regions` writes files that do, "
                "and VLP's have a box file."
            )
        return found.clip(0, 1)

    def require(self, image_ids: Sequence[str]) -> None:
        """Refuse at once what would fail hours later; features are looked for, not read.

        Raises:
            DualmatchError: an image has no features.
        """
        if missing := self._reader.missing(list(image_ids)):
            raise DualmatchError(
                f"the region file {self.path} has no features for image {missing[0]!r}"
                + (f" and {len(missing) - 1} others of {len(image_ids)}." if len(missing) > 1 else ".")
            )


def _reader_of(path: Path) -> _Reader:
    """The reader of the format that the files tell."""
    features, comma, boxes = str(path).rpartition(",")
    if comma and not path.exists():
        box_file = Path(boxes)
        if not box_file.is_file():
            raise DualmatchError(f"there is no box file {box_file} (of --regions {path}).")
        return _vlp(Path(features), box_file)
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == ".npy":
        return ScanRegions(path)
    if path.suffix == ".h5":
        raise DualmatchError(
            f"the region file {path} cannot be read by itself: give the prefix that all of its `_feat###.h5` share."
        )
    if not path.is_file() and any(path.parent.glob(f"{path.name}_feat*.h5")):
        return _vlp(path, None)
    return _NpzRegions(path)


def _in_folder(folder: Path) -> _Reader:
    prefixes = sorted({path.name[: -len("_feat###.h5")] for path in folder.glob("*_feat???.h5")})
    scan = any(folder.glob(f"*{IMAGES_SUFFIX}"))
    flickr = any(not path.name.endswith((IMAGES_SUFFIX, "_ids.npy")) for path in folder.glob("*.npy"))
    if len(prefixes) + scan + flickr > 1:
        raise DualmatchError(
            f"the region folder {folder} holds more than one kind of region files; give what is meant by itself: "
            + ", ".join([*(str(folder / prefix) for prefix in prefixes), *([f"a *{IMAGES_SUFFIX}"] if scan else [])])
            + "."
        )
    if scan:
        return ScanRegions(folder)
    if prefixes or flickr:
        return _vlp(folder / prefixes[0] if prefixes else folder, None)
    raise DualmatchError(f"the region folder {folder} cannot be read: it holds no region files. They are {FORMATS}.")


def _vlp(features: Path, boxes: Path | None) -> _Reader:
    if features.is_dir():
        prefixes = sorted({path.name[: -len("_feat###.h5")] for path in features.glob("*_feat???.h5")})
        if len(prefixes) > 1:
            raise DualmatchError(
                f"the region folder {features} holds several prefixes, {', '.join(prefixes)}; name one."
            )
        if not prefixes:
            return FlickrRegions(features, boxes or _boxes_near(features))
        features = features / prefixes[0]
    return CocoRegions(features, boxes or _boxes_near(features.parent))


def _boxes_near(folder: Path) -> Path | None:
    """The one `.h5` file beside the features, or else in the folder above, that holds neither features nor class probabilities."""
    for place in (folder, folder.parent):
        found = [path for path in place.glob("*.h5") if path.stem[-7:-3] != "feat" and path.stem[-6:-3] != "cls"]
        if found:
            return found[0] if len(found) == 1 else None
    return None


class _NpzRegions:
    """Our own region files, wholly in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays = read_npz(path, "region file", required=("filenames", "features"))
        names, self._features, self._positions = arrays["filenames"], arrays["features"], arrays.get("positions")
        if names.ndim != 1 or self._features.ndim != 3 or len(names) != len(self._features):
            raise DualmatchError(
                f"the region file {path} must hold features (images, regions, channels) for each filename; "
                f"it has {list(self._features.shape)} for {list(names.shape)} filenames."
            )
        if self._positions is not None and (
            self._positions.ndim != 3 or self._positions.shape[:2] != self._features.shape[:2]
        ):
            raise DualmatchError(
                f"the region file {path} must hold positions (images, regions, numbers) for its features "
                f"{list(self._features.shape)}; it has {list(self._positions.shape)}."
            )
        self.feature_shape = (int(self._features.shape[1]), int(self._features.shape[2]))
        self.position_dim = 0 if self._positions is None else int(self._positions.shape[2])
        self._row = {str(name): row for row, name in enumerate(names)}

    def features(self, image_id: str) -> NDArray[np.float32]:
        return self._features[self._found(image_id)].astype(np.float32)

    def positions(self, image_id: str) -> NDArray[np.float32]:
        if self._positions is None:
            raise DualmatchError(f"the region file {self.path} has no positions, which this network needs.")
        return self._positions[self._found(image_id)].astype(np.float32)

    def boxes(self, image_id: str, width: int, height: int) -> NDArray[np.float32] | None:  # noqa: ARG002
        if self.position_dim != NUM_GEOMETRY:
            return None
        return self.positions(image_id)[:, :4]

    def missing(self, image_ids: list[str]) -> list[str]:
        return [image_id for image_id in image_ids if self._find(image_id) is None]

    def _found(self, image_id: str) -> int:
        row = self._find(image_id)
        if row is None:
            raise DualmatchError(f"the region file {self.path} has no features for image {image_id!r}.")
        return row

    def _find(self, image_id: str) -> int | None:
        return self._row.get(image_id, self._row.get(Path(image_id).name))


def read_npz(path: Path, what: str, *, required: Sequence[str]) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz` file; `what` names it in errors.

    Raises:
        DualmatchError: the file is missing, damaged, of another kind, or lacks a `required` array.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, NpzFile):
            raise DualmatchError(
                f"the {what} {path} holds a single array; an .npz with {', '.join(required)} is needed."
            )
        with loaded:
            arrays = dict(loaded)
    except FileNotFoundError:
        raise DualmatchError(f"there is no {what} {path}.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DualmatchError):
            raise
        # NumPy takes what is neither .npy nor .npz for a pickle, and advises to load it unsafely.
        why = "it is no .npz file" if "pickle" in str(error) else error
        raise DualmatchError(f"the {what} {path} cannot be read: {why}.") from None
    for name in required:
        if name not in arrays:
            raise DualmatchError(f"the {what} {path} lacks the array {name!r}; it has {', '.join(arrays) or 'none'}.")
    return arrays
