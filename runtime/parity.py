"""Did retrieval survive? Embeddings before and after a change, on the same pairs, compared by what is retrieved.

Comparison measures; `decide` rules. Used by export's gate and by `verify`, so that both mean the same thing.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .bootstrap import CUTOFFS, bound, images_needed, interval, losses
from .configs import check_range
from .errors import DualmatchError
from .recall import Recall, evaluate, ranks

Embeddings = NDArray[np.float32]
Verdict = Literal["pass", "fail", "too few pairs"]


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What a change may cost.

    Attributes:
        rsum_loss: largest loss of Rsum, in points, that the bootstrap bound may reach.
        worst_cosine: least cosine between an embedding before and after.
        component: where given, the largest absolute difference of any component; it then decides in place of the bound, on any number
            of pairs (float32 must give the same numbers, not only the same recall).

    Raises:
        DualmatchError: a loss or a component below 0, or a cosine outside [-1, 1].
    """

    rsum_loss: float
    worst_cosine: float
    component: float | None = None

    def __post_init__(self) -> None:
        check_range("the tolerance of the loss of Rsum", self.rsum_loss, 0, 600)
        check_range("the floor of the cosine", self.worst_cosine, -1, 1)
        check_range("the tolerance of a component", self.component or 0.0, 0, 2)


TOLERANCES = {
    "fp32": Tolerances(rsum_loss=0.1, worst_cosine=0.999999, component=1e-5),
    "fp16": Tolerances(rsum_loss=0.5, worst_cosine=0.999),
    # Eight bits move single embeddings visibly and retrieval hardly: recall decides, the floor finds what is broken.
    "int8": Tolerances(rsum_loss=3.0, worst_cosine=0.95),
}


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A query whose answer entered or left the first K.

    Attributes:
        query: index of the image (i2t) or of the caption (t2i).
        rank_before, rank_after: 0-based rank of its best right answer.
        first_before, first_after: index of what was ranked first.
    """

    direction: Literal["i2t", "t2i"]
    query: int
    rank_before: int
    rank_after: int
    first_before: int
    first_after: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Retrieval before and after, on the same pairs ranked together.

    Attributes:
        before, after: recall with its protocol.
        rsum_loss: Rsum before minus after, in points.
        bound: 95% one-sided upper bound of that loss, from resampling images with their captions (see `bootstrap.bound`).
        rsum_change_interval: 95% two-sided interval of Rsum after minus before, likewise (see `bootstrap.interval`); the gate decides by the bound.
        losses: for each image the points of Rsum that it lost, its captions included; float64 (images,), their mean is `rsum_loss`.
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
    rsum_change_interval: tuple[float, float]
    losses: NDArray[np.float64] = field(compare=False, repr=False)
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
        """Plain values, the flipped queries as their number: `Verification` names them."""
        values = asdict(self)
        del values["losses"]
        return values | {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "flips": len(self.flips),
        }


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The verdict and the sentence that explains it.

    Attributes:
        pairs_needed: where the pairs were too few, about how many images with their captions would decide; None also where none would.
        smallest: the tightest tolerances that would have passed; None where retrieval was not compared.
    """

    verdict: Verdict
    reason: str
    pairs_needed: int | None = None
    smallest: Tolerances | None = None


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
    per_image = losses(ranks_before, ranks_after, caption_image)
    least, most = interval(per_image, paired=True)
    return Comparison(
        before=recall_before,
        after=recall_after,
        rsum_loss=round(recall_before.rsum - recall_after.rsum, 9),  # else 0.1 + 0.2 is above a tolerance of 0.3
        bound=bound(per_image),
        rsum_change_interval=(0.0 - most, 0.0 - least),
        losses=per_image,
        largest_difference=max(differences),
        image_cosine=_cosine_quantiles(before[0], after[0]),
        caption_cosine=_cosine_quantiles(before[1], after[1]),
        same_first=same_first,
        overlap_at_10=overlap,
        hits_lost=lost,
        hits_won=won,
        flips=_flips((ranks_before, ranks_after), similarity_before, similarity_after),
    )


def smallest_tolerances(comparison: Comparison, *, component: bool) -> Tolerances:
    """The tightest tolerances with which `decide` passes, rounded away from what was measured; `component` where it decides."""
    return Tolerances(
        rsum_loss=_at_least(max(comparison.bound, comparison.rsum_loss, 0.0), 2),
        worst_cosine=-_at_least(-max(-1.0, min(comparison.worst_cosine, 1.0)), 6),
        component=float(f"{comparison.largest_difference * 1.01:.2e}") if component else None,
    )


def decide(comparison: Comparison, tolerances: Tolerances) -> Decision:
    """Pass only what is shown to be within the tolerances; everything else is refused."""
    smallest = smallest_tolerances(comparison, component=tolerances.component is not None)
    if not comparison.worst_cosine >= tolerances.worst_cosine:
        return Decision(
            verdict="fail",
            reason=f"the worst cosine is {comparison.worst_cosine:.6f}, below the floor of {tolerances.worst_cosine}; "
            f"a floor of {smallest.worst_cosine} would have passed",
            smallest=smallest,
        )
    if tolerances.component is not None:
        if comparison.largest_difference > tolerances.component:
            return Decision(
                verdict="fail",
                reason=f"the largest difference of a component is {comparison.largest_difference:.2e}, above {tolerances.component:.0e}; "
                f"a tolerance of {smallest.component:.2e} would have passed",
                smallest=smallest,
            )
        return Decision(
            verdict="pass",
            reason=f"every component agrees within {comparison.largest_difference:.2e} (tolerance {tolerances.component:.0e}); "
            f"the smallest tolerance that would have passed is {smallest.component:.2e}",
            smallest=smallest,
        )
    limit = tolerances.rsum_loss
    if comparison.rsum_loss > limit:
        return Decision(
            verdict="fail",
            reason=f"Rsum fell by {comparison.rsum_loss:.2f}, more than {limit}; a tolerance of {smallest.rsum_loss} would have passed",
            smallest=smallest,
        )
    if comparison.bound > limit:
        needed = images_needed(comparison.losses, limit)
        wanted = (
            "no number of pairs would settle it"
            if needed is None
            else f"about {needed} images with captions are needed"
        )
        return Decision(
            verdict="too few pairs",
            reason=f"Rsum changed by {0.0 - comparison.rsum_loss:+.2f}, but on {len(comparison.losses)} images the 95% bound of its loss is "
            f"{comparison.bound:.2f}, above the tolerance of {limit}; {wanted} to tell, or a tolerance of {smallest.rsum_loss} would have passed",
            pairs_needed=needed,
            smallest=smallest,
        )
    return Decision(
        verdict="pass",
        reason=f"Rsum changed by {0.0 - comparison.rsum_loss:+.2f}, 95% bound of the loss {comparison.bound:.2f} (tolerance {limit}); "
        f"the smallest tolerance that would have passed is {smallest.rsum_loss}",
        smallest=smallest,
    )


def _at_least(value: float, digits: int) -> float:
    """The smallest number of so many decimals that is not below `value`."""
    near = round(value, digits)
    return near if near >= value else round(near + 10**-digits, digits)


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
        for k in CUTOFFS:
            lost += int(((first < k) & (second >= k)).sum())
            won += int(((first >= k) & (second < k)).sum())
    return lost, won


def _flips(
    ranks_before_after: tuple[tuple[NDArray[np.int64], ...], tuple[NDArray[np.int64], ...]],
    before: NDArray[np.float32],
    after: NDArray[np.float32],
) -> tuple[Flip, ...]:
    flips = []
    ways: tuple[Literal["i2t", "t2i"], ...] = ("i2t", "t2i")
    for direction, old, new, first, second in zip(
        ways, *ranks_before_after, (before, before.T), (after, after.T), strict=True
    ):
        crossed = np.any([(old < k) != (new < k) for k in CUTOFFS], axis=0)
        flips += [
            Flip(
                direction=direction,
                query=query,
                rank_before=int(old[query]),
                rank_after=int(new[query]),
                first_before=int(first[query].argmax()),
                first_after=int(second[query].argmax()),
            )
            for query in np.flatnonzero(crossed).tolist()
        ]
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
