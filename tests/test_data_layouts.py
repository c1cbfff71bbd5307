"""Karpathy's, VSE++'s and SCAN's layouts: the same data read from each, how each kind of fault is refused, and training from them."""

import json

import numpy as np
import pytest

from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.datasets.entries import Faults
from dualmatch.runtime.errors import DualmatchError

from .data_layouts import (
    CHANNELS,
    SPLITS,
    captions_of,
    coco_part,
    features_of,
    name_of,
    rows_of,
    write_ids,
    write_image,
    write_karpathy,
    write_scan,
    write_vlp,
    write_vsepp,
)
from .demo_fixture import dualmatch


def refusal(data):
    with pytest.raises(DualmatchError) as caught:
        open_dataset(data)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def pixels_of(item):
    return np.asarray(item.open().convert("RGB"))


def assert_is_the_data(dataset, ids, *, images=True):
    """The captions, splits and images of `data_layouts`, whatever the order."""
    by_id = {item.id: item for item in dataset.items}
    assert by_id.keys() == set(ids.values())
    for row, name in ids.items():
        assert by_id[name].split == SPLITS[row]
        assert list(by_id[name].captions) == captions_of(row)
        if images:
            np.testing.assert_array_equal(pixels_of(by_id[name]).shape, (9, 12, 3))
            assert by_id[name].path.name == name.rpartition("/")[2]


ALL = range(len(SPLITS))
COCO_IDS = {row: f"{coco_part(row)}/{name_of(row, coco=True)}" for row in ALL}
FLICKR_IDS = {row: name_of(row, coco=False) for row in ALL}


@pytest.mark.parametrize("images", ["images", "flickr30k-images", "."])
def test_flickr_in_karpathys_splits_wherever_beside_the_file_its_images_are(tmp_path, images):
    dataset = open_dataset(write_karpathy(tmp_path / "f30k", images=images))
    assert (dataset.name, dataset.layout) == ("flickr30k", "karpathy")
    assert [item.id for item in dataset.items] == list(FLICKR_IDS.values())
    assert_is_the_data(dataset, FLICKR_IDS)
    assert dataset.splits == ("train", "restval", "val", "test")


def test_coco_in_karpathys_splits_with_its_folders_and_without(tmp_path):
    folder = write_karpathy(tmp_path / "coco", coco=True)
    assert_is_the_data(open_dataset(folder / "dataset_coco.json"), COCO_IDS)
    for path in list((folder / "images").glob("*/*.jpg")):
        path.rename(folder / "images" / path.name)
    assert_is_the_data(open_dataset(folder), COCO_IDS)


def test_restval_joins_train_where_it_is_asked_for(tmp_path):
    dataset = open_dataset(write_karpathy(tmp_path, coco=True))
    assert len(dataset.select(["train"]).items) == 6
    assert len(dataset.select(["train", "restval"]).items) == 8


def test_coco_by_vsepps_annotation_ids(tmp_path):
    dataset = open_dataset(write_vsepp(tmp_path / "coco"))
    assert (dataset.name, dataset.layout, dataset.splits) == ("coco", "vsepp", ("train", "val", "restval", "test"))
    assert_is_the_data(dataset, COCO_IDS)


def test_vsepps_files_may_lie_side_by_side(tmp_path):
    folder = write_vsepp(tmp_path)
    for path in list((folder / "annotations").iterdir()):
        path.rename(folder / path.name)
    (folder / "annotations").rmdir()
    (folder / "images" / "val2014").rename(folder / "val2014")
    assert_is_the_data(open_dataset(folder), COCO_IDS)


def test_the_ids_decide_which_captions_and_in_which_order(tmp_path):
    folder = write_vsepp(tmp_path)
    first, second = rows_of("test")[:2]
    write_ids(folder, "test", [70000 + 5 * second + 3, 70000 + 5 * first + 4, 70000 + 5 * first])
    items = open_dataset(folder).select(["test"]).items
    assert [item.id for item in items] == [COCO_IDS[second], COCO_IDS[first]]
    assert items[1].captions == (captions_of(first)[4], captions_of(first)[0])


def test_dev_is_val_and_cut_to_5000_captions(tmp_path):
    folder = write_vsepp(tmp_path)
    dev = [70000 + 5 * row + place for row in rows_of("val") for place in range(5)]
    write_ids(folder, "dev", [dev[0]] * 4999 + dev)
    dataset = open_dataset(folder)
    assert len(dataset.select(["val"]).captions) == 5000
    assert "first 5000 of 5009 captions" in dataset.notes[0]


@pytest.mark.parametrize("repeated", [(), ("dev", "test")])
def test_scan_splits_have_features_for_images(tmp_path, repeated):
    from dualmatch.runtime.regions import RegionFile

    dataset = open_dataset(write_scan(tmp_path / "f30k_precomp", repeated=repeated))
    assert (dataset.name, dataset.layout, dataset.splits) == ("f30k_precomp", "scan", ("train", "val", "test"))
    regions = RegionFile(dataset.regions)
    for split in dataset.splits:
        items = dataset.select([split]).items
        assert len(items) == len(rows_of(split))
        for item, row in zip(items, rows_of(split), strict=True):
            assert list(item.captions) == captions_of(row)
            np.testing.assert_array_equal(regions.features(item.id), features_of(row))
    assert dataset.items[-1].id == f"test/{10 if repeated else 2}"
    with pytest.raises(DualmatchError, match="row of region features, not a photograph"):
        dataset.items[0].read_bytes()


def test_scan_rows_that_differ_are_images_of_their_own(tmp_path):
    folder = write_scan(tmp_path, repeated=("test",))
    features = np.load(folder / "test_ims.npy")
    features[-1, -1] += 1
    np.save(folder / "test_ims.npy", features)
    test = open_dataset(folder).select(["test"])
    assert [len(item.captions) for item in test.items] == [1] * 15


def test_a_row_of_features_is_known_by_its_content(tmp_path):
    one = open_dataset(write_scan(tmp_path / "one")).items
    other = open_dataset(write_scan(tmp_path / "other", repeated=("test",))).items
    assert [item.content_hash() for item in one] == [item.content_hash() for item in other]
    assert len({item.content_hash() for item in one}) == len(one)


# Which layout.


def test_two_layouts_in_a_folder_must_be_told_apart(tmp_path):
    write_vsepp(tmp_path)
    write_karpathy(tmp_path, coco=True)
    message = refusal(tmp_path)
    assert "fits the layouts karpathy and vsepp" in message
    assert f"--data karpathy:{tmp_path} or --data vsepp:{tmp_path}" in message
    for layout in ("karpathy", "vsepp"):
        assert open_dataset(f"{layout}:{tmp_path}").layout == layout
    assert "there is no such folder" in refusal("karpathy:/nowhere")
    assert "give the path after the colon" in refusal("scan:")
    assert "but the scan layout is *_caps.txt" in refusal(f"scan:{tmp_path}")


def test_two_json_files_must_be_told_apart(tmp_path):
    write_karpathy(tmp_path)
    write_karpathy(tmp_path, coco=True)
    assert f"name one: --data {tmp_path / 'dataset_coco.json'}" in refusal(tmp_path)
    assert open_dataset(tmp_path / "dataset_coco.json").name == "coco"


def test_any_json_file_is_read_when_the_layout_is_named(tmp_path):
    write_karpathy(tmp_path)
    (tmp_path / "dataset_flickr30k.json").rename(tmp_path / "mine.json")
    assert "is a file; give its folder" in refusal(tmp_path / "mine.json")
    assert len(open_dataset(f"karpathy:{tmp_path / 'mine.json'}").items) == len(SPLITS)


@pytest.mark.parametrize("coco", [False, True])
def test_vlps_regions_are_no_data_set(tmp_path, coco):
    prefix = write_vlp(tmp_path, coco=coco)
    assert "VLP's region features, which --regions takes" in refusal(prefix.parent if coco else prefix)


def test_the_folder_above_data_sets_names_them(tmp_path):
    write_karpathy(tmp_path / "f30k")
    write_scan(tmp_path / "coco_precomp")
    assert f"({tmp_path / 'coco_precomp'}, {tmp_path / 'f30k'} can be read)" in refusal(tmp_path)


@pytest.mark.parametrize(("file", "kind"), [("run.json", "a training run"), ("manifest.json", "a bundle")])
def test_another_kind_of_folder_is_called_by_its_name(tmp_path, file, kind):
    (tmp_path / file).write_text("{}")
    assert f"({kind}), but a data set is a folder with" in refusal(tmp_path)


# What is wrong in Karpathy's layout.


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("images"), 'expected an object with a list "images"'),
        (lambda c: c.update(images=[]), 'expected an object with a list "images" that is not empty'),
        (lambda c: c["images"].insert(0, 3), "image 1 must be an object"),
        (lambda c: c["images"][1].pop("filename"), 'image 2 needs a "filename", found nothing'),
        (lambda c: c["images"][1].update(filename="../a.jpg"), "must lie below the images' folder"),
        (lambda c: c["images"][1].update(filepath="/etc"), "must lie below the images' folder"),
        (lambda c: c["images"][2].update(split=None), '"split" must be a name'),
        (lambda c: c["images"][2].update(sentences="a dog"), '"sentences" must be a list of objects'),
        (lambda c: c["images"][2]["sentences"][0].pop("raw"), '"sentences" must be a list of objects'),
        (lambda c: c["images"][2]["sentences"][1].update(raw=" \n"), "caption 2 must be a text that is not empty"),
        (lambda c: c["images"][2].update(sentences=[]), "has no captions"),
        (lambda c: c["images"].append(c["images"][0]), "is listed twice"),
        (lambda c: c["images"].append({**c["images"][0], "split": "test"}), "is in the splits train and test"),
        (lambda c: c["images"].append({**c["images"][0], "filename": "gone.jpg"}), "1 of 14 listed images are not in it"),
    ],
)  # fmt: skip
def test_faults_of_karpathys_file(tmp_path, change, sentence):
    assert sentence in refusal(write_karpathy(tmp_path, change=change))


def test_karpathys_images_that_are_nowhere_or_in_two_places(tmp_path):
    folder = write_karpathy(tmp_path / "a", images="photos")
    for row in ALL:
        write_image(folder / "thumbs" / name_of(row, coco=False), row)
    assert "are in" in refusal(folder)
    assert "thumbs; call the folder to take" in refusal(folder)
    (folder / "photos").rename(folder / "images")
    assert open_dataset(folder).items[0].path.parent.name == "images"
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "thumbs").rename(tmp_path / "elsewhere-too")
    assert "are not beside it: 1000092795.jpg is in none of" in refusal(folder)


def test_what_is_not_json_is_said_not_to_be(tmp_path):
    (write_karpathy(tmp_path) / "dataset_flickr30k.json").write_text("{images: 1}")
    assert "cannot be read as JSON" in refusal(tmp_path)


# What is wrong in VSE++'s layout.


def edit_coco(folder, change, part="val2014"):
    path = folder / "annotations" / f"captions_{part}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: write_ids(f, "test", [70000, 1]), "lists annotation 70000, which"),
        (lambda f: write_ids(f, "test", []), "it holds float64 [0]"),
        (lambda f: np.save(f / "annotations/coco_test_ids.npy", np.empty(0, int)), "its split has no image"),
        (lambda f: write_ids(f, "test", [["a"]]), "must hold annotation ids"),
        (lambda f: (f / "annotations/coco_test_ids.npy").write_bytes(b"x"), "coco_test_ids.npy cannot be read"),
        (lambda f: (f / "annotations/captions_val2014.json").unlink(), "captions_val2014.json"),
        (lambda f: (f / "annotations/captions_val2014.json").write_text("[]"), 'expected COCO\'s "images"'),
        (lambda f: edit_coco(f, lambda c: c["annotations"][0].pop("caption")), "KeyError: 'caption'"),
        (lambda f: edit_coco(f, lambda c: c["images"].clear()), "which it does not list"),
        (lambda f: edit_coco(f, lambda c: [a.update(caption="") for a in c["annotations"]]), "caption 1 must be a text"),
        (lambda f: write_ids(f, "test", [70000 + 5 * rows_of("val")[0]]), "is in the splits val and test"),
        (lambda f: (f / "images/val2014").rename(f / "photos"), "there is no folder images/val2014"),
        (lambda f: next((f / "images/val2014").iterdir()).unlink(), "1 of 13 listed images are not in it"),
    ],
)  # fmt: skip
def test_faults_of_vsepps_files(tmp_path, spoil, sentence):
    spoil(write_vsepp(tmp_path))
    assert sentence in refusal(tmp_path)


# What is wrong in SCAN's layout.


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "test_caps.txt").unlink(), "there is no caption file"),
        (lambda f: (f / "test_ims.npy").unlink(), "there is no region file"),
        (lambda f: (f / "test_caps.txt").write_text("a\nb\n"), "2 captions for the 3 images"),
        (lambda f: (f / "test_caps.txt").write_text("a\n\nb\n"), "line 2 is empty"),
        (lambda f: np.save(f / "test_ims.npy", np.zeros((3, 8), np.float32)), "it holds float32 [3, 8]"),
        (lambda f: np.save(f / "test_ims.npy", np.zeros((0, 3, 8), np.float32)), "it holds float32 [0, 3, 8]"),
        (lambda f: (f / "test_ims.npy").write_bytes(b"\x93NUMPY"), "test_ims.npy cannot be read"),
    ],
)
def test_faults_of_scans_files(tmp_path, spoil, sentence):
    spoil(write_scan(tmp_path))
    assert sentence in refusal(tmp_path)


def test_dev_and_val_are_one_split(tmp_path):
    write_scan(tmp_path)
    for ending in ("ims.npy", "caps.txt"):
        (tmp_path / f"val_{ending}").write_bytes((tmp_path / f"dev_{ending}").read_bytes())
    assert "has both dev and val" in refusal(tmp_path)


def test_faults_are_collected_where_they_are_wanted(tmp_path):
    def change(content):
        content["images"][0]["sentences"][0]["raw"] = ""
        content["images"][1]["sentences"] = []
        content["images"].append(content["images"][2])

    folder = write_karpathy(tmp_path, change=change)
    (folder / "images" / name_of(3, coco=False)).unlink()
    faults = Faults(collect=True)
    dataset = open_dataset(folder, faults)
    assert {kind: len(found) for kind, found in faults.found.items()} == {
        "empty captions": 1, "images without captions": 1, "images listed twice": 1, "missing files": 1,
    }  # fmt: skip
    assert len(dataset.items) == len(SPLITS) - 2
    assert list(dataset.items[0].captions) == captions_of(0)[1:]


# Training from them: an epoch, then recall of what it left.

TINY = ("train.epochs=1", "train.batch_size=10", 'data.train_splits=["train", "restval"]')
REGION_VSRN = (
    "model.feature_dim=8", "model.embed_dim=16", "model.text.word_dim=8", "model.captioning.weight=0",
    "data.min_word_count=1", "train.epochs=1", "train.batch_size=4", 'data.train_splits=["train"]',
)  # fmt: skip


def train_on(recipe, data, folder):
    from dualmatch.training.loop import train

    return train(recipe, open_dataset(data), folder / "run", data_name=str(data), cache=folder / "cache", workers=0)


@pytest.mark.parametrize("layout", ["karpathy", "vsepp"])
def test_an_epoch_on_photographs(tmp_path, layout):
    from dualmatch.training.evaluation import evaluate_run

    from .tiny_runs import tiny_recipe

    folder = write_karpathy(tmp_path / "coco", coco=True) if layout == "karpathy" else write_vsepp(tmp_path / "coco")
    best = train_on(tiny_recipe(*TINY), folder, tmp_path)
    found = evaluate_run(tmp_path / "run", open_dataset(folder).select(["val"]))
    assert found.rsum == pytest.approx(best["val_rsum"], abs=0.01)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["dataset"]["layout"] == layout
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["val"]["i2t"]["r1"] >= 0


@pytest.mark.parametrize("coco", [False, True])
def test_an_epoch_on_photographs_with_vlps_regions_and_boxes(tmp_path, coco):
    """Of the run: the region files that it was trained with are found again where none are named."""
    from dualmatch.training.evaluation import evaluate_run

    from .tiny_runs import tiny_recipe

    folder, features = write_karpathy(tmp_path / "data", coco=coco), write_vlp(tmp_path / "vlp", coco=coco)
    where = f"{features},{next((tmp_path / 'vlp').glob('*.h5'))}"
    options = [f"model.regions.{key}" for key in ("source=precomputed", f"feature_dim={CHANNELS}", "position_dim=11")]
    best = train_on(tiny_recipe(*TINY, *options, f"data.regions={where}"), folder, tmp_path)
    found = evaluate_run(tmp_path / "run", open_dataset(folder).select(["val"]))
    assert found.rsum == pytest.approx(best["val_rsum"], abs=0.01)


def test_training_does_not_start_without_an_images_features(tmp_path):
    from .tiny_runs import tiny_recipe

    folder, features = write_karpathy(tmp_path / "data"), write_vlp(tmp_path / "vlp", coco=False)
    (features / FLICKR_IDS[rows_of("val")[1]].replace(".jpg", ".npy")).unlink()
    options = (
        "model.regions.source=precomputed",
        f"model.regions.feature_dim={CHANNELS}",
        "model.regions.position_dim=0",
    )
    with pytest.raises(DualmatchError, match=f"no features for image '{FLICKR_IDS[rows_of('val')[1]]}'"):
        train_on(tiny_recipe(*TINY, *options, f"data.regions={features}"), folder, tmp_path)
    assert not (tmp_path / "run").exists()


def done(*words):
    finished = dualmatch(*words)
    assert finished.code == 0, finished.err
    return finished


def test_vsrn_on_scans_features_from_training_to_the_bundle(tmp_path):
    """What `train`, `evaluate-checkpoint`, `export`, `verify` and `evaluate` do with a data set that has no photographs."""
    folder, run, bundle = write_scan(tmp_path / "f30k_precomp"), tmp_path / "run", tmp_path / "bundle"
    repeated = write_scan(tmp_path / "repeated", repeated=("dev", "test"))
    options = [word for option in REGION_VSRN for word in ("--set", option)]
    done("train", "flickr8k-vsrn", "--data", folder, "--out", run, "--no-tensorboard", "--cache", tmp_path, *options)
    trained, *others = [
        done("evaluate-checkpoint", run, "--data", data, "--split", "val,test", "--json").json
        for data in (folder, repeated)
    ]
    for result in (trained, *others):
        del result["subject"]  # what was measured: the two folders have different names
    assert others == [trained]
    done("export", run, "--out", bundle, "--unverified")
    served = done("runtime", "evaluate", bundle, "--data", folder, "--split", "val,test", "--json").json
    assert (served["i2t"], served["t2i"]) == (trained["i2t"], trained["t2i"])
    assert (served["protocol"]["images"], served["protocol"]["captions"]) == (5, 25)
    verified = dualmatch("runtime", "verify", bundle, "--data", folder)
    assert "split train, val, test: 11 images, 55 captions" in verified.out, verified.err


def test_a_network_that_takes_pixels_says_so_of_a_data_set_of_features(tmp_path):
    from .tiny_runs import tiny_recipe

    with pytest.raises(DualmatchError, match="is a row of region features, not a photograph"):
        train_on(tiny_recipe(*TINY[:2]), write_scan(tmp_path / "scan"), tmp_path)
