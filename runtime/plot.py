"""Plots as small SVG: points and lines on two axes, and rows that share one axis.

A plot is 360 units wide, so that its letters keep their size on a phone; in a page it takes the page's colours, light or dark. As a file of
its own (`as_file`) it brings the colours along. Every plot names itself for those who do not see it; its numbers belong into a table beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .page import COLOURS, Markup, shown

WIDTH = 360
LEFT, RIGHT, TOP, BELOW = 46, 14, 16, 40
LEGEND_LINE, ROW, ROW_LABEL = 16, 26, 16
NUM_TONES = 6
STYLE = """
svg.plot { display: block; font: 12px system-ui, sans-serif; fill: var(--ink); }
.plot .grid { stroke: var(--line); } .plot .soft { fill: var(--soft); } .plot .name { font-weight: 600; }
.plot text { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.plot .line { fill: none; stroke-width: 2; stroke-linejoin: round; } .plot .dashed { stroke-dasharray: 5 4; } .plot .hollow { fill: var(--card); stroke-width: 2; }
""" + "".join(
    f".plot .tone{n} {{ fill: var(--tone{n}); }} .plot .line.tone{n}, .plot .hollow.tone{n}, .plot .rule.tone{n} {{ stroke: var(--tone{n}); }}"
    f" .plot .line.tone{n} {{ fill: none; }} .plot .hollow.tone{n} {{ fill: var(--card); }}\n"
    for n in range(1, NUM_TONES + 1)
)

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: its label with the unit, and whether it is logarithmic; `low` and `high` widen what the values ask for.

    `names` are (place, words) that stand below a horizontal axis in place of numbers.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    names: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind.

    Attributes:
        label: in the legend; empty for none.
        points: (x, y), drawn in the given order.
        kind: a line, a dashed line, filled or hollow points.
        tone: colour, from 1; more than there are begin again.
        names: written beside the points: a number or a letter or two.
    """

    label: str
    points: Sequence[Point]
    kind: Literal["line", "dashed", "points", "hollow"] = "line"
    tone: int = 1
    names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of `rows`: what applies is drawn.

    Attributes:
        label: above the row.
        bar: from, to: a filled bar.
        line: from, to: a thin line (a range, an interval).
        box: from, to: the middle half of a distribution.
        outline: (value, height from 0 to 1): the shape of a distribution.
        dots: (value, filled) points.
        tone: colour, from 1.
    """

    label: str
    bar: Point | None = None
    line: Point | None = None
    box: Point | None = None
    outline: Sequence[Point] = ()
    dots: Sequence[tuple[float, bool]] = ()
    tone: int = 1


class _Scale:
    """From values to places along an axis."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float, *, pad: float = 0.05) -> None:
        known = [*values, *(v for v in (axis.low, axis.high) if v is not None)]
        if axis.log:
            known = [math.log10(v) for v in known if v > 0] or [0.0]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        least = 0.2 if axis.log else max(1e-9, 1e-3 * abs(high))
        if high - low < least:
            low, high = low - least / 2, high + least / 2
        bound = tuple(None if v is None else (math.log10(v) if axis.log else v) for v in (axis.low, axis.high))
        room = pad * (high - low)
        self.low = low if bound[0] is not None and low >= bound[0] else low - room
        self.high = high if bound[1] is not None and high <= bound[1] else high + room
        self.log, self.start, self.end = axis.log, start, end

    def __call__(self, value: float) -> float:
        at = math.log10(max(value, 1e-300)) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis: four or so, in logarithms 1, 2 and 5 times a power of ten."""
        low, high = self.low, self.high
        if self.log and high - low < 1:
            low, high = 10**low, 10**high
        elif self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [m * 10.0**p for p in powers for m in steps if self.low <= math.log10(m * 10.0**p) <= self.high]
                if len(found) <= 6:
                    break
            return found if len(found) <= 8 else found[:: math.ceil(len(found) / 6)]
        raw = (high - low) / 5.5
        step = 10.0 ** math.floor(math.log10(raw))
        step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
        first = math.ceil(low / step - 1e-9)
        return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tone_of(index: int) -> int:
    """The colour of the n-th of several things, from 0."""
    return index % NUM_TONES + 1


def short(value: float) -> str:
    """A number at a tick."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}"


def chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    height: int = 210,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Series on two axes.

    Args:
        title: what the plot shows, for those who do not see it.
        height: of the part between the axes' labels, in units.
        marks: (x, words): vertical lines.
    """
    points = [point for one in series for point in one.points]
    bottom = TOP + height
    across = _Scale(x, [p[0] for p in points] + [at for at, _ in marks], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [p[1] for p in points], bottom, TOP)
    parts = []
    for value in up.ticks():
        level = f"{up(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level}" y2="{level}"/>')
        parts.append(_text(LEFT - 6, up(value) + 4, short(value), "end", "soft"))
    parts.append(_x_axis(across, x, bottom))
    for at, words in marks:
        where = across(at)
        parts.append(
            f'<line class="grid" x1="{where:.1f}" x2="{where:.1f}" y1="{TOP}" y2="{bottom}" stroke-dasharray="2 3"/>'
        )
        end = where > (LEFT + WIDTH) / 2
        parts.append(_text(where, TOP - 4, words, "end" if end else "start", "soft"))
    parts.append(_text(0, TOP - 4, y.label, "start", "soft"))
    taken: list[tuple[float, float]] = []
    parts.extend(_drawn(one, across, up, taken) for one in series)
    legend = [one for one in series if one.label]
    for number, one in enumerate(legend):
        line = bottom + BELOW + 10 + LEGEND_LINE * number
        parts.append(_swatch(one, LEFT, line - 4) + _text(LEFT + 28, line, _cut(one.label, 42)))
    return _svg(title, bottom + BELOW + (6 if legend else 0) + LEGEND_LINE * len(legend), parts)


def rows(title: str, given: Sequence[Row], x: Axis, *, from_zero: bool = False) -> Markup:
    """Rows one below the other on a common axis, each below its label."""
    values = [0.0] if from_zero else []
    for row in given:
        values += [v for pair in (row.bar, row.line, row.box) if pair is not None for v in pair]
        values += [v for v, _ in row.outline] + [v for v, _ in row.dots]
    bottom = TOP + (ROW + ROW_LABEL) * len(given)
    left = RIGHT
    across = _Scale(x, values, left, WIDTH - RIGHT, pad=0.03)
    parts = [
        f'<line class="grid" x1="{across(v):.1f}" x2="{across(v):.1f}" y1="{TOP}" y2="{bottom}"/>'
        for v in across.ticks()
    ]
    parts.append(_x_axis(across, x, bottom))
    for number, row in enumerate(given):
        top = TOP + (ROW + ROW_LABEL) * number
        middle, base = top + ROW_LABEL + ROW / 2, top + ROW_LABEL + ROW - 2
        parts.append(_text(left, top + 12, _cut(row.label, 46)))
        if row.bar is not None:
            a, b = sorted(map(across, row.bar))
            parts.append(
                f'<rect class="tone{row.tone}" x="{a:.1f}" y="{middle - 6}" width="{max(b - a, 1):.1f}" height="12" opacity=".85"/>'
            )
        if row.outline:
            line = " ".join(f"{across(v):.1f},{base - height * (ROW - 2):.1f}" for v, height in row.outline)
            ends = across(row.outline[0][0]), across(row.outline[-1][0])
            parts.append(
                f'<polygon class="tone{row.tone}" opacity=".6" points="{ends[0]:.1f},{base} {line} {ends[1]:.1f},{base}"/>'
            )
        if row.line is not None:
            y = base if row.outline else middle
            parts.append(
                f'<line class="rule tone{row.tone}" stroke-width="1.5" x1="{across(row.line[0]):.1f}" x2="{across(row.line[1]):.1f}" y1="{y}" y2="{y}"/>'
            )
        if row.box is not None:
            a, b = map(across, row.box)
            parts.append(
                f'<rect class="tone{row.tone}" x="{a:.1f}" y="{middle - 6}" width="{max(b - a, 1):.1f}" height="12" opacity=".6"/>'
            )
        for value, filled in row.dots:
            y = base if row.outline else middle
            kind = "" if filled else "hollow "
            parts.append(
                f'<circle class="{kind}tone{row.tone}" cx="{across(value):.1f}" cy="{y}" r="{5 if filled else 4}"/>'
            )
    return _svg(title, bottom + BELOW, parts)


def as_file(title: str, plots: Sequence[tuple[str, Markup]], *, words: str = "") -> str:
    """Plots with a heading each, side by side, as an SVG file of its own, light or dark like whoever shows it.

    Args:
        words: the numbers as text, for those who do not see them.
    """
    height = 60 + max(int(plot.partition("viewBox=")[2].split('"')[1].split()[3]) for _, plot in plots)
    width = WIDTH * len(plots)
    inner = ""
    for number, (heading, plot) in enumerate(plots):
        drawn = plot[plot.index(">") + 1 : plot.rindex("</svg>")]
        inner += _text(WIDTH * (number + 0.5), 46, heading, "middle")
        inner += f'<g transform="translate({WIDTH * number} 56)">{drawn}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{shown(title)}</title><desc>{shown(words)}</desc><style>{COLOURS}{STYLE}</style>"
        f'<rect width="{width}" height="{height}" style="fill: var(--card)"/>'
        f"{_text(width / 2, 20, title, 'middle', 'title')}{inner}</svg>\n"
    )


def _svg(title: str, height: float, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="plot" width="100%" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{shown(title)}">'
        f"<title>{shown(title)}</title>{''.join(parts)}</svg>"
    )


def _x_axis(across: _Scale, axis: Axis, bottom: float) -> str:
    named = axis.names or [(value, short(value)) for value in across.ticks()]
    ticks = "".join(_text(across(place), bottom + 15, words, "middle", "soft") for place, words in named)
    middle = (across.start + across.end) / 2
    label = axis.label + (" (logarithmic)" if axis.log else "")
    rule = f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{bottom}" y2="{bottom}"/>'
    return rule + ticks + _text(middle, bottom + 31, label, "middle", "soft")


def _drawn(one: Series, across: _Scale, up: _Scale, taken: list[tuple[float, float]]) -> str:
    tone = (one.tone - 1) % NUM_TONES + 1
    places = [(across(a), up(b)) for a, b in one.points]
    if one.kind in ("line", "dashed"):
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        dashed = " dashed" if one.kind == "dashed" else ""
        if len(places) == 1:  # a line of one point would not be seen
            return f'<circle class="tone{tone}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
        return f'<polyline class="line{dashed} tone{tone}" points="{line}"/>'
    kind = "hollow " if one.kind == "hollow" else ""
    drawn = "".join(f'<circle class="{kind}tone{tone}" cx="{a:.1f}" cy="{b:.1f}" r="5"/>' for a, b in places)
    for (a, b), name in zip(places, one.names, strict=False):
        end = a > WIDTH - RIGHT - 30  # none leaves the picture
        x, y = a + (-8 if end else 8), b + 4
        while any(abs(x - other_x) < 20 and abs(y - other_y) < 13 for other_x, other_y in taken):
            y -= 13
        taken.append((x, y))
        drawn += _text(x, y, name, "end" if end else "start", "name")
    return drawn


def _swatch(one: Series, x: float, y: float) -> str:
    tone = (one.tone - 1) % NUM_TONES + 1
    if one.kind in ("line", "dashed"):
        dashed = " dashed" if one.kind == "dashed" else ""
        return f'<line class="line{dashed} tone{tone}" x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}"/>'
    kind = "hollow " if one.kind == "hollow" else ""
    return f'<circle class="{kind}tone{tone}" cx="{x + 11}" cy="{y}" r="5"/>'


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        + (f' class="{kind}"' if kind else "")
        + f">{shown(words)}</text>"
    )
