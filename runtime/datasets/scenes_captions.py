"""Five differently worded captions for a description.

Every caption names both things and their relation. The first, third, fourth and fifth name the setting too, the first,
second and fourth the colours; the second leaves the setting out unless that is what tells the scene from its partner.
Within a split no two scenes agree in what such a caption says of the first two things (`Description.keys`), so that every
caption has one right answer.
"""

from dataclasses import dataclass

from .scenes_description import Description, Dice, Difference, Thing


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Ways to state a canonical relation of `{a}` to `{b}`.

    Attributes:
        nouns: noun phrases that begin with `{a}`.
        nouns_inverse: noun phrases that begin with `{b}`.
        clauses: sentences about `{a}`.
        clauses_inverse: sentences about `{b}`.
    """

    nouns: tuple[str, ...]
    nouns_inverse: tuple[str, ...]
    clauses: tuple[str, ...]
    clauses_inverse: tuple[str, ...]


WORDINGS = {
    "left of": Wording(
        nouns=("{a} left of {b}", "{a} to the left of {b}", "{a} on the left side of {b}"),
        nouns_inverse=("{b} right of {a}", "{b} to the right of {a}", "{b} on the right side of {a}"),
        clauses=("{a} is to the left of {b}", "{a} has {b} on its right"),
        clauses_inverse=("{b} is to the right of {a}", "{b} has {a} on its left"),
    ),
    "above": Wording(
        nouns=("{a} above {b}", "{a} high above {b}", "{a} over {b}"),
        nouns_inverse=("{b} below {a}", "{b} under {a}", "{b} underneath {a}"),
        clauses=("{a} floats above {b}", "{a} is above {b}", "{a} hangs over {b}"),
        clauses_inverse=("{b} is below {a}", "{b} is under {a}", "{b} has {a} above it"),
    ),
    "in front of": Wording(
        nouns=("{a} in front of {b}", "{a} partly hiding {b}", "{a} with {b} behind it"),
        nouns_inverse=("{b} behind {a}", "{b} partly hidden by {a}", "{b} with {a} in front of it"),
        clauses=("{a} is in front of {b}", "{a} hides a part of {b}"),
        clauses_inverse=("{b} is behind {a}", "{b} is partly hidden by {a}"),
    ),
    "inside": Wording(
        nouns=("{a} inside {b}", "{a} in {b}", "{a} put into {b}"),
        nouns_inverse=("{b} containing {a}", "{b} with {a} inside", "{b} with {a} in it"),
        clauses=("{a} is inside {b}", "{a} is in {b}"),
        clauses_inverse=("{b} contains {a}", "{b} has {a} in it"),
    ),
    "holding": Wording(
        nouns=("{a} holding {b}", "{a} with {b} in hand", "{a} carrying {b}"),
        nouns_inverse=("{b} held by {a}", "{b} in the hand of {a}", "{b} carried by {a}"),
        clauses=("{a} holds {b}", "{a} is holding {b}", "{a} carries {b}"),
        clauses_inverse=("{b} is held by {a}", "{b} is carried by {a}"),
    ),
}

SYNONYMS = {
    "box": ("box", "crate"),
    "house": ("house", "cottage"),
    "boat": ("boat", "sailboat"),
    "dog": ("dog", "puppy"),
    "umbrella": ("umbrella", "parasol"),
    "cup": ("cup", "mug"),
}

PLACES = {
    "beach": ("on the beach", "by the sea", "on the sandy shore"),
    "field": ("in a field", "in a green meadow", "on the grass"),
    "snow": ("in the snow", "on a snowy day", "in winter"),
    "city": ("in the city", "on a street in town", "downtown"),
    "desert": ("in the desert", "among the dunes", "on hot desert sand"),
    "night": ("at night", "under the moon", "on a starry night"),
    "sunset": ("at sunset", "in the evening sun", "as the sun goes down"),
    "room": ("indoors", "in a room", "at home"),
}
SCENE_NAMES = {
    "beach": "a beach scene",
    "field": "a meadow scene",
    "snow": "a winter scene",
    "city": "a city scene",
    "desert": "a desert scene",
    "night": "a night scene",
    "sunset": "a sunset scene",
    "room": "an indoor scene",
}


def captions_for(description: Description, differs: Difference, dice: Dice) -> tuple[str, ...]:
    """The five captions of a scene whose hard partner `differs` in its relation or in its setting."""
    subject, relation, target = description.canonical
    wording = WORDINGS[relation]
    # Which thing comes first is thrown for two captions and exchanged for two others, so that both orders occur in each scene.
    turned = dice.chance(50)

    def say(patterns: tuple[str, ...], a: str, b: str) -> str:
        return dice.pick(patterns).format(a=a, b=b)

    def coloured(thing: Thing) -> str:
        return _named(thing, dice, with_colour=True)

    def plain(thing: Thing) -> str:
        return _named(thing, dice, with_colour=False)

    places = list(PLACES[description.setting])
    first_place, second_place, third_place = (places.pop(dice.between(0, len(places) - 1)) for _ in range(3))
    nearby = "" if description.third is None else f" and a small {_bare(description.third, dice)} nearby"

    nouns, clauses = wording.nouns, wording.clauses
    nouns_turned, clauses_turned = wording.nouns_inverse, wording.clauses_inverse
    if turned:
        nouns, nouns_turned = nouns_turned, nouns
        clauses, clauses_turned = clauses_turned, clauses
    one_coloured = dice.pick((coloured, plain))
    other_coloured = plain if one_coloured is coloured else dice.pick((coloured, plain))
    return (
        f"{say(nouns, coloured(subject), coloured(target))} {first_place}",
        say(clauses_turned, coloured(subject), coloured(target)) + (f" {third_place}" if differs == "setting" else ""),
        f"{second_place} {say(clauses, plain(subject), plain(target))}",
        f"{third_place} there is {say(nouns_turned, coloured(subject), coloured(target))}{nearby}",
        f"{SCENE_NAMES[description.setting]} with {say(dice.pick((nouns, nouns_turned)), one_coloured(subject), other_coloured(target))}",
    )


def _bare(thing: Thing, dice: Dice, *, with_colour: bool = True) -> str:
    """`red ball`, or `person in red`: nobody calls a person red."""
    word = dice.pick(SYNONYMS.get(thing.kind, (thing.kind,)))
    if not with_colour:
        return word
    return f"{word} in {thing.colour}" if thing.kind == "person" else f"{thing.colour} {word}"


def _named(thing: Thing, dice: Dice, *, with_colour: bool) -> str:
    name = _bare(thing, dice, with_colour=with_colour)
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
