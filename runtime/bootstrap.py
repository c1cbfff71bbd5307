"""How much Rsum may really have fallen, given the pairs that were measured: the paired bootstrap bound, and how many pairs would settle it.

Before and after are measured on the same pairs, so an image and its captions are one observation: the points of Rsum that they lost.
"""

import math

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]
Points = NDArray[np.float64]

CUTOFFS = (1, 5, 10)
_RESAMPLES = 2000
_QUANTILE = 0.95
# A hit of an image query that was lost, in points of that image; see `bound`.
_ONE_LOST_HIT = 100.0


def losses(before: tuple[Ranks, Ranks], after: tuple[Ranks, Ranks], caption_image: NDArray[np.int64]) -> Points:
    """For each image, with its captions, the points of Rsum that it lost: (images,); their mean is the loss of Rsum.

    With unequal numbers of captions the text-to-image part is a ratio; it is linearised around the measured loss.

    Args:
        before, after: 0-based ranks of the image queries and of the caption queries.
        caption_image: for each caption the index of its image.
    """
    images, captions = len(before[0]), len(caption_image)
    lost_i, lost_c = (
        np.sum([(first < k).astype(np.float64) - (second < k) for k in CUTOFFS], axis=0)
        for first, second in zip(before, after, strict=True)
    )
    lost_captions = np.bincount(caption_image, weights=lost_c, minlength=images)
    num_captions = np.bincount(caption_image, minlength=images)
    mean = lost_c.mean()
    return 100 * (lost_i + images / captions * (lost_captions - mean * num_captions) + mean)


def bound(losses: Points, images: int | None = None) -> float:
    """95% one-sided upper bound of the loss of Rsum, in points.

    Resamples the images and one more that lost a hit. Without it a sample in which nothing flipped would promise that nothing ever
    will; with it the bound follows the exact one for rare events (no flip among n images: 300 / n points, the rule of three).

    Args:
        losses: see `losses`.
        images: bound on the mean of so many images like these; by default as many as there are.
    """
    images = images or len(losses)
    values, counts = np.unique(losses.round(9), return_counts=True)
    values = np.append(values, _ONE_LOST_HIT)
    shares = np.append(counts / counts.sum() * images, 1.0) / (images + 1)
    chance = np.random.default_rng(0)  # the same verdict on the same pairs, always
    # In blocks: with unequal numbers of captions there may be as many values as images.
    means = [chance.multinomial(images, shares, size=100) @ values / images for _ in range(0, _RESAMPLES, 100)]
    return round(float(np.quantile(np.concatenate(means), _QUANTILE)), 9)


def images_needed(losses: Points, limit: float) -> int | None:
    """About how many images like these bring the bound to `limit`, rounded up to two digits; None where a thousand times as many would not.

    The measured loss is taken for the true one. Call it where the bound is above `limit`.
    """
    low, high = len(losses), 1000 * len(losses)
    if bound(losses, high) > limit:
        return None
    while high > 1.02 * low + 1:
        middle = math.isqrt(low * high)
        low, high = (low, middle) if bound(losses, middle) <= limit else (middle, high)
    unit = 10 ** max(0, len(str(high)) - 2)
    return -(-high // unit) * unit
