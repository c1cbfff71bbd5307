"""Region features from files: what a network with precomputed regions takes beside, or in place of, pixels."""

from pathlib import Path

import numpy as np
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
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = arrays["filenames"]
                self._features = arrays["features"]
                self._positions = arrays.get("positions")
        except FileNotFoundError:
            raise DualmatchError(f"there is no region file {path}.") from None
        except KeyError as error:
            raise DualmatchError(f"the region file {path} lacks the array {error}.") from None
        except (OSError, ValueError) as error:
            raise DualmatchError(f"the region file {path} cannot be read: {error}.") from None
        if self._features.ndim != 3 or len(names) != len(self._features):
            raise DualmatchError(
                f"the region file {path} must hold features (images, regions, channels) for each filename; "
                f"it has {list(self._features.shape)} for {len(names)} filenames."
            )
        self._row = {str(name): row for row, name in enumerate(names)}

    @property
    def feature_dim(self) -> int:
        """Channels of a region."""
        return int(self._features.shape[2])

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
