"""The similarity matrix and its file."""

import json
import resource
from dataclasses import replace

import numpy as np
import pytest

from dualmatch.runtime import similarity as module
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.similarity import (
    SimsInfo,
    ensemble,
    load_sims,
    order_similarity,
    save_sims,
    similarity_matrix,
    sims_being_written,
)

RNG = np.random.default_rng(0)


def unit(n, d=16, dtype=np.float32):
    vectors = RNG.standard_normal((n, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def info(images=3, captions=6):
    return SimsInfo(
        image_ids=tuple(f"photo-{index}.jpg" for index in range(images)),
        caption_ids=tuple(f"légende {index}" for index in range(captions)),
        caption_image=tuple(index % images for index in range(captions)),
        bundle="c0ffee",
        protocol={"split": "val,test", "ensemble": 1},
    )


def matrix(images=3, captions=6):
    return RNG.standard_normal((images, captions)).astype(np.float32)


def test_dot_products_over_block_borders(monkeypatch):
    monkeypatch.setattr(module, "_IMAGES_PER_BLOCK", 7)
    monkeypatch.setattr(module, "_CAPTIONS_PER_BLOCK", 5)
    for images, captions in ((7, 5), (8, 6), (20, 33), (1, 1)):
        left, right = unit(images), unit(captions)
        result = similarity_matrix(left, right)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, left.astype(float) @ right.astype(float).T, atol=1e-6)


def test_half_precision_is_multiplied_in_single():
    left, right = unit(9, 512, np.float16), unit(11, 512, np.float16)
    np.testing.assert_allclose(similarity_matrix(left, right), left.astype(float) @ right.astype(float).T, atol=1e-6)


def test_writes_into_a_mapped_file(tmp_path):
    left, right = unit(9), unit(11)
    out = np.lib.format.open_memmap(tmp_path / "s.npy", "w+", np.float32, (9, 11))
    similarity_matrix(left, right, out=out)
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), similarity_matrix(left, right))


def test_order_measure():
    left, right = unit(5), unit(8)
    expected = [
        [-np.sqrt(sum(max(0.0, c - i) ** 2 for c, i in zip(cap, img, strict=True))) for cap in right] for img in left
    ]
    np.testing.assert_allclose(order_similarity(left, right), expected, atol=1e-6)


def test_ensemble_is_the_average():
    matrices = [matrix(70, 40) for _ in range(3)]
    np.testing.assert_allclose(ensemble(matrices), np.mean([m.astype(float) for m in matrices], axis=0), rtol=1e-6)
    np.testing.assert_array_equal(ensemble(matrices[:1]), matrices[0])
    np.testing.assert_array_equal(ensemble(matrices[:2]), ensemble(matrices[1::-1]))
    assert ensemble(matrices).dtype == np.float32


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (unit(3, 8), unit(3, 9), "8 dimensions and captions in 9"),
        (unit(3)[0], unit(3), "image embeddings must be floats"),
        (unit(3), unit(3).astype(int), "caption embeddings must be floats"),
        (unit(3), np.where(np.arange(4)[:, None] == 2, np.nan, unit(4)), "embedding of caption 2 holds NaN"),
        (np.where(np.arange(4)[:, None] == 3, np.inf, unit(4)), unit(3), "embedding of image 3 holds NaN or infinity"),
    ],
)
def test_embeddings_that_are_refused(images, captions, message):
    with pytest.raises(DualmatchError, match=message):
        similarity_matrix(images, captions)


def test_outputs_and_ensembles_that_are_refused():
    with pytest.raises(DualmatchError, match=r"output must be float32 \(3, 4\)"):
        similarity_matrix(unit(3), unit(4), out=np.empty((3, 5), np.float32))
    with pytest.raises(DualmatchError, match=r"one shape, got \[\(3, 6\), \(3, 5\)\]"):
        ensemble([matrix(), matrix(3, 5)])
    with pytest.raises(DualmatchError, match="one shape"):
        ensemble([])


@pytest.mark.parametrize("name", ["sims", "sims.npy", "sims.v2"])
def test_saved_and_loaded(tmp_path, name):
    values = matrix()
    save_sims(tmp_path / name, values, info())
    loaded, about = load_sims(tmp_path / name)
    np.testing.assert_array_equal(loaded, values)
    assert about == info()
    stem = name.removesuffix(".npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.json", f"{stem}.npy"]
    document = json.loads((tmp_path / f"{stem}.json").read_text(encoding="utf-8"))
    assert document["caption_image"] == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(np.load(tmp_path / f"{stem}.npy"), values)


def test_captions_without_images(tmp_path):
    save_sims(tmp_path / "s", matrix(), replace(info(), caption_image=None))
    assert load_sims(tmp_path / "s")[1].caption_image is None


def test_replaces_an_older_one(tmp_path):
    save_sims(tmp_path / "s", matrix(), info())
    newer = matrix(2, 4)
    save_sims(tmp_path / "s", newer, info(2, 4))
    np.testing.assert_array_equal(load_sims(tmp_path / "s")[0], newer)


def test_a_failure_leaves_the_older_one(tmp_path):
    values = matrix()
    save_sims(tmp_path / "s", values, info())
    with pytest.raises(ZeroDivisionError), sims_being_written(tmp_path / "s", info(2, 4)) as out:
        out[0] = 1 // (len(out) - 2)
    broken = matrix()
    broken[2, 3] = np.nan
    with pytest.raises(DualmatchError, match="holds NaN in rows 0 to 2"):
        save_sims(tmp_path / "s", broken, info())
    np.testing.assert_array_equal(load_sims(tmp_path / "s")[0], values)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def files_of_at_most_a_megabyte():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("files_of_at_most_a_megabyte")
def test_no_room_is_a_sentence(tmp_path):
    with pytest.raises(DualmatchError, match="600 by 600 float32 cannot be kept"):
        save_sims(tmp_path / "s", matrix(600, 600), info(600, 600))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "about", "message"),
    [
        (matrix(3, 5), info(), "does not fit 3 image and 6 caption ids"),
        (matrix(), replace(info(), caption_image=(0, 1)), "caption_image must name one of 3 images for each of 6"),
        (matrix(), replace(info(), caption_image=(0, 1, 2, 3, 0, 0)), "caption_image must name"),
        (matrix(0, 0), info(0, 0), "needs images and captions"),
    ],
)
def test_contradictions_are_not_saved(tmp_path, values, about, message):
    with pytest.raises(DualmatchError, match=message):
        save_sims(tmp_path / "s", values, about)
    assert not list(tmp_path.iterdir())


def edit(path, **changes):
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda npy, js: js.unlink(), "there is no file .*s.json"),
        (lambda npy, js: npy.unlink(), "there is no file .*s.npy"),
        (lambda npy, js: js.write_text("{"), "cannot be read as JSON"),
        (lambda npy, js: js.write_text("[]"), "does not describe a similarity matrix"),
        (lambda npy, js: edit(js, version=99), "version 99"),
        (lambda npy, js: edit(js, bundle=None), r"bundle \(a string\)"),
        (lambda npy, js: edit(js, caption_ids=[1] * 6), "lists of strings"),
        (lambda npy, js: edit(js, caption_image=[0, 1, 2, 0, 1, 7]), "caption_image must name"),
        (lambda npy, js: edit(js, image_ids=["a", "b"], caption_image=None), r"says float32 \(2, 6\)"),
        (lambda npy, js: npy.write_bytes(npy.read_bytes()[:-8]), "cannot be read as a .npy"),
        (lambda npy, js: npy.write_bytes(b"no matrix"), "cannot be read as a .npy"),
        (lambda npy, js: npy.write_bytes(b""), "cannot be read as a .npy"),
        (lambda npy, js: np.save(npy, matrix().astype(np.float64)), "is float64"),
        (lambda npy, js: np.save(npy, np.full((3, 6), np.nan, np.float32)), "holds NaN"),
        (lambda npy, js: np.save(npy, np.array([{}], object), allow_pickle=True), "cannot be read as a .npy"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    save_sims(tmp_path / "s", matrix(), info())
    damage(tmp_path / "s.npy", tmp_path / "s.json")
    with pytest.raises(DualmatchError, match=message):
        load_sims(tmp_path / "s")
