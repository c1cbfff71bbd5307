"""`bench recall`: its rows are those of `runtime evaluate`, its intervals cover, and a planted weakness shows in its slice only."""

import json
from functools import partial

import numpy as np
import pytest

from dualmatch.bench import bundle_recall
from dualmatch.bench.bundle_recall import labels, recall_report
from dualmatch.bench.recall_rows import Encoded, all_rows, differences
from dualmatch.bench.recall_slices import RELATION_WORDS, SETTING_WORDS, hard_pairs, slices_of
from dualmatch.bench.test_sets import recognised
from dualmatch.runtime import bootstrap, evaluate, recall, rerank
from dualmatch.runtime.datasets import Dataset, ImageItem, make_scenes
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.similarity import ensemble

from .demo_fixture import dualmatch, one_sentence

PLACES = ("on a beach", "in a field", "at home")


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def encoded(label, owners, noise, seed=0, dimension=16):
    """Captions near their images: `noise` is a number, or one for each caption."""
    chance = np.random.default_rng(seed)
    images = unit(np.random.default_rng(99).normal(size=(int(owners.max()) + 1, dimension)))
    away = chance.normal(size=(len(owners), dimension)) * np.broadcast_to(noise, len(owners))[:, None]
    return Encoded(label=label, about={}, images=images, captions=unit(images[owners] + away))


def photographs(count, captions):
    items = [ImageItem(id=f"{n}.jpg", split="test", captions=captions(n)) for n in range(count)]
    return Dataset(name="photographs", layout="captions", items=tuple(items))


# Intervals.


def test_intervals_of_shares_cover_the_truth():
    chance, covered, differ = np.random.default_rng(0), 0, 0
    for _ in range(200):
        easy = chance.random((60, 1)) < 0.5  # an image's captions are alike, which is why images are resampled
        hits = np.stack([chance.binomial(5, np.where(easy, 0.9, 0.1))[:, 0], chance.binomial(5, 0.5, 60)], axis=1)
        shares, steps = bootstrap.share_intervals(hits.astype(float), np.full((60, 2), 5.0))
        covered += shares[0, 0] <= 50 <= shares[1, 0]
        differ += steps[0, 0] <= 0 <= steps[1, 0]
    assert 0.91 <= covered / 200 <= 0.99
    assert 0.91 <= differ / 200 <= 0.99


def test_an_interval_of_few_without_a_miss_is_not_a_point():
    shares, steps = bootstrap.share_intervals(np.full((10, 2), 1.0), np.ones((10, 2)))
    assert shares[0, 0] < 85
    assert shares[1, 0] == 100
    assert steps[0, 0] < 0 < steps[1, 0]


def test_intervals_of_rsum_cover_the_truth():
    chance, covered = np.random.default_rng(1), 0
    for _ in range(200):
        lost = chance.choice([0.0, 100.0, 300.0], size=80, p=[0.5, 0.3, 0.2])
        low, high = bootstrap.interval(lost, paired=False)
        covered += low <= 90 <= high
    assert 0.91 <= covered / 200 <= 0.98


def test_no_flip_among_few_images_is_not_yet_no_difference():
    low, high = bootstrap.interval(np.zeros(50), paired=True)
    assert low < -3
    assert high > 3
    assert bootstrap.interval(np.zeros(50), paired=False) == (0, 0)
    assert bootstrap.interval(np.full(50, 350.0), paired=True) == pytest.approx((350 + low, 350 + high))


# Rows.


@pytest.fixture(scope="module")
def models():
    owners = np.repeat(np.arange(60), 5)
    return [encoded("a", owners, 0.6), encoded("b", owners, 0.75, seed=1)], owners


def test_rows_are_those_of_the_matrix(models):
    (first, second), owners = models
    rows, absent = all_rows([first, second], image_of=owners, rerank=7, split="test")
    assert not absent
    assert len(rows) == 12
    similarities = {(one.label,): one.images @ one.captions.T for one in (first, second)}
    similarities["a", "b"] = ensemble(list(similarities.values()))
    for row in rows:
        wanted = recall.evaluate(
            similarities[row.models],
            caption_image=owners,
            folds=recall.FOLDS[row.protocol],
            i2t=partial(rerank.i2t, k1=7) if row.rerank else None,
            split="test",
            ensemble=len(row.models),
        )
        assert row.recall.to_json() == wanted.to_json()
        low, high = row.to_json({"name": "x", "layout": "captions"})["rsum_interval"]
        assert low < row.recall.rsum < high
        assert 600 - row.points_short.mean() == pytest.approx(row.recall.rsum)


def test_what_the_data_cannot_have_is_absent_with_a_reason(models):
    (first, _), owners = models
    few = Encoded(label="a", about={}, images=first.images[:12], captions=first.captions[:60])
    rows, absent = all_rows([few], image_of=owners[:60], rerank=15, split="test")
    assert [(row.protocol, row.rerank) for row in rows] == [("full", 0), ("full", 15)]
    assert [one["row"] for one in absent] == ["five-folds"]
    assert "12 images cannot be cut into 5 equal folds" in absent[0]["reason"]
    rows, absent = all_rows(
        [Encoded(label="a", about={}, images=first.images[:10], captions=first.captions[:50])],
        image_of=owners[:50], rerank=15, split="test",
    )  # fmt: skip
    assert [(row.protocol, row.rerank) for row in rows] == [("full", 0), ("full", 15), ("five-folds", 0)]
    assert absent[0]["row"] == "five-folds, re-ranked"
    assert "there are 10 captions in one of 5 folds" in absent[0]["reason"]


def test_differences_are_paired_and_know_what_they_cannot_tell(models):
    (first, second), owners = models
    rows, _ = all_rows([first, second], image_of=owners, rerank=7, split="test")
    found = differences(rows)
    assert (
        len(found) == 14
    )  # b and the ensemble against a, in two protocols, plain and re-ranked; re-ranked against plain
    for one in found:
        assert one.of.protocol == one.against.protocol
        assert one.of.points_above(one.against).mean() == pytest.approx(one.value)
        assert one.low <= one.value <= one.high
    worse = next(one for one in found if (one.of.models, one.of.rerank, one.of.protocol) == (("b",), 0, "full"))
    assert worse.high < 0
    assert worse.tells
    same = Encoded(label="c", about={}, images=first.images, captions=first.captions)
    rows, _ = all_rows([first, same], image_of=owners, rerank=0, split="test")
    assert [(one.value, one.tells) for one in differences(rows)] == [(0.0, False)] * 4


# Slices.


def test_slices_by_words_and_length():
    texts = ("a dog next to a ball", "A dog on the Beach.", "a dog", "dog " * 20, "a leftover dog")
    found = {one.name: one.chosen.tolist() for one in slices_of(photographs(1, lambda _: texts))}
    assert found == {
        "1 to 7 words": [True, True, True, False, True],
        "16 words and more": [False, False, False, True, False],
        "relation words": [True, False, False, False, False],
        "setting words": [False, True, False, False, False],
        "neither": [False, False, True, True, True],
    }


def test_the_lists_of_words_are_small_and_apart():
    assert not RELATION_WORDS & SETTING_WORDS
    assert max(len(RELATION_WORDS), len(SETTING_WORDS)) < 100


def test_a_planted_weakness_shows_in_its_slice_only():
    dataset = photographs(100, lambda n: (f"dog {n} under a tree", f"dog {n}", f"cat {n}", f"dog {n}", f"dog {n}"))
    owners = np.array(dataset.caption_image)
    weak = np.where(np.arange(500) % 5 == 0, 1.5, 0.4)
    report = recall_report([encoded("weak", owners, weak), encoded("fair", owners, 0.4)], dataset).to_json()
    rows = {(row["models"][0], row["slice"]): row for row in report["slices"] if len(row["models"]) == 1}
    relation, neither = rows["weak", "relation words"], rows["weak", "neither"]
    assert (relation["captions"], relation["images"], relation["against_rest"]["captions"]) == (100, 100, 400)
    assert relation["intervals"]["r1"][1] < neither["intervals"]["r1"][0]
    assert relation["against_rest"]["intervals"]["r1"][1] < -20
    assert relation["against_rest"]["r1"] == pytest.approx(relation["r1"] - neither["r1"])
    low, high = rows["fair", "relation words"]["against_rest"]["intervals"]["r1"]
    assert low < 0 < high
    against = rows["fair", "relation words"]["against_first"]
    assert against["intervals"]["r1"][0] > 20
    assert relation["against_first"] is None
    assert rows["weak", "1 to 7 words"]["against_rest"] is None  # all captions: there is no rest
    assert "NaN" not in json.dumps(report)


def test_hard_pairs_are_told_apart_by_what_the_model_sees():
    """Embeddings that know the setting and nothing of the relation: chance has no say, the scenes of a pair are equal."""
    dataset = make_scenes(num_train=0, num_val=0, num_test=40)
    settings = sorted({dict(item.tags)["setting"] for item in dataset.items})
    sees = np.eye(len(settings), dtype=np.float32)[[settings.index(dict(i.tags)["setting"]) for i in dataset.items]]
    model = Encoded(label="a", about={}, images=sees, captions=sees[dataset.caption_image])
    found = {row["differs"]: row for row in hard_pairs([[model]], dataset)}
    assert found["setting"]["captions"]["value"] == found["setting"]["images"]["value"] == 100
    assert found["setting"]["captions"]["interval"][0] > 80
    assert (
        found["relation"]["captions"]["value"] == found["relation"]["images"]["value"] == 0
    )  # a tie is not told apart
    assert (found["relation"]["pairs"], found["relation"]["captions"]["of"], found["relation"]["images"]["of"]) == (
        10,
        100,
        20,
    )
    assert hard_pairs([[model]], photographs(3, lambda n: (f"dog {n}",))) == []


def test_hard_pairs_of_a_model_that_guesses():
    dataset = make_scenes(num_train=0, num_val=0, num_test=80)
    chance = np.random.default_rng(0)
    model = Encoded(
        label="a",
        about={},
        images=unit(chance.normal(size=(80, 8))),
        captions=unit(chance.normal(size=(400, 8))),
    )
    for row in hard_pairs([[model], [model, model]], dataset):
        for side in ("captions", "images"):
            low, high = row[side]["interval"]
            assert low < 50 < high


# Test sets.

COCO = {"name": "coco", "layout": "karpathy", "splits": ["test"], "images": 5000, "captions": 25000}


@pytest.mark.parametrize(
    ("changes", "protocol", "wanted"),
    [
        ({}, "full", "COCO 5K"),
        ({}, "five-folds", "COCO 1K"),
        ({"name": "coco_precomp", "layout": "scan", "splits": ["testall"]}, "five-folds", "COCO 1K"),
        ({"name": "my folder", "layout": "vsepp"}, "full", "COCO 5K"),
        ({"name": "flickr30k", "images": 1000, "captions": 5000}, "full", "Flickr30K"),
        ({"name": "f30k_precomp", "layout": "scan", "images": 1000, "captions": 5000}, "full", "Flickr30K"),
        ({"name": "flickr30k", "images": 1000, "captions": 5000}, "five-folds", "in five folds"),
        ({"name": "flickr8k-1000", "layout": "captions"}, "full", "is not Flickr30K or COCO"),
        ({"name": "flickr30k", "layout": "captions"}, "full", "is not Flickr30K or COCO"),
        ({"splits": ["val", "test"]}, "full", "split val, test of COCO: the papers test on test alone"),
        ({"name": "coco_precomp", "layout": "scan", "images": 1000, "captions": 5000}, "full", "test on testall alone"),
        ({"images": 1000}, "full", "1000 images of COCO's test: the papers rank 5000"),
        ({"captions": 25010}, "full", "25010 captions"),
    ],
)
def test_recognised_test_sets(changes, protocol, wanted):
    found, reason = recognised({**COCO, **changes}, protocol)
    assert (found == wanted and not reason) if found else wanted in reason


# The command.


def test_the_command_encodes_once_and_agrees_with_evaluate(small_bundle, small_run, tmp_path, monkeypatch):
    calls = []
    encode = evaluate.encode_dataset
    monkeypatch.setattr(evaluate, "encode_dataset", lambda *a, **k: calls.append(a) or encode(*a, **k))
    words = (small_bundle, "--data", small_run.data, "--split", "train,val", "--threads", "1")
    found = dualmatch("bench", "recall", *words, "--out", tmp_path / "recall.json", "--json")
    assert found.code == 0, found.err
    assert len(calls) == 1
    assert found.json == json.loads((tmp_path / "recall.json").read_text())
    rows = {(row["protocol_name"], row["rerank"]): row for row in found.json["rows"]}
    assert set(rows) == {("full", 0), ("full", 15), ("five-folds", 0), ("five-folds", 15)}
    for (protocol, k1), row in rows.items():
        options = ("--protocol", protocol, *(("--rerank", k1) if k1 else ()))
        wanted = dualmatch("runtime", "evaluate", *words, *options, "--json").json
        assert {key: row[key] for key in ("rsum", "i2t", "t2i", "protocol")} == {
            key: wanted[key] for key in ("rsum", "i2t", "t2i", "protocol")
        }
        assert row["test_set"] is None
    assert found.json["subject"]["data"]["images"] == 40


def test_a_run_beside_its_bundle_and_the_tables(small_bundle, small_run):
    words = ("--data", small_run.data, "--split", "test", "--threads", "1")
    found = dualmatch("bench", "recall", small_run.folder, small_bundle, *words)
    assert found.code == 0, found.err
    text = " ".join(found.out.split())
    assert "12 images cannot be cut into 5 equal folds" in text
    assert "none of the papers' test sets" in text
    assert "A: run (scenes-dsran-gru, torch fp32) B: bundle (scenes-dsran-gru, fp32)" in text
    assert max(map(len, found.out.splitlines())) <= 80
    assert "A+B full K1 15" in text
    printed = dualmatch("bench", "recall", small_run.folder, small_bundle, *words, "--rerank", "0", "--json").json
    first, second, _ = printed["rows"]
    assert first["rsum"] == second["rsum"]  # fp32 in torch and in onnxruntime
    assert [one["tells"] for one in printed["comparisons"]] == [False, False]
    assert [model["precision"] for model in printed["subject"]["models"]] == ["torch fp32", "fp32"]


def test_refusals(small_bundle, small_run, tmp_path):
    words = ("--data", small_run.data, "--split", "test")
    for arguments, message in (
        ((small_bundle, small_bundle, *words), "given twice"),
        ((tmp_path / "none", *words), "there is no"),
        ((small_bundle, "--data", small_run.data, "--split", "all"), "has no split 'all'"),
    ):
        found = dualmatch("bench", "recall", *arguments)
        assert found.code == 1
        assert message in found.err
        assert one_sentence(found.err)
    assert dualmatch("bench", "recall").code == 2


def test_labels(tmp_path):
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert labels([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == [
        str(tmp_path / "x" / "a"),
        str(tmp_path / "y" / "a"),
    ]
    with pytest.raises(DualmatchError, match="given twice"):
        labels([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_the_report_says_what_was_resampled(models):
    (first, _), owners = models
    dataset = photographs(60, lambda n: tuple(f"dog {n} {PLACES[n % 3]} {i}" for i in range(5)))
    report = recall_report([first], dataset, rerank=0).to_json()
    assert report["schema"] == bundle_recall.SCHEMA
    assert report["bootstrap"]["resamples"] == 2000
    assert report["comparisons"] == report["hard_pairs"] == []
    assert np.array_equal(owners, dataset.caption_image)
