"""The numbers that the papers print for the networks our recipes train, table by table.

DSRAN: Wen et al., "Learning Dual Semantic Relations with Graph Attention for Image-Text Matching", IEEE TCSVT 2020.
VSRN: Li et al., "Visual Semantic Reasoning for Image-Text Matching", ICCV 2019.
What a figure only draws is not here: no number is read off a plot.
"""

from dataclasses import dataclass
from typing import Any

DSRAN, VSRN = "DSRAN", "VSRN"
FLICKR30K, COCO_1K, COCO_5K = "Flickr30K", "COCO 1K", "COCO 5K"
# How each test set is evaluated: images, and the options of `dualmatch runtime evaluate`.
TEST_SETS = {
    FLICKR30K: ("1000 images", ""),
    COCO_1K: ("5000 images in five folds, averaged", " --protocol five-folds"),
    COCO_5K: ("5000 images", ""),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of a paper's table.

    Attributes:
        paper, table: where it is printed.
        test_set: one of `TEST_SETS`.
        i2t, t2i: R@1, R@5, R@10 of image to text and text to image, per cent.
        printed_rsum: the sum as printed; None where the paper prints none.
        models: whose similarities are averaged; 0: the paper does not say.
        rerank: K1 of the re-ranking of image to text; 0: none.
    """

    paper: str
    table: str
    test_set: str
    i2t: tuple[float, float, float]
    t2i: tuple[float, float, float]
    printed_rsum: float | None = None
    models: int = 1
    rerank: int = 0

    @property
    def rsum(self) -> float:
        """The printed sum, or that of the six."""
        return round(sum(self.i2t) + sum(self.t2i), 1) if self.printed_rsum is None else self.printed_rsum

    @property
    def evaluate(self) -> str:
        """The command that measures the same."""
        rerank = f" --rerank {self.rerank}" if self.rerank else ""
        ensemble = " --ensemble BUNDLE2" if self.models == 2 else ""
        split = (
            "testall" if self.paper == VSRN and self.test_set != FLICKR30K else "test"
        )  # SCAN's `test` is a fifth of COCO's
        return f"dualmatch runtime evaluate BUNDLE --data DATA --split {split}{TEST_SETS[self.test_set][1]}{ensemble}{rerank}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the keys that recall has elsewhere."""
        recall = {name: dict(zip(("r1", "r5", "r10"), getattr(self, name), strict=True)) for name in ("i2t", "t2i")}
        return {
            "paper": self.paper,
            "table": self.table,
            "test_set": self.test_set,
            **recall,
            "rsum": self.rsum,
            "models": self.models,
            "rerank": self.rerank,
            "evaluate": self.evaluate,
        }


Numbers = tuple[float, float, float, float, float, float, float | None]


def _target(paper: str, table: str, test_set: str, numbers: Numbers, **how: int) -> Target:
    *six, rsum = numbers
    i2t, t2i = tuple(six[:3]), tuple(six[3:])
    return Target(paper=paper, table=table, test_set=test_set, i2t=i2t, t2i=t2i, printed_rsum=rsum, **how)  # type: ignore[arg-type]


# (models, K1) of the four rows that DSRAN prints for each network.
_FOUR = ((1, 0), (1, 15), (2, 0), (2, 15))
_TABLE_1: dict[str, dict[str, tuple[Numbers, ...]]] = {
    "gru": {
        COCO_1K: (
            (76.3, 94.9, 98.4, 62.4, 89.7, 95.2, 516.9),
            (79.0, 96.2, 98.5, 62.4, 89.7, 95.2, 521.0),
            (78.0, 95.6, 98.5, 64.2, 90.4, 95.8, 522.5),
            (80.4, 96.7, 98.7, 64.2, 90.4, 95.8, 526.2),
        ),
        COCO_5K: (
            (51.9, 81.6, 89.8, 39.5, 70.6, 81.0, 414.4),
            (55.4, 84.4, 91.0, 39.5, 70.6, 81.0, 421.9),
            (54.4, 83.5, 91.3, 41.5, 71.9, 82.1, 424.7),
            (57.6, 85.6, 91.9, 41.5, 71.9, 82.1, 430.6),
        ),
    },
    "bert": {
        COCO_1K: (
            (77.1, 95.3, 98.1, 62.9, 89.9, 95.3, 518.6),
            (78.8, 96.1, 98.5, 62.9, 89.9, 95.3, 521.5),
            (78.3, 95.7, 98.4, 64.5, 90.8, 95.8, 523.5),
            (80.6, 96.7, 98.7, 64.5, 90.8, 95.8, 527.1),
        ),
        COCO_5K: (
            (53.7, 82.1, 89.9, 40.3, 70.9, 81.3, 418.2),
            (56.3, 84.2, 90.7, 40.3, 70.9, 81.3, 423.7),
            (55.3, 83.5, 90.9, 41.7, 72.7, 82.8, 426.9),
            (57.9, 85.3, 92.0, 41.7, 72.7, 82.8, 432.4),
        ),
    },
}
_TABLE_2: dict[str, tuple[Numbers, ...]] = {
    "gru": (
        (72.6, 93.6, 96.3, 56.3, 84.0, 89.8, 492.6),
        (75.7, 94.7, 96.8, 56.3, 84.0, 89.8, 497.3),
        (74.9, 94.5, 97.0, 58.6, 85.8, 91.3, 502.1),
        (79.6, 95.6, 97.5, 58.6, 85.8, 91.3, 508.4),
    ),
    "bert": (
        (75.3, 94.4, 97.6, 57.3, 84.8, 90.9, 500.3),
        (78.6, 95.6, 97.6, 57.3, 84.8, 90.9, 504.8),
        (77.8, 95.1, 97.6, 59.2, 86.0, 91.9, 507.6),
        (80.5, 95.5, 97.9, 59.2, 86.0, 91.9, 511.0),
    ),
}
_TABLE_3: dict[int, Numbers] = {
    1: (48.1, 78.1, 87.2, 36.4, 68.1, 78.6, 396.4),
    2: (52.9, 79.8, 88.5, 38.2, 69.7, 79.9, 409.0),
    3: (58.4, 84.8, 91.9, 44.5, 75.3, 84.2, 439.1),
    4: (73.2, 92.3, 96.4, 56.3, 83.6, 89.8, 491.6),
    5: (68.0, 91.7, 96.0, 51.6, 81.2, 88.4, 476.9),
    6: (72.8, 93.4, 97.1, 57.1, 84.5, 90.8, 495.6),
    7: (73.4, 92.9, 96.9, 57.2, 84.7, 90.8, 495.9),
    8: (75.3, 94.4, 97.6, 57.3, 84.8, 90.9, 500.3),
    9: (43.3, 73.9, 83.4, 33.7, 63.9, 74.7, 372.9),
    10: (52.6, 78.5, 85.4, 39.2, 69.4, 79.1, 404.3),
    11: (61.2, 87.1, 93.2, 45.0, 74.7, 83.5, 444.7),
    12: (67.7, 89.4, 94.8, 51.4, 79.8, 87.9, 470.9),
    13: (66.4, 89.4, 95.1, 48.9, 78.1, 86.3, 464.2),
    14: (69.3, 90.8, 96.3, 54.5, 81.7, 89.2, 481.8),
    15: (70.1, 90.7, 95.5, 53.2, 81.8, 88.9, 480.2),
    16: (72.6, 93.6, 96.3, 56.3, 84.0, 89.8, 492.6),
}
_VSEPP: dict[str, tuple[str, Numbers]] = {
    COCO_1K: ("Table I", (64.6, 90.0, 95.7, 52.0, 84.3, 92.0, 478.6)),
    COCO_5K: ("Table I", (41.3, 71.1, 81.2, 30.3, 59.4, 72.4, 355.7)),
    FLICKR30K: ("Table II", (52.9, 80.5, 87.2, 39.6, 70.1, 79.5, 409.8)),
}
_VSRN: dict[str, tuple[str, Numbers]] = {
    COCO_1K: ("Table 1", (76.2, 94.8, 98.2, 62.8, 89.7, 95.1, None)),
    COCO_5K: ("Table 2", (53.0, 81.1, 89.4, 40.5, 70.6, 81.1, None)),
    FLICKR30K: ("Table 3", (71.3, 90.6, 96.0, 54.7, 81.8, 88.2, None)),
}
# By the recipe's last words.
_VSRN_TABLE_4: dict[str, Numbers] = {
    "mean-pool": (64.3, 90.5, 95.1, 49.2, 83.4, 91.5, None),
    "rrr": (68.5, 93.2, 96.3, 56.8, 87.2, 94.2, None),
    "gsr": (72.3, 94.4, 98.0, 59.6, 88.6, 94.5, None),
    "1rrr-gsr": (75.3, 94.7, 98.1, 62.1, 89.2, 94.9, None),
    "4rrr-gsr": (76.2, 94.8, 98.2, 62.8, 89.7, 95.1, None),
    "4rrr-gsr-no-captioning": (74.6, 94.6, 98.2, 61.2, 89.0, 94.8, None),
}
_VSRN_TABLE_5: dict[str, Numbers] = {
    "random": (75.1, 94.5, 98.0, 62.3, 89.1, 94.6, None),
    "size": (75.8, 94.9, 98.4, 62.5, 89.5, 94.8, None),
    "confidence": (76.2, 94.8, 98.2, 62.8, 89.7, 95.1, None),
}


def dsran_targets(text: str, data: str) -> tuple[Target, ...]:
    """Tables I and II: `gru` or `bert` on `coco` or `flickr30k`; alone and in twos, plain and re-ranked."""
    if data == "flickr30k":
        printed = {FLICKR30K: ("Table II", _TABLE_2[text])}
    else:
        printed = {test_set: ("Table I", numbers) for test_set, numbers in _TABLE_1[text].items()}
    return tuple(
        _target(DSRAN, table, test_set, numbers, models=models, rerank=rerank)
        for test_set, (table, rows) in printed.items()
        for numbers, (models, rerank) in zip(rows, _FOUR, strict=True)
    )


def ablation_targets(number: int) -> tuple[Target, ...]:
    """A line of DSRAN's Table III."""
    return (_target(DSRAN, f"Table III, line {number}", FLICKR30K, _TABLE_3[number]),)


def vsepp_targets(data: str) -> tuple[Target, ...]:
    """VSE++ as DSRAN's tables print it."""
    return tuple(_target(DSRAN, table, one, numbers) for one, (table, numbers) in _VSEPP.items() if _on(one, data))


def vsrn_targets(data: str) -> tuple[Target, ...]:
    """Tables 1 to 3 of VSRN, all of them averages of two models."""
    return tuple(
        _target(VSRN, table, one, numbers, models=2) for one, (table, numbers) in _VSRN.items() if _on(one, data)
    )


def vsrn_ablations() -> dict[str, tuple[Target, ...]]:
    """Tables 4 and 5 of VSRN by the last words of the recipe's name; their full network repeats Table 1's ensemble."""
    tables = {"table4": ("Table 4", _VSRN_TABLE_4), "table5": ("Table 5", _VSRN_TABLE_5)}
    return {
        f"{name}-{row}": (_target(VSRN, table, COCO_1K, numbers, models=0),)
        for name, (table, rows) in tables.items()
        for row, numbers in rows.items()
    }


def _on(test_set: str, data: str) -> bool:
    return (test_set == FLICKR30K) == (data == "flickr30k")
