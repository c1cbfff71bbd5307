import json
from pathlib import Path

import pytest
from PIL import Image

from dualmatch.runtime.datasets import Dataset, open_dataset
from dualmatch.runtime.datasets.captions import read_captions_folder
from dualmatch.runtime.datasets.entries import Faults
from dualmatch.runtime.errors import DualmatchError

ENTRIES = [
    {"filename": "b.png", "split": "val", "captions": ["a red square", "something red"]},
    {"filename": "a.png", "captions": ["a blue square"]},
    {
        "filename": "more/c.png",
        "split": "none",
        "captions": ["a green square", "green", "grass-coloured"],
        "size": [4, 4],
    },
]


def folder_with(root: Path, entries: object = ENTRIES, **extra: object) -> Path:
    (root / "images" / "more").mkdir(parents=True)
    for name, colour in (("a.png", "blue"), ("b.png", "red"), ("more/c.png", "green")):
        Image.new("RGB", (4, 4), colour).save(root / "images" / name)
    (root / "captions.json").write_text(json.dumps({"images": entries, **extra}))
    return root


def refusal(root: Path) -> str:
    with pytest.raises(DualmatchError) as caught:
        open_dataset(root)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_a_folder_is_read_in_the_order_of_its_file(tmp_path):
    dataset = open_dataset(folder_with(tmp_path / "mine"))
    assert isinstance(dataset, Dataset)
    assert (dataset.name, dataset.layout, dataset.root) == ("mine", "captions", tmp_path / "mine")
    assert [item.id for item in dataset.items] == ["b.png", "a.png", "more/c.png"]
    assert [item.split for item in dataset.items] == ["val", "train", "none"]
    assert dataset.captions[:3] == ["a red square", "something red", "a blue square"]
    assert dataset.caption_image == [0, 0, 1, 2, 2, 2]
    assert dataset.items[0].open().convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert dataset.items[2].path == tmp_path / "mine" / "images" / "more" / "c.png"


def test_the_name_may_be_given_in_the_file_and_the_path_as_text(tmp_path):
    assert open_dataset(str(folder_with(tmp_path, dataset="holidays"))).name == "holidays"


def test_splits_join_in_the_order_of_the_data_set(tmp_path):
    dataset = open_dataset(folder_with(tmp_path))
    assert dataset.splits == ("val", "train", "none")
    assert [item.id for item in dataset.select(["none", "val"]).items] == ["b.png", "more/c.png"]
    with pytest.raises(DualmatchError, match="no split 'test'; it has val, train, none"):
        dataset.select(["test"])


def test_a_missing_folder_is_named_with_what_can_be_given(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "captions.json" in message
    assert "scenes" in message
    with pytest.raises(DualmatchError, match="no such folder"):
        read_captions_folder(tmp_path / "nowhere", Faults())
    assert "cannot be opened" in refusal(tmp_path / ("x" * 5000))


def test_an_unknown_layout_is_told_by_its_first_entries(tmp_path):
    assert "an empty folder" in refusal(tmp_path)
    for name in ("e.jpg", "b.jpg", "c.jpg", "d.jpg", "a.jpg", "f.jpg", "g.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "aa").mkdir()
    message = refusal(tmp_path)
    assert "a.jpg, aa/, b.jpg, c.jpg, d.jpg and 3 more" in message
    assert "images/ and captions.json" in message


def test_no_captions_file_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    assert "found images/," in refusal(tmp_path)
    with pytest.raises(DualmatchError, match=r"there is no file .*captions\.json"):
        read_captions_folder(tmp_path, Faults())


def test_no_images_folder_is_named(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"images": ENTRIES}))
    assert "no folder images/" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"{images: 1}", b"", b"\xff\xfe\x00"])
def test_what_is_not_json_is_said_not_to_be(tmp_path, content):
    (tmp_path / "captions.json").write_bytes(content)
    assert "captions.json cannot be read as JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([], "found a list of 0"),
        ({"photos": [], "info": 1}, "found an object with 'photos', 'info'"),
        ({"images": {}}, "found an object with 'images'"),
        ({"images": []}, "is empty"),
        ({"images": ENTRIES, "dataset": 7}, "found the value 7"),
    ],
)
def test_another_shape_of_json_is_described(tmp_path, content, found):
    (tmp_path / "captions.json").write_text(json.dumps(content))
    assert found in refusal(tmp_path)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("b.png", "found the text 'b.png'"),
        ({"captions": ["x"]}, 'needs a "filename", found nothing'),
        ({"filename": 3, "captions": ["x"]}, "found the value 3"),
        ({"filename": "b.png", "captions": ["x"], "split": 1}, "'b.png'): \"split\" must be a name"),
        ({"filename": "b.png"}, "'b.png') has no captions"),
        ({"filename": "b.png", "captions": []}, "'b.png') has no captions"),
        ({"filename": "b.png", "captions": "red"}, "found the text 'red'"),
        ({"filename": "b.png", "captions": ["x", " \n"]}, "caption 2 must be a text that is not empty"),
        ({"filename": "b.png", "captions": [None]}, "caption 1 must be a text"),
        ({"filename": "b.png", "captions": ["\ud83d"]}, "caption 1 is not valid Unicode"),
        ({"filename": "../b.png", "captions": ["x"]}, "'../b.png') must lie below images/"),
        ({"filename": "more/../../b.png", "captions": ["x"]}, "must lie below images/"),
        ({"filename": "/b.png", "captions": ["x"]}, "must lie below images/"),
        ({"filename": "..\\b.png", "captions": ["x"]}, "must lie below images/"),
    ],
)
def test_a_bad_entry_is_named_with_its_number(tmp_path, entry, found):
    message = refusal(folder_with(tmp_path, [ENTRIES[1], entry]))
    assert "image 2" in message
    assert found in message


@pytest.mark.parametrize("again", ["a.png", "./a.png"])
def test_a_file_listed_twice_is_named(tmp_path, again):
    message = refusal(folder_with(tmp_path, [*ENTRIES, {"filename": again, "captions": ["x"]}]))
    assert "'a.png' is listed twice" in message


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    gone = [{"filename": name, "captions": ["x"]} for name in ("z.png", "y.png", "n" * 5000, "nul\0.png", "more")]
    message = refusal(folder_with(tmp_path, [*ENTRIES, *gone]))
    assert "5 of 8 listed images are not in" in message
    assert "'z.png'" in message


def test_the_name_scenes_opens_the_embedded_set_and_a_path_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_with(tmp_path / "scenes")
    assert open_dataset("scenes").layout == "scenes"
    assert open_dataset("./scenes").layout == "captions"
    assert open_dataset(tmp_path / "scenes").layout == "captions"
