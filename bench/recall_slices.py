"""Where a model is weak: text to image by kind of caption, and the pairs of scenes that differ in one thing only.

The word lists are small and blunt: a caption belongs to a slice if one of the words stands in it. They find most of what they are after
and some of what they are not ("a right turn"); the prepositions that nearly every caption has (in, on, at, of, with) are left out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.bootstrap import CUTOFFS, Points, Ranks, share_intervals
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.recall import recall_at

from .recall_rows import Encoded, Row

_RELATIONS = """
above across against along alongside among around atop behind below beneath beside between beyond facing front inside into left near next
onto opposite over past right through toward towards under underneath within
carried carries carry carrying chase chases chasing contain containing contains follow following follows held hidden hiding hold holding
holds leading leads leaning pull pulling pulls push pushes pushing ride rides riding throw throwing throws
"""
_SETTINGS = """
beach city cliff coast court creek desert downtown dunes evening field forest garden grass grassy ground gym hill home ice indoor indoors
kitchen lake lawn market meadow moon mountain mountains night ocean outdoor outdoors outside park path playground pond pool river road
rock rocks rocky room sand sandy sea shore sidewalk sky snow snowy stage stadium starry street sun sunny sunset town track trail trees
water wave waves winter wooded woods yard
"""
RELATION_WORDS, SETTING_WORDS = frozenset(_RELATIONS.split()), frozenset(_SETTINGS.split())
# Words of a caption, and where each bin but the first begins.
_LENGTHS = (8, 12, 16)
_TAGS = ("relation", "setting")
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Some captions of a data set: `chosen` is (captions,), true for its own."""

    group: str
    name: str
    chosen: NDArray[np.bool_]


def slices_of(dataset: Dataset) -> list[Slice]:
    """By length, by classes of words, and by relation and setting where the data set knows them; those without captions left out."""
    words = [_WORD.findall(caption.lower()) for caption in dataset.captions]
    lengths = np.array([len(one) for one in words])
    bins = np.searchsorted(_LENGTHS, lengths, side="right")
    edges = [1, *_LENGTHS]
    found = [
        Slice(
            group="caption length",
            name=f"{low} to {high - 1} words" if high else f"{low} words and more",
            chosen=bins == number,
        )
        for number, (low, high) in enumerate(zip(edges, [*edges[1:], 0], strict=True))
    ]
    relation, setting = (
        np.array([not listed.isdisjoint(one) for one in words]) for listed in (RELATION_WORDS, SETTING_WORDS)
    )
    for name, chosen in (
        ("relation words", relation),
        ("setting words", setting),
        ("neither", ~relation & ~setting),
    ):
        found.append(Slice(group="words", name=name, chosen=chosen))
    owners = np.array(dataset.caption_image)
    for tag in _TAGS:
        values = np.array([dict(item.tags).get(tag, "") for item in dataset.items])
        found += [
            Slice(group=tag, name=value, chosen=(values == value)[owners])
            for value in dict.fromkeys(values.tolist())
            if value
        ]
    return [one for one in found if one.chosen.any()]


def slice_rows(rows: Sequence[Row], slices: Sequence[Slice], owners: Ranks) -> list[dict[str, Any]]:
    """Recall of each slice from text to image, with intervals, against all other captions and against the first model.

    Args:
        rows: plain ones over all images together, the first model's first.
        owners: for each caption its image.
    """
    return [
        {
            "models": list(row.models),
            "group": one.group,
            "slice": one.name,
            "captions": int(one.chosen.sum()),
            "images": len(np.unique(owners[one.chosen])),
            **_against(ranks[one.chosen], _sides(one.chosen, ~one.chosen, ranks, ranks), owners),
            "against_first": None
            if row is rows[0]
            else _differences(_sides(one.chosen, one.chosen, ranks, rows[0].parts[0][1]), owners),
        }
        for row, ranks in ((row, row.parts[0][1]) for row in rows)
        for one in slices
    ]


# For each side (those compared with, then those in question) which captions count, and the ranks of all.
_Sides = tuple[tuple[NDArray[np.bool_], Ranks], tuple[NDArray[np.bool_], Ranks]]


def _sides(chosen: NDArray[np.bool_], others: NDArray[np.bool_], ranks: Ranks, other_ranks: Ranks) -> _Sides:
    return (others, other_ranks), (chosen, ranks)


def _against(own: Ranks, sides: _Sides, owners: Ranks) -> dict[str, Any]:
    """The recall of a slice with its intervals, and how far it is from the rest; null where there is no rest."""
    rest = int(sides[0][0].sum())
    intervals = {f"r{k}": shares[:, 1].tolist() for k, shares, _ in _resampled(sides, owners)}
    return {
        **{f"r{k}": recall_at(own, k) for k in CUTOFFS},
        "intervals": intervals,
        "against_rest": {"captions": rest, **_differences(sides, owners)} if rest else None,
    }


def _differences(sides: _Sides, owners: Ranks) -> dict[str, Any]:
    (others, other_ranks), (chosen, ranks) = sides
    values = {f"r{k}": recall_at(ranks[chosen], k) - recall_at(other_ranks[others], k) for k in CUTOFFS}
    return {**values, "intervals": {f"r{k}": steps[:, 0].tolist() for k, _, steps in _resampled(sides, owners)}}


def _resampled(sides: _Sides, owners: Ranks) -> Iterator[tuple[int, Points, Points]]:
    """For every cut-off the intervals of both sides' recall and of their difference."""
    images = int(owners.max()) + 1

    def by_image(values: NDArray[np.bool_]) -> Points:
        return np.bincount(owners, weights=values, minlength=images).astype(np.float64)

    counts = np.stack([by_image(chosen) for chosen, _ in sides], axis=1)
    for k in CUTOFFS:
        hits = np.stack([by_image(chosen & (ranks < k)) for chosen, ranks in sides], axis=1)
        yield k, *share_intervals(hits, counts)


def hard_pairs(groups: Sequence[Sequence[Encoded]], dataset: Dataset) -> list[dict[str, Any]]:
    """How often the scenes of a pair that differ only in a relation, or only in the setting, are told apart; chance is 50%.

    From text to image: a caption scores higher on its own scene than on the partner. From image to text: a scene scores its best own caption
    above the partner's best. Equal scores are not told apart. A data set without such pairs has no row.

    Args:
        groups: a model alone, or those whose similarities are averaged.
    """
    rows = {item.id: row for row, item in enumerate(dataset.items)}
    partners = {
        rows[item.id]: rows[tags["pair"]]
        for item, tags in ((item, dict(item.tags)) for item in dataset.items)
        if tags.get("pair") in rows and "differs" in tags
    }
    owners = np.array(dataset.caption_image)
    captions_of = {row: np.flatnonzero(owners == row) for row in partners}
    found = []
    for group in groups:
        for what in dict.fromkeys(dict(dataset.items[row].tags)["differs"] for row in partners):
            pairs = [
                (one, other)
                for one, other in partners.items()
                if one < other and dict(dataset.items[one].tags)["differs"] == what
            ]
            told = [_told_apart(group, pair, captions_of) for pair in pairs]
            found.append(
                {
                    "models": [model.label for model in group],
                    "differs": what,
                    "pairs": len(pairs),
                    "captions": _share([one[0] for one in told]),
                    "images": _share([one[1] for one in told]),
                }
            )
    return found


def _told_apart(
    group: Sequence[Encoded], pair: tuple[int, int], captions_of: Mapping[int, Ranks]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(told apart, of) of a pair's captions, and of its two scenes."""
    own, others = (captions_of[row] for row in pair)
    captions = np.concatenate([own, others])
    scores = np.mean([model.images[list(pair)] @ model.captions[captions].T for model in group], axis=0)
    right = np.repeat([0, 1], [len(own), len(others)])
    of_captions = scores[right, np.arange(len(right))] > scores[1 - right, np.arange(len(right))]
    best = np.stack([scores[:, right == side].max(axis=1) for side in (0, 1)], axis=1)
    return (int(of_captions.sum()), len(right)), (int(best[0, 0] > best[0, 1]) + int(best[1, 1] > best[1, 0]), 2)


def _share(told: Sequence[tuple[int, int]]) -> dict[str, Any]:
    values = np.array(told, np.float64)
    shares, _ = share_intervals(values[:, :1], values[:, 1:])
    hits, of = values.sum(axis=0)
    return {"value": 100 * hits / of, "interval": shares[:, 0].tolist(), "of": int(of)}
