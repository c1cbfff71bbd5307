"""`dualmatch data check`: what it counts, and every kind of fault that it finds."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dualmatch.runtime.datasets.check import check_dataset, report_lines
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.regions import RegionFile

from .data_layouts import (
    CHANNELS,
    REGIONS,
    SPLITS,
    features_of,
    name_of,
    rows_of,
    write_image,
    write_karpathy,
    write_scan,
    write_vlp,
    write_vsepp,
)
from .demo_fixture import dualmatch

FILES = {row: name_of(row, coco=False) for row in range(len(SPLITS))}
TRAIN, VAL, TEST = (rows_of(split) for split in ("train", "val", "test"))


@pytest.fixture
def folder(tmp_path):
    return write_karpathy(tmp_path / "f30k")


def found(report):
    return {finding.kind: list(finding.entries) for finding in report.findings}


def copy(folder, source, target):
    shutil.copy(folder / "images" / FILES[source], folder / "images" / FILES[target])


@pytest.mark.parametrize(
    "write", [write_karpathy, lambda path: write_karpathy(path, coco=True), write_vsepp, write_scan]
)
def test_a_good_data_set_is_counted_and_passes(tmp_path, write):
    report = check_dataset(write(tmp_path / "data"))
    assert found(report) == {}
    assert report.passed
    report.require()
    for split, counts in report.splits.items():
        images = len(rows_of(split))
        assert (counts.images, counts.captions) == (images, 5 * images)
        assert (counts.fewest, counts.mean, counts.most) == (5, 5.0, 5)
    assert set(report.splits) == set(SPLITS) - ({"restval"} if write is write_scan else set())
    assert report.words == (5, pytest.approx(5.2), 6)
    assert report.features == ((REGIONS, CHANNELS, 0) if write is write_scan else None)


def test_the_same_file_in_two_splits_is_an_error(folder):
    copy(folder, TRAIN[1], TEST[2])
    report = check_dataset(folder)
    assert found(report) == {
        "images in two splits": [f"{FILES[TRAIN[1]]} (train) and {FILES[TEST[2]]} (test): the same bytes"]
    }
    with pytest.raises(DualmatchError, match=r"not fit for a run: images in two splits \(1\); keep every image in one"):
        report.require()


def test_a_photograph_saved_again_in_another_format_is_found(folder):
    with Image.open(folder / "images" / FILES[TRAIN[0]]) as photograph:
        photograph.save(folder / "images" / FILES[VAL[1]], format="PNG")
    (entry,) = found(check_dataset(folder))["images in two splits"]
    assert entry == f"{FILES[TRAIN[0]]} (train) and {FILES[VAL[1]]} (val): the same pixels in another file"


def test_pixels_of_another_size_are_another_image(folder):
    for row, size in ((TRAIN[0], (6, 4)), (TEST[0], (4, 6))):
        Image.new("RGB", size, "red").save(folder / "images" / FILES[row], format="PNG")
    assert found(check_dataset(folder)) == {}


def test_an_image_twice_in_a_split_is_a_note(folder):
    copy(folder, TRAIN[0], TRAIN[3])
    report = check_dataset(folder)
    assert found(report) == {
        "images that are another image of their split": [
            f"{FILES[TRAIN[3]]} is {FILES[TRAIN[0]]} (train): the same bytes"
        ]
    }
    assert report.passed


def test_train_and_restval_may_share_as_both_are_trained_on(folder):
    copy(folder, TRAIN[0], rows_of("restval")[0])
    assert check_dataset(folder).passed
    copy(folder, TRAIN[0], TEST[0])  # with the test image there are now two leaks
    assert len(found(check_dataset(folder))["images in two splits"]) == 2


def test_features_in_two_splits_are_leakage_too(tmp_path):
    folder = write_scan(tmp_path)
    features = np.load(folder / "test_ims.npy")
    features[1] = features_of(TRAIN[2])
    np.save(folder / "test_ims.npy", features)
    (entry,) = found(check_dataset(folder))["images in two splits"]
    assert entry == "train/2 (train) and test/1 (test): the same bytes"


def test_cocos_1000_test_images_are_among_its_5000(tmp_path):
    folder = write_scan(tmp_path)
    for ending in ("ims.npy", "caps.txt"):
        shutil.copy(folder / f"test_{ending}", folder / f"testall_{ending}")
    report = check_dataset(folder)
    assert report.passed
    assert report.splits["testall"].images == 3


def test_features_that_are_not_finite_are_unreadable(tmp_path):
    folder = write_scan(tmp_path)
    features = np.load(folder / "test_ims.npy")
    features[2, 1, 3] = np.nan
    np.save(folder / "test_ims.npy", features)
    assert found(check_dataset(folder)) == {"unreadable images": ["test/2: its features are not finite"]}


def test_nothing_stops_at_the_first_fault(tmp_path):
    def change(content):
        content["images"][TRAIN[1]]["sentences"][2]["raw"] = "  "
        content["images"][TRAIN[2]]["sentences"] = []
        content["images"].append({**content["images"][TRAIN[3]], "split": "test"})

    folder = write_karpathy(tmp_path / "f30k", change=change)
    images = folder / "images"
    (images / FILES[VAL[0]]).unlink()
    (images / FILES[TEST[0]]).write_bytes((images / FILES[TEST[0]]).read_bytes()[:200])
    (images / FILES[TEST[1]]).write_bytes(b"")
    report = check_dataset(folder)
    assert {kind: len(entries) for kind, entries in found(report).items()} == {
        "empty captions": 1, "images without captions": 1, "images in two splits": 1, "missing files": 1, "unreadable images": 2,
    }  # fmt: skip
    assert FILES[VAL[0]] in found(report)["missing files"][0]
    assert report.splits["train"].images == 5
    assert (report.splits["train"].fewest, report.splits["val"].images) == (4, 1)
    assert all(finding.error for finding in report.findings)


def test_all_images_missing_is_said_of_each(folder):
    shutil.rmtree(folder / "images")
    report = check_dataset(folder)
    assert len(found(report)["missing files"]) == len(SPLITS)
    assert report.splits == {}


def test_odd_captions_are_noted_and_pass(tmp_path):
    def change(content):
        texts = [sentence for image in content["images"] for sentence in image["sentences"]]
        texts[1]["raw"] = texts[0]["raw"] + " "
        texts[-1]["raw"] = texts[4]["raw"]
        texts[7]["raw"] = "very " * 12 + "long"

    folder = write_karpathy(tmp_path / "f30k", change=change)
    report = check_dataset(folder, max_words=12)
    assert report.passed
    kinds = found(report)
    assert kinds["captions that their image has twice"] == [f"{FILES[0]}: 'photograph 0 shows a dog'"]
    assert kinds["captions that stand in two splits"] == ["'photograph 0 shows the sea': test, train"]
    assert kinds["captions of more than 12 words"][0].startswith(f"{FILES[1]}: 13 words")
    assert len(kinds) == 3


def test_images_without_features_are_errors(tmp_path):
    folder, prefix = write_karpathy(tmp_path / "f30k"), write_vlp(tmp_path / "vlp", coco=False)
    assert check_dataset(folder, regions=RegionFile(prefix)).features == (REGIONS, CHANNELS, 11)
    stem = FILES[TEST[1]].removesuffix(".jpg")
    (prefix / f"{stem}.npy").unlink()
    np.save(prefix / f"{FILES[0].removesuffix('.jpg')}.npy", np.full((REGIONS, CHANNELS), np.inf, np.float32))
    np.save(prefix / f"{FILES[1].removesuffix('.jpg')}.npy", np.ones((REGIONS - 1, CHANNELS), np.float32))
    (prefix / f"{FILES[2].removesuffix('.jpg')}_cls_prob.npy").unlink()
    with pytest.raises(DualmatchError, match="not finite"):
        RegionFile(prefix)  # the first file tells the shape
    np.save(prefix / f"{FILES[0].removesuffix('.jpg')}.npy", features_of(0))
    entries = found(check_dataset(folder, regions=RegionFile(prefix)))["images without features"]
    assert [entry.partition(":")[0] for entry in entries] == [FILES[1], FILES[2], FILES[TEST[1]]]


def test_the_report_is_the_same_with_any_number_of_workers(folder):
    copy(folder, TRAIN[1], TEST[2])
    assert check_dataset(folder, workers=1) == check_dataset(folder, workers=7)


def test_progress_counts_every_image(folder):
    seen = []
    check_dataset(folder, workers=2, progress=lambda what, done, of: seen.append((what, done, of)))
    assert seen[-1] == ("reading images", len(SPLITS), len(SPLITS))


def test_a_long_list_is_cut_for_people_and_whole_in_json(folder):
    for row in range(1, len(SPLITS)):
        write_image(folder / "images" / FILES[row], 0)
    report = check_dataset(folder)
    leaks = found(report)["images in two splits"]
    assert len(leaks) > 10
    lines = report_lines(report).splitlines()
    assert f"ERROR: images in two splits: {len(leaks)}" in lines
    assert f"    … and {len(leaks) - 10} more (--json lists all)" in lines


def test_the_command(folder):
    good = dualmatch("data", "check", folder)
    assert good.code == 0
    assert "flickr30k, in the karpathy layout" in good.out
    assert "test          3 images       15 captions, 5 to 5 an image (mean 5.00)" in good.out
    assert "nothing found amiss" in good.out
    copy(folder, TRAIN[1], TEST[2])
    bad = dualmatch("data", "check", folder, "--json")
    assert bad.code == 1
    assert json.loads(bad.out)["findings"][0]["entries"] == [
        f"{FILES[TRAIN[1]]} (train) and {FILES[TEST[2]]} (test): the same bytes"
    ]
    assert not json.loads(bad.out)["passed"]
    assert bad.err == (
        "dualmatch: data set 'flickr30k' is not fit for a run: images in two splits (1); keep every image in one split, "
        "or what is trained on is also tested.\n"
    )


def test_the_command_with_regions(tmp_path):
    folder, prefix = write_karpathy(tmp_path / "coco", coco=True), write_vlp(tmp_path / "vlp", coco=True)
    good = dualmatch("data", "check", folder, "--regions", prefix)
    assert good.code == 0, good.err
    assert "features: 3 regions of 8 channels, positions of 11 numbers" in good.out
    nothing = dualmatch("data", "check", folder, "--regions", tmp_path / "nowhere")
    assert nothing.code == 1
    assert "there is no region file" in nothing.err
    assert nothing.err.count("\n") == 1
