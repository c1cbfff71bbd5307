"""The things of drawn scenes, as little pictures made of filled shapes."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .scenes_raster import RGB, Part, covered, ellipse, polygon, rectangle

BODY_COLOURS: dict[str, RGB] = {
    "red": (216, 36, 40),
    "blue": (36, 92, 226),
    "green": (26, 152, 58),
    "yellow": (250, 214, 38),
    "purple": (150, 56, 196),
    "white": (248, 248, 250),
}
_FIXED: dict[str, RGB] = {
    "outline": (24, 22, 30),
    "dark": (44, 42, 54),
    "wood": (126, 82, 44),
    "skin": (236, 182, 142),
    "hair": (84, 54, 34),
    "jeans": (66, 72, 104),
    "pane": (188, 224, 244),
    "sail": (240, 232, 206),
    "metal": (176, 178, 186),
}
_TONES = (*_FIXED, "body", "shade", "light")


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """A thing drawn on a grid of `width` x `height` units, 32 units to the `size` at which it is placed.

    Attributes:
        parts: drawn in order.
        front: for containers: drawn after `parts`, and after what is inside.
        opening: for containers: left and right of the space for what is inside, and the height of the rim.
    """

    width: int
    height: int
    parts: tuple[Part, ...]
    front: tuple[Part, ...] = ()
    opening: tuple[int, int, int] | None = None

    def pixels(self, size: int) -> tuple[int, int]:
        """Width and height in pixels when placed at `size`."""
        return self.width * size // 32, self.height * size // 32


_LEGS_AND_HEAD = (
    rectangle("jeans", 4, 22, 8, 34),
    rectangle("jeans", 10, 22, 14, 34),
    ellipse("skin", 4, 0, 14, 10),
    polygon("hair", (4, 4), (5, 1), (9, 0), (13, 1), (14, 4), (9, 3)),
    polygon("body", (3, 10), (15, 10), (15, 23), (3, 23)),
    rectangle("body", 0, 10, 3, 19),
    rectangle("skin", 0, 19, 3, 22),
)

SPRITES: dict[str, Sprite] = {
    "ball": Sprite(
        width=24,
        height=24,
        parts=(
            ellipse("shade", 0, 0, 24, 24),
            ellipse("body", 0, 0, 22, 21),
            ellipse("light", 5, 4, 11, 9),
        ),
    ),
    "box": Sprite(
        width=28,
        height=24,
        parts=(
            polygon("light", (0, 8), (6, 0), (28, 0), (22, 8)),
            polygon("shade", (22, 8), (28, 0), (28, 16), (22, 24)),
            rectangle("body", 0, 8, 22, 24),
            rectangle("shade", 9, 8, 13, 24),
        ),
    ),
    "open box": Sprite(
        width=28,
        height=24,
        parts=(polygon("dark", (0, 8), (6, 0), (28, 0), (22, 8)),),
        front=(
            polygon("shade", (22, 8), (28, 0), (28, 16), (22, 24)),
            rectangle("body", 0, 8, 22, 24),
            rectangle("light", 0, 8, 22, 10),
        ),
        opening=(2, 23, 8),
    ),
    "tree": Sprite(
        width=24,
        height=32,
        parts=(
            rectangle("wood", 10, 18, 14, 32),
            ellipse("body", 0, 8, 14, 23),
            ellipse("body", 10, 8, 24, 23),
            ellipse("body", 4, 0, 20, 17),
            ellipse("shade", 3, 16, 8, 20),
            ellipse("shade", 15, 15, 20, 19),
            ellipse("light", 8, 4, 12, 8),
        ),
    ),
    "house": Sprite(
        width=32,
        height=30,
        parts=(
            rectangle("shade", 23, 1, 27, 10),
            rectangle("body", 3, 13, 29, 30),
            polygon("shade", (0, 14), (16, 0), (32, 14)),
            rectangle("wood", 13, 19, 19, 30),
            rectangle("pane", 6, 17, 11, 22),
            rectangle("pane", 21, 17, 26, 22),
        ),
    ),
    "car": Sprite(
        width=36,
        height=19,
        parts=(
            polygon("body", (7, 9), (12, 0), (25, 0), (31, 9)),
            polygon("body", (0, 8), (33, 8), (36, 11), (36, 16), (0, 16)),
            polygon("pane", (10, 8), (13, 2), (17, 2), (17, 8)),
            polygon("pane", (19, 8), (19, 2), (24, 2), (28, 8)),
            ellipse("dark", 4, 11, 12, 19),
            ellipse("metal", 6, 13, 10, 17),
            ellipse("dark", 24, 11, 32, 19),
            ellipse("metal", 26, 13, 30, 17),
        ),
    ),
    "boat": Sprite(
        width=36,
        height=30,
        parts=(
            rectangle("wood", 11, 0, 13, 19),
            polygon("sail", (10, 1), (10, 16), (0, 16)),
        ),
        front=(
            polygon("body", (0, 18), (36, 18), (30, 30), (6, 30)),
            polygon("shade", (3, 25), (33, 25), (30, 30), (6, 30)),
        ),
        opening=(14, 34, 18),
    ),
    "person": Sprite(
        width=18,
        height=34,
        parts=(*_LEGS_AND_HEAD, rectangle("body", 15, 10, 18, 19), rectangle("skin", 15, 19, 18, 22)),
    ),
    "reaching person": Sprite(
        width=30,
        height=34,
        parts=(*_LEGS_AND_HEAD, rectangle("body", 15, 11, 26, 15), ellipse("skin", 25, 10, 30, 16)),
    ),
    "dog": Sprite(
        width=32,
        height=24,
        parts=(
            polygon("body", (6, 12), (0, 4), (3, 3), (10, 10)),
            rectangle("shade", 9, 15, 12, 24),
            rectangle("shade", 19, 15, 22, 24),
            rectangle("body", 5, 13, 9, 24),
            rectangle("body", 22, 13, 26, 24),
            ellipse("body", 4, 8, 27, 19),
            ellipse("body", 19, 1, 29, 12),
            rectangle("body", 25, 6, 32, 11),
            polygon("shade", (19, 2), (23, 2), (22, 11), (18, 9)),
            rectangle("dark", 25, 4, 27, 6),
            rectangle("dark", 30, 5, 32, 8),
        ),
    ),
    "star": Sprite(
        width=30,
        height=28,
        parts=(
            polygon(
                "body",
                *((15, 0), (19, 10), (30, 11), (21, 17), (25, 28), (15, 21), (5, 28), (9, 17), (0, 11), (11, 10)),
            ),
            polygon("light", (15, 6), (17, 12), (13, 12)),
        ),
    ),
    "kite": Sprite(
        width=24,
        height=38,
        parts=(
            polygon("dark", (11, 25), (13, 25), (14, 30), (12, 34), (13, 38), (11, 38), (10, 34), (12, 30)),
            polygon("body", (12, 0), (24, 11), (12, 27), (0, 11)),
            polygon("shade", (12, 0), (24, 11), (12, 11)),
            polygon("shade", (0, 11), (12, 11), (12, 27)),
            polygon("light", (7, 29), (12, 31), (7, 33)),
            polygon("light", (17, 29), (12, 31), (17, 33)),
        ),
    ),
    "umbrella": Sprite(
        width=32,
        height=32,
        parts=(
            rectangle("wood", 15, 0, 17, 29),
            polygon("wood", (15, 27), (17, 29), (19, 29), (19, 26), (21, 26), (21, 32), (15, 32)),
            polygon(
                "body",
                *((0, 16), (2, 10), (6, 5), (11, 2), (16, 1), (21, 2), (26, 5), (30, 10), (32, 16)),
                *((27, 14), (22, 17), (16, 14), (10, 17), (5, 14)),
            ),
            polygon("shade", (16, 2), (22, 16), (16, 14), (10, 16)),
        ),
    ),
    "cup": Sprite(
        width=27,
        height=24,
        parts=(ellipse("dark", 0, 0, 20, 6),),
        front=(
            rectangle("body", 18, 8, 27, 11),
            rectangle("body", 24, 8, 27, 18),
            rectangle("body", 17, 16, 27, 19),
            polygon("body", (0, 3), (3, 5), (7, 6), (13, 6), (17, 5), (20, 3), (18, 24), (2, 24)),
            polygon("shade", (14, 6), (17, 5), (20, 3), (18, 24), (14, 24)),
        ),
        opening=(1, 19, 5),
    ),
}


def rasterise(
    kind: str, colour: str, size: int, *, flip: bool, front: bool
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The sprite's colours (height + 2, width + 2, 3) and which of its pixels are opaque, with an outline one pixel wide around it.

    `front` draws what covers the inside of a container, otherwise all the rest. `flip` mirrors left and right.
    """
    tones, opaque = _tones(kind, size, front=front)
    body = BODY_COLOURS[colour]
    own = {"body": body, "shade": _mixed(body, (0, 0, 0), 30), "light": _mixed(body, (255, 255, 255), 50)}
    rgb = np.array([own.get(tone) or _FIXED[tone] for tone in _TONES], np.uint8)[tones]
    return (rgb[:, ::-1], opaque[:, ::-1]) if flip else (rgb, opaque)


@lru_cache(maxsize=1024)
def _tones(kind: str, size: int, *, front: bool) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """For every pixel an index into `_TONES`, and whether it is opaque."""
    sprite = SPRITES[kind]
    width, height = sprite.pixels(size)
    tones = np.full((height + 2, width + 2), _TONES.index("outline"), np.uint8)
    opaque = np.zeros((height + 2, width + 2), bool)
    inner = slice(1, -1), slice(1, -1)
    for part in sprite.front if front else sprite.parts:
        mask = covered(part, (sprite.width, sprite.height), (width, height))
        tones[inner][mask] = _TONES.index(part.colour)
        opaque[inner] |= mask
    return tones, _dilated(opaque)


def silhouette(kind: str, size: int, *, flip: bool) -> NDArray[np.bool_]:
    """Which pixels the thing covers, front and rest together, outline included."""
    opaque = _tones(kind, size, front=False)[1] | _tones(kind, size, front=True)[1]
    return opaque[:, ::-1] if flip else opaque


def _mixed(colour: RGB, other: RGB, percent: int) -> RGB:
    red, green, blue = ((a * (100 - percent) + b * percent) // 100 for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown
