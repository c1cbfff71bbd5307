"""Recall at K, median and mean rank, from a similarity matrix, by counting instead of sorting.

The rank of an item is the number of items that score higher, plus those that score the same and have a smaller index;
counted in float32, one row at a time, so nothing but the matrix itself grows with it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DualmatchError

Matrix = NDArray[Any]
Ranks = NDArray[np.int64]
Candidates = Ranks | Callable[[Matrix], Ranks]

FOLDS: Mapping[str, int] = {"full": 1, "five-folds": 5}
"""Named protocols: every image against every caption, or the average over five consecutive fifths (COCO's "1K")."""

_ROWS_PER_BLOCK = 64
_LARGEST_UINT8 = 255


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a recall was measured on and how; its one line is printed beside every figure.

    Attributes:
        split: the split or splits, or None where the caller did not say.
        images, captions: size of the whole matrix, over all folds.
        captions_per_image: `5`, or `1 to 7` where it varies.
        folds: the figures are averages over so many consecutive parts of the images.
        ties: which of two equal scores ranks first.
        rerank: what was re-ranked, or `none`.
        ensemble: how many models' similarities were averaged.
    """

    split: str | None
    images: int
    captions: int
    captions_per_image: str
    folds: int = 1
    ties: str = "smaller index first"
    rerank: str = "none"
    ensemble: int = 1

    def __str__(self) -> str:
        folds = "1 fold" if self.folds == 1 else f"average of {self.folds} folds"
        models = "1 model" if self.ensemble == 1 else f"ensemble of {self.ensemble} models"
        return (
            f"split {self.split or 'not named'}: {self.images} images, {self.captions} captions "
            f"({self.captions_per_image} per image), {folds}, ties: {self.ties}, re-ranking: {self.rerank}, {models}"
        )


@dataclass(frozen=True)
class Metrics:
    """One direction: R@1, R@5, R@10 in percent; median and mean rank counted from 1."""

    r1: float
    r5: float
    r10: float
    median: float
    mean: float

    @classmethod
    def of(cls, ranks: Ranks) -> "Metrics":
        """The metrics of 0-based ranks (queries,)."""
        # The authors round the median down before they count from 1, so that an even number of queries gives an integer.
        median = float(np.floor(np.median(ranks)) + 1)
        r1, r5, r10 = (recall_at(ranks, k) for k in (1, 5, 10))
        return cls(r1, r5, r10, median, float(ranks.mean()) + 1)

    @classmethod
    def average(cls, folds: "list[Metrics]") -> "Metrics":
        """Field by field, as the authors average their five folds (median and mean rank too)."""
        return cls(*np.mean([astuple(fold) for fold in folds], axis=0).tolist())


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Retrieval both ways with the protocol that it was measured under.

    Attributes:
        i2t: an image is the query; its rank is that of the best of its own captions.
        t2i: a caption is the query; its rank is that of its image.
    """

    i2t: Metrics
    t2i: Metrics
    protocol: Protocol

    @property
    def rsum(self) -> float:
        """R@1 + R@5 + R@10, both ways: what DSRAN chooses its best checkpoint by."""
        return self.i2t.r1 + self.i2t.r5 + self.i2t.r10 + self.t2i.r1 + self.t2i.r5 + self.t2i.r10

    @property
    def vsrn_selection_sum(self) -> float:
        """R@1 + R@5, both ways: what VSRN's code chooses its best checkpoint by (its paper says the sum of the recalls)."""
        return self.i2t.r1 + self.i2t.r5 + self.t2i.r1 + self.t2i.r5

    def to_json(self) -> dict[str, Any]:
        """`rsum`, `i2t` and `t2i` with `r1 r5 r10 median mean`, and `protocol`."""
        return {
            "rsum": self.rsum,
            "i2t": asdict(self.i2t),
            "t2i": asdict(self.t2i),
            "protocol": asdict(self.protocol),
        }


def evaluate(
    similarity: Matrix,
    *,
    caption_image: ArrayLike | None = None,
    captions_per_image: int = 5,
    folds: int = 1,
    i2t: Candidates | None = None,
    t2i: Candidates | None = None,
    split: str | None = None,
    ensemble: int = 1,
) -> Recall:
    """Recall both ways.

    Args:
        similarity: (images, captions), compared in float32; may be memory-mapped.
        caption_image: for each caption the index of its image, in any order; without it caption c belongs to image c // captions_per_image.
        folds: average over so many consecutive parts of the images, each ranked by itself with its own captions.
        i2t, t2i: re-ranked candidates (queries, k1), best first, which take the place of the first k1 of the plain ranking; or a
            function that makes them from a similarity (`partial(rerank.i2t, k1=15)`), which is applied to each fold.
        split, ensemble: facts for the protocol line.

    Raises:
        DualmatchError: NaN in the similarity, an image without a caption, sizes that do not fit, or candidates of another similarity.
    """
    num_images, num_captions = shape_of(similarity)
    image_of = _caption_image(num_images, num_captions, caption_image, captions_per_image)
    if folds < 1 or num_images % folds:
        raise DualmatchError(
            f"{num_images} images cannot be cut into {folds} equal folds; choose a number that divides them."
        )
    if folds > 1 and not all(given is None or callable(given) for given in (i2t, t2i)):
        raise DualmatchError(
            f"re-ranked candidates of the whole matrix do not fit {folds} folds; pass the function that re-ranks."
        )

    size = num_images // folds
    parts: list[tuple[Metrics, Metrics]] = []
    k1_i2t = k1_t2i = 0
    for start in range(0, num_images, size):
        part, owner = (similarity, image_of) if folds == 1 else _fold(similarity, image_of, start, start + size)
        ranks_of_images, ranks_of_captions = ranks(part, owner)
        if i2t is not None:
            candidates = _checked(i2t(part) if callable(i2t) else i2t, "i2t", queries=size, items=len(owner))
            own = owner[candidates] == np.arange(size)[:, None]
            ranks_of_images, k1_i2t = _reranked(ranks_of_images, own, "i2t"), candidates.shape[1]
        if t2i is not None:
            candidates = _checked(t2i(part) if callable(t2i) else t2i, "t2i", queries=len(owner), items=size)
            ranks_of_captions = _reranked(ranks_of_captions, candidates == owner[:, None], "t2i")
            k1_t2i = candidates.shape[1]
        parts.append((Metrics.of(ranks_of_images), Metrics.of(ranks_of_captions)))

    per_image = np.bincount(image_of)
    fewest, most = int(per_image.min()), int(per_image.max())
    reranked = [f"{name} k1={k1}" for name, k1 in (("i2t", k1_i2t), ("t2i", k1_t2i)) if k1]
    protocol = Protocol(
        split=split,
        images=num_images,
        captions=num_captions,
        captions_per_image=str(fewest) if fewest == most else f"{fewest} to {most}",
        folds=folds,
        rerank=" and ".join(reranked) or "none",
        ensemble=ensemble,
    )
    return Recall(
        i2t=Metrics.average([images for images, _ in parts]),
        t2i=Metrics.average([captions for _, captions in parts]),
        protocol=protocol,
    )


def recall_at(ranks: Ranks, k: int) -> float:
    """Percentage of queries whose 0-based rank is below `k`."""
    return 100.0 * int(np.count_nonzero(ranks < k)) / len(ranks)


def ranks_i2t(similarity: Matrix, caption_image: ArrayLike) -> Ranks:
    """For each image the 0-based rank of the best of its captions, int64 (images,); raises as `evaluate`."""
    own_captions = _OwnCaptions(*_checked_pair(similarity, caption_image))
    return np.fromiter((own_captions.rank(index, row) for index, row in rows(similarity)), np.int64, len(similarity))


def ranks_t2i(similarity: Matrix, caption_image: ArrayLike) -> Ranks:
    """For each caption the 0-based rank of its image, int64 (captions,); raises as `evaluate`."""
    own_image = _OwnImage(similarity, _checked_pair(similarity, caption_image)[1])
    for index, row in rows(similarity):
        own_image.count(index, row)
    return own_image.ranks()


def ranks(similarity: Matrix, caption_image: ArrayLike) -> tuple[Ranks, Ranks]:
    """`ranks_i2t` and `ranks_t2i` in one pass, so that the matrix is read from memory once."""
    num_images, image_of = _checked_pair(similarity, caption_image)
    own_captions, own_image = _OwnCaptions(num_images, image_of), _OwnImage(similarity, image_of)
    ranks_of_images = np.empty(num_images, np.int64)
    for index, row in rows(similarity):
        ranks_of_images[index] = own_captions.rank(index, row)
        own_image.count(index, row)
    return ranks_of_images, own_image.ranks()


def rows(similarity: Matrix) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Each row with its index, contiguous and float32 (what is neither is converted in small blocks).

    Raises:
        DualmatchError: the row holds NaN, which has no place in any ranking.
    """
    similarity = np.asarray(similarity)  # a plain view: every operation on a np.memmap pays for the subclass
    as_it_is = similarity.dtype == np.float32 and similarity.strides[1] == similarity.itemsize
    for start in range(0, len(similarity), _ROWS_PER_BLOCK):
        block = similarity[start : start + _ROWS_PER_BLOCK]
        if not as_it_is:
            block = np.array(block, dtype=np.float32, order="C")
        for index, row in enumerate(block, start):
            if np.isnan(row.max()):  # the maximum of a line with NaN is NaN
                raise nan_error(index, int(np.isnan(row).argmax()))
            yield index, row


def shape_of(similarity: Matrix) -> tuple[int, int]:
    """Its numbers of images and captions.

    Raises:
        DualmatchError: it is not a matrix of real numbers.
    """
    if similarity.ndim != 2 or not similarity.size or similarity.dtype.kind not in "fiu":
        raise DualmatchError(
            f"a similarity matrix of numbers, images by captions, is needed; found {similarity.dtype} of shape {similarity.shape}."
        )
    return similarity.shape[0], similarity.shape[1]


def nan_error(row: int, column: int) -> DualmatchError:
    """The error for a similarity that cannot be ranked."""
    return DualmatchError(f"the similarity of row {row} and column {column} is NaN; encode again and find out why.")


class _OwnCaptions:
    """Ranks an image's best caption within the image's row."""

    def __init__(self, num_images: int, image_of: Ranks) -> None:
        # By image and then by index, so that argmax takes the smaller index.
        self.captions = np.argsort(image_of, kind="stable")
        self.bounds = np.searchsorted(image_of[self.captions], np.arange(num_images + 1))

    def rank(self, image: int, row: NDArray[np.float32]) -> int:
        captions = self.captions[self.bounds[image] : self.bounds[image + 1]]
        scores = row[captions]
        best = scores.argmax()
        caption, score = captions[best], scores[best]
        return int(np.count_nonzero(row[:caption] >= score) + np.count_nonzero(row[caption:] > score))


class _OwnImage:
    """Counts, row by row, the images that rank above each caption's own."""

    def __init__(self, similarity: Matrix, image_of: Ranks) -> None:
        self.in_order = bool((np.diff(image_of) >= 0).all())
        # By image: at any row, the captions whose own image has passed are the first ones.
        self.captions = np.argsort(image_of, kind="stable")
        self.ends = np.searchsorted(image_of[self.captions], np.arange(len(similarity)), side="right")
        self.scores = similarity[image_of[self.captions], self.captions].astype(np.float32)
        self.above = np.empty(len(image_of), bool)
        self.counted_uint8 = np.zeros(len(image_of), np.uint8)
        self.counted = np.zeros(len(image_of), np.int64)
        self.pending = 0

    def count(self, image: int, row: NDArray[np.float32]) -> None:
        if not self.in_order:
            row = row[self.captions]
        end = self.ends[image]
        np.greater(row[:end], self.scores[:end], out=self.above[:end])
        # This image comes before the own image of the rest: an equal score ranks above theirs.
        np.greater_equal(row[end:], self.scores[end:], out=self.above[end:])
        self.counted_uint8 += self.above.view(np.uint8)
        self.pending += 1
        if self.pending == _LARGEST_UINT8:
            self._carry()

    def _carry(self) -> None:
        self.counted += self.counted_uint8
        self.counted_uint8[:] = 0
        self.pending = 0

    def ranks(self) -> Ranks:
        self._carry()
        ranks = np.empty_like(self.counted)
        ranks[self.captions] = self.counted
        return ranks


def _caption_image(num_images: int, num_captions: int, given: ArrayLike | None, captions_per_image: int) -> Ranks:
    if given is None:
        if num_captions != num_images * captions_per_image:
            raise DualmatchError(
                f"{num_images} images with {captions_per_image} captions each need {num_images * captions_per_image} captions, "
                f"the matrix has {num_captions}; say which image each caption belongs to (caption_image)."
            )
        return np.arange(num_captions) // captions_per_image
    image_of = np.asarray(given)
    if image_of.shape != (num_captions,) or image_of.dtype.kind not in "iu":
        raise DualmatchError(
            f"caption_image needs one image index for each of {num_captions} captions, got {image_of.dtype} of shape {image_of.shape}."
        )
    if image_of.min() < 0 or image_of.max() >= num_images:
        raise DualmatchError(
            f"caption_image names images {image_of.min()} to {image_of.max()}, the matrix has 0 to {num_images - 1}."
        )
    without = np.flatnonzero(np.bincount(image_of, minlength=num_images) == 0)
    if len(without):
        raise DualmatchError(
            f"{len(without)} of {num_images} images have no caption (the first is image {without[0]}), so they have no rank; "
            "leave them out of the matrix or give them captions."
        )
    return image_of.astype(np.int64)


def _checked_pair(similarity: Matrix, caption_image: ArrayLike) -> tuple[int, Ranks]:
    num_images, num_captions = shape_of(similarity)
    return num_images, _caption_image(num_images, num_captions, caption_image, 0)


def _fold(similarity: Matrix, image_of: Ranks, start: int, stop: int) -> tuple[Matrix, Ranks]:
    captions = np.flatnonzero((image_of >= start) & (image_of < stop))
    first, last = captions[0], captions[-1] + 1
    consecutive = last - first == len(captions)  # then a view will do
    part = similarity[start:stop, first:last] if consecutive else similarity[start:stop][:, captions]
    return part, image_of[captions] - start


def _checked(candidates: Ranks, direction: str, *, queries: int, items: int) -> Ranks:
    if candidates.ndim != 2 or len(candidates) != queries or candidates.dtype.kind not in "iu":
        raise DualmatchError(
            f"{direction} needs re-ranked candidates for {queries} queries, got {candidates.dtype} of shape {candidates.shape}."
        )
    if candidates.min() < 0 or candidates.max() >= items:
        raise DualmatchError(f"{direction}: re-ranked candidates must be indices from 0 to {items - 1}.")
    return candidates


def _reranked(plain: Ranks, own: NDArray[np.bool_], direction: str) -> Ranks:
    """The position of the first own item among the candidates, else its plain rank, which re-ranking leaves alone."""
    found = own.any(axis=1)
    if (found != (plain < own.shape[1])).any():
        raise DualmatchError(
            f"{direction}: these candidates are not the first {own.shape[1]} of this similarity's ranking; re-rank this similarity."
        )
    return np.where(found, own.argmax(axis=1), plain)
