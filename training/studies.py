"""Studies: recipes that are trained on the same data with the same seeds, and compared in one table. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dualmatch.runtime.errors import DualmatchError

from .paper_tables import ablation_targets

LINES = ("global", "global, SSR", "regional", "regional, SSR", "both", "both, SSR", "both, JSR", "both, SSR, JSR")
WHOLE = LINES[-1]

# Each module against the same network without it, and each path against both.
_MODULES = (
    ("global", "global, SSR"),
    ("regional", "regional, SSR"),
    ("both", "both, SSR"),
    ("both", "both, JSR"),
    ("both, SSR", WHOLE),
    ("both, JSR", WHOLE),
    ("global, SSR", "regional, SSR"),
    ("global, SSR", WHOLE),
    ("regional, SSR", WHOLE),
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained and what is compared.

    Attributes:
        description: one line.
        rows: recipes by the label of their row.
        contrasts: pairs of labels: the second is tested against the first.
        printed_from: the line of DSRAN's Table III that the row "global" stands for: 1 with BERT, 9 with a GRU; 0 where none does.
    """

    description: str
    rows: dict[str, str]
    contrasts: tuple[tuple[str, str], ...]
    printed_from: int = 0

    def printed_gain(self, before: str, after: str) -> float | None:
        """By how much Rsum differs between these two lines in the paper's Table III (Flickr30K); None where they are no lines of it."""
        if not self.printed_from or before not in LINES or after not in LINES:
            return None
        first, second = (ablation_targets(self.printed_from + LINES.index(label))[0].rsum for label in (before, after))
        return round(second - first, 1)

    def only(self, labels: Sequence[str]) -> "Study":
        """The study of some of its rows; its contrasts are those of all.

        Raises:
            DualmatchError: a label that it does not have.
        """
        for label in labels:
            if label not in self.rows:
                raise DualmatchError(f"the study has no row {label!r}; it has {'; '.join(self.rows)}.")
        return replace(self, rows={label: name for label, name in self.rows.items() if label in labels})


def _table3(base: str, first: int) -> dict[str, str]:
    """The eight lines of DSRAN's Table III; both paths without JSR meet in the gated fusion layer."""
    return {label: f"{base}-table3-{number}" for number, label in enumerate(LINES, start=first)}


_SCENES = _table3("scenes-dsran-gru", 9)

STUDIES: dict[str, Study] = {
    "scenes": Study(
        description="DSRAN's Table III and VSRN on the embedded scenes",
        rows=_SCENES | {"VSRN": "scenes-vsrn"},
        contrasts=(*_MODULES, ("VSRN", WHOLE)),
        printed_from=9,
    ),
    "scenes-places": Study(
        description="what a path knows of places, on the embedded scenes",
        rows={
            "global, SSR": _SCENES["global, SSR"],
            "global, SSR, positions": "scenes-dsran-gru-global-positions",
            "regional, SSR": _SCENES["regional, SSR"],
            "regional, SSR, no positions": "scenes-dsran-gru-regional-no-positions",
            "regional, SSR, small regions": "scenes-dsran-gru-regional-small",
            WHOLE: _SCENES[WHOLE],
            f"{WHOLE}, positions": "scenes-dsran-gru-positions",
        },
        contrasts=(
            ("global, SSR", "global, SSR, positions"),
            ("regional, SSR, no positions", "regional, SSR"),
            ("global, SSR, positions", "regional, SSR"),
            ("regional, SSR", "regional, SSR, small regions"),
            (WHOLE, f"{WHOLE}, positions"),
        ),
    ),
    "scenes-curves": Study(
        description="K, the norm of the graph attention and the number of epochs, on the embedded scenes",
        rows={
            "K = 1": "scenes-dsran-gru-k1",
            "K = 2, BatchNorm, 14 epochs": _SCENES[WHOLE],
            "K = 4": "scenes-dsran-gru-k4",
            "LayerNorm": "scenes-dsran-gru-with-layernorm",
            "no norm": "scenes-dsran-gru-without-batchnorm",
            "7 epochs": "scenes-dsran-gru-epochs7",
            "28 epochs": "scenes-dsran-gru-epochs28",
        },
        contrasts=(
            ("K = 1", "K = 2, BatchNorm, 14 epochs"),
            ("K = 2, BatchNorm, 14 epochs", "K = 4"),
            ("no norm", "K = 2, BatchNorm, 14 epochs"),
            ("LayerNorm", "K = 2, BatchNorm, 14 epochs"),
            ("7 epochs", "K = 2, BatchNorm, 14 epochs"),
            ("K = 2, BatchNorm, 14 epochs", "28 epochs"),
        ),
    ),
    # Its line "global" is a linear head on each side: pooled features, no attention (a test compares it with the recipe of that name).
    "flickr8k": Study(
        description="DSRAN's Table III, VSRN and two other trainings on photographs with detected boxes",
        rows=_table3("flickr8k-dsran-boxes", 1)
        | {
            "VSRN": "flickr8k-vsrn-boxes",
            "authors": "flickr8k-dsran-boxes-authors",
            "modern": "flickr8k-dsran-boxes-modern",
        },
        contrasts=(
            *_MODULES,
            ("VSRN", WHOLE),
            ("global", WHOLE),
            ("authors", WHOLE),
            ("authors", "modern"),
            (WHOLE, "modern"),
        ),
        printed_from=1,
    ),
}
