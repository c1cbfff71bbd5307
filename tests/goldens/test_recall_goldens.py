"""Ranks and recalls against those that the authors' evaluation code computed."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dualmatch.bench.recall_rows import Encoded, all_rows
from dualmatch.runtime import recall, rerank
from dualmatch.runtime.similarity import ensemble, order_similarity, similarity_matrix

from .cases import KINDS, Case, case_folders, cases_of, folders_of, kind_of, read_json

JSON = "recall.json"
FACTS = {"n", "D", "margin", "note", "metrics"}
INPUTS = {"sim", "img", "cap", "img2", "cap2"}


@pytest.mark.parametrize("folder", case_folders(), ids=lambda folder: folder.name)
def test_the_case_is_of_a_known_kind(folder):
    assert kind_of(folder) is not None, f"{folder} is of no kind in tests/goldens/cases.py: nothing tests it"


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_run(kind):
    folders = ", ".join(folder.name for folder in folders_of(kind))
    if not folders:
        pytest.skip(f"not run: {kind}: no case in this folder")
    if KINDS[kind] is not None:
        pytest.skip(f"not run: {folders}: {KINDS[kind]}")


@cache
def similarity(case: Case) -> np.ndarray:
    arrays = case.arrays()
    return arrays["sim"] if "sim" in arrays else similarity_matrix(arrays["img"], arrays["cap"])


@cache
def ensemble_similarity(case: Case) -> np.ndarray:
    arrays = case.arrays()
    return ensemble([similarity(case), similarity_matrix(arrays["img2"], arrays["cap2"])])


@cache
def order_similarity_on_abs(case: Case) -> np.ndarray:
    arrays = case.arrays()
    return order_similarity(abs(arrays["img"]), abs(arrays["cap"]))


def metrics(result: recall.Metrics) -> list[float]:
    return [result.r1, result.r5, result.r10, result.median, result.mean]


def i2t(matrix: Callable[[Case], np.ndarray]) -> Callable[[Case], list[float]]:
    return lambda case: metrics(recall.evaluate(matrix(case)).i2t)


def t2i(matrix: Callable[[Case], np.ndarray]) -> Callable[[Case], list[float]]:
    return lambda case: metrics(recall.evaluate(matrix(case)).t2i)


def simrank(result: recall.Recall) -> list[float]:
    return [*metrics(result.i2t)[:3], *metrics(result.t2i)[:3], result.rsum]


def owner(case: Case) -> np.ndarray:
    return np.arange(similarity(case).shape[1]) // 5


NUMBERS = {
    "simrank": lambda case: simrank(recall.evaluate(similarity(case))),
    "acc_i2t": i2t(similarity),
    "acc_t2i": t2i(similarity),
    "i2t": i2t(similarity),
    "t2i": t2i(similarity),
    "ensemble_i2t": i2t(ensemble_similarity),
    "ensemble_t2i": t2i(ensemble_similarity),
    "order_i2t_on_abs": i2t(order_similarity_on_abs),
    "order_t2i_on_abs": t2i(order_similarity_on_abs),
}
ARRAYS = {
    "i2t_ranks": lambda case: recall.ranks_i2t(similarity(case), owner(case)),
    "t2i_ranks": lambda case: recall.ranks_t2i(similarity(case), owner(case)),
    "i2t_top1": lambda case: rerank.best_captions(similarity(case), 1)[:, 0],
    "t2i_top1": lambda case: rerank.best_images(similarity(case), 1)[:, 0],
    "ens_i2t_ranks": lambda case: recall.ranks_i2t(ensemble_similarity(case), owner(case)),
    "ens_t2i_ranks": lambda case: recall.ranks_t2i(ensemble_similarity(case), owner(case)),
}
CASES = cases_of("recall", JSON) + cases_of("recall_vsrn", JSON)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_case_has_numbers_and_arrays(case):
    assert case.numbers(JSON)
    assert case.arrays()


@pytest.mark.parametrize(
    ("case", "aspect"),
    [(case, aspect) for case in CASES for aspect in sorted(case.numbers(JSON).keys() - FACTS)],
    ids=str,
)
def test_numbers(case, aspect):
    assert aspect in NUMBERS, f"{case}: nothing tests the number {aspect!r}"
    assert NUMBERS[aspect](case) == pytest.approx(case.numbers(JSON)[aspect], rel=1e-12)


@pytest.mark.parametrize(
    ("case", "aspect"), [(case, aspect) for case in CASES for aspect in sorted(case.arrays().keys() - INPUTS)], ids=str
)
def test_arrays(case, aspect):
    assert aspect in ARRAYS, f"{case}: nothing tests the array {aspect!r}"
    np.testing.assert_array_equal(ARRAYS[aspect](case), case.arrays()[aspect])


FOLD5 = "fold5.json"
# One caption's rank moves a fold's recall by 0.02: this tolerance, the goldens' own, forgives none.
FINER_THAN_ONE_RANK = {"abs": 0.01}


@cache
def fold5_similarity(folder: Path) -> np.ndarray:
    with np.load(folder / "emb_int8.npz", allow_pickle=False) as file:
        sides = [file[side].astype(np.float32) for side in ("img", "cap")]
    return similarity_matrix(*(side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides))


@cache
def fold5_recall(folder: Path, folds: int) -> recall.Recall:
    return recall.evaluate(fold5_similarity(folder), folds=folds)


def one_fold(folder: Path, index: int, num_folds: int) -> recall.Recall:
    matrix = fold5_similarity(folder)
    images, captions = (size // num_folds for size in matrix.shape)
    return recall.evaluate(
        matrix[index * images : (index + 1) * images, index * captions : (index + 1) * captions], captions_per_image=5
    )


def check_folds(folder, golden, *, whole, parts):
    if whole is not None:
        assert simrank(fold5_recall(folder, 1)) == pytest.approx(whole, rel=1e-12)
    for index, part in enumerate(parts):
        assert simrank(one_fold(folder, index, len(parts))) == pytest.approx(part, **FINER_THAN_ONE_RANK)


def check_mean(folder, golden):
    result = fold5_recall(folder, len(golden["simrank_folds"]))
    assert simrank(result) == pytest.approx(golden["mean_folds"], **FINER_THAN_ONE_RANK)


def check_printed(folder, golden):
    """The authors' script printed these lines; the figures have one decimal."""
    whole, folds = fold5_recall(folder, 1), len(golden["simrank_folds"])
    expected = [_printed(result) for result in (whole, *(one_fold(folder, index, folds) for index in range(folds)))]
    mean = simrank(fold5_recall(folder, folds))
    expected.append("I2T:{:.1f} {:.1f} {:.1f}\nT2I:{:.1f} {:.1f} {:.1f}\nRsum:{:.1f}".format(*mean))
    position = 0
    for lines in expected:
        position = golden["stdout"].index(lines, position) + len(lines)


def _printed(result):
    return "i2t:r1: {:.1f}, r5: {:.1f}, r10: {:.1f}\nt2i:r1: {:.1f}, r5: {:.1f}, r10: {:.1f}\nrsum={:.1f}".format(
        *simrank(result)
    )


FOLD5_ASPECTS = {
    "simrank_5k": lambda folder, golden: check_folds(folder, golden, whole=golden["simrank_5k"], parts=[]),
    "simrank_folds": lambda folder, golden: check_folds(folder, golden, whole=None, parts=golden["simrank_folds"]),
    "float64_values": lambda folder, golden: check_folds(
        folder, golden, whole=golden["float64_values"][0], parts=golden["float64_values"][1:]
    ),
    "mean_folds": check_mean,
    "stdout": check_printed,
}


@pytest.mark.parametrize(
    ("folder", "aspect"),
    [
        (folder, aspect)
        for folder in folders_of("fold5")
        for aspect in sorted(read_json(folder / FOLD5).keys() - {"note", "same_in_float64"})
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_fold5(folder, aspect):
    assert aspect in FOLD5_ASPECTS, f"{folder}: nothing tests {aspect!r}"
    FOLD5_ASPECTS[aspect](folder, read_json(folder / FOLD5))


@pytest.mark.parametrize("folder", folders_of("fold5"), ids=lambda folder: folder.name)
def test_the_rows_of_bench_recall_reproduce_both_of_coco_protocols(folder):
    golden = read_json(folder / FOLD5)
    with np.load(folder / "emb_int8.npz", allow_pickle=False) as file:
        images, captions = (file[side].astype(np.float32) for side in ("img", "cap"))
    images, captions = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (images, captions))
    model = Encoded(label="authors", about={}, images=images, captions=captions)
    rows, absent = all_rows([model], image_of=np.arange(len(captions)) // 5, rerank=0, split="test")
    assert not absent
    found = {row.protocol: simrank(row.recall) for row in rows}
    assert found["full"] == pytest.approx(golden["simrank_5k"], rel=1e-12)
    assert found["five-folds"] == pytest.approx(golden["mean_folds"], **FINER_THAN_ONE_RANK)


@pytest.mark.parametrize("case", [case for case in CASES if "img" in case.arrays()], ids=str)
def test_the_rows_of_bench_recall_reproduce_single_models_and_ensembles(case):
    arrays = case.arrays()
    models = [
        Encoded(label=image, about={}, images=arrays[image], captions=arrays[caption])
        for image, caption in (("img", "cap"), ("img2", "cap2"))
        if image in arrays
    ]
    rows, _ = all_rows(models, image_of=np.arange(len(arrays["cap"])) // 5, rerank=0, split="test")
    numbers = case.numbers(JSON)
    for row in (row for row in rows if row.protocol == "full"):
        prefix = {1: "", 2: "ensemble_"}[len(row.models)]
        if row.models == ("img2",):
            continue
        for side in ("i2t", "t2i"):
            if f"{prefix}{side}" in numbers:
                assert metrics(getattr(row.recall, side)) == pytest.approx(numbers[f"{prefix}{side}"], rel=1e-12)
