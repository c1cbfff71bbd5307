"""Where the things of a scene stand: the geometry that makes each relation visible.

The relations exclude each other by how they are drawn: left, right, above and below leave a gap; the nearer thing overlaps
the farther one; what is inside is cut off by its container's rim; what is held touches a stretched-out hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .scenes_description import Description, Dice, Thing
from .scenes_sprites import SPRITES, silhouette

SIZE = 96  # width and height of a scene in pixels
_MARGIN = 3  # between a thing and the frame, pixels


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A thing at its place.

    Attributes:
        sprite: which of `SPRITES` is drawn.
        thing: what it shows.
        size: pixels that 32 grid units of the sprite take.
        left, top: of the sprite's box, pixels from the scene's upper left corner.
        flip: mirrored.
    """

    sprite: str
    thing: Thing
    size: int
    left: int = 0
    top: int = 0
    flip: bool = False

    @property
    def width(self) -> int:
        return SPRITES[self.sprite].pixels(self.size)[0]

    @property
    def height(self) -> int:
        return SPRITES[self.sprite].pixels(self.size)[1]

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def bottom(self) -> int:
        return self.top + self.height

    def at(self, *, centre: int, bottom: int) -> "Placed":
        """The same thing with its foot there."""
        return replace(self, left=centre - self.width // 2, top=bottom - self.height)

    def overlaps(self, other: "Placed", gap: int = 0) -> bool:
        """Whether the boxes are closer than `gap` pixels."""
        return (
            self.left - gap < other.right
            and other.left - gap < self.right
            and self.top - gap < other.bottom
            and other.top - gap < self.bottom
        )

    def hides(self, other: "Placed") -> float:
        """The fraction of the other's pixels that this one covers when drawn over it."""
        own, theirs = np.zeros((2, 3 * SIZE, 3 * SIZE), bool)  # wide enough for places outside the frame
        for canvas, placed in ((own, self), (theirs, other)):
            mask = silhouette(placed.sprite, placed.size, flip=placed.flip)
            top, left = placed.top + SIZE, placed.left + SIZE
            canvas[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        return float((own & theirs).sum() / theirs.sum())


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A scene's things at their places, in the roles of its `Description`."""

    first: Placed
    second: Placed
    third: Placed | None


def lay_out(description: Description, dice: Dice) -> Layout:
    """Throw places for the things, so that the relation can be seen and nothing else hides them."""
    subject, relation, target = description.canonical
    a, b = _into_frame(*_PLACERS[relation](subject, target, dice))
    third = None if description.third is None else _beside(description.third, (a, b), dice)
    first, second = (a, b) if subject == description.first else (b, a)
    return Layout(first=first, second=second, third=third)


def _thrown(thing: Thing, dice: Dice, low: int, high: int, sprite: str | None = None) -> Placed:
    return Placed(sprite=sprite or thing.kind, thing=thing, size=dice.between(low, high), flip=dice.chance(50))


def _left_of(subject: Thing, target: Thing, dice: Dice) -> tuple[Placed, Placed]:
    a, b = _thrown(subject, dice, 28, 34), _thrown(target, dice, 28, 34)
    slack = SIZE - 2 * _MARGIN - a.width - b.width
    gap = dice.between(8, min(slack, 24))
    left = _MARGIN + dice.between(0, slack - gap)
    foot = dice.between(60, 86)
    a = a.at(centre=left + a.width // 2, bottom=foot + dice.between(-3, 3))
    b = b.at(centre=left + a.width + gap + b.width // 2, bottom=foot + dice.between(-3, 3))
    return a, b


def _above(subject: Thing, target: Thing, dice: Dice) -> tuple[Placed, Placed]:
    a, b = _thrown(subject, dice, 25, 30), _thrown(target, dice, 26, 32)
    centre = dice.between(24, 72)
    b = b.at(centre=centre, bottom=dice.between(84, 92))
    a = a.at(centre=centre + dice.between(-4, 4), bottom=b.top - dice.between(7, 12))
    return a, b


def _in_front_of(subject: Thing, target: Thing, dice: Dice) -> tuple[Placed, Placed]:
    for attempt in range(1000):
        a, b = _thrown(subject, dice, 28, 32), _thrown(target, dice, 34, 38)
        b = b.at(centre=dice.between(30, 66), bottom=dice.between(58, 70))
        side = dice.pick((-1, 1))
        centre = b.left + b.width // 2 + side * dice.between(4, 20)
        # What is nearer stands lower; a low thing before a thin-footed one (a car, an umbrella) has to float to hide any of it.
        a = a.at(centre=centre, bottom=b.bottom + dice.between(4 if attempt < 300 else -12, 14))
        # It must reach up beside or over the farther thing's middle, else it seems to stand below.
        if 5 * (a.top - b.top) <= 3 * b.height and 0.18 <= a.hides(b) <= 0.42:
            return a, b
    raise AssertionError(f"no place for a {subject} in front of a {target}")


def _inside(subject: Thing, target: Thing, dice: Dice) -> tuple[Placed, Placed]:
    container = _thrown(target, dice, 40, 46, "open box" if target.kind == "box" else None)
    container = container.at(centre=dice.between(30, 66), bottom=dice.between(72, 90))
    opening = SPRITES[container.sprite].opening
    assert opening is not None
    grid_width = SPRITES[container.sprite].width
    left, right, rim = opening
    if container.flip:
        left, right = grid_width - right, grid_width - left
    left, right, rim = (units * container.size // 32 for units in (left, right, rim))
    content = _thrown(subject, dice, 25, 29)
    while content.width > right - left - 2:
        content = replace(content, size=content.size - 1)
    # Three tenths of it are below the rim, and so behind the container's front.
    bottom = container.top + rim + content.height * 3 // 10
    return content.at(centre=container.left + (left + right) // 2, bottom=bottom), container


def _holding(subject: Thing, target: Thing, dice: Dice) -> tuple[Placed, Placed]:
    person = _thrown(subject, dice, 36, 40, "reaching person")
    held = _thrown(target, dice, 21, 25)
    person = person.at(centre=dice.between(36, 60), bottom=dice.between(70, 90))
    hand_height = person.top + 13 * person.size // 32
    hand = person.left + 2 if person.flip else person.right - 2
    if target.kind in ("umbrella", "kite"):  # by the handle, by the tail
        return person, held.at(centre=hand, bottom=hand_height + 3)
    outward = -1 if person.flip else 1
    return person, held.at(centre=hand + outward * (held.width // 2 - 2), bottom=hand_height + held.height // 2)


_PLACERS: dict[str, Callable[[Thing, Thing, Dice], tuple[Placed, Placed]]] = {
    "left of": _left_of,
    "above": _above,
    "in front of": _in_front_of,
    "inside": _inside,
    "holding": _holding,
}


def _beside(thing: Thing, others: tuple[Placed, ...], dice: Dice) -> Placed:
    """A smaller thing clear of the others; on the ground if there is room, else anywhere."""
    for attempt in range(1000):
        size = 20 if attempt < 500 else 16
        placed = _thrown(thing, dice, size - 2, size)
        placed = placed.at(centre=dice.between(8, SIZE - 8), bottom=dice.between(56 if attempt < 250 else 20, 92))
        if _is_in_frame(placed) and not any(placed.overlaps(other, gap=3) for other in others):
            return placed
    raise AssertionError(f"no place for a {thing} beside {others}")


def _into_frame(a: Placed, b: Placed) -> tuple[Placed, Placed]:
    """Both moved by the least that brings them into the frame."""
    left, right = min(a.left, b.left) - _MARGIN, max(a.right, b.right) + _MARGIN
    top, bottom = min(a.top, b.top) - _MARGIN, max(a.bottom, b.bottom) + _MARGIN
    across = -left if left < 0 else min(SIZE - right, 0)
    down = -top if top < 0 else min(SIZE - bottom, 0)
    a, b = (replace(each, left=each.left + across, top=each.top + down) for each in (a, b))
    assert _is_in_frame(a), a
    assert _is_in_frame(b), b
    return a, b


def _is_in_frame(placed: Placed) -> bool:
    return (
        placed.left >= _MARGIN
        and placed.top >= _MARGIN
        and placed.right <= SIZE - _MARGIN
        and placed.bottom <= SIZE - _MARGIN
    )
