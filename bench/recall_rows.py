"""Recall under every protocol, of each model and of their ensemble, from embeddings that were made once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime import recall, streaming
from dualmatch.runtime.bootstrap import Points, Ranks, interval, losses
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.recall import FOLDS, Recall

from .test_sets import recognised


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A model's embeddings of a data set.

    Attributes:
        label: what tells it from the others.
        about: see `runtime.subject`.
        images, captions: (n, d) float32, in the data set's order.
    """

    label: str
    about: Mapping[str, Any]
    images: NDArray[np.float32]
    captions: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The recall of one model, or of an ensemble, under one protocol.

    Attributes:
        models: whose similarities were averaged.
        protocol: a key of `recall.FOLDS`.
        rerank: K1 of the re-ranking from image to text; 0: none.
        parts: of each fold the 0-based ranks of its images and of its captions, and the image in the fold that each caption belongs to.
    """

    models: tuple[str, ...]
    protocol: str
    rerank: int
    recall: Recall
    parts: Sequence[tuple[Ranks, Ranks, Ranks]]

    @property
    def points_short(self) -> Points:
        """What each image lacks of the 600 points of Rsum."""
        return np.concatenate(
            [
                losses((np.zeros_like(images), np.zeros_like(captions)), (images, captions), owner)
                for images, captions, owner in self.parts
            ]
        )

    def points_above(self, other: "Row") -> Points:
        """What each image has above another row of the same protocol."""
        return np.concatenate(
            [
                losses(own[:2], others[:2], owner)
                for own, others, (_, _, owner) in zip(self.parts, other.parts, self.parts, strict=True)
            ]
        )

    def name(self) -> dict[str, Any]:
        """What tells it from the other rows."""
        return {"models": list(self.models), "protocol_name": self.protocol, "rerank": self.rerank}

    def to_json(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its recall, an interval of its Rsum, and which of the papers' test sets it was measured on, or null.

        Args:
            data: see `runtime.subject.about_data`.
        """
        low, high = interval(self.points_short, paired=False)
        return {
            **self.name(),
            "kind": "single" if len(self.models) == 1 else "ensemble",
            "test_set": recognised(data, self.protocol)[0],
            **self.recall.to_json(),
            "rsum_interval": [600 - high, 600 - low],
        }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Rsum of one row less that of another of the same protocol, with its paired 95% interval."""

    of: Row
    against: Row
    value: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        return {
            "of": self.of.name(),
            "against": self.against.name(),
            "rsum_difference": self.value,
            "interval": [self.low, self.high],
            "tells": self.tells,
        }


def all_rows(
    models: Sequence[Encoded], *, image_of: Ranks, rerank: int, split: str
) -> tuple[list[Row], list[dict[str, str]]]:
    """Each model, and all together; every protocol; plain and re-ranked.

    Args:
        image_of: for each caption the index of its image.
        rerank: K1 of the re-ranking from image to text; 0 leaves it out.

    Returns:
        the rows, and the `row` and `reason` of each that this data set cannot have.
    """
    groups = [[model] for model in models] + ([list(models)] if len(models) > 1 else [])
    rows, absent = [], []
    num_images = len(models[0].images)
    for protocol, folds in FOLDS.items():
        k1 = 0
        try:
            recall.require_folds(image_of, num_images, folds)
            recall.require_folds(image_of, num_images, folds, k1_i2t=rerank)
            k1 = rerank
        except DualmatchError as reason:
            divides = num_images % folds == 0
            absent.append({"row": f"{protocol}, re-ranked" if divides else protocol, "reason": str(reason)})
            if not divides:
                continue
        for group in groups:
            rows += _ranked(group, protocol, image_of=image_of, k1=k1, split=split)
    return rows, absent


def _ranked(group: Sequence[Encoded], protocol: str, *, image_of: Ranks, k1: int, split: str) -> list[Row]:
    """The plain row and, with a `k1`, the re-ranked one, from one pass over the similarities."""
    plain, reranked = [], []
    for images, captions in recall.fold_members(image_of, len(group[0].images), FOLDS[protocol]):
        owner = image_of[captions] - images.start
        part = [(model.images[images], model.captions[captions]) for model in group]
        of_images, of_captions, candidates = streaming.ranks(part, owner, k1)
        plain.append((of_images, of_captions, owner))
        if candidates is not None:
            reranked.append((recall.reranked_i2t(of_images, candidates, owner), of_captions, owner))
    names = tuple(model.label for model in group)
    return [
        Row(
            models=names,
            protocol=protocol,
            rerank=used,
            recall=recall.summary(
                [part[:2] for part in parts], image_of, split=split, ensemble=len(group), k1_i2t=used
            ),
            parts=parts,
        )
        for parts, used in ((plain, 0), (reranked, k1))
        if parts
    ]


def differences(rows: Sequence[Row]) -> list[Difference]:
    """Every other model and the ensemble against the first model, under the same protocol; and every re-ranking against none."""
    pairs = [pair for pair in product(rows, rows) if pair[0].protocol == pair[1].protocol]
    models = [
        (of, against)
        for of, against in pairs
        if of.rerank == against.rerank and of.models != against.models == rows[0].models
    ]
    reranked = [
        (of, against) for of, against in pairs if of.models == against.models and of.rerank and not against.rerank
    ]
    return [_difference(of, against) for of, against in models + reranked]


def _difference(of: Row, against: Row) -> Difference:
    low, high = interval(of.points_above(against), paired=True)
    return Difference(of=of, against=against, value=of.recall.rsum - against.recall.rsum, low=low, high=high)
