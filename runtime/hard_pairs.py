"""Hard pairs, which `scenes` come in: two images that share everything but one thing, and whether their captions are told apart."""

import numpy as np
from numpy.typing import NDArray

from .datasets import Dataset
from .errors import DualmatchError
from .recall import Matrix, checked_caption_image, shape_of

# What the two may differ in, by the tag `differs`.
DIFFERENCES = ("relation", "setting")


def has_pairs(dataset: Dataset) -> bool:
    """Whether the data set comes in hard pairs."""
    return any(name == "pair" for item in dataset.items for name, _ in item.tags)


def partners(dataset: Dataset) -> NDArray[np.int64] | None:
    """For each image the index of the one it makes a hard pair with, (images,); None where the data set has no pairs.

    Raises:
        DualmatchError: an image whose partner is not among them.
    """
    if not has_pairs(dataset):
        return None
    row_of = {item.id: row for row, item in enumerate(dataset.items)}
    try:
        return np.array([row_of[dict(item.tags)["pair"]] for item in dataset.items])
    except KeyError as error:
        raise DualmatchError(f"a hard pair lacks one of its two images: {error} is not among those given.") from None


def told_apart(similarity: Matrix, dataset: Dataset, differs: str) -> NDArray[np.float64]:
    """For each image the share, 0 to 1, of its captions that score higher on it than on its partner; NaN for images of other pairs.

    Equal scores tell nothing apart. Chance: a half.

    Args:
        similarity: (images, captions) of the data set.
        differs: one of `DIFFERENCES`: only pairs that differ in this count.

    Returns:
        (images,) float64.

    Raises:
        DualmatchError: no pair that differs in this, or a similarity of another size.
    """
    partner = partners(dataset)
    chosen = np.array([dict(item.tags).get("differs") == differs for item in dataset.items])
    if partner is None or not chosen.any():
        raise DualmatchError(f"data set {dataset.name!r} has no hard pairs that differ in the {differs}.")
    own = checked_caption_image(*shape_of(similarity), dataset.caption_image)
    each = np.arange(len(own))
    right = similarity[own, each] > similarity[partner[own], each]
    shares = np.bincount(own, weights=right, minlength=len(chosen)) / np.bincount(own, minlength=len(chosen))
    return np.where(chosen, shares, np.nan)
