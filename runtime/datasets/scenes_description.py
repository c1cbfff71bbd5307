"""What a drawn scene shows, in words only: two or three coloured things, one relation, one setting."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

T = TypeVar("T")

SETTINGS = ("beach", "field", "snow", "city", "desert", "night", "sunset", "room")
COLOURS = ("red", "blue", "green", "yellow", "purple", "white")
KINDS = ("ball", "box", "tree", "house", "car", "boat", "person", "dog", "star", "kite", "umbrella", "cup")

# The first half of each couple is the canonical wording; the second says the same with the things exchanged.
INVERSE = {"right of": "left of", "below": "above", "behind": "in front of"}
SPATIAL = ("left of", "right of", "above", "below", "in front of", "behind")
RELATIONS = (*SPATIAL, "inside", "holding")
CONTAINERS = ("box", "boat", "cup")
FITS_INSIDE = ("ball", "tree", "person", "dog", "star", "kite", "umbrella", "cup", "box")
CAN_BE_HELD = ("ball", "box", "boat", "dog", "star", "kite", "umbrella", "cup")

Difference = Literal["relation", "setting"]


class Dice:
    """Seeded chance that falls alike everywhere: Python promises the sequence of `random()` only, so only that is used."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.between(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        """True in `percent` of a hundred throws."""
        return self.between(1, 100) <= percent


@dataclass(frozen=True)
class Thing:
    """A kind of object in a colour."""

    kind: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, kw_only=True)
class Description:
    """All that a scene's captions may speak of.

    Attributes:
        first: the thing of which the relation is told: `first` is left of `second`.
        second: the thing that it is related to.
        relation: one of `RELATIONS`.
        setting: one of `SETTINGS`.
        third: a smaller thing beside them, or None.
    """

    first: Thing
    second: Thing
    relation: str
    setting: str
    third: Thing | None = None

    @property
    def things(self) -> tuple[Thing, ...]:
        """The two or three things."""
        return (self.first, self.second) if self.third is None else (self.first, self.second, self.third)

    @property
    def canonical(self) -> tuple[Thing, str, Thing]:
        """The statement in one fixed wording: `a right of b` becomes `b left of a`."""
        if self.relation in INVERSE:
            return self.second, INVERSE[self.relation], self.first
        return self.first, self.relation, self.second

    @property
    def keys(self) -> frozenset[tuple[str, ...]]:
        """What the most reticent captions say: one leaves out the colours, one the setting (see `scenes_captions`).

        Descriptions without a common key have no common caption.
        """
        subject, relation, target = self.canonical
        return frozenset({(subject.kind, relation, target.kind, self.setting), (str(subject), relation, str(target))})


def possible_relations(first: str, second: str) -> tuple[str, ...]:
    """The relations that can be drawn between two kinds, in that order."""
    inside = ("inside",) if first in FITS_INSIDE and second in CONTAINERS else ()
    holding = ("holding",) if first == "person" and second in CAN_BE_HELD else ()
    return SPATIAL + inside + holding


def throw_pair(dice: Dice, differs: Difference) -> tuple[Description, Description]:
    """Two descriptions that share their things with their colours, and differ in the relation or in the setting only."""
    # Weights: holding and inside have few partners, so that they run out soon if they come as often as the others.
    relation = dice.pick((*SPATIAL, *SPATIAL, "inside", "inside", "holding"))
    kinds = [(a, b) for a in KINDS for b in KINDS if a != b and relation in possible_relations(a, b)]
    first, second = dice.pick(kinds)
    colours = list(COLOURS)
    first_colour, second_colour, third_colour = (colours.pop(dice.between(0, len(colours) - 1)) for _ in range(3))
    third_kind = dice.pick([kind for kind in KINDS if kind not in (first, second)])
    one = Description(
        first=Thing(first, first_colour),
        second=Thing(second, second_colour),
        relation=relation,
        setting=dice.pick(SETTINGS),
        third=Thing(third_kind, third_colour) if dice.chance(35) else None,
    )
    if differs == "setting":
        return one, replace(one, setting=dice.pick([setting for setting in SETTINGS if setting != one.setting]))
    others = [other for other in possible_relations(first, second) if other != relation]
    return one, replace(one, relation=dice.pick(others))
