"""Training curves from a run's log: loss, validation recall and learning rate by epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

from .page import Markup
from .plot import Axis, Series, chart

WAYS = (("i2t", "image to text"), ("t2i", "text to image"))


def best_epoch(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The line of the epoch with the highest validation Rsum, the first of equals."""
    return max(lines, key=lambda line: float(line["val_rsum"]))


def curves(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """A heading and a plot for each curve.

    Args:
        lines: of RUN/log.jsonl, an epoch each, at least one.
    """
    epochs = [float(line["epoch"]) for line in lines]
    best = best_epoch(lines)
    recall = [
        Series(
            label=f"{words} R@{k[1:]}",
            points=[(epoch, float(line["val"][way][k])) for epoch, line in zip(epochs, lines, strict=True)],
            kind="line" if way == "i2t" else "dashed",
            tone=tone,
        )
        for way, words in WAYS
        for tone, k in enumerate(("r1", "r5", "r10"), 1)
    ]
    epoch = Axis(label="epoch")
    found = [
        ("validation recall", recall, Axis(label="%"), [(float(best["epoch"]), f"best Rsum {best['val_rsum']:.1f}")])
    ]
    for name, words in (("loss", "training loss"), ("learning_rate", "learning rate after the epoch")):
        points = [(at, float(line[name])) for at, line in zip(epochs, lines, strict=True)]
        found.append((words, [Series(label="", points=points)], Axis(label=""), []))
    return [(words, chart(f"{words} by epoch", series, epoch, y, marks=marks)) for words, series, y, marks in found]
