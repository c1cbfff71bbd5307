"""Region features from files: what a network with precomputed regions takes beside, or in place of, pixels."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from .errors import DualmatchError


class RegionFile:
    """Region features of a set of images, looked up by image id.

    The file is an `.npz` with `filenames` (n,), `features` (n, regions, channels) and, where the network embeds positions,
    `positions` (n, regions, numbers). `dualmatch data pool-regions` writes one from boxes.

    Raises:
        DualmatchError: the file cannot be read or its arrays do not fit each other.
    """

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
        self._row = {str(name): row for row, name in enumerate(names)}

    @property
    def feature_dim(self) -> int:
        """Channels of a region."""
        return int(self._features.shape[2])

    @property
    def position_dim(self) -> int:
        """Numbers of a region's position; 0 where the file has none."""
        return 0 if self._positions is None else int(self._positions.shape[2])

    def features(self, image_id: str) -> NDArray[np.float32]:
        """Features of one image, (regions, channels) float32.

        Raises:
            DualmatchError: the file has none for this image; nothing is made up in its place.
        """
        return self._features[self._find(image_id)].astype(np.float32)

    def positions(self, image_id: str) -> NDArray[np.float32]:
        """Position features of one image, (regions, numbers) float32."""
        if self._positions is None:
            raise DualmatchError(f"the region file {self.path} has no positions, which this network needs.")
        return self._positions[self._find(image_id)].astype(np.float32)

    def _find(self, image_id: str) -> int:
        row = self._row.get(image_id, self._row.get(Path(image_id).name))
        if row is None:
            raise DualmatchError(f"the region file {self.path} has no features for image {image_id!r}.")
        return row


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
        raise DualmatchError(f"the {what} {path} cannot be read: {error}.") from None
    for name in required:
        if name not in arrays:
            raise DualmatchError(f"the {what} {path} lacks the array {name!r}; it has {', '.join(arrays) or 'none'}.")
    return arrays
