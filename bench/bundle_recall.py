"""`bench recall`: recall of bundles under every protocol, differences that may mean nothing, and where each model is weak."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualmatch.runtime.bootstrap import CONFIDENCE, RESAMPLES
from dualmatch.runtime.bundle import Bundle
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.evaluate import encode_each
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.recall import checked_caption_image
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.subject import about_bundle, subject

from .recall_rows import Difference, Encoded, Row, all_rows, differences
from .recall_slices import RELATION_WORDS, SETTING_WORDS, hard_pairs, slice_rows, slices_of

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = {"name": "dualmatch.bench.recall", "version": 1}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class RecallReport:
    """All that `bench recall` found.

    Attributes:
        subject: see `runtime.subject`.
        absent: rows that the data set cannot have, with their reasons.
        slices, pairs: see `recall_slices`.
    """

    subject: dict[str, Any]
    rows: Sequence[Row]
    absent: Sequence[dict[str, str]]
    differences: Sequence[Difference]
    slices: Sequence[dict[str, Any]]
    pairs: Sequence[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": dict(SCHEMA),
            "subject": self.subject,
            "rows": [row.to_json(self.subject["data"]) for row in self.rows],
            "absent": list(self.absent),
            "comparisons": [difference.to_json() for difference in self.differences],
            "slices": list(self.slices),
            "hard_pairs": list(self.pairs),
            "words": {"relation": sorted(RELATION_WORDS), "setting": sorted(SETTING_WORDS)},
            "bootstrap": {
                "resamples": RESAMPLES,
                "confidence": CONFIDENCE,
                "unit": "an image with its captions; of hard pairs, a pair",
            },
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        write_atomically(path, json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def tables(self) -> "Group":
        """The report for people."""
        from .recall_table import tables

        return tables(self.to_json())


def encoded_bundles(
    bundles: Sequence[Bundle],
    dataset: Dataset,
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 32,
    regions: RegionFile | None = None,
    progress: Progress | None = None,
) -> list[Encoded]:
    """Every image and caption encoded once by each bundle; raises as `runtime.evaluate.encode_each`."""
    sides = encode_each(
        bundles, dataset, backend=backend, threads=threads, batch_size=batch_size, regions=regions, progress=progress
    )
    return [
        Encoded(
            label=bundle.path.name, about={**about_bundle(bundle), "backend": backend}, images=images, captions=captions
        )
        for bundle, (images, captions) in zip(bundles, sides, strict=True)
    ]


def labels(paths: Sequence[Path]) -> list[str]:
    """What to call each: its folder's name, or its path where two folders have one name.

    Raises:
        DualmatchError: one was given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise DualmatchError("a bundle or run was given twice; its ensemble with itself is itself, so give each once.")
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def recall_report(models: Sequence[Encoded], dataset: Dataset, *, rerank: int = 15) -> RecallReport:
    """Every row, difference and slice of models whose embeddings are at hand.

    Args:
        rerank: K1 of the re-ranking from image to text; 0 leaves it out.

    Raises:
        DualmatchError: embeddings that are not finite, or an image without a caption.
    """
    image_of = checked_caption_image(len(dataset.items), len(dataset.captions), dataset.caption_image)
    rows, absent = all_rows(models, image_of=image_of, rerank=rerank, split=", ".join(dataset.splits))
    whole = [row for row in rows if row.protocol == "full" and not row.rerank]
    groups = [[model for model in models if model.label in row.models] for row in whole]
    return RecallReport(
        subject=subject(dataset, [{"label": model.label, **model.about} for model in models])["subject"],
        rows=rows,
        absent=absent,
        differences=differences(rows),
        slices=slice_rows(whole, slices_of(dataset), image_of),
        pairs=hard_pairs(groups, dataset),
    )
