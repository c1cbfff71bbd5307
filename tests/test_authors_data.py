"""The authors' data formats: what is read from good files, and how each kind of bad one is refused."""

import builtins

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualmatch.runtime.datasets.scan import ScanSplit
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.region_readers import CocoRegions, FlickrRegions, position_features
from dualmatch.training.authors_data import bert_tokenizer, collate
from dualmatch.training.glove import initialise_from_glove, read_glove

torch.set_num_threads(1)


def rows(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


# Collation.


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=12))
def test_collation_sorts_and_loses_nothing(captions):
    batch = collate(captions)
    assert batch.lengths.tolist() == sorted(map(len, captions), reverse=True)
    places = list(zip(-batch.lengths, batch.order, strict=True))
    assert places == sorted(places)  # of equal length: as they came
    for place, (row, length) in enumerate(zip(batch.order, batch.lengths, strict=True)):
        assert batch.token_ids[place].tolist() == captions[row] + [0] * (batch.lengths[0] - length)


def test_no_captions_are_refused():
    with pytest.raises(DualmatchError, match="at least one caption"):
        collate([])


# Word pieces.


def test_a_word_of_a_hundred_characters_is_cut_and_a_longer_one_unknown():
    tokenizer = bert_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "x", "##x"])
    assert tokenizer.encode("x" * 100).ids == [2, 4, *[5] * 99, 3]
    assert tokenizer.encode("x" * 101).ids == [2, 1, 3]


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [(["[PAD]", "[UNK]", "[SEP]"], r"lacks \[CLS\]"), (["a", "[PAD]", "[UNK]", "[CLS]", "[SEP]"], r"begins with 'a'")],
)
def test_a_vocabulary_without_special_pieces_is_refused(vocabulary, message):
    with pytest.raises(DualmatchError, match=message):
        bert_tokenizer(vocabulary)


# Position features.


def test_position_features_by_hand():
    boxes = np.array([[0, 0, 50, 100, 7, 0.5], [30, 20, 200, 10, 3, 0.25]], dtype=np.float32)
    found = position_features(boxes, np.array([[1, 3], [2, 2]], dtype=np.float32))
    six = np.array([[0, 0, 0.25, 1, 0.25, 0.5], [0.15, 0.2, 1, 0.1, 0, 0.25]])  # the second box is inside out: no area
    expected = (six - six.mean(1, keepdims=True)) / np.sqrt(six.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found[:, :6], expected, atol=1e-5)
    np.testing.assert_allclose(found[:, 6:], [[-1, 1], [0, 0]], atol=1e-4)
    assert found.dtype == np.float32


@pytest.mark.parametrize(("boxes", "classes"), [((3, 4), (3, 9)), ((0, 6), (0, 9)), ((3, 6), (2, 9)), ((3, 6), (9,))])
def test_position_features_of_other_shapes_are_refused(boxes, classes):
    with pytest.raises(DualmatchError, match="must be"):
        position_features(rows(*boxes), rows(*classes))


# Region files of VLP.

COCO = "COCO_val2014_000000391895"


@pytest.fixture
def vlp(tmp_path):
    """Two images of COCO in files by their last characters, one of Flickr30K, and the boxes of all."""
    with h5py.File(tmp_path / "boxes.h5", "w") as file:
        for name in (COCO, "COCO_val2014_000000000009", "1000092795"):
            file[name] = rows(5, 6)
    for name in (COCO, "COCO_val2014_000000000009"):
        with h5py.File(tmp_path / f"dets_feat{name[-3:]}.h5", "w") as file:
            file[name] = rows(5, 8, seed=int(name[-3:])).astype(np.float16)
        with h5py.File(tmp_path / f"dets_cls{name[-3:]}.h5", "w") as file:
            file[name] = rows(5, 11, seed=2)
    np.save(tmp_path / "1000092795.npy", rows(5, 8))
    np.save(tmp_path / "1000092795_cls_prob.npy", rows(5, 11, seed=2))
    return tmp_path


def test_coco_regions_are_found_by_the_last_three_characters(vlp):
    regions = CocoRegions(vlp / "dets", vlp / "boxes.h5")
    for name in (f"{COCO}.jpg", f"val2014/{COCO}.jpg", COCO):
        np.testing.assert_array_equal(regions.features(name), rows(5, 8, seed=895).astype(np.float16))
    assert regions.features(COCO).dtype == np.float32
    np.testing.assert_array_equal(regions.positions(COCO), position_features(rows(5, 6), rows(5, 11, seed=2)))


def test_flickr_regions(vlp):
    regions = FlickrRegions(vlp, vlp / "boxes.h5")
    np.testing.assert_array_equal(regions.features("1000092795.jpg"), rows(5, 8))
    assert regions.positions("1000092795.jpg").shape == (5, 17)


def test_features_need_neither_boxes_nor_classes(vlp):
    (vlp / "1000092795_cls_prob.npy").unlink()
    assert FlickrRegions(vlp).features("1000092795.jpg").shape == (5, 8)
    with pytest.raises(DualmatchError, match=r"'1000092795.jpg' need the box file"):
        FlickrRegions(vlp).positions("1000092795.jpg")


def lacks(name, path=r"", what="features"):
    return pytest.param(name, path, what, id=f"{name}-{what}")


@pytest.mark.parametrize(
    ("image_id", "path", "what"),
    [
        lacks("COCO_val2014_000000391777.jpg", r"dets_feat777\.h5"),
        lacks("COCO_val2014_000000555895.jpg", r"dets_feat895\.h5"),
        lacks("COCO_val2014_000000391777.jpg", r"boxes\.h5", "positions"),
    ],
)
def test_what_coco_files_lack_is_named(vlp, image_id, path, what):
    with pytest.raises(DualmatchError, match=f"{path} .*{image_id}.*nothing is made up"):
        getattr(CocoRegions(vlp / "dets", vlp / "boxes.h5"), what)(image_id)


@pytest.mark.parametrize("missing", ["36.npy", "1000092795_cls_prob.npy"])
def test_what_flickr_files_lack_is_named(vlp, missing):
    (vlp / "1000092795_cls_prob.npy").unlink()
    regions = FlickrRegions(vlp, vlp / "boxes.h5")
    image_id, read = ("36.jpg", regions.features) if missing == "36.npy" else ("1000092795.jpg", regions.positions)
    with pytest.raises(DualmatchError, match=rf"{missing} for image '{image_id}'; nothing is made up"):
        read(image_id)


def test_a_path_without_region_files_is_refused(vlp):
    with pytest.raises(DualmatchError, match="is a prefix, not a folder"):
        CocoRegions(vlp)
    with pytest.raises(DualmatchError, match="no folder"):
        FlickrRegions(vlp / "boxes.h5")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((5, 8, 1)), "must hold numbers"),
        (np.zeros((5, 8), dtype=np.int64), "holds int64"),
        (np.full((5, 8), np.nan), "not finite"),
        (np.array([{}]), "cannot be read"),
    ],
)
def test_bad_flickr_regions_are_refused(vlp, values, message):
    np.save(vlp / "bad.npy", values)
    with pytest.raises(DualmatchError, match=rf"bad\.npy.*{message}|{message}.*bad"):
        FlickrRegions(vlp).features("bad.jpg")


def test_damaged_region_files_are_refused(vlp):
    (vlp / "dets_feat895.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 40)
    with pytest.raises(DualmatchError, match=r"dets_feat895\.h5 .*cannot be read"):
        CocoRegions(vlp / "dets").features(COCO)
    whole = (vlp / "1000092795.npy").read_bytes()
    (vlp / "1000092795.npy").write_bytes(whole[:-8])
    with pytest.raises(DualmatchError, match=r"1000092795\.npy .*cannot be read"):
        FlickrRegions(vlp).features("1000092795.jpg")


def test_without_h5py_the_extra_is_named(vlp, monkeypatch):
    def refuse(name, *rest, **options):
        if name == "h5py":
            raise ImportError(name)
        return found(name, *rest, **options)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DualmatchError, match=r"dualmatch\[authors\]"):
        CocoRegions(vlp / "dets")
    with pytest.raises(DualmatchError, match=r"dualmatch\[authors\]"):
        FlickrRegions(vlp, vlp / "boxes.h5")
    assert FlickrRegions(vlp).features("1000092795.jpg").shape == (5, 8)


# Region files of SCAN.


def write_scan(folder, split, num_images, num_captions):
    np.save(folder / f"{split}_ims.npy", rows(num_images, 3, 2))
    (folder / f"{split}_caps.txt").write_text("".join(f"caption {row}\n" for row in range(num_captions)))
    return folder


def test_five_captions_an_image_or_one(tmp_path):
    split = ScanSplit(write_scan(tmp_path, "test", 3, 15), "test")
    assert split.caption_image == [0] * 5 + [1] * 5 + [2] * 5
    np.testing.assert_array_equal(split.images, rows(3, 3, 2))
    assert ScanSplit(write_scan(tmp_path, "train", 4, 4), "train").caption_image == [0, 1, 2, 3]


def test_dev_is_cut_to_5000_captions(tmp_path):
    write_scan(tmp_path, "dev", 1002, 5010)
    write_scan(tmp_path, "testall", 1002, 5010)
    dev = ScanSplit(tmp_path, "dev")
    assert (len(dev.captions), dev.caption_image[-1]) == (5000, 999)
    assert len(ScanSplit(tmp_path, "testall").captions) == 5010


def test_captions_end_at_line_feeds_only(tmp_path):
    write_scan(tmp_path, "test", 3, 3)
    (tmp_path / "test_caps.txt").write_bytes("one\x0ctwo \r\n caf\u00e9\nlast".encode())
    assert ScanSplit(tmp_path, "test").captions == ["one\x0ctwo", "caf\u00e9", "last"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\nb\nc\n", "3 captions for the 2 images"),
        (b"a\n\n", "line 2 is empty"),
        (b"", "line 1 is empty"),
        (b"a\n\xff\xfe\n", "line 2 is not UTF-8"),
    ],
)
def test_bad_caption_files_are_refused(tmp_path, text, message):
    write_scan(tmp_path, "test", 2, 2)
    (tmp_path / "test_caps.txt").write_bytes(text)
    with pytest.raises(DualmatchError, match=rf"test_caps\.txt.* {message}"):
        ScanSplit(tmp_path, "test")


def test_bad_or_missing_scan_images_are_refused(tmp_path):
    write_scan(tmp_path, "test", 2, 2)
    (tmp_path / "test_caps.txt").rename(tmp_path / "dev_caps.txt")
    with pytest.raises(DualmatchError, match=r"no region file .*dev_ims\.npy; nothing is made up"):
        ScanSplit(tmp_path, "dev")
    with pytest.raises(DualmatchError, match=r"no caption file .*test_caps\.txt"):
        ScanSplit(tmp_path, "test")
    np.save(tmp_path / "dev_ims.npy", np.zeros((2, 3)))
    with pytest.raises(DualmatchError, match=r"must hold float32 .*float64 \[2, 3\]"):
        ScanSplit(tmp_path, "dev")


# GloVe.

GLOVE = "dog 1 2 3\nam 4 5 6\nred 7 8 9\nice-cream 1 1 1\nicecream 2 2 2\n<unk> 9 9 9\n. 3 3 3\ndog 1.5 2 3\n"
VOCABULARY = {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3} | {
    word: row for row, word in enumerate(["dog", "a.m", "red/blue", "ice-cream", "cat", "-", "."], start=4)
}


@pytest.fixture
def glove_path(tmp_path):
    (tmp_path / "glove.txt").write_text(GLOVE)
    return tmp_path / "glove.txt"


def test_words_are_simplified_only_where_they_are_unknown(glove_path):
    weight = torch.full((11, 3), -1.0)
    assert initialise_from_glove(weight, VOCABULARY, glove_path) == [4, 5, 6, 7, 10]
    assert weight[4:].tolist() == [[1.5, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1], [-1] * 3, [-1] * 3, [3, 3, 3]]
    assert (weight[:4] == -1).all()  # the specials keep theirs, though the file knows <unk>


def test_an_embedding_parameter_may_be_initialised(glove_path):
    embedding = torch.nn.Embedding(11, 3)
    initialise_from_glove(embedding.weight, VOCABULARY, glove_path)
    assert embedding.weight[5].tolist() == [4, 5, 6]
    assert embedding.weight.requires_grad


def test_numbers_are_those_of_float64_rounded_once(tmp_path):
    (tmp_path / "glove.txt").write_text("dog 0.1 -3e-05 16777217\n")
    expected = np.array([0.1, -3e-05, 16777217]).astype(np.float32)
    np.testing.assert_array_equal(read_glove(tmp_path / "glove.txt", ["dog"], dim=3)["dog"], expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("400000 3\ndog 1 2 3\n", r"line 1: a word and 3 numbers .* it has 2 parts"),
        ("cat 1 2 3\ncow 1 2\n", r"line 2: .* it has 3 parts"),
        ("cat 1 2 3\n\ndog 1 2 3\n", r"line 2: .* it has 1 parts"),
        ("cat 1 2 3\ndog 1 two 3\n", r"line 2: what follows 'dog' is not all numbers"),
        ("dog 1  2\n", r"line 1: what follows 'dog' is not all numbers"),
        ("dog 1 nan 3\n", r"line 1: the vector of 'dog' is not finite"),
        ("dog 1 1e39 3\n", r"line 1: the vector of 'dog' is not finite"),
        ("\0" * 100_000, r"line 1: "),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_lines_are_refused_by_their_number(tmp_path, text, message):
    (tmp_path / "glove.txt").write_text(text)
    with pytest.raises(DualmatchError, match=message):
        read_glove(tmp_path / "glove.txt", ["dog"], dim=3)


def test_other_white_space_belongs_to_the_word(tmp_path):
    (tmp_path / "glove.txt").write_text("at\xa0name 1 2 3\r\ndog 4 5 6 \n", encoding="utf-8")
    found = read_glove(tmp_path / "glove.txt", ["at\xa0name", "dog"], dim=3)
    assert {word: vector.tolist() for word, vector in found.items()} == {"at\xa0name": [1, 2, 3], "dog": [4, 5, 6]}


def test_a_missing_glove_file_and_a_small_embedding_are_refused(tmp_path, glove_path):
    with pytest.raises(DualmatchError, match="no GloVe file"):
        read_glove(tmp_path / "none.txt", ["dog"], dim=3)
    with pytest.raises(DualmatchError, match="ids up to 10, the embedding 9 rows"):
        initialise_from_glove(torch.zeros(9, 3), VOCABULARY, glove_path)
