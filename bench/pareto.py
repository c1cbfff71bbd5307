"""Speed beside recall: which variants no other beats in both, and a picture of it."""

import math
from collections.abc import Sequence
from html import escape

Point = tuple[str, float, float]

WIDTH, HEIGHT, MARGIN = 640, 400, 56
STYLE = """
svg{font:13px system-ui,sans-serif;background:#fff;color:#222}
.axis{stroke:currentColor;stroke-width:1;opacity:.5}
text{fill:currentColor}
.front{fill:none;stroke:#0b62c4;stroke-width:1.5;stroke-dasharray:5 4}
.on{fill:#0b62c4}
.off{fill:none;stroke:#767676;stroke-width:1.5}
@media(prefers-color-scheme:dark){svg{background:#16181c;color:#e6e6e6}.front{stroke:#7db7ff}.on{fill:#7db7ff}.off{stroke:#a0a0a0}}
"""


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (milliseconds, recall) whether no other point is at least as good in both and better in one."""
    return [
        not any(ms <= own_ms and rsum >= own_rsum and (ms, rsum) != (own_ms, own_rsum) for ms, rsum in points)
        for own_ms, own_rsum in points
    ]


def picture(title: str, points: Sequence[Point]) -> str:
    """An SVG of (label, milliseconds, Rsum): latency on a logarithmic axis, filled where a point is on the front."""
    times, recalls = [ms for _, ms, _ in points], [rsum for _, _, rsum in points]
    left, right = math.log(min(times)) - 0.1, math.log(max(times)) + 0.1
    spread = max(max(recalls) - min(recalls), 1.0)
    bottom, top = min(recalls) - 0.15 * spread, max(recalls) + 0.15 * spread

    def x(ms: float) -> float:
        return MARGIN + (math.log(ms) - left) / (right - left) * (WIDTH - 2 * MARGIN)

    def y(rsum: float) -> float:
        return HEIGHT - MARGIN - (rsum - bottom) / (top - bottom) * (HEIGHT - 2 * MARGIN)

    on = front([(ms, rsum) for _, ms, rsum in points])
    best = sorted((ms, rsum) for (_, ms, rsum), is_on in zip(points, on, strict=True) if is_on)
    line = " ".join(f"{x(ms):.1f},{y(rsum):.1f}" for ms, rsum in best)
    words = "; ".join(f"{label}: {ms:.3g} ms, Rsum {rsum:.1f}" for label, ms, rsum in points)
    marks = []
    for (label, ms, rsum), is_on in zip(points, on, strict=True):
        # Labels lean towards the middle, so that none leaves the picture.
        anchor, shift = ("start", 9) if x(ms) < WIDTH / 2 else ("end", -9)
        marks.append(
            f'<circle class="{"on" if is_on else "off"}" cx="{x(ms):.1f}" cy="{y(rsum):.1f}" r="5"/>'
            f'<text x="{x(ms) + shift:.1f}" y="{y(rsum) - 7:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
        )
    low, high = HEIGHT - MARGIN, WIDTH - MARGIN
    ticks = "".join(
        f'<text x="{x(ms):.1f}" y="{low + 18}" text-anchor="middle">{ms:.3g}</text>' for ms in (min(times), max(times))
    ) + "".join(
        f'<text x="{MARGIN - 8}" y="{y(rsum) + 4:.1f}" text-anchor="end">{rsum:.0f}</text>'
        for rsum in sorted({round(min(recalls)), round(max(recalls))})
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(words)}</desc><style>{STYLE}</style>"
        f'<text x="{WIDTH / 2}" y="24" text-anchor="middle" font-weight="600">{escape(title)}</text>'
        f'<line class="axis" x1="{MARGIN}" y1="{low}" x2="{high}" y2="{low}"/>'
        f'<line class="axis" x1="{MARGIN}" y1="{MARGIN}" x2="{MARGIN}" y2="{low}"/>{ticks}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">median latency (ms, logarithmic; left is better)</text>'
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">Rsum</text>'
        f'<polyline class="front" points="{line}"/>{"".join(marks)}</svg>\n'
    )
