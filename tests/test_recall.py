"""Recall by counting, against loops that sort."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dualmatch.runtime import recall, rerank
from dualmatch.runtime.errors import DualmatchError


def order(scores):
    """Best first, ties to the smaller index."""
    return sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))


def slow_ranks(similarity, caption_image):
    """What the module counts, as two loops that sort every row and every column."""
    images, captions = similarity.shape
    i2t = [
        min(rank for rank, caption in enumerate(order(similarity[image])) if caption_image[caption] == image)
        for image in range(images)
    ]
    t2i = [order(similarity[:, caption]).index(caption_image[caption]) for caption in range(captions)]
    return i2t, t2i


@st.composite
def problems(draw):
    """A small similarity full of ties, any number of captions per image, captions in any order."""
    per_image = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    caption_image = draw(st.permutations([image for image, count in enumerate(per_image) for _ in range(count)]))
    values = st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 1e-45, 0.25, 1.0, np.inf])
    shape = (len(per_image), len(caption_image))
    return draw(hnp.arrays(np.float32, shape, elements=values)), np.array(caption_image)


def random_problem(images, seed=0, levels=None, shuffled=True):
    rng = np.random.default_rng(seed)
    caption_image = np.repeat(np.arange(images), rng.integers(1, 5, images))
    if shuffled:
        rng.shuffle(caption_image)
    similarity = rng.standard_normal((images, len(caption_image)), dtype=np.float32)
    if levels is not None:
        similarity = np.round(similarity * levels) / levels
    return similarity.astype(np.float32), caption_image


@given(problems())
@settings(max_examples=200, deadline=None)
def test_ranks_equal_sorting_loops(problem):
    similarity, caption_image = problem
    i2t, t2i = slow_ranks(similarity, caption_image)
    assert recall.ranks_i2t(similarity, caption_image).tolist() == i2t
    assert recall.ranks_t2i(similarity, caption_image).tolist() == t2i


# 255 rows fill the 8-bit counter and 64 rows are a block: one less, exactly, one more, and well past both.
@pytest.mark.parametrize("images", [1, 2, 63, 64, 65, 254, 255, 256, 600])
@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_block_boundaries(images, levels, shuffled):
    similarity, caption_image = random_problem(images, images, levels, shuffled)
    own = similarity[caption_image, np.arange(len(caption_image))]
    before = np.arange(images)[:, None] < caption_image
    t2i = ((similarity > own) | (before & (similarity == own))).sum(axis=0)
    both = recall.ranks(similarity, caption_image)
    np.testing.assert_array_equal(both[1], t2i)
    np.testing.assert_array_equal(recall.ranks_t2i(similarity, caption_image), t2i)
    np.testing.assert_array_equal(recall.ranks_i2t(similarity, caption_image), both[0])
    for image in range(0, images, 50):
        ranking = order(similarity[image])
        assert both[0][image] == next(rank for rank, caption in enumerate(ranking) if caption_image[caption] == image)


def test_a_constant_similarity_ranks_by_index():
    i2t, t2i = recall.ranks(np.zeros((300, 600), np.float32), np.arange(600) // 2)
    assert i2t.tolist() == list(range(0, 600, 2))
    assert t2i.tolist() == [caption // 2 for caption in range(600)]


def test_layout_and_type_do_not_matter(tmp_path):
    similarity, caption_image = random_problem(90, 1, levels=4)  # quarters: exact in float16
    expected = recall.ranks(similarity, caption_image)
    on_disk = np.memmap(tmp_path / "m", np.float32, "w+", shape=similarity.shape)
    on_disk[:] = similarity
    padded = np.zeros((90, 2 * similarity.shape[1]), np.float32)
    padded[:, ::2] = similarity
    for other in (
        np.asfortranarray(similarity),
        similarity.astype(np.float16),
        similarity.astype(np.float64),
        padded[:, ::2],
        on_disk,
    ):
        for ours, theirs in zip(recall.ranks(other, caption_image), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_float64_is_compared_in_float32():
    similarity = np.array([[1.0, 1.0 + 1e-12], [0.0, 2.0]])
    assert recall.ranks_i2t(similarity, [0, 1]).tolist() == [0, 0]


def test_metrics_by_hand():
    ranks = np.array([0, 4, 5, 9, 10, 30])
    metrics = recall.Metrics.of(ranks)
    assert metrics.r1 == pytest.approx(100 / 6)
    assert metrics.r5 == pytest.approx(200 / 6)
    assert metrics.r10 == pytest.approx(400 / 6)
    assert metrics.median == 8  # the median of the 0-based ranks is 7: halfway is rounded down, then counted from 1
    assert metrics.mean == pytest.approx(58 / 6 + 1)
    assert recall.recall_at(ranks, 31) == 100.0
    assert recall.Metrics.of(np.array([1, 2])).median == 2


def test_perfect_retrieval():
    result = recall.evaluate(np.repeat(np.eye(20, dtype=np.float32), 5, axis=1))
    assert result.rsum == 600
    assert result.vsrn_selection_sum == 400
    assert (result.i2t.median, result.t2i.mean) == (1, 1)


def test_the_sums():
    similarity, caption_image = random_problem(40)
    result = recall.evaluate(similarity, caption_image=caption_image)
    i2t, t2i = result.i2t, result.t2i
    assert result.rsum == pytest.approx(i2t.r1 + i2t.r5 + i2t.r10 + t2i.r1 + t2i.r5 + t2i.r10)
    assert result.vsrn_selection_sum == pytest.approx(result.rsum - i2t.r10 - t2i.r10)


@pytest.mark.parametrize("shuffled", [False, True])
def test_folds_are_averages_of_their_parts(shuffled):
    similarity, caption_image = random_problem(60, 3, shuffled=shuffled)
    parts = []
    for start in range(0, 60, 12):
        captions = np.flatnonzero((caption_image >= start) & (caption_image < start + 12))
        part = np.ascontiguousarray(similarity[start : start + 12, captions])
        parts.append(recall.evaluate(part, caption_image=caption_image[captions] - start))
    folds = recall.evaluate(similarity, caption_image=caption_image, folds=recall.FOLDS["five-folds"])
    for way in ("i2t", "t2i"):
        for name in ("r1", "r5", "r10", "median", "mean"):
            mean = np.mean([getattr(getattr(part, way), name) for part in parts])
            assert getattr(getattr(folds, way), name) == pytest.approx(mean)
    assert folds.rsum == pytest.approx(np.mean([part.rsum for part in parts]))
    assert folds != recall.evaluate(similarity, caption_image=caption_image)


def slow_reranked_recall(similarity, caption_image, orders, k1):
    """R@K of the full ranking whose first k1 were re-ordered, image by image."""
    ranks = []
    for image, candidates in enumerate(orders):
        ranking = [*candidates.tolist(), *order(similarity[image])[k1:]]
        ranks.append(next(rank for rank, caption in enumerate(ranking) if caption_image[caption] == image))
    return recall.Metrics.of(np.array(ranks))


@pytest.mark.parametrize("k1", [1, 4, 15])
def test_recall_of_reranked_candidates(k1):
    similarity, caption_image = random_problem(50, 4)
    plain = recall.evaluate(similarity, caption_image=caption_image)
    candidates = rerank.i2t(similarity, k1)
    result = recall.evaluate(similarity, caption_image=caption_image, i2t=candidates)
    assert result.i2t == slow_reranked_recall(similarity, caption_image, candidates, k1)
    assert result.t2i == plain.t2i
    assert result == recall.evaluate(similarity, caption_image=caption_image, i2t=partial(rerank.i2t, k1=k1))

    back = recall.evaluate(similarity, caption_image=caption_image, t2i=rerank.t2i(similarity, k1))
    full = [
        [*first.tolist(), *order(similarity[:, caption])[k1:]]
        for caption, first in enumerate(rerank.t2i(similarity, k1))
    ]
    ranks = np.array([ranking.index(caption_image[caption]) for caption, ranking in enumerate(full)])
    assert back.t2i == recall.Metrics.of(ranks)
    assert back.i2t == plain.i2t


def test_reranking_happens_inside_each_fold():
    similarity, caption_image = random_problem(60, 5, shuffled=False)
    folds = recall.evaluate(similarity, caption_image=caption_image, folds=5, i2t=partial(rerank.i2t, k1=6))
    captions = np.flatnonzero(caption_image < 12)
    first = recall.evaluate(
        similarity[:12, captions], caption_image=caption_image[captions], i2t=partial(rerank.i2t, k1=6)
    )
    seen = []
    recall.evaluate(
        similarity,
        caption_image=caption_image,
        folds=5,
        i2t=lambda part: seen.append(part.shape) or rerank.i2t(part, 6),
    )
    assert seen[0] == (12, len(captions))
    assert len(seen) == 5
    assert folds.protocol.rerank == first.protocol.rerank == "i2t k1=6"


def test_json_and_protocol():
    similarity, caption_image = random_problem(40, 6)
    result = recall.evaluate(
        similarity,
        caption_image=caption_image,
        folds=2,
        split="val,test",
        ensemble=2,
        i2t=partial(rerank.i2t, k1=3),
        t2i=partial(rerank.t2i, k1=4),
    )
    document = result.to_json()
    assert list(document) == ["rsum", "i2t", "t2i", "protocol"]
    assert list(document["i2t"]) == list(document["t2i"]) == ["r1", "r5", "r10", "median", "mean"]
    assert document["protocol"] == {
        "split": "val,test",
        "images": 40,
        "captions": len(caption_image),
        "captions_per_image": "1 to 4",
        "folds": 2,
        "ties": "smaller index first",
        "rerank": "i2t k1=3 and t2i k1=4",
        "ensemble": 2,
    }
    line = str(result.protocol)
    assert "\n" not in line
    for fact in ("val,test", "40 images", "1 to 4", "2 folds", "smaller index", "i2t k1=3", "ensemble of 2"):
        assert fact in line


def test_the_input_is_left_alone_and_the_result_repeats():
    similarity, caption_image = random_problem(70, 7)
    copy = similarity.copy()
    first = recall.evaluate(similarity, caption_image=caption_image)
    assert first == recall.evaluate(similarity, caption_image=caption_image)
    np.testing.assert_array_equal(similarity, copy)


def zeros(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("similarity", "options", "message"),
    [
        (np.array([[0, 1], [np.nan, 0]], np.float32), {"captions_per_image": 1}, "row 1 and column 0 is NaN"),
        (zeros(2, 9), {}, "2 images with 5 captions each need 10 captions, the matrix has 9"),
        (zeros(2, 3), {"caption_image": [0, 0, 2]}, "names images 0 to 2"),
        (zeros(2, 3), {"caption_image": [0, -1, 1]}, "names images -1 to 1"),
        (zeros(3, 3), {"caption_image": [0, 0, 2]}, "1 of 3 images have no caption (the first is image 1)"),
        (zeros(2, 3), {"caption_image": [0, 1]}, "one image index for each of 3 captions"),
        (zeros(2, 2), {"caption_image": [0.0, 1.0]}, "one image index"),
        (zeros(4, 20), {"folds": 3}, "4 images cannot be cut into 3 equal folds"),
        (zeros(4, 20), {"folds": 0}, "cannot be cut"),
        (zeros(4), {}, "images by captions"),
        (zeros(0, 0), {}, "images by captions"),
        (np.zeros((2, 10), complex), {}, "images by captions"),
        (zeros(4, 20), {"folds": 2, "i2t": np.zeros((4, 3), int)}, "do not fit 2 folds"),
        (zeros(4, 20), {"i2t": np.zeros((3, 3), int)}, "candidates for 4 queries"),
        (zeros(4, 20), {"t2i": np.full((20, 3), 4)}, "indices from 0 to 3"),
        (np.repeat(np.eye(4), 5, axis=1), {"t2i": np.full((20, 1), 3)}, "not the first 1 of this similarity"),
    ],
)
def test_refusals(similarity, options, message):
    with pytest.raises(DualmatchError) as error:
        recall.evaluate(similarity, **options)
    assert message in str(error.value)
