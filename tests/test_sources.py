"""What to encode: folders, lists and caption files, good and bad."""

import io
import json
import re
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.patterns import files_of
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
    with pytest.raises(DualmatchError, match="there is no folder, list, archive"):
        photos_in(tmp_path / "nowhere")
    touch(tmp_path, "a.jpg")
    with pytest.raises(DualmatchError, match="neither a folder nor a list "):
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
        ("c.txt", b"a\nb\nc\xe9\n", "line 3: not UTF-8"),
        ("c.csv", "a", r"none of \.txt"),
        ("c.jsonl", '{"caption": "a"}\n{"caption"', "line 2: not JSON"),
        ("c.jsonl", '{"caption": "a"}\n["b"]', "line 2: expected an object with a 'caption'"),
        ("c.jsonl", '{"captoin": "a"}', "line 1: expected an object with a 'caption'"),
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


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        ("c.txt", "a\n\n  \nb\n\n", [None, "the line is empty", "the line is empty", None]),
        ("c.jsonl", '{"caption": "a"}\n\n{"caption": " "}', [None, "the line is empty", "the caption is empty"]),
        ("c.jsonl", '{"caption": null}\n{"caption": 5}', ["the caption is not text but null", "the caption is not text but 5"]),
        ("c.jsonl", '{"caption": "\\ud800"}', ["the caption holds half a surrogate pair, which is no text"]),
        ("c.json", '{"images": [{"filename": "x", "captions": ["", "a"]}]}', ["the caption is empty", None]),
    ],
)  # fmt: skip
def test_a_caption_that_cannot_be_used_keeps_its_row(tmp_path, name, content, problems):
    captions = captions_in(text_file(tmp_path, name, content))
    assert [caption.problem for caption in captions] == problems
    assert all((caption.text == "") == (caption.problem is not None) for caption in captions)


# Standard input and patterns


def test_standard_input_is_a_list_relative_to_the_working_directory(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "sub/b.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"sub/b.jpg\n./a.jpg\n")))
    photos = photos_in("-")
    assert [p.id for p in photos] == ["sub/b.jpg", "a.jpg"]
    assert all(p.path.exists() for p in photos)
    assert photos_root("-").resolve() == tmp_path
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(DualmatchError, match="list of standard input is empty"):
        photos_in("-")


def test_patterns(tmp_path):
    touch(tmp_path, "s-008.tar", "s-009.tar", "s-010.tar", "x.tar", "y.tar", "{odd}.tar")

    def names(pattern):
        return [path.name for path in files_of(f"{tmp_path}/{pattern}")]

    assert names("s-{008..010}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert names("{y,x}.tar") == ["y.tar", "x.tar"]
    assert names("s-*.tar") == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert names("{s-00?,x}.tar") == ["s-008.tar", "s-009.tar", "x.tar"]
    assert names("{odd}.tar") == ["{odd}.tar"]  # what is there is meant as it stands
    assert names("nothing-*.tar") == names("no.tar") == []
    with pytest.raises(DualmatchError, match=r"no file .*s-011.tar, which .* asks for \(2 missing\)"):
        names("s-{010..012}.tar")
    with pytest.raises(DualmatchError, match="more than"):
        names("s-{0..99999999}.tar")


# Tar archives


def write_tar(path, members, compression="", **options):
    with tarfile.open(path, f"w:{compression}", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


MEMBERS = [
    ("a/0.jpg", b"first"),
    ("a/0.txt", b"caption"),
    ("./1.PNG", b"second" * 999),
    ("._2.jpg", b"mac"),
    ("2.webp", b"3"),
]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_photographs_of_archives_are_read_in_place(tmp_path, layout):
    long = "deep/" * 60 + "long.jpg"
    write_tar(
        tmp_path / "s-0.tar", MEMBERS if layout == tarfile.USTAR_FORMAT else [*MEMBERS, (long, b"4")], format=layout
    )
    write_tar(tmp_path / "s-1.tar", [("0.jpg", b"other")], format=layout)
    photos = photos_in(tmp_path / "s-*.tar")
    read = {photo.id: photo.read() for photo in reversed(photos)}
    expected = {
        "s-0.tar/a/0.jpg": b"first",
        "s-0.tar/1.PNG": b"second" * 999,
        "s-0.tar/2.webp": b"3",
        "s-1.tar/0.jpg": b"other",
    }
    assert read == expected | ({} if layout == tarfile.USTAR_FORMAT else {f"s-0.tar/{long}": b"4"})
    assert photos_root(tmp_path / "s-*.tar") == tmp_path
    assert [photo.id for photo in photos_in(f"{tmp_path}/s-1.tar")] == ["s-1.tar/0.jpg"]


def lost(photo):
    with pytest.raises(DualmatchError) as caught:
        photo.read()
    return str(caught.value)


def test_a_cut_archive_gives_what_it_has_and_says_what_is_lost(tmp_path):
    whole = write_tar(tmp_path / "s.tar", MEMBERS).read_bytes()
    assert all("lost" not in photo.id for photo in photos_in(tmp_path / "s.tar"))
    for length in range(0, len(whole), 97):
        (tmp_path / "s.tar").write_bytes(whole[:length])
        photos = photos_in(tmp_path / "s.tar")
        end = photos[-1]
        if length >= 9 * 512 + 6 * 1024 + 512:  # all the data and one block of the end mark
            continue
        assert end.id == "s.tar", length
        assert "what follows is lost" in lost(end)
        if len(photos) > 1 and length < photos[-2].offset + photos[-2].size:
            assert "the archive ends inside it" in lost(photos[-2])


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    data = bytearray(write_tar(tmp_path / "s.tar", MEMBERS).read_bytes())
    data[4 * 512 + 3] ^= 1  # in the header of the third member
    (tmp_path / "s.tar").write_bytes(data)
    photos = photos_in(tmp_path / "s.tar")
    assert [photo.id for photo in photos] == ["s.tar/a/0.jpg", "s.tar"]
    assert "damaged header" in lost(photos[1])


def test_what_is_no_archive_and_a_link_in_one(tmp_path):
    (tmp_path / "no.tar").write_bytes(b"\x1f\x8b" + b"compressed" * 99)
    (photo,) = photos_in(tmp_path / "no.tar")
    assert "cannot be read" in lost(photo)
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        info = tarfile.TarInfo("l.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    (photo,) = photos_in(tmp_path / "link.tar")
    assert "not a plain file" in lost(photo)
    write_tar(tmp_path / "empty.tar", [("a.txt", b"")])
    with pytest.raises(DualmatchError, match="no photograph"):
        photos_in(tmp_path / "empty.tar")


def test_an_archive_that_vanishes_is_not_its_photographs_fault(tmp_path):
    photos = photos_in(write_tar(tmp_path / "s.tar", MEMBERS))
    (tmp_path / "s.tar").unlink()
    with pytest.raises(DualmatchError, match=r"archive .*s\.tar has vanished.*--resume"):
        photos[0].read()


def test_a_folder_of_archives_says_how_to_give_them(tmp_path):
    touch(tmp_path, "a.tar")
    with pytest.raises(DualmatchError, match=r"for the photographs in them give '.*/\*\.tar'"):
        photos_in(tmp_path)
    touch(tmp_path, "b.parquet")
    with pytest.raises(DualmatchError, match="of one kind"):
        photos_in(tmp_path / "*")


# Columns


def values(count):
    return [None if row % 7 == 3 else b"%d" % row * (row + 1) for row in range(count)]


@pytest.mark.parametrize("layout", ["parquet", "parquet of datasets", "arrow stream", "arrow file"])
def test_columns_are_read_in_any_order(tmp_path, layout):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    column = pa.array(values(300), pa.binary())
    if layout == "parquet of datasets":
        path = pa.array([f"{row}.jpg" for row in range(300)])
        column = pa.StructArray.from_arrays([column, path], names=["bytes", "path"])
    table = pa.table({"label": list(range(300)), "image": column})
    if layout.startswith("parquet"):
        path = tmp_path / "t.parquet"
        pq.write_table(table, path, row_group_size=120)
    else:
        path = tmp_path / "t.arrow"
        opened = pa.ipc.new_stream if layout == "arrow stream" else pa.ipc.new_file
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=120)
    photos = photos_in(path)
    assert [photo.id for photo in photos] == [f"{path.name}#{row}" for row in range(300)]
    order = [*range(300), 5, 4, 299, 130, 119, 120, 121, 0]
    for row in order:
        if values(300)[row] is None:
            assert "holds nothing" in lost(photos[row])
        else:
            assert photos[row].read() == values(300)[row]


def test_bad_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"], "c": [1]}), tmp_path / "two.parquet")
    with pytest.raises(
        DualmatchError, match=r"no column is named, columns that can hold .*: a, b; choose with --column"
    ):
        photos_in(tmp_path / "two.parquet")
    assert photos_in(tmp_path / "two.parquet", column="b")[0].read() == b"y"
    with pytest.raises(DualmatchError, match="'c' is asked for"):
        photos_in(tmp_path / "two.parquet", column="c")
    text_file(tmp_path, "no.parquet", "not one")
    text_file(tmp_path, "no.arrow", "not one either")
    for name in ("no.parquet", "no.arrow"):
        with pytest.raises(DualmatchError, match="cannot be read"):
            photos_in(tmp_path / name)
    pq.write_table(pa.table({"a": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    with pytest.raises(DualmatchError, match="have no row"):
        photos_in(tmp_path / "none.parquet")


def test_a_damaged_column_file_is_the_rows_problem(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": values(99)}), path, row_group_size=40)
    data = bytearray(path.read_bytes())
    data[100:900] = bytes(800)
    path.write_bytes(data)
    photos = photos_in(path)
    assert "its file is damaged there" in lost(photos[0])
    assert photos[98].read() == values(99)[98]


def test_columns_without_pyarrow_say_what_to_install(tmp_path):
    touch(tmp_path, "a.parquet")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from dualmatch.runtime.galleries.sources import photos_in\n"
        "try: photos_in(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.parquet"], capture_output=True, text=True, check=True
    )
    assert "pip install 'dualmatch[parquet]'" in done.stdout
