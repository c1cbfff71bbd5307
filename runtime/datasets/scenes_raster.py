"""Filled shapes in whole numbers, so that every machine and every version of a drawing library gives the same pixels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """One filled shape. An ellipse is given by two opposite corners of its box, a polygon by its corners."""

    colour: str
    points: tuple[tuple[int, int], ...]
    is_ellipse: bool = False


def ellipse(colour: str, left: int, top: int, right: int, bottom: int) -> Part:
    """An ellipse that fills the box."""
    return Part(colour, ((left, top), (right, bottom)), is_ellipse=True)


def polygon(colour: str, *points: tuple[int, int]) -> Part:
    """A polygon (even-odd)."""
    return Part(colour, points)


def rectangle(colour: str, left: int, top: int, right: int, bottom: int) -> Part:
    """An upright rectangle."""
    return Part(colour, ((left, top), (right, top), (right, bottom), (left, bottom)))


def covered(part: Part, grid: tuple[int, int], pixels: tuple[int, int]) -> NDArray[np.bool_]:
    """Which pixel centres lie in the part, when a `grid` of units (width, height) is spread over `pixels` (width, height).

    Both are brought to one integer scale (2 * pixels * unit), so no rounding can differ between machines.
    """
    (grid_width, grid_height), (width, height) = grid, pixels
    x = (2 * np.arange(width, dtype=np.int64) + 1)[None, :] * grid_width
    y = (2 * np.arange(height, dtype=np.int64) + 1)[:, None] * grid_height
    points = [(2 * width * px, 2 * height * py) for px, py in part.points]
    if part.is_ellipse:
        (left, top), (right, bottom) = points
        radius_x, radius_y = right - left, bottom - top
        across = ((2 * x - left - right) * radius_y) ** 2 + ((2 * y - top - bottom) * radius_x) ** 2
        return across <= (radius_x * radius_y) ** 2
    inside = np.zeros((height, width), bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        if ay != by:
            side = (bx - ax) * (y - ay) - (x - ax) * (by - ay)
            inside ^= ((ay <= y) != (by <= y)) & ((side > 0) if by > ay else (side < 0))
    return inside
