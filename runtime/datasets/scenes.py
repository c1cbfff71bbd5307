"""The embedded data set: drawn scenes in hard pairs, generated from a seed.

It exists so that a laptop can see why objects, relations and the global setting all matter to retrieval: the two scenes of
a pair share their objects and colours, and differ in one relation or in the setting.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dualmatch.runtime.errors import DualmatchError

from .base import Dataset, ImageItem
from .scenes_captions import captions_for
from .scenes_description import Description, Dice, Difference, throw_pair
from .scenes_drawing import draw, png_bytes
from .scenes_layout import Layout, lay_out

NUM_TRAIN = 1600
NUM_VAL = 200
NUM_TEST = 400
_MAX_THROWS_IN_VAIN = 5000


@dataclass(frozen=True, kw_only=True)
class SceneItem(ImageItem):
    """An image that is drawn whenever it is read (about a millisecond), so that opening the data set costs no drawing.

    Attributes:
        description: what it shows.
        seed: from which everything thrown is thrown; with the id it determines every byte.
    """

    description: Description
    seed: int

    @property
    def layout(self) -> Layout:
        """Where its things stand."""
        return lay_out(self.description, Dice(f"{self.seed}/{self.id}/layout"))

    def read_bytes(self) -> bytes:
        """The drawn scene as a PNG file."""
        return png_bytes(draw(self.description, self.layout, Dice(f"{self.seed}/{self.id}/drawing")))


def make_scenes(
    *, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL, num_test: int = NUM_TEST, seed: int = 0
) -> Dataset:
    """Generate the `scenes` data set; the same arguments give the same bytes on every machine.

    Partners are neighbours (`train-0000a`, `train-0000b`) and share a split. No description occurs twice in the whole set,
    and within a split no two scenes agree in what a caption says of the first two things. Tags: `pair` (the partner's id),
    `differs` (`relation` or `setting`, alternating from pair to pair), `setting`, `relation` (of the first object to the
    second) and `objects` (`red ball|blue box`, or three).

    Raises:
        DualmatchError: an odd or negative number of images, or more than there are different scenes.
    """
    dice = Dice(f"{seed}/descriptions")
    seen: set[tuple[object, ...]] = set()
    items: list[SceneItem] = []
    for split, count in (("train", num_train), ("val", num_val), ("test", num_test)):
        if count < 0 or count % 2:
            raise DualmatchError(f"scenes come in pairs: {count} {split} images were asked for, give an even number.")
        for number, pair in enumerate(_pairs(split, count // 2, seen, dice)):
            items.extend(_items_of_pair(split, number, pair, seed))
    return Dataset(name="scenes", layout="scenes", items=tuple(items))


def _difference(number: int) -> Difference:
    return "setting" if number % 2 else "relation"


def _pairs(
    split: str, count: int, seen: set[tuple[object, ...]], dice: Dice
) -> Iterator[tuple[Description, Description]]:
    """Pairs that repeat no statement of the earlier splits and no caption's content within this one."""
    keys: set[tuple[str, ...]] = set()
    for number in range(count):
        for _ in range(_MAX_THROWS_IN_VAIN):
            pair = throw_pair(dice, _difference(number))
            statements = {(*each.canonical, each.setting) for each in pair}
            if not statements & seen and not (pair[0].keys | pair[1].keys) & keys:
                break
        else:
            raise DualmatchError(
                f"there are not enough different scenes for {2 * count} {split} images; ask for fewer."
            )
        seen |= statements
        keys |= pair[0].keys | pair[1].keys
        yield pair


def _items_of_pair(
    split: str, number: int, pair: tuple[Description, Description], seed: int
) -> tuple[SceneItem, SceneItem]:
    ids = (f"{split}-{number:04}a", f"{split}-{number:04}b")
    differs = _difference(number)
    one, other = (
        SceneItem(
            id=own,
            split=split,
            captions=captions_for(description, differs, Dice(f"{seed}/{own}/captions")),
            tags=(
                ("pair", partner),
                ("differs", differs),
                ("setting", description.setting),
                ("relation", description.relation),
                ("objects", "|".join(str(thing) for thing in description.things)),
            ),
            description=description,
            seed=seed,
        )
        for own, partner, description in zip(ids, reversed(ids), pair, strict=True)
    )
    return one, other
