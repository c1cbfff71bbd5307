"""`runtime similarity`, `rerank` and `evaluate` on galleries and bundles, and what they refuse before they encode."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dualmatch.runtime import Gallery, evaluate, load_bundle, rerank
from dualmatch.runtime.encode import encode_caption_gallery, encode_gallery
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.evaluate import encode_dataset, evaluate_bundles
from dualmatch.runtime.recall import evaluate as evaluate_matrix
from dualmatch.runtime.similarity import load_sims, save_sims, similarity_matrix

from .demo_fixture import SMALL, dualmatch, one_sentence


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return load_bundle(small_bundle)


@pytest.fixture(scope="module")
def folder(bundle, small_run, tmp_path_factory):
    """Galleries of the small data set, and their similarity."""
    root = tmp_path_factory.mktemp("evaluate")
    encode_gallery(bundle, small_run.data / "images", root / "images")
    encode_caption_gallery(bundle, small_run.data / "captions.json", root / "captions")
    finished = dualmatch("runtime", "similarity", root / "images", root / "captions", "--out", root / "sims.npy")
    assert finished.code == 0, finished.err
    return root


def test_similarity_makes_its_folder_and_replaces_nothing(folder, tmp_path):
    words = (
        "runtime",
        "similarity",
        folder / "images",
        folder / "captions",
        "--out",
        tmp_path / "a" / "b" / "sims.npy",
    )
    assert dualmatch(*words).code == 0
    written = (tmp_path / "a" / "b" / "sims.npy").read_bytes()
    images, captions = Gallery.open(folder / "images"), Gallery.open(folder / "captions")
    expected = similarity_matrix(images.vectors(), captions.vectors())
    np.testing.assert_allclose(load_sims(tmp_path / "a" / "b" / "sims")[0], expected, atol=1e-6)
    again = dualmatch(*words)
    assert again.code == 1
    assert "exists already" in again.err
    assert one_sentence(again.err)
    assert (tmp_path / "a" / "b" / "sims.npy").read_bytes() == written


def test_similarity_in_small_blocks(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "_IMAGES_PER_BLOCK", 7)
    monkeypatch.setattr(evaluate, "_CAPTIONS_PER_BLOCK", 11)
    evaluate.write_sims(Gallery.open(folder / "images"), Gallery.open(folder / "captions"), tmp_path / "sims")
    np.testing.assert_allclose(load_sims(tmp_path / "sims")[0], load_sims(folder / "sims")[0], atol=1e-6)


def test_similarity_of_vectors_that_are_not_finite(folder, bundle, small_run, tmp_path):
    encode_gallery(bundle, small_run.data / "images", tmp_path / "images")
    file = next((tmp_path / "images").glob("vectors-*.npy"))
    vectors = np.load(file)
    vectors[3, 2] = np.inf
    np.save(file, vectors)
    finished = dualmatch("runtime", "similarity", tmp_path / "images", folder / "captions", "--out", tmp_path / "s.npy")
    assert finished.code == 1
    assert "holds NaN or infinity" in finished.err
    assert not (tmp_path / "s.npy").exists()


def test_rerank_through_neighbours(folder, tmp_path):
    words = ("runtime", "rerank", folder / "sims.npy", "--direction", "t2i", "--k1", "6")
    through = (
        *words,
        "--through",
        folder / "captions",
        "--k2",
        "4",
        "--out",
        tmp_path / "deep" / "order.npy",
        "--json",
    )
    found = dualmatch(*through)
    assert found.code == 0, found.err
    similarity, info = load_sims(folder / "sims")
    captions = Gallery.open(folder / "captions").vectors()
    wanted = rerank.t2i_through_neighbours(similarity, similarity_matrix(captions, captions), 6, 4)
    np.testing.assert_array_equal(np.load(tmp_path / "deep" / "order.npy"), wanted)
    recall = evaluate_matrix(similarity, caption_image=info.caption_image, t2i=wanted).to_json()
    assert found.json["reranked"] == recall
    itself = dualmatch(*words, "--through", folder / "captions", "--k2", "1", "--json")
    assert itself.json == dualmatch(*words, "--json").json


def test_rerank_of_captions_that_name_few_images(folder, tmp_path):
    similarity, info = load_sims(folder / "sims")
    few = [0] * len(info.caption_ids)
    save_sims(tmp_path / "s", np.array(similarity), replace(info, caption_image=tuple(few)))
    found = dualmatch("runtime", "rerank", tmp_path / "s", "--direction", "i2t", "--out", tmp_path / "o.npy")
    assert found.code == 0
    assert "51 of 52 images have no caption, so there is no recall" in found.out
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), rerank.i2t(similarity, 15))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--direction i2t --through {captions}", 2, "--through is for --direction t2i"),
        ("--direction t2i --through {images}", 1, "does not hold the captions"),
        (
            "--direction t2i --through {captions} --k2 261",
            1,
            "261 candidates were asked for and there are 260 captions",
        ),
        ("--direction t2i --through {captions} --k1 53", 1, "53 candidates were asked for and there are 52 images"),
        ("--direction i2t --k1 261", 1, "261 candidates were asked for and there are 260 captions"),
    ],
)
def test_reranking_that_is_refused(folder, tmp_path, words, code, message):
    known = {"captions": folder / "captions", "images": folder / "images"}
    out = tmp_path / "order.npy"
    finished = dualmatch(
        "runtime", "rerank", folder / "sims.npy", *(word.format(**known) for word in words.split()), "--out", out
    )
    assert finished.code == code
    assert message in finished.err
    assert not out.exists()


def test_evaluate_as_the_matrix_says(bundle, small_run):
    images, captions = encode_dataset(
        bundle, small_run.dataset, backend="onnxruntime", threads=1, batch_size=32, regions=None, progress=None
    )
    wanted = evaluate_matrix(
        images @ captions.T,
        caption_image=small_run.dataset.caption_image,
        split="train, val, test",
        i2t=lambda part: rerank.i2t(part, 7),
        t2i=lambda part: rerank.t2i(part, 5),
    )
    found = evaluate_bundles([bundle], small_run.dataset, rerank_k1=7, rerank_t2i_k1=5, threads=1)
    assert found.to_json() == wanted.to_json()
    words = ("--split", "train,val,test", "--rerank", "7", "--rerank-t2i", "5", "--threads", "1", "--json")
    printed = dualmatch("runtime", "evaluate", bundle.path, "--data", small_run.data, *words)
    document = json.loads(printed.out)
    subject = document.pop("subject")
    assert document == wanted.to_json()
    assert subject["data"] == {
        "name": "small scenes", "layout": "captions", "splits": ["train", "val", "test"], "images": 52, "captions": 260,
    }  # fmt: skip
    assert subject["models"] == [
        {
            "name": "dsran",
            "recipe": "scenes-dsran-gru",
            "changed": sorted(SMALL),
            "precision": "fp32",
            "bundle": bundle.hash,
        }
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rerank_k1": 261}, "261 candidates were asked for and there are 260 captions"),
        ({"rerank_t2i_k1": 53}, "53 candidates were asked for and there are 52 images"),
        ({"protocol": "five-folds"}, "52 images cannot be cut into 5 equal folds"),
    ],
)
def test_evaluation_refused_before_encoding(bundle, small_run, monkeypatch, options, message):
    monkeypatch.setattr(evaluate, "encode_dataset", None)
    with pytest.raises(DualmatchError, match=message):
        evaluate_bundles([bundle], small_run.dataset, **options)


def test_an_ensemble_that_cannot_run_is_refused_before_the_first_is_encoded(bundle, small_run, monkeypatch):
    opened = evaluate.ImageEncoder

    def second_fails(given, **options):
        if given is not bundle:
            raise DualmatchError("the second bundle cannot run.")
        return opened(given, **options)

    monkeypatch.setattr(evaluate, "ImageEncoder", second_fails)
    monkeypatch.setattr(evaluate, "encode_dataset", None)
    with pytest.raises(DualmatchError, match="the second bundle cannot run"):
        evaluate_bundles([bundle, load_bundle(bundle.path)], small_run.dataset)
