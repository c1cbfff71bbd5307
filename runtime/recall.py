"""Recall at K, median and mean rank, from a similarity matrix, by counting instead of sorting.

The rank of an item is the number of items that score higher, plus those that score the same and have a smaller index;
counted in float32, one row at a time, so nothing but the matrix itself grows with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    image_of = checked_caption_image(num_images, num_captions, caption_image, captions_per_image)
    require_folds(image_of, num_images, folds)
    if folds > 1 and not all(given is None or callable(given) for given in (i2t, t2i)):
        raise DualmatchError(
            f"re-ranked candidates of the whole matrix do not fit {folds} folds; pass the function that re-ranks."
        )

    parts: list[tuple[Ranks, Ranks]] = []
    k1_i2t = k1_t2i = 0
    for images, captions in fold_members(image_of, num_images, folds):
        part, owner = (similarity, image_of) if folds == 1 else _fold(similarity, image_of, images, captions)
        ranks_of_images, ranks_of_captions = ranks(part, owner)
        if i2t is not None:
            candidates = _checked(i2t(part) if callable(i2t) else i2t, "i2t", queries=len(part), items=len(owner))
            ranks_of_images = reranked_i2t(ranks_of_images, candidates, owner)
            k1_i2t = candidates.shape[1]
        if t2i is not None:
            candidates = _checked(t2i(part) if callable(t2i) else t2i, "t2i", queries=len(owner), items=len(part))
            ranks_of_captions = reranked_t2i(ranks_of_captions, candidates, owner)
            k1_t2i = candidates.shape[1]
        parts.append((ranks_of_images, ranks_of_captions))
    return summary(parts, image_of, split=split, ensemble=ensemble, k1_i2t=k1_i2t, k1_t2i=k1_t2i)


def summary(
    parts: Sequence[tuple[Ranks, Ranks]],
    image_of: Ranks,
    *,
    split: str | None = None,
    ensemble: int = 1,
    k1_i2t: int = 0,
    k1_t2i: int = 0,
) -> Recall:
    """The recall of each fold's 0-based ranks (of its images, of its captions), and the protocol; a k1 of 0 is no re-ranking."""
    per_image = np.bincount(image_of)
    fewest, most = int(per_image.min()), int(per_image.max())
    reranked = [f"{name} k1={k1}" for name, k1 in (("i2t", k1_i2t), ("t2i", k1_t2i)) if k1]
    protocol = Protocol(
        split=split,
        images=len(per_image),
        captions=len(image_of),
        captions_per_image=str(fewest) if fewest == most else f"{fewest} to {most}",
        folds=len(parts),
        rerank=" and ".join(reranked) or "none",
        ensemble=ensemble,
    )
    return Recall(
        i2t=Metrics.average([Metrics.of(images) for images, _ in parts]),
        t2i=Metrics.average([Metrics.of(captions) for _, captions in parts]),
        protocol=protocol,
    )


def recall_at(ranks: Ranks, k: int) -> float:
    """Percentage of queries whose 0-based rank is below `k`."""
    return 100.0 * int(np.count_nonzero(ranks < k)) / len(ranks)


def ranks_i2t(similarity: Matrix, caption_image: ArrayLike) -> Ranks:
    """For each image the 0-based rank of the best of its captions, int64 (images,); raises as `evaluate`."""
    own_captions = _own_captions(*_checked_pair(similarity, caption_image))
    return np.fromiter((own_captions.rank(index, row) for index, row in rows(similarity)), np.int64, len(similarity))


def ranks_t2i(similarity: Matrix, caption_image: ArrayLike) -> Ranks:
    """For each caption the 0-based rank of its image, int64 (captions,); raises as `evaluate`."""
    own_image = _own_image(similarity, _checked_pair(similarity, caption_image)[1])
    for index, row in rows(similarity):
        own_image.count(index, row)
    return own_image.ranks()


def ranks(similarity: Matrix, caption_image: ArrayLike) -> tuple[Ranks, Ranks]:
    """`ranks_i2t` and `ranks_t2i` in one pass, so that the matrix is read from memory once."""
    num_images, image_of = _checked_pair(similarity, caption_image)
    own_captions, own_image = _own_captions(num_images, image_of), _own_image(similarity, image_of)
    ranks_of_images = np.empty(num_images, np.int64)
    for index, row in rows(similarity):
        ranks_of_images[index] = own_captions.rank(index, row)
        own_image.count(index, row)
    return ranks_of_images, own_image.ranks()


def rows(similarity: Matrix, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Each row from `first` to before `stop` with its index, contiguous and float32 (what is neither is converted in small blocks).

    Raises:
        DualmatchError: the row holds NaN, which has no place in any ranking.
    """
    similarity = np.asarray(similarity)  # a plain view: every operation on a np.memmap pays for the subclass
    as_it_is = similarity.dtype == np.float32 and similarity.strides[1] == similarity.itemsize
    stop = len(similarity) if stop is None else stop
    for start in range(first, stop, _ROWS_PER_BLOCK):
        block = similarity[start : min(start + _ROWS_PER_BLOCK, stop)]
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


class RanksWithinLines:
    """In each line of scores, the rank of the best of the line's own items.

    Args:
        line_of, item_of: (pairs,): which items are whose own, every line having one at least.
    """

    def __init__(self, num_lines: int, line_of: Ranks, item_of: Ranks) -> None:
        # By line and then by item, so that argmax takes the smaller item.
        order = np.lexsort((item_of, line_of))
        self._items = item_of[order]
        self._bounds = np.searchsorted(line_of[order], np.arange(num_lines + 1)).tolist()

    def rank(self, index: int, line: NDArray[np.float32]) -> int:
        """0-based, in the line `index`, (items,)."""
        items = self._items[self._bounds[index] : self._bounds[index + 1]]
        item = items[line[items].argmax()] if len(items) > 1 else items[0]
        score = line[item]
        return int(np.count_nonzero(line[:item] >= score) + np.count_nonzero(line[item:] > score))


class RanksAcrossLines:
    """Counts, line by line, the lines that rank above a query's own line in the query's column.

    Args:
        own_line, scores: (queries,): each query's own line and its score there.
        column_of: (queries,): the query's place in a line; without it query q is column q.
    """

    def __init__(
        self, num_lines: int, own_line: Ranks, scores: NDArray[np.float32], column_of: Ranks | None = None
    ) -> None:
        # By own line: at any line, the queries whose own line has passed are the first ones.
        self._order = np.argsort(own_line, kind="stable")
        self._ends = np.searchsorted(own_line[self._order], np.arange(num_lines), side="right").tolist()
        self._scores = scores[self._order]
        in_place = column_of is None and bool((np.diff(own_line) >= 0).all())  # then nothing has to be gathered
        self._columns = None if in_place else self._order if column_of is None else column_of[self._order]
        self._line = np.empty(len(scores), np.float32)
        self._above = np.empty(len(scores), bool)
        self._counted_uint8 = np.zeros(len(scores), np.uint8)
        self._counted = np.zeros(len(scores), np.int64)
        self._pending = 0

    def count(self, index: int, line: NDArray[np.float32]) -> None:
        """Compare every query's own score with the line `index`; lines may come in any order, each once."""
        if self._columns is not None:
            line = line.take(self._columns, out=self._line, mode="clip")  # the mode that needs no buffer
        end = self._ends[index]
        np.greater(line[:end], self._scores[:end], out=self._above[:end])
        # This line comes before the own line of the rest: an equal score ranks above theirs.
        np.greater_equal(line[end:], self._scores[end:], out=self._above[end:])
        self._counted_uint8 += self._above.view(np.uint8)
        self._pending += 1
        if self._pending == _LARGEST_UINT8:
            self._carry()

    def _carry(self) -> None:
        self._counted += self._counted_uint8
        self._counted_uint8[:] = 0
        self._pending = 0

    def ranks(self) -> Ranks:
        """The counts after all lines, 0-based ranks (queries,)."""
        self._carry()
        ranks = np.empty_like(self._counted)
        ranks[self._order] = self._counted
        return ranks


def _own_captions(num_images: int, image_of: Ranks) -> RanksWithinLines:
    return RanksWithinLines(num_images, image_of, np.arange(len(image_of)))


def _own_image(similarity: Matrix, image_of: Ranks) -> RanksAcrossLines:
    scores = similarity[image_of, np.arange(len(image_of))].astype(np.float32)
    return RanksAcrossLines(len(similarity), image_of, scores)


def checked_caption_image(
    num_images: int, num_captions: int, given: ArrayLike | None, captions_per_image: int = 0
) -> Ranks:
    """For each caption the index of its image, int64 (captions,).

    Raises:
        DualmatchError: sizes that do not fit, an index that is none, or an image without a caption.
    """
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


def require_folds(image_of: Ranks, num_images: int, folds: int, *, k1_i2t: int = 0, k1_t2i: int = 0) -> None:
    """Refuse a protocol that does not fit the sizes, before any work.

    Raises:
        DualmatchError: folds of unequal size, or more candidates to re-rank than a fold has items.
    """
    if folds < 1 or num_images % folds:
        raise DualmatchError(
            f"{num_images} images cannot be cut into {folds} equal folds; choose a number that divides them."
        )
    fewest_captions = int(np.bincount(image_of // (num_images // folds)).min())
    require_k(k1_i2t or 1, fewest_captions, "captions", folds)
    require_k(k1_t2i or 1, num_images // folds, "images", folds)


def require_k(k: int, num_items: int, items: str, folds: int = 1) -> None:
    """Refuse more candidates than there are `items`, or none.

    Raises:
        DualmatchError: k is outside 1 … num_items.
    """
    if not 1 <= k <= num_items:
        where = "" if folds == 1 else f" in one of {folds} folds"
        raise DualmatchError(
            f"{k} candidates were asked for and there are {num_items} {items}{where}; choose 1 to {num_items}."
        )


def fold_members(image_of: Ranks, num_images: int, folds: int) -> Iterator[tuple[slice, slice | Ranks]]:
    """The images and the captions of each fold; captions as a slice where they are consecutive."""
    size = num_images // folds
    for start in range(0, num_images, size):
        captions = np.flatnonzero((image_of >= start) & (image_of < start + size))
        first, stop = int(captions[0]), int(captions[-1]) + 1
        consecutive = stop - first == len(captions)  # then a view will do
        yield slice(start, start + size), slice(first, stop) if consecutive else captions


def _checked_pair(similarity: Matrix, caption_image: ArrayLike) -> tuple[int, Ranks]:
    num_images, num_captions = shape_of(similarity)
    return num_images, checked_caption_image(num_images, num_captions, caption_image)


def _fold(similarity: Matrix, image_of: Ranks, images: slice, captions: slice | Ranks) -> tuple[Matrix, Ranks]:
    return similarity[images][:, captions], image_of[captions] - images.start


def _checked(candidates: Ranks, direction: str, *, queries: int, items: int) -> Ranks:
    if candidates.ndim != 2 or len(candidates) != queries or candidates.dtype.kind not in "iu":
        raise DualmatchError(
            f"{direction} needs re-ranked candidates for {queries} queries, got {candidates.dtype} of shape {candidates.shape}."
        )
    if candidates.min() < 0 or candidates.max() >= items:
        raise DualmatchError(f"{direction}: re-ranked candidates must be indices from 0 to {items - 1}.")
    return candidates


def reranked_i2t(plain: Ranks, candidates: Ranks, image_of: Ranks) -> Ranks:
    """Ranks of images after re-ranking, from their plain ranks and their candidates (images, k1); raises as `evaluate`."""
    return _reranked(plain, image_of[candidates] == np.arange(len(plain))[:, None], "i2t")


def reranked_t2i(plain: Ranks, candidates: Ranks, image_of: Ranks) -> Ranks:
    """Ranks of captions after re-ranking, from their plain ranks and their candidates (captions, k1); raises as `evaluate`."""
    return _reranked(plain, candidates == image_of[:, None], "t2i")


def _reranked(plain: Ranks, own: NDArray[np.bool_], direction: str) -> Ranks:
    """The position of the first own item among the candidates, else its plain rank, which re-ranking leaves alone."""
    found = own.any(axis=1)
    if (found != (plain < own.shape[1])).any():
        raise DualmatchError(
            f"{direction}: these candidates are not the first {own.shape[1]} of this similarity's ranking; re-rank this similarity."
        )
    return np.where(found, own.argmax(axis=1), plain)
