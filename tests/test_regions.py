"""Region files, and pooling them from a real trunk."""

import numpy as np
import pytest
from PIL import Image

from dualmatch.runtime.datasets import Dataset, ImageItem
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import open_rgb
from dualmatch.runtime.region_readers import position_features
from dualmatch.runtime.regions import RegionFile

from .data_layouts import (
    CHANNELS,
    REGIONS,
    SPLITS,
    boxes_of,
    classes_of,
    features_of,
    name_of,
    write_vlp,
)

NAMES = np.array(["one.jpg", "two.jpg"])
FEATURES = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
POSITIONS = np.arange(12, dtype=np.float32).reshape(2, 3, 2)


def written(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_features_by_name(tmp_path):
    regions = RegionFile(written(tmp_path / "r.npz", filenames=NAMES, features=FEATURES, positions=POSITIONS))
    assert (regions.feature_dim, regions.position_dim) == (4, 2)
    assert regions.features("two.jpg").dtype == regions.positions("two.jpg").dtype == np.float32
    np.testing.assert_array_equal(regions.features("two.jpg"), FEATURES[1])
    np.testing.assert_array_equal(regions.features("folder/one.jpg"), FEATURES[0])
    np.testing.assert_array_equal(regions.positions("one.jpg"), POSITIONS[0])


def test_what_is_not_there_is_not_made_up(tmp_path):
    regions = RegionFile(written(tmp_path / "r.npz", filenames=NAMES, features=FEATURES))
    assert regions.position_dim == 0
    with pytest.raises(DualmatchError, match=r"has no features for image 'three.jpg'"):
        regions.features("three.jpg")
    with pytest.raises(DualmatchError, match="has no positions"):
        regions.positions("one.jpg")
    with pytest.raises(DualmatchError, match="does not tell where its regions lie"):
        regions.boxes("one.jpg", 640, 480)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"filenames": NAMES}, "lacks the array 'features'; it has filenames"),
        ({"features": FEATURES}, "lacks the array 'filenames'"),
        ({"filenames": NAMES, "features": FEATURES[0]}, "must hold features"),
        ({"filenames": NAMES[:1], "features": FEATURES}, "must hold features"),
        ({"filenames": NAMES[0], "features": FEATURES}, "must hold features"),
        ({"filenames": NAMES, "features": FEATURES, "positions": POSITIONS[:1]}, "must hold positions"),
        ({"filenames": NAMES, "features": FEATURES, "positions": POSITIONS[..., 0]}, "must hold positions"),
        ({"filenames": NAMES.astype(object), "features": FEATURES}, "cannot be read"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, sentence):
    with pytest.raises(DualmatchError, match=r"r\.npz") as caught:
        RegionFile(written(tmp_path / "r.npz", **arrays))
    assert sentence in str(caught.value)


def test_other_files_are_refused(tmp_path):
    whole = written(tmp_path / "whole.npz", filenames=NAMES, features=FEATURES).read_bytes()
    files = {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "cut-late": whole[:-10]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "single.npy", FEATURES)
    for name in (*files, "single.npy"):
        with pytest.raises(DualmatchError, match=name):
            RegionFile(tmp_path / name)
    with pytest.raises(DualmatchError, match="there is no region file"):
        RegionFile(tmp_path / "nowhere.npz")
    with pytest.raises(DualmatchError, match=r"must hold numbers \(regions, channels\) for image 'single'"):
        RegionFile(tmp_path)
    (tmp_path / "single.npy").unlink()
    with pytest.raises(DualmatchError, match=r"cannot be read: it holds no region files\. They are"):
        RegionFile(tmp_path)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three photographs of different shapes, as noise."""
    folder, chance, items = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0), []
    for name, size in (("a.png", (80, 40)), ("b.png", (50, 90)), ("c.png", (64, 64))):
        coarse = Image.fromarray(chance.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
        items.append(ImageItem(id=name, split="train", captions=("x",), path=folder / name))
    return Dataset(name="photographs", layout="captions", items=tuple(items))


def write_boxes(path, photographs):
    """For each photograph the whole of it, its left half, and a speck in the last corner."""
    boxes = []
    for item in photographs.items:
        width, height = item.open().size
        boxes.append([[0, 0, width, height], [0, 0, width / 2, height], [width - 0.1, height - 0.1, width, height]])
    names = np.array([item.id for item in photographs.items])
    return written(path, filenames=names[::-1], boxes=np.array(boxes, dtype=np.float32)[::-1])


@pytest.fixture
def pool():
    """`pool_regions` with EfficientNet-Lite0, whose weights come with the package that `train` installs."""
    from functools import partial

    from dualmatch.training.regions import pool_regions

    return partial(pool_regions, trunk="efficientnet-lite0", image_size=64, batch_size=2)


def test_pooled_regions_are_means_of_the_map(tmp_path, photographs, pool):
    import torch

    from dualmatch.models.config import TrunkConfig
    from dualmatch.models.trunks import build_trunk, preprocess_of

    torch.set_num_threads(1)
    shape = pool(photographs, write_boxes(tmp_path / "boxes.npz", photographs), tmp_path / "regions.npz")
    regions = RegionFile(tmp_path / "regions.npz")
    assert shape == (3, 3, 1280) == (len(photographs.items), 3, regions.feature_dim)
    config = TrunkConfig(name="efficientnet-lite0", image_size=64)
    trunk, preprocess = build_trunk(config).eval(), preprocess_of(config, "squash")
    for item in photographs.items:
        with torch.inference_mode():
            pixels = torch.from_numpy(preprocess(open_rgb(item.read_bytes())))[None]
            cells = trunk(pixels)["final"][0].numpy()  # 2 x 2 cells
        expected = [cells.mean(axis=(1, 2)), cells[:, :, 0].mean(axis=1), cells[:, -1, -1]]
        np.testing.assert_allclose(regions.features(item.id), expected, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(regions.positions(item.id)[:2, :4], [[0, 0, 1, 1], [0, 0, 0.5, 1]], atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxes.npz", "regions.npz"]


def test_cached_maps_give_the_same_regions_without_the_trunk(tmp_path, photographs, pool, monkeypatch):
    import torch

    torch.set_num_threads(1)
    boxes, cache = write_boxes(tmp_path / "boxes.npz", photographs), tmp_path / "cache"
    pool(photographs, boxes, tmp_path / "plain.npz")
    pool(photographs, boxes, tmp_path / "first.npz", cache=cache)
    monkeypatch.setattr("dualmatch.models.efficientnet_lite.EfficientNetLite0.forward", None)  # runs no more
    pool(photographs, boxes, tmp_path / "second.npz", cache=cache)
    plain, *cached = (RegionFile(tmp_path / f"{name}.npz") for name in ("plain", "first", "second"))
    for item in photographs.items:
        for regions in cached:
            np.testing.assert_allclose(regions.features(item.id), plain.features(item.id), rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(regions.positions(item.id), plain.positions(item.id))


def test_pooling_refuses_and_leaves_nothing(tmp_path, photographs, pool):
    whole = write_boxes(tmp_path / "boxes.npz", photographs)
    with np.load(whole) as arrays:
        names, boxes = arrays["filenames"], arrays["boxes"]
    few = written(tmp_path / "few.npz", filenames=names[:1], boxes=boxes[:1])
    flat = written(tmp_path / "flat.npz", filenames=names, boxes=boxes[:, 0])
    nameless = written(tmp_path / "nameless.npz", boxes=boxes)
    (tmp_path / "text.npz").write_text("boxes")
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out.npz"
    for path, sentence in (
        (few, "has no boxes for 2 of 3 photographs, the first 'a.png'"),
        (flat, r"must hold boxes \(images, regions, 4\)"),
        (nameless, "lacks the array 'filenames'"),
        (tmp_path / "text.npz", "cannot be read: it is no .npz file"),
        (tmp_path / "nowhere.npz", "there is no box file"),
    ):
        with pytest.raises(DualmatchError, match=sentence):
            pool(photographs, path, out)
    with pytest.raises(DualmatchError, match="exists already"):
        pool(photographs, whole, flat)
    with pytest.raises(DualmatchError, match="there is no folder"):
        pool(photographs, whole, tmp_path / "nowhere" / "out.npz")
    assert sorted(tmp_path.iterdir()) == before


def test_regions_come_in_the_order_asked_for(tmp_path, photographs, pool):
    import torch

    torch.set_num_threads(1)
    boxes = write_boxes(tmp_path / "boxes.npz", photographs)  # largest first
    with np.load(boxes) as arrays:
        names, pixels = arrays["filenames"], arrays["boxes"]
    scores = np.tile([0.2, 0.9, 0.5], (len(names), 1))
    shuffled = written(
        tmp_path / "scored.npz", filenames=names, boxes=pixels[:, [2, 0, 1]], scores=scores[:, [2, 0, 1]]
    )
    areas = {}
    for order in ("file", "confidence", "size", "random"):
        pool(photographs, shuffled, tmp_path / f"{order}.npz", order=order)
        regions = RegionFile(tmp_path / f"{order}.npz")
        areas[order] = [np.round(regions.positions(item.id)[:, 4], 2).tolist() for item in photographs.items]
    assert all(found == [0, 1, 0.5] for found in areas["file"])
    assert all(found == [1, 0.5, 0] for found in areas["size"])
    assert all(found == [0.5, 0, 1] for found in areas["confidence"])
    assert len({tuple(found) for found in areas["random"]}) > 1
    pool(photographs, shuffled, tmp_path / "again.npz", order="random")
    again = RegionFile(tmp_path / "again.npz")
    assert [np.round(again.positions(item.id)[:, 4], 2).tolist() for item in photographs.items] == areas["random"]
    with pytest.raises(DualmatchError, match="has no `scores`"):
        pool(photographs, boxes, tmp_path / "out.npz", order="confidence")


# The authors' formats behind the same door.

SCAN_ROWS = np.arange(48, dtype=np.float32).reshape(4, 3, 4)


def test_scans_files_one_by_one_and_by_the_folder(tmp_path):
    np.save(tmp_path / "test_ims.npy", SCAN_ROWS)
    np.save(tmp_path / "dev_ims.npy", SCAN_ROWS[:2] + 1)
    one, both = RegionFile(tmp_path / "test_ims.npy"), RegionFile(tmp_path)
    for regions in (one, both):
        assert (regions.num_regions, regions.feature_dim, regions.position_dim) == (3, 4, 0)
        np.testing.assert_array_equal(regions.features("test/3"), SCAN_ROWS[3])
        regions.require(["test/0", "test/3"])
    np.testing.assert_array_equal(both.features("val/1"), SCAN_ROWS[1] + 1)
    for regions, image_id in ((one, "val/1"), (both, "val/2"), (both, "test/4"), (both, "test/x"), (both, "3.jpg")):
        with pytest.raises(DualmatchError, match=f"has no features for image '{image_id}'"):
            regions.features(image_id)
        with pytest.raises(DualmatchError, match=f"has no features for image '{image_id}'"):
            regions.require([image_id])
    with pytest.raises(DualmatchError, match=r"has no positions, which this network needs for image 'test/0'"):
        one.positions("test/0")
    with pytest.raises(DualmatchError, match=r"test_ims\.npy does not tell where its regions lie"):
        one.boxes("test/0", 640, 480)
    np.save(tmp_path / "dev_ims.npy", SCAN_ROWS[:, :2])
    with pytest.raises(DualmatchError, match=r"differ in shape: \(2, 4\), \(3, 4\)"):
        RegionFile(tmp_path)


@pytest.mark.parametrize("coco", [False, True])
def test_vlps_files_with_their_boxes(tmp_path, coco):
    features = write_vlp(tmp_path, coco=coco)
    box_file = next(tmp_path.glob("*.h5"))
    ids = [f"folder/{name_of(row, coco=coco)}" for row in range(len(SPLITS))]
    ways = [features, f"{features},{box_file}"] + ([features.parent, f"{features.parent},{box_file}"] if coco else [])
    for way in ways:  # the box file is found beside the folder, or named
        regions = RegionFile(way)
        assert (regions.num_regions, regions.feature_dim, regions.position_dim) == (REGIONS, CHANNELS, 11)
        regions.require(ids)
        for row, image_id in enumerate(ids):
            np.testing.assert_array_equal(regions.features(image_id), features_of(row))
            expected = position_features(boxes_of(row), classes_of(row))
            np.testing.assert_array_equal(regions.positions(image_id), expected)
            corners = boxes_of(row)[:, :4] / np.array([2000, 1000, 2000, 1000], np.float32)
            np.testing.assert_allclose(regions.boxes(image_id, 2000, 1000), corners.clip(0, 1), rtol=1e-6)
    with pytest.raises(DualmatchError, match=r"no features for image '391.jpg' and 1 others of 3\."):
        RegionFile(features).require(["391.jpg", "392.jpg", ids[0]])


def test_without_boxes_there_are_no_positions(tmp_path):
    features = write_vlp(tmp_path, coco=False)
    box_file = next(tmp_path.glob("*.h5"))
    (tmp_path / "second.h5").write_bytes(b"")
    regions = RegionFile(features)  # which of the two is meant is not guessed
    assert regions.position_dim == 0
    with pytest.raises(DualmatchError, match=r"name it after a comma, FEATURES,BOXES\.h5"):
        regions.positions(name_of(0, coco=False))
    assert RegionFile(f"{features},{box_file}").position_dim == 11
    with pytest.raises(DualmatchError, match=r"there is no box file .*nowhere\.h5"):
        RegionFile(f"{features},{tmp_path / 'nowhere.h5'}")


def test_an_image_with_fewer_regions_is_refused_by_name(tmp_path):
    features = write_vlp(tmp_path, coco=False)
    name = name_of(4, coco=False)
    np.save(features / f"{name.removesuffix('.jpg')}.npy", features_of(4)[:-1])
    with pytest.raises(DualmatchError, match=rf"has features \[2, 8\] for image '{name}', for others \[3, 8\]"):
        RegionFile(features).features(name)


def test_kinds_that_are_mixed_or_half_named_are_refused(tmp_path):
    prefix = write_vlp(tmp_path, coco=True)
    with pytest.raises(DualmatchError, match=r"give the prefix that all of its `_feat###\.h5` share"):
        RegionFile(next(prefix.parent.glob("*.h5")))
    np.save(prefix.parent / "test_ims.npy", SCAN_ROWS)
    with pytest.raises(DualmatchError, match="holds more than one kind of region files"):
        RegionFile(prefix.parent)
    assert RegionFile(prefix).feature_dim == CHANNELS
    (prefix.parent / "other_feat000.h5").write_bytes(b"")
    with pytest.raises(DualmatchError, match="several prefixes"):
        RegionFile(f"{prefix.parent},{next(tmp_path.glob('*.h5'))}")


def test_a_damaged_file_of_vlps_is_named(tmp_path):
    prefix = write_vlp(tmp_path, coco=True)
    name = name_of(3, coco=True)
    path = prefix.with_name(f"{prefix.name}_feat{name.removesuffix('.jpg')[-3:]}.h5")
    path.write_bytes(b"\x89HDF")
    regions = RegionFile(prefix)
    for ask in (lambda: regions.features(name), lambda: regions.require([name])):
        with pytest.raises(DualmatchError, match=rf"{path.name}.*cannot be read"):
            ask()
