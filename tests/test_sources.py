"""What to encode: folders, lists and caption files, good and bad."""

import json
import re

import pytest

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.sources import captions_in, photos_in, photos_root


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def text_file(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_folder_is_read_in_the_order_of_its_relative_paths(tmp_path):
    touch(tmp_path, "b/2.JPG", "b/1.jpeg", "a.png", "c.WebP", "b.bmp", "b/deep/er/x.jpg")
    photos = photos_in(tmp_path)
    assert [p.id for p in photos] == ["a.png", "b.bmp", "b/1.jpeg", "b/2.JPG", "b/deep/er/x.jpg", "c.WebP"]
    assert all(p.path == tmp_path / p.id and p.path.exists() for p in photos)
    assert photos_root(tmp_path) == tmp_path


def test_hidden_files_and_other_files_are_no_photos(tmp_path):
    touch(tmp_path, "a.jpg", "._a.jpg", ".trash/b.jpg", "notes.txt", "jpg")
    assert [p.id for p in photos_in(tmp_path)] == ["a.jpg"]


def test_a_folder_without_photos_says_what_it_holds(tmp_path):
    touch(tmp_path, "a.pdf", "b/c.pdf", "d.txt", "Makefile", ".x.jpg")
    with pytest.raises(DualmatchError, match=r"no photograph .* it holds 2 \.pdf, 1 \.txt, 1 hidden, 1 without suffix"):
        photos_in(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DualmatchError, match="it holds no file at all"):
        photos_in(tmp_path / "empty")


def test_a_list_keeps_its_order_and_is_relative_to_itself(tmp_path):
    touch(tmp_path, "z.jpg", "sub/ä b.jpg")
    path = text_file(tmp_path, "list.txt", "z.jpg\r\n./sub/ä b.jpg\ngone.jpg\n\n")
    photos = photos_in(path)
    assert [p.id for p in photos] == ["z.jpg", "sub/ä b.jpg", "gone.jpg"]
    assert [p.path.exists() for p in photos] == [True, True, False]  # what is missing shows at encoding
    assert photos_root(path) == tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("a.jpg\n\nb.jpg", "line 2: the line is empty"),
        ("a.jpg\nb.jpg\n./a.jpg\n", "line 3: 'a.jpg' stands on line 1 already"),
        (b"a.jpg\nb\xff.jpg\n", "line 2: not UTF-8"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    with pytest.raises(DualmatchError, match=message):
        photos_in(text_file(tmp_path, "list.txt", content))


def test_photos_from_nowhere_or_from_something_else(tmp_path):
    with pytest.raises(DualmatchError, match="there is no folder or list file"):
        photos_in(tmp_path / "nowhere")
    touch(tmp_path, "a.jpg")
    with pytest.raises(DualmatchError, match="neither a folder nor a list file"):
        photos_in(tmp_path / "a.jpg")


def test_captions_of_a_text_file_are_numbered_by_line(tmp_path):
    path = text_file(tmp_path, "c.txt", "\ufeffA dog . \r\nZwei Hunde\u2028im Schnee\n\n")
    assert [(c.id, c.text, c.image) for c in captions_in(path)] == [
        ("1", "A dog .", None),
        ("2", "Zwei Hunde\u2028im Schnee", None),
    ]


def test_captions_of_jsonl_use_their_own_ids_first(tmp_path):
    lines = [
        {"caption": " a ", "image": "x.jpg"},
        {"caption": "b", "image": "y.jpg", "id": 7},
        {"caption": "c", "image": "x.jpg", "split": "val"},
        {"caption": "d"},
        {"caption": "e", "id": "own", "image": None},
    ]
    path = text_file(tmp_path, "c.jsonl", "\n".join(map(json.dumps, lines)))
    assert [(c.id, c.text, c.image) for c in captions_in(path)] == [
        ("x.jpg#0", "a", "x.jpg"),
        ("7", "b", "y.jpg"),
        ("x.jpg#1", "c", "x.jpg"),
        ("4", "d", None),
        ("own", "e", None),
    ]


def test_captions_json_counts_within_the_image(tmp_path):
    images = [
        {"filename": "x.jpg", "split": "val", "captions": ["a", "b"]},
        {"filename": "y.jpg", "captions": ["a"]},
    ]
    path = text_file(tmp_path, "captions.json", json.dumps({"images": images}))
    assert [(c.id, c.text, c.image) for c in captions_in(path, images=["y.jpg", "x.jpg"])] == [
        ("x.jpg#0", "a", "x.jpg"),
        ("x.jpg#1", "b", "x.jpg"),
        ("y.jpg#0", "a", "y.jpg"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "", "holds no caption"),
        ("c.txt", "a\n\nb\n", "line 2: the line is empty"),
        ("c.txt", b"a\nb\nc\xe9\n", "line 3: not UTF-8"),
        ("c.csv", "a", r"none of \.txt"),
        ("c.jsonl", '{"caption": "a"}\n{"caption"', "line 2: not JSON"),
        ("c.jsonl", '{"caption": "a"}\n["b"]', "line 2: expected an object with a 'caption'"),
        ("c.jsonl", '{"captoin": "a"}', "line 1: 'caption' must be text, found null"),
        ("c.jsonl", '{"caption": "  "}', "line 1: 'caption' must be text, found \"  \""),
        ("c.jsonl", '{"caption": "\\ud800"}', "line 1: 'caption' holds half a surrogate pair"),
        ("c.jsonl", '{"caption": "a", "id": 1.5}', "line 1: 'id' must be text, found 1.5"),
        ("c.jsonl", '{"caption": "a", "image": 3}', "line 1: 'image' must be text, found 3"),
        ("c.jsonl", '{"caption": "a", "id": 2}\n{"caption": "b"}', "line 2: the id '2' is taken by line 1"),
        ("c.json", "[1, 2", "is not JSON"),
        ("c.json", "[" * 100_000, "is not JSON"),
        ("c.json", '{"pictures": []}', "must hold"),
        ("c.json", "[]", "must hold"),
        ("c.json", '{"images": []}', "holds no caption"),
        ("c.json", '{"images": [{"filename": "x", "captions": "a"}]}', "entry 0 of 'images': expected"),
        ("c.json", '{"images": [{"captions": ["a"]}]}', "entry 0 of 'images': 'filename' must be text"),
        ("c.json", '{"images": [{"filename": "x", "captions": ["a", 5]}]}', "entry 0 of 'images': caption 1 must be"),
        (
            "c.json",
            '{"images": [{"filename": "x", "captions": ["a"]}, {"filename": "x", "captions": ["b"]}]}',
            "the id 'x#0' is taken by entry 0 of 'images', caption 0",
        ),
    ],
)
def test_bad_caption_files(tmp_path, name, content, message):
    with pytest.raises(DualmatchError, match=message) as caught:
        captions_in(text_file(tmp_path, name, content))
    assert len(re.findall(r"\.(\s|$)", str(caught.value))) <= 2
    assert "\n" not in str(caught.value)


def test_a_caption_of_an_image_that_is_not_there(tmp_path):
    path = text_file(tmp_path, "c.jsonl", '{"caption": "a"}\n{"caption": "b", "image": "gone.jpg"}')
    assert len(captions_in(path)) == 2
    with pytest.raises(DualmatchError, match=r"line 2: image 'gone.jpg' is not among the 1 photographs"):
        captions_in(path, images=["here.jpg"])
    with pytest.raises(DualmatchError, match="there is no file"):
        captions_in(tmp_path / "nowhere.txt")
