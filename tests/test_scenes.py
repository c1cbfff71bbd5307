import hashlib
import io
from collections import Counter
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from dualmatch.runtime.datasets import Dataset, make_scenes, open_dataset
from dualmatch.runtime.datasets.scenes import SceneItem
from dualmatch.runtime.datasets.scenes_captions import PLACES, SCENE_NAMES, SYNONYMS, WORDINGS
from dualmatch.runtime.datasets.scenes_description import (
    CAN_BE_HELD,
    COLOURS,
    CONTAINERS,
    FITS_INSIDE,
    INVERSE,
    KINDS,
    RELATIONS,
    SETTINGS,
    Description,
    Dice,
    Thing,
    possible_relations,
)
from dualmatch.runtime.datasets.scenes_drawing import draw, png_bytes
from dualmatch.runtime.datasets.scenes_layout import SIZE, lay_out
from dualmatch.runtime.datasets.scenes_raster import covered, ellipse, polygon
from dualmatch.runtime.datasets.scenes_sprites import BODY_COLOURS, SPRITES
from dualmatch.runtime.errors import DualmatchError

# What the generator gives. Change these only with a change to the data set that is meant, and say so in the changelog.
FIRST_EIGHT_IMAGES = "3c74424c792f32ced3e95186287c926ef89036f35f18dc7722d6a78019321f48"
SMALL_SET_CAPTIONS = "8227e131a4c6087849da0b85baf1cacbc817d24c1b80e016fee9e82b0313ac9d"


@cache
def small_set() -> Dataset:
    return make_scenes(num_train=320, num_val=20, num_test=40)


@cache
def default_set() -> Dataset:
    return make_scenes()


def scenes(dataset: Dataset) -> list[SceneItem]:
    assert all(isinstance(item, SceneItem) for item in dataset.items)
    return [item for item in dataset.items if isinstance(item, SceneItem)]


def pairs(dataset: Dataset) -> list[tuple[SceneItem, SceneItem]]:
    items = scenes(dataset)
    return list(zip(items[::2], items[1::2], strict=True))


def pixels_of(item: SceneItem) -> np.ndarray:
    return np.asarray(item.open().convert("RGB"))


def sha256(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_images_and_captions_are_pinned():
    items = scenes(small_set())
    assert sha256([item.read_bytes() for item in items[:8]]) == FIRST_EIGHT_IMAGES
    assert sha256([caption.encode() + b"\n" for caption in small_set().captions]) == SMALL_SET_CAPTIONS


def test_the_same_seed_repeats_and_another_differs():
    again, other = (
        make_scenes(num_train=4, num_val=0, num_test=0),
        make_scenes(num_train=4, num_val=0, num_test=0, seed=1),
    )
    assert again.items == small_set().items[:4]
    assert [item.read_bytes() for item in again.items] == [item.read_bytes() for item in small_set().items[:4]]
    assert [item.id for item in other.items] == [item.id for item in again.items]
    assert other.captions != again.captions


def test_the_default_set_has_its_splits_in_order():
    dataset = default_set()
    assert open_dataset("scenes") == dataset
    assert dataset.splits == ("train", "val", "test")
    assert Counter(item.split for item in dataset.items) == {"train": 1600, "val": 200, "test": 400}
    assert len({item.id for item in dataset.items}) == 2200
    assert [item.id for item in dataset.items[:3]] == ["train-0000a", "train-0000b", "train-0001a"]
    assert dataset.items[-1].id == "test-0199b"
    assert all(dict(item.tags)["setting"] in SETTINGS for item in dataset.items)


def test_everything_occurs_often_enough_to_be_learnt():
    items = [item for item in scenes(default_set()) if item.split == "train"]
    for values, expected in (
        ([item.description.setting for item in items], SETTINGS),
        ([item.description.relation for item in items], RELATIONS),
        ([thing.kind for item in items for thing in item.description.things], KINDS),
        ([thing.colour for item in items for thing in item.description.things], COLOURS),
    ):
        counts = Counter(values)
        assert set(counts) == set(expected)
        assert min(counts.values()) >= 40


def test_partners_share_everything_but_one_difference():
    for number, (one, other) in enumerate(pairs(default_set())):
        tags, other_tags = dict(one.tags), dict(other.tags)
        assert (tags["pair"], other_tags["pair"]) == (other.id, one.id)
        assert one.split == other.split
        assert tags["objects"] == other_tags["objects"] == "|".join(map(str, one.description.things))
        assert one.description.things == other.description.things
        differing = {name for name in ("relation", "setting") if tags[name] != other_tags[name]}
        assert differing == {tags["differs"]} == {other_tags["differs"]}
        assert tags["differs"] == ("setting" if number % 2 else "relation")


def test_partners_are_drawn_differently():
    for one, other in pairs(small_set())[:40]:
        assert (pixels_of(one) != pixels_of(other)).any(axis=-1).mean() > 0.05


def test_the_things_of_a_scene_differ_in_kind_and_colour():
    for item in scenes(default_set()):
        things = item.description.things
        assert len({thing.kind for thing in things}) == len({thing.colour for thing in things}) == len(things)
        assert item.description.relation in possible_relations(things[0].kind, things[1].kind)


def statement(item: SceneItem) -> tuple[str, ...]:
    """The description in words, with `a right of b` turned into `b left of a`, without the third thing."""
    description = item.description
    first, relation, second = str(description.first), description.relation, str(description.second)
    if relation in INVERSE:
        first, relation, second = second, INVERSE[relation], first
    return first, relation, second, description.setting


def test_no_statement_occurs_twice_in_any_splits():
    statements = [statement(item) for item in scenes(default_set())]
    assert len(set(statements)) == len(statements)


def test_within_a_split_no_caption_is_true_of_two_scenes():
    for split in default_set().splits:
        items = scenes(default_set().select([split]))
        without_colours, without_setting = Counter(), Counter()
        for item in items:
            first, relation, second, setting = statement(item)
            without_colours[first.split()[1], relation, second.split()[1], setting] += 1
            # Partners that differ in the setting only agree here, and for that name it in every caption.
            if dict(item.tags)["differs"] == "relation" or item.id.endswith("a"):
                without_setting[first, relation, second] += 1
        assert max(without_colours.values()) == 1
        assert max(without_setting.values()) == 1
        captions = [caption for item in items for caption in item.captions]
        assert len(set(captions)) == len(captions)


def test_every_caption_names_both_things_the_relation_and_mostly_the_setting():
    relation_words = {
        "left of": ("left", "right"),
        "above": ("above", "over", "below", "under", "underneath"),
        "in front of": ("in front of", "hiding", "hides", "hidden", "behind"),
        "inside": ("inside", " in ", "into", "contain"),
        "holding": ("hold", "held", "hand", "carr"),
    }
    for item in scenes(default_set()):
        first, relation, second, setting = statement(item)
        assert len(set(item.captions)) == len(item.captions) == 5
        naming_setting = 0
        for caption in item.captions:
            assert caption == caption.lower().strip()
            assert "  " not in caption
            for kind in (first.split()[1], second.split()[1]):
                assert any(word in caption.split() for word in SYNONYMS.get(kind, (kind,))), caption
            assert any(word in caption for word in relation_words[relation]), caption
            places = (*PLACES[setting], SCENE_NAMES[setting])
            naming_setting += any(place in caption for place in places)
            others = [place for name, named in PLACES.items() if name != setting for place in named]
            assert not any(caption.startswith(f"{place} ") or caption.endswith(f" {place}") for place in others), (
                caption
            )
        assert naming_setting == (5 if dict(item.tags)["differs"] == "setting" else 4)
        colours = [thing.colour for thing in item.description.things[:2]]
        assert sum(all(colour in caption.split() for colour in colours) for caption in item.captions) >= 3


def test_captions_of_a_relation_read_from_both_ends():
    for relation, wording in WORDINGS.items():
        for patterns, start in ((wording.nouns, "{a}"), (wording.nouns_inverse, "{b}")):
            assert all(pattern.startswith(start) for pattern in patterns), relation
        for patterns, start in ((wording.clauses, "{a}"), (wording.clauses_inverse, "{b}")):
            assert all(pattern.startswith(start) for pattern in patterns), relation
    orders = set()
    for item in scenes(small_set()):
        if item.description.relation in ("left of", "right of"):
            left, _, right, _ = statement(item)
            caption = item.captions[0]
            left_first = caption.index(left.split()[0]) < caption.index(right.split()[0])
            assert ("left" in caption) == left_first
            orders.add(left_first)
    assert orders == {True, False}


def test_words_are_few_and_plain():
    words = {word for caption in default_set().captions for word in caption.split()}
    assert 80 <= len(words) <= 150
    assert all(word.isascii() and word.isalpha() for word in words)


def body_pixels(item: SceneItem, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns at which the picture has exactly a thing's body colour."""
    return np.nonzero((pixels_of(item) == BODY_COLOURS[colour]).all(axis=-1))


def test_relations_can_be_seen_in_the_layout_and_in_the_pixels():
    seen = Counter()
    for item in scenes(small_set()):
        layout, relation = item.layout, item.description.relation
        a, b = layout.first, layout.second
        assert (a.thing, b.thing) == (item.description.first, item.description.second)
        if relation in INVERSE:
            a, b, relation = b, a, INVERSE[relation]
        rows_a, columns_a = body_pixels(item, a.thing.colour)
        rows_b, columns_b = body_pixels(item, b.thing.colour)
        assert min(len(rows_a), len(rows_b)) >= 20, item.id  # neither is hidden
        if relation == "left of":
            assert a.right + 5 <= b.left
            assert columns_a.max() < columns_b.min()
            assert abs(a.bottom - b.bottom) <= 6
        elif relation == "above":
            assert a.bottom + 5 <= b.top
            assert rows_a.max() < rows_b.min()
            assert abs((a.left + a.right) - (b.left + b.right)) <= 12
        elif relation == "in front of":
            assert 0.18 <= a.hides(b) <= 0.42
            alone = SPRITES[a.sprite].pixels(a.size)
            assert (a.width, a.height) == alone
            assert len(rows_a) > 0.15 * a.width * a.height  # nothing hides the one in front
        elif relation == "inside":
            assert b.left < a.left
            assert a.right < b.right
            assert a.top < a.bottom < b.bottom
            opening = SPRITES[b.sprite].opening
            assert opening is not None
            rim = b.top + opening[2] * b.size // 32
            assert a.top < rim < a.bottom
            assert rows_a.max() <= rim + 3  # below the rim the container's front hides it
        else:
            assert relation == "holding"
            assert a.sprite == "reaching person"
            assert a.overlaps(b)
            hand = a.left if a.flip else a.right
            assert b.left - 3 <= hand <= b.right + 3
        seen[relation] += 1
    assert min(seen[relation] for relation in RELATIONS if relation not in INVERSE) >= 5


def test_things_stay_in_the_frame_and_the_third_stays_clear():
    thirds = 0
    for item in scenes(small_set()):
        layout = item.layout
        for placed in (layout.first, layout.second, layout.third):
            if placed is not None:
                assert min(placed.left, placed.top) >= 1
                assert max(placed.right, placed.bottom) <= SIZE - 1
        if layout.third is not None:
            thirds += 1
            assert not layout.third.overlaps(layout.first)
            assert not layout.third.overlaps(layout.second)
            assert len(body_pixels(item, layout.third.thing.colour)[0]) >= 10
    assert thirds > 50


def test_settings_fill_the_picture_and_look_apart():
    """The nearest class mean of an 8 x 8 thumbnail's border names the setting, so the background is told by its whole."""
    border = np.ones((8, 8), bool)
    border[2:6, 2:6] = False
    features, settings = [], []
    for item in scenes(small_set()):
        thumbnail = item.open().convert("RGB").resize((8, 8), Image.Resampling.BOX)
        features.append(np.asarray(thumbnail, dtype=np.float64)[border].ravel())
        settings.append(SETTINGS.index(item.description.setting))
    x, y = np.array(features), np.array(settings)
    means = np.stack([x[:160][y[:160] == index].mean(axis=0) for index in range(len(SETTINGS))])
    guesses = ((x[160:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert (guesses == y[160:]).mean() > 0.9


def test_png_files_decode_to_what_was_drawn():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(png_bytes(pixels))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIZE, SIZE))
        assert (np.asarray(image) == pixels).all()


def test_shapes_cover_the_pixels_whose_centres_they_hold():
    triangle = covered(polygon("", (0, 0), (8, 0), (0, 8)), (8, 8), (4, 4))
    assert triangle.astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    disc = covered(ellipse("", 0, 0, 10, 10), (10, 10), (100, 100))
    assert disc.sum() / 100**2 == pytest.approx(np.pi / 4, abs=0.005)
    assert (disc == disc[::-1]).all()
    assert (disc == disc.T).all()


def test_an_odd_number_and_too_many_are_refused(monkeypatch):
    with pytest.raises(DualmatchError, match="3 val images"):
        make_scenes(num_train=2, num_val=3, num_test=2)
    monkeypatch.setattr("dualmatch.runtime.datasets.scenes._MAX_THROWS_IN_VAIN", 20)
    with pytest.raises(DualmatchError, match="not enough different scenes for 9000 train images"):
        make_scenes(num_train=9000, num_val=0, num_test=0)


def test_every_two_kinds_can_be_drawn_in_every_relation_they_allow():
    number = 0
    for first, second in permutations(KINDS, 2):
        for relation in possible_relations(first, second):
            number += 1
            third = next(kind for kind in KINDS[number % 10 :] + KINDS if kind not in (first, second))
            description = Description(
                first=Thing(first, "red"),
                second=Thing(second, "blue"),
                relation=relation,
                setting=SETTINGS[number % len(SETTINGS)],
                third=Thing(third, "white"),
            )
            layout = lay_out(description, Dice(str(number)))  # asserts that there is room
            pixels = draw(description, layout, Dice(str(number)))
            assert (pixels == BODY_COLOURS["red"]).all(axis=-1).sum() >= 20
            assert (pixels == BODY_COLOURS["blue"]).all(axis=-1).sum() >= 20
    assert number == 132 * 6 + len(CONTAINERS) * len(FITS_INSIDE) - 2 + len(CAN_BE_HELD)


def test_every_part_of_a_scene_shows_its_setting():
    """Why regions alone can tell settings apart: a ninth of a scene is enough to look like the scenes of its setting (chance: an eighth)."""

    def colours(item):
        """A coarse histogram of each ninth's colours, (9, 64)."""
        pixels = np.asarray(item.open().convert("RGB")) // 64
        bins = (pixels[..., 0] * 16 + pixels[..., 1] * 4 + pixels[..., 2]).astype(int)
        ninths = bins.reshape(3, 32, 3, 32).transpose(0, 2, 1, 3).reshape(9, -1)
        return np.stack([np.bincount(one, minlength=64) for one in ninths])

    data = make_scenes(num_train=400, num_val=0, num_test=100)
    known, asked = (data.select([split]).items for split in ("train", "test"))
    settings = np.array([item.description.setting for item in known])
    known_CNH, asked_CNH = (np.stack([colours(item) for item in items]).transpose(1, 0, 2) for items in (known, asked))
    for ours, theirs in zip(asked_CNH, known_CNH, strict=True):
        nearest = np.square(ours[:, None] - theirs[None]).sum(axis=2).argmin(axis=1)
        right = [settings[row] == item.description.setting for row, item in zip(nearest, asked, strict=True)]
        assert np.mean(right) > 0.8
