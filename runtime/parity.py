"""Did retrieval survive? Embeddings before and after a change, on the same pairs, compared by what is retrieved.

Comparison measures; `decide` rules. Used by export's gate and by `verify`, so that both mean the same thing.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import DualmatchError
from .recall import Recall, evaluate, ranks

Embeddings = NDArray[np.float32]
Verdict = Literal["pass", "fail", "too few pairs"]

_RESAMPLES = 2000
_CUTOFFS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What a change may cost.

    Attributes:
        rsum_loss: largest loss of Rsum, in points, that the bootstrap bound may reach.
        worst_cosine: least cosine between an embedding before and after.
        component: where given, the largest absolute difference of any component; it then decides in place of the bound, on any number
            of pairs (float32 must give the same numbers, not only the same recall).
    """

    rsum_loss: float
    worst_cosine: float
    component: float | None = None


TOLERANCES = {
    "fp32": Tolerances(rsum_loss=0.1, worst_cosine=0.999999, component=1e-5),
    "fp16": Tolerances(rsum_loss=0.5, worst_cosine=0.999),
}


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A query whose answer entered or left the first K."""

    direction: Literal["i2t", "t2i"]
    query: int
    rank_before: int
    rank_after: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Retrieval before and after, on the same pairs ranked together.

    Attributes:
        before, after: recall with its protocol.
        rsum_loss: Rsum before minus after, in points.
        bound: 95% one-sided upper bound of that loss, from resampling images with their captions (paired bootstrap).
        largest_difference: of any component of any embedding.
        image_cosine, caption_cosine: worst, 1st percentile and median cosine between before and after.
        same_first: share of queries, both directions, whose first answer is the same, in percent.
        overlap_at_10: mean share of the first ten answers that is common, in percent.
        hits_lost, hits_won: flips out of and into the first 1, 5 and 10, both directions together.
        flips: the queries behind them, worst first.
    """

    before: Recall
    after: Recall
    rsum_loss: float
    bound: float
    largest_difference: float
    image_cosine: tuple[float, float, float]
    caption_cosine: tuple[float, float, float]
    same_first: float
    overlap_at_10: float
    hits_lost: int
    hits_won: int
    flips: tuple[Flip, ...]

    @property
    def worst_cosine(self) -> float:
        """Over images and captions."""
        return min(self.image_cosine[0], self.caption_cosine[0])

    def to_json(self) -> dict[str, Any]:
        """Plain values; flips are cut to the first twenty."""
        values = asdict(self)
        values |= {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "flips": [asdict(flip) for flip in self.flips[:20]],
        }
        return values


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The verdict and the sentence that explains it; `pairs_needed` where more images would decide."""

    verdict: Verdict
    reason: str
    pairs_needed: int | None = None


def compare(
    before: tuple[Embeddings, Embeddings],
    after: tuple[Embeddings, Embeddings],
    caption_image: NDArray[np.int64],
    *,
    split: str | None = None,
) -> Comparison:
    """Compare (images, captions) embeddings before and after on one set of pairs.

    Args:
        before, after: float32 (images, D) and (captions, D) each.
        caption_image: for each caption the index of its image.
        split: named in the protocol.

    Raises:
        DualmatchError: other numbers of embeddings before and after, NaN or infinity in them, or captions that do not fit the images.
    """
    for first, second, what in zip(before, after, ("images", "captions"), strict=True):
        if first.shape != second.shape:
            raise DualmatchError(
                f"{what} are {list(first.shape)} before and {list(second.shape)} after; both must be of the same items and dimension."
            )
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise DualmatchError(f"the embeddings of the {what} hold NaN or infinity; there is nothing to compare.")
    similarity_before, similarity_after = before[0] @ before[1].T, after[0] @ after[1].T
    ranks_before, ranks_after = ranks(similarity_before, caption_image), ranks(similarity_after, caption_image)
    recall_before = evaluate(similarity_before, caption_image=caption_image, split=split)
    recall_after = evaluate(similarity_after, caption_image=caption_image, split=split)
    lost, won = _flipped_hits(ranks_before, ranks_after)
    same_first, overlap = _agreement(similarity_before, similarity_after)
    differences = [float(np.abs(a - b).max(initial=0.0)) for a, b in zip(before, after, strict=True)]
    return Comparison(
        before=recall_before,
        after=recall_after,
        rsum_loss=recall_before.rsum - recall_after.rsum,
        bound=_bootstrap_bound(ranks_before, ranks_after, caption_image),
        largest_difference=max(differences),
        image_cosine=_cosine_quantiles(before[0], after[0]),
        caption_cosine=_cosine_quantiles(before[1], after[1]),
        same_first=same_first,
        overlap_at_10=overlap,
        hits_lost=lost,
        hits_won=won,
        flips=_flips(ranks_before, ranks_after),
    )


def decide(comparison: Comparison, tolerances: Tolerances) -> Decision:
    """Pass only what is shown to be within the tolerances; everything else is refused."""
    if not comparison.worst_cosine >= tolerances.worst_cosine:
        return Decision(
            verdict="fail",
            reason=f"the worst cosine is {comparison.worst_cosine:.6f}, below the floor of {tolerances.worst_cosine}; "
            f"a floor of {_floor(comparison.worst_cosine)} would have passed",
        )
    if tolerances.component is not None:
        if comparison.largest_difference > tolerances.component:
            return Decision(
                verdict="fail",
                reason=f"the largest difference of a component is {comparison.largest_difference:.2e}, above {tolerances.component:.0e}; "
                f"a tolerance of {comparison.largest_difference * 1.01:.2e} would have passed",
            )
        return Decision(
            verdict="pass",
            reason=f"every component agrees within {comparison.largest_difference:.2e} (tolerance {tolerances.component:.0e})",
        )
    limit = tolerances.rsum_loss
    if comparison.rsum_loss > limit:
        return Decision(
            verdict="fail",
            reason=f"Rsum fell by {comparison.rsum_loss:.2f}, more than {limit}; a tolerance of {_ceiling(comparison.bound)} would have passed",
        )
    # One image query is worth 100 / images points at each cut-off: with fewer images than this a single flip decides.
    images = comparison.before.protocol.images
    least = math.ceil(100 / limit)
    if images < least:
        return Decision(
            verdict="too few pairs",
            reason=f"with {images} images one flipped query moves Rsum by {100 / images:.2f}, more than the tolerance of {limit}; "
            f"about {least} images are needed",
            pairs_needed=least,
        )
    if comparison.bound > limit:
        spread = comparison.bound - comparison.rsum_loss
        needed = (
            math.ceil(images * (spread / (limit - comparison.rsum_loss)) ** 2)
            if limit > comparison.rsum_loss
            else images * 10
        )
        return Decision(
            verdict="too few pairs",
            reason=f"the loss of Rsum is {comparison.rsum_loss:.2f} but its 95% bound {comparison.bound:.2f} passes the tolerance of {limit}; "
            f"about {needed} images are needed to tell, or a tolerance of {_ceiling(comparison.bound)} would have passed",
            pairs_needed=needed,
        )
    return Decision(
        verdict="pass",
        reason=f"Rsum changed by {-comparison.rsum_loss:+.2f}, 95% bound of the loss {comparison.bound:.2f}; "
        f"the smallest tolerance that would have passed is {_ceiling(comparison.bound)}",
    )


def _ceiling(value: float) -> float:
    return math.ceil(max(value, 0.0) * 100) / 100


def _floor(value: float) -> float:
    return math.floor(value * 1e6) / 1e6


def _cosine_quantiles(before: Embeddings, after: Embeddings) -> tuple[float, float, float]:
    norms = np.linalg.norm(before, axis=1).astype(np.float64) * np.linalg.norm(after, axis=1)
    products = np.einsum("nd,nd->n", before.astype(np.float64), after.astype(np.float64))
    # A vector of zeros agrees with nothing.
    cosine = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    worst, low, median = np.quantile(cosine, [0.0, 0.01, 0.5])
    return float(worst), float(low), float(median)


def _flipped_hits(before: tuple[NDArray[np.int64], ...], after: tuple[NDArray[np.int64], ...]) -> tuple[int, int]:
    lost = won = 0
    for first, second in zip(before, after, strict=True):
        for k in _CUTOFFS:
            lost += int(((first < k) & (second >= k)).sum())
            won += int(((first >= k) & (second < k)).sum())
    return lost, won


def _flips(before: tuple[NDArray[np.int64], ...], after: tuple[NDArray[np.int64], ...]) -> tuple[Flip, ...]:
    flips = []
    for direction, first, second in zip(("i2t", "t2i"), before, after, strict=True):
        crossed = np.zeros(len(first), dtype=bool)
        for k in _CUTOFFS:
            crossed |= (first < k) != (second < k)
        for query in np.flatnonzero(crossed).tolist():
            one = Flip(direction=direction, query=query, rank_before=int(first[query]), rank_after=int(second[query]))  # type: ignore[arg-type]
            flips.append(one)
    return tuple(sorted(flips, key=lambda flip: flip.rank_before - flip.rank_after))


def _agreement(before: NDArray[np.float32], after: NDArray[np.float32]) -> tuple[float, float]:
    same = shared = queries = 0.0
    for first, second in ((before, after), (before.T, after.T)):
        k = min(10, first.shape[1])
        same += float((first.argmax(axis=1) == second.argmax(axis=1)).sum())
        top_first = np.argpartition(-first, k - 1, axis=1)[:, :k]
        top_second = np.argpartition(-second, k - 1, axis=1)[:, :k]
        shared += (
            sum(len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(top_first, top_second, strict=True)) / k
        )
        queries += len(first)
    return 100 * same / queries, 100 * shared / queries


def _bootstrap_bound(
    before: tuple[NDArray[np.int64], ...], after: tuple[NDArray[np.int64], ...], caption_image: NDArray[np.int64]
) -> float:
    """95% quantile of the Rsum loss over resampled images; a caption is resampled with its image."""
    images = len(before[0])
    captions_of_image = np.bincount(caption_image, minlength=images)
    image_loss = sum(((before[0] < k).astype(np.float64) - (after[0] < k)) for k in _CUTOFFS)
    caption_loss = sum(((before[1] < k).astype(np.float64) - (after[1] < k)) for k in _CUTOFFS)
    loss_of_captions = np.bincount(caption_image, weights=np.asarray(caption_loss), minlength=images)
    chance = np.random.default_rng(0)
    losses = []
    for _ in range(0, _RESAMPLES, 100):
        counts = chance.multinomial(images, np.full(images, 1 / images), size=100)
        losses.append(
            100 * (counts @ np.asarray(image_loss) / images + counts @ loss_of_captions / (counts @ captions_of_image))
        )
    return float(np.quantile(np.concatenate(losses), 0.95))
