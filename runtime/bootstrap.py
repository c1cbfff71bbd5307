"""How far a measured recall may be from the true one: the gate's one-sided bound of a loss of Rsum, and two-sided intervals.

An image and its captions are one observation. Two models are measured on the same pairs, so what is resampled is the points of Rsum that
an image lost from one to the other.
"""

import math

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]
Points = NDArray[np.float64]

CUTOFFS = (1, 5, 10)
RESAMPLES = 2000
CONFIDENCE = 0.95
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
    means = [chance.multinomial(images, shares, size=100) @ values / images for _ in range(0, RESAMPLES, 100)]
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


def interval(losses: Points, *, paired: bool) -> tuple[float, float]:
    """95% two-sided interval of the mean of `losses`, in points: the images resampled.

    Args:
        losses: see `losses`.
        paired: they are the loss from one ranking to another, most of them perhaps zero. Then one image more that lost a hit more than
            the mean and one that lost a hit less are resampled too, akin to `bound`: where nothing changed among a few images, something
            still may.
    """
    extra = [losses.mean() + _ONE_LOST_HIT, losses.mean() - _ONE_LOST_HIT] if paired else []
    sums = _resampled(losses.round(9)[:, None], np.array(extra).reshape(-1, 1))
    low, high = _quantiles(sums / len(losses))
    return float(low[0]), float(high[0])


def share_intervals(hits: Points, counts: Points) -> tuple[Points, Points]:
    """95% two-sided intervals of shares, in percent, and of their differences, the observations resampled.

    Beside the observations, every column gets one that hit and one that missed, in opposite observations for neighbouring columns: a
    share that was 0 or 100% among a few has an interval of some width, and so has a difference of none.

    Args:
        hits, counts: (observations, columns): of so many captions of an image so many hit; the share of a column is the sum of its hits
            over that of its counts. An observation may count nothing in a column.

    Returns:
        (2, columns): low and high of each share; (2, columns - 1): low and high of each further column's share minus the first's.
    """
    columns = hits.shape[1]
    extra = np.indices((2, columns)).sum(axis=0) % 2
    sums = _resampled(np.hstack([hits, counts]), np.hstack([extra, np.ones_like(extra)]))
    counted = sums[:, columns:]
    shares = 100 * np.divide(sums[:, :columns], counted, out=np.full_like(counted, np.nan), where=counted > 0)
    return _quantiles(shares), _quantiles(shares[:, 1:] - shares[:, :1])


def _resampled(rows: Points, extra: Points) -> Points:
    """Sums of the columns over as many rows as there are, drawn from them and from the `extra` ones: (resamples, columns)."""
    values, counts = np.unique(rows, axis=0, return_counts=True)
    values = np.vstack([values, extra])
    shares = np.append(counts, [1.0] * len(extra)) / (len(rows) + len(extra))
    chance = np.random.default_rng(0)  # the same interval of the same pairs, always
    draws = (chance.multinomial(len(rows), shares, size=100) @ values for _ in range(0, RESAMPLES, 100))
    return np.concatenate(list(draws))


def _quantiles(values: Points) -> Points:
    """Between which `CONFIDENCE` of the resamples lie, (2, columns)."""
    tail = (1 - CONFIDENCE) / 2
    return np.nanquantile(values, [tail, 1 - tail], axis=0).round(9)
