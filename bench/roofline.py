"""How near an encoder comes to what the machine can do: its operations against a GEMM, its bytes against a copy; and the picture.

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52 (4), 2009.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dualmatch.runtime.page import Markup
from dualmatch.runtime.plot import NUM_TONES, Axis, Series, as_file, chart, tone_of

from .operations import Work
from .roofs import Roofs


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """One variant's median call against the roofs.

    Attributes:
        seconds: of the median call.
    """

    work: Work
    roofs: Roofs
    seconds: float

    @property
    def gemm_seconds(self) -> float:
        """What the products would take as one GEMM, those on 8-bit integers at the rate of int8."""
        floats = (self.work.matrix - self.work.matrix_int8) / self.roofs.gemm["float32"]
        return floats + self.work.matrix_int8 / self.roofs.gemm["int8"]

    @property
    def copy_seconds(self) -> float:
        """What the least bytes would take at the rate of a copy."""
        return self.work.least_bytes / self.roofs.copy

    @property
    def gemm_percent(self) -> float:
        """Of the GEMM's rate."""
        return 100 * self.gemm_seconds / self.seconds

    @property
    def copy_percent(self) -> float:
        """Of the copy's rate."""
        return 100 * self.copy_seconds / self.seconds

    @property
    def bound(self) -> Literal["gemm", "copy"]:
        """Which roof is the nearer."""
        return "gemm" if self.gemm_seconds >= self.copy_seconds else "copy"

    @property
    def intensity(self) -> float:
        """Operations in products for each byte that has to move."""
        return self.work.matrix / self.work.least_bytes

    @property
    def rate(self) -> float:
        """Operations in products per second."""
        return self.work.matrix / self.seconds

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        work = self.work
        return {
            "operations": {
                "matrix": work.matrix,
                "matrix_int8": work.matrix_int8,
                "other": work.other,
                "by_operator": dict(work.by_operator),
            },
            "bytes": {"least": work.least_bytes, "unfused": work.unfused_bytes},
            "intensity": self.intensity,
            "achieved": {"operations_per_s": self.rate, "bytes_per_s": work.least_bytes / self.seconds},
            "percent": {"gemm": self.gemm_percent, "copy": self.copy_percent},
            "bound": self.bound,
        }


def roofs_line(roofs: Roofs) -> str:
    """The roofs in a sentence."""
    threads = {0: "the threads that onnxruntime chose", 1: "1 thread"}.get(roofs.threads, f"{roofs.threads} threads")
    rates = ", ".join(f"{name} GEMM {rate / 1e9:.0f} G operations/s" for name, rate in roofs.gemm.items())
    return f"Roofs measured in this run with {threads}: {rates}, copy {roofs.copy / 1e9:.1f} GB/s (read + written)"


def plot(title: str, roofs: Mapping[str, Any], points: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    """Operations per second over operations per byte, both logarithmic, below the roofs; numbered in the given order.

    Args:
        roofs: `Roofs.to_json`.
        points: (label, `Roofline.to_json`).
    """
    copy = roofs["copy"]["avg"]
    rates = {name: block["avg"] for name, block in roofs["gemm"].items()}
    at = [point["intensity"] for _, point in points] + [rate / copy for rate in rates.values()]
    low, high = min(at) / 3, max(at) * 3
    series = [
        Series(
            label=f"roof: {name} GEMM, copy",
            points=[(low, low * copy / 1e9), (rate / copy, rate / 1e9), (high, rate / 1e9)],
            kind="dashed" if number else "line",
            tone=NUM_TONES,
        )
        for number, (name, rate) in enumerate(rates.items())
    ]
    series += [
        Series(
            label=f"{number + 1}: {label}",
            points=[(point["intensity"], point["achieved"]["operations_per_s"] / 1e9)],
            kind="points",
            tone=tone_of(number),
            names=(str(number + 1),),
        )
        for number, (label, point) in enumerate(points)
    ]
    return chart(
        title, series, Axis(label="operations per byte", log=True), Axis(label="G operations/s", log=True), height=260
    )


def picture(title: str, roofs: Roofs, points: Sequence[tuple[str, Roofline]]) -> str:
    """`plot` as an SVG file of its own."""
    words = [
        f"{label}: {point.rate / 1e9:.3g} G operations/s, {point.gemm_percent:.0f} % of GEMM, {point.copy_percent:.0f} % of copy"
        for label, point in points
    ]
    drawn = plot(title, roofs.to_json(), [(label, point.to_json()) for label, point in points])
    return as_file(title, [("", drawn)], words="; ".join((roofs_line(roofs), *words)))
