"""What is wrong with a data set, found before a long run instead of in the middle of it or never."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import open_rgb
from dualmatch.runtime.regions import RegionFile

from .base import Dataset, ImageItem
from .entries import IN_TWO_SPLITS, Faults
from .opening import open_dataset

UNREADABLE = "unreadable images"
NO_FEATURES = "images without features"
SAME_IMAGE = "images that are another image of their split"
SAME_CAPTION = "captions that their image has twice"
SHARED_CAPTION = "captions that stand in two splits"
LONG_CAPTION = "captions of more than {} words"
# Splits that may share images: COCO's 1000 test images are the first of its 5000, and what both sides train on leaks nowhere.
ALLIED = ({"test", "testall"}, {"train", "restval"})

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """What a split holds; captions per image as fewest, mean, most."""

    images: int
    captions: int
    fewest: int
    mean: float
    most: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Faults of one kind.

    Attributes:
        error: a run would fail on them, or its recall would mean nothing.
        entries: a line for each.
    """

    kind: str
    error: bool
    entries: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `check_dataset` found.

    Attributes:
        splits: counts of what can be used, by split.
        words: words a caption: fewest, mean, most.
        features: (regions, channels, position numbers) of the region features, None without any.
    """

    name: str
    layout: str
    splits: dict[str, SplitCounts]
    words: tuple[int, float, int]
    features: tuple[int, int, int] | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is an error."""
        return not any(finding.error for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, every entry listed."""
        return {**asdict(self), "passed": self.passed}

    def require(self) -> None:
        """Refuse a data set with errors, in a sentence.

        Raises:
            DualmatchError: as it says.
        """
        if self.passed:
            return
        counts = [f"{finding.kind} ({len(finding.entries)})" for finding in self.findings if finding.error]
        leak = any(finding.kind == IN_TWO_SPLITS for finding in self.findings)
        raise DualmatchError(
            f"data set {self.name!r} is not fit for a run: {', '.join(counts)}; "
            + (
                "keep every image in one split, or what is trained on is also tested."
                if leak
                else "mend the list above."
            )
        )


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What one image showed.

    Attributes:
        content: hash of the file, or of the row of features.
        pixels: hash of what it decodes to; the content's where nothing is decoded.
    """

    content: bytes = b""
    pixels: bytes = b""
    unreadable: str = ""
    featureless: str = ""


def check_dataset(
    data: str | Path,
    *,
    regions: RegionFile | None = None,
    max_words: int = 50,
    workers: int | None = None,
    progress: Progress | None = None,
) -> DataReport:
    """Read and decode every image of a data set, and its features, and compare them all; no single fault stops it.

    Two images are the same if their files are, or all the pixels that they decode to (a photograph saved again without loss).

    Args:
        data: as `open_dataset` takes it.
        regions: features that every image should have; by default those that come with the data set.
        max_words: longer captions are counted.
        workers: threads that read and decode; by default one a processor.

    Raises:
        DualmatchError: the data set cannot be opened at all.
    """
    faults = Faults(collect=True)
    dataset = open_dataset(data, faults)
    own = regions or (RegionFile(dataset.regions) if dataset.regions is not None else None)
    looks = _looks(dataset.items, regions, workers or os.cpu_count() or 1, progress)
    two_splits, twice = _same_images(dataset.items, looks)
    findings = {kind: (True, entries) for kind, entries in faults.found.items()}
    findings[IN_TWO_SPLITS] = (True, [*findings.get(IN_TWO_SPLITS, (True, []))[1], *two_splits])
    pairs = list(zip(dataset.items, looks, strict=True))
    findings[UNREADABLE] = (True, [f"{item.id}: {look.unreadable}" for item, look in pairs if look.unreadable])
    findings[NO_FEATURES] = (True, [f"{item.id}: {look.featureless}" for item, look in pairs if look.featureless])
    findings[SAME_IMAGE] = (False, twice)
    findings |= {kind: (False, list(entries)) for kind, entries in _captions(dataset, max_words).items()}
    lengths = [len(caption.split()) for caption in dataset.captions]
    return DataReport(
        name=dataset.name,
        layout=dataset.layout,
        splits={split: _counts(dataset, split) for split in dataset.splits},
        words=_spread(lengths),
        features=None if own is None else (own.num_regions, own.feature_dim, own.position_dim),
        findings=tuple(
            Finding(kind=kind, error=error, entries=tuple(entries))
            for kind, (error, entries) in findings.items()
            if entries
        ),
        notes=dataset.notes,
    )


def report_lines(report: DataReport, *, shown: int = 10) -> str:
    """A report for people: counts, then what was found, `shown` of each kind."""
    lines = [f"{report.name}, in the {report.layout} layout"]
    width = max([len(split) for split in report.splits] or [5])
    for split, counts in report.splits.items():
        lines.append(
            f"  {split:{width}} {counts.images:7} images {counts.captions:8} captions, "
            f"{counts.fewest} to {counts.most} an image (mean {counts.mean:.2f})"
        )
    fewest, mean, most = report.words
    lines.append(f"  captions of {fewest} to {most} words (mean {mean:.1f})")
    if report.features is not None:
        num_regions, channels, numbers = report.features
        lines.append(
            f"  features: {num_regions} regions of {channels} channels"
            + (f", positions of {numbers} numbers" if numbers else "")
        )
    lines += [f"  {note}" for note in report.notes]
    for finding in report.findings:
        lines.append(f"{'ERROR' if finding.error else 'note'}: {finding.kind}: {len(finding.entries)}")
        lines += [f"    {entry}" for entry in finding.entries[:shown]]
        if len(finding.entries) > shown:
            lines.append(f"    … and {len(finding.entries) - shown} more (--json lists all)")
    if not report.findings:
        lines.append("nothing found amiss")
    return "\n".join(lines)


def _looks(
    items: Sequence[ImageItem], regions: RegionFile | None, workers: int, progress: Progress | None
) -> list[_Look]:
    looks = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for look in pool.map(lambda item: _look(item, regions), items):
                looks.append(look)
                if progress is not None:
                    progress("reading images", len(looks), len(items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return looks


def _look(item: ImageItem, regions: RegionFile | None) -> _Look:
    content, pixels, unreadable, featureless = b"", b"", "", ""
    try:
        if item.region_row is not None:
            file, row = item.region_row
            array = np.load(file, mmap_mode="r", allow_pickle=False)[row]
            content = pixels = _digest(array.tobytes())
            if not np.isfinite(array).all():
                unreadable = "its features are not finite"
        else:
            data = item.read_bytes()
            content = _digest(data)
            image = open_rgb(data)
            pixels = _digest(repr(image.size).encode() + image.tobytes())
    except (DualmatchError, OSError, ValueError) as error:
        unreadable = str(error)
    if regions is not None:
        try:
            found = [regions.features(item.id)]
            if regions.position_dim:
                found.append(regions.positions(item.id))
            if not all(np.isfinite(values).all() for values in found):
                featureless = "its features are not finite"
        except DualmatchError as error:
            featureless = str(error)
    return _Look(content=content, pixels=pixels or content, unreadable=unreadable, featureless=featureless)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _same_images(items: Sequence[ImageItem], looks: Sequence[_Look]) -> tuple[list[str], list[str]]:
    """Images that are the same: (in two splits, in one)."""
    groups: dict[bytes, list[int]] = {}
    for index, look in enumerate(looks):
        if look.pixels:
            groups.setdefault(look.pixels, []).append(index)
    two_splits, twice = [], []
    for group in groups.values():
        for one, other in _pairs(group):
            first, second = items[one], items[other]
            how = "the same bytes" if looks[one].content == looks[other].content else "the same pixels in another file"
            if first.split == second.split:
                twice.append(f"{second.id} is {first.id} ({first.split}): {how}")
            elif not any({first.split, second.split} <= allied for allied in ALLIED):
                two_splits.append(f"{first.id} ({first.split}) and {second.id} ({second.split}): {how}")
    return two_splits, twice


def _pairs(group: Sequence[int], at_most: int = 16) -> Iterator[tuple[int, int]]:
    """All pairs of a small group; of a large one (a placeholder picture) each with the first."""
    if len(group) <= at_most:
        yield from combinations(group, 2)
    else:
        yield from ((group[0], other) for other in group[1:])


def _captions(dataset: Dataset, max_words: int) -> dict[str, Iterable[str]]:
    """What is odd about captions; none of it stops a run."""
    twice, long = [], []
    splits_of: dict[str, set[str]] = {}
    for item in dataset.items:
        seen = set()
        for caption in item.captions:
            text = " ".join(caption.split())
            if text in seen:
                twice.append(f"{item.id}: {text[:80]!r}")
            seen.add(text)
            if (words := len(text.split())) > max_words:
                long.append(f"{item.id}: {words} words, {text[:60]!r} …")
            splits_of.setdefault(text, set()).add(item.split)
    shared = [
        f"{text[:80]!r}: {', '.join(sorted(splits))}"
        for text, splits in splits_of.items()
        if len(splits) > 1 and not any(splits <= allied for allied in ALLIED)
    ]
    return {SAME_CAPTION: twice, SHARED_CAPTION: shared, LONG_CAPTION.format(max_words): long}


def _counts(dataset: Dataset, split: str) -> SplitCounts:
    captions = [len(item.captions) for item in dataset.items if item.split == split]
    fewest, mean, most = _spread(captions)
    return SplitCounts(images=len(captions), captions=sum(captions), fewest=fewest, mean=mean, most=most)


def _spread(values: Sequence[int]) -> tuple[int, float, int]:
    return (min(values), sum(values) / len(values), max(values)) if values else (0, 0.0, 0)
