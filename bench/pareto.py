"""Speed beside recall: which variants no other beats in both, and a picture of it."""

from collections.abc import Sequence
from typing import Literal

from dualmatch.runtime.page import Markup
from dualmatch.runtime.plot import NUM_TONES, Axis, Series, as_file, chart, tone_of

Point = tuple[str, float, float]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (milliseconds, recall) whether no other point is at least as good in both and better in one."""
    return [
        not any(ms <= own_ms and rsum >= own_rsum and (ms, rsum) != (own_ms, own_rsum) for ms, rsum in points)
        for own_ms, own_rsum in points
    ]


def plot(title: str, points: Sequence[Point]) -> Markup:
    """(label, milliseconds, Rsum), numbered in the given order, latency on a logarithmic axis: filled where a point is on the front,
    which a dashed line follows.
    """
    on = front([(ms, rsum) for _, ms, rsum in points])
    line = sorted((ms, rsum) for (_, ms, rsum), is_on in zip(points, on, strict=True) if is_on)
    series = [Series(label="", points=line, kind="dashed", tone=NUM_TONES)]
    for number, ((label, ms, rsum), is_on) in enumerate(zip(points, on, strict=True)):
        words = f"{number + 1}: {label}" + ("" if is_on else " (beaten in both)")
        kind: Literal["points", "hollow"] = "points" if is_on else "hollow"
        series.append(
            Series(label=words, points=[(ms, rsum)], kind=kind, tone=tone_of(number), names=(str(number + 1),))
        )
    return chart(title, series, Axis(label="median latency, ms; left is better", log=True), Axis(label="Rsum"))


def picture(title: str, points: Sequence[Point]) -> str:
    """`plot` as an SVG file of its own."""
    words = "; ".join(f"{label}: {ms:.3g} ms, Rsum {rsum:.1f}" for label, ms, rsum in points)
    return as_file(title, [("", plot(title, points))], words=words)
