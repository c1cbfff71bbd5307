"""Ranking straight from embeddings, against the same on their matrix."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dualmatch.runtime import recall, rerank, streaming
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.similarity import ensemble, similarity_matrix


@pytest.fixture(autouse=True)
def few_lines_at_a_time(monkeypatch):
    monkeypatch.setattr(streaming, "_MOST_LINES", 3)
    monkeypatch.setattr(streaming, "_SCORES_AT_ONCE", 7)
    monkeypatch.setattr(streaming, "_OWN_CAPTIONS", 5)
    monkeypatch.setattr(streaming, "_OWN_IMAGES", 2)


def whole(*shape):
    """Small whole numbers: their dot products are exact in any order of summation, and full of ties."""
    return hnp.arrays(np.float32, shape, elements=st.integers(-1, 1).map(float))


@st.composite
def problems(draw):
    """Embeddings of one or two models, any number of captions per image, captions in any order."""
    per_image = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    caption_image = draw(st.permutations([image for image, count in enumerate(per_image) for _ in range(count)]))
    models = [
        (draw(whole(len(per_image), 3)), draw(whole(len(caption_image), 3))) for _ in range(draw(st.integers(1, 2)))
    ]
    return models, np.array(caption_image)


def matrix_of(models):
    return ensemble([images @ captions.T for images, captions in models])


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_equals_the_dense_definition(data):
    models, caption_image = data.draw(problems())
    similarity = matrix_of(models)
    num_images, num_captions = similarity.shape
    k_captions, k_images = data.draw(st.integers(1, num_captions)), data.draw(st.integers(1, num_images))
    k2 = data.draw(st.integers(1, num_captions))
    ours, theirs = streaming.ranks(models, caption_image, k_captions), recall.ranks(similarity, caption_image)
    for one, other in zip(ours, (*theirs, rerank.i2t(similarity, k_captions)), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(streaming.i2t(models, k_captions), rerank.i2t(similarity, k_captions))
    np.testing.assert_array_equal(streaming.t2i(models, k_images), rerank.t2i(similarity, k_images))
    among_captions = matrix_of([(captions, captions) for _, captions in models])
    np.testing.assert_array_equal(
        streaming.t2i_through_neighbours(models, k_images, k2),
        rerank.t2i_through_neighbours(similarity, among_captions, k_images, k2),
    )
    folds = data.draw(st.sampled_from([folds for folds in range(1, num_images + 1) if num_images % folds == 0]))
    if folds == 1:
        assert streaming.evaluate(
            models, caption_image=caption_image, k1_i2t=k_captions, k1_t2i=k_images
        ) == recall.evaluate(
            similarity,
            caption_image=caption_image,
            ensemble=len(models),
            i2t=partial(rerank.i2t, k1=k_captions),
            t2i=partial(rerank.t2i, k1=k_images),
        )
    else:
        assert streaming.evaluate(
            models, caption_image=caption_image, folds=folds, k1_i2t=1, k1_t2i=1, split="test"
        ) == recall.evaluate(
            similarity,
            caption_image=caption_image,
            folds=folds,
            split="test",
            ensemble=len(models),
            i2t=partial(rerank.i2t, k1=1),
            t2i=partial(rerank.t2i, k1=1),
        )


def trained(images, per_image=5, dimension=48, seed=0, shuffled=False):
    """Unit vectors whose retrieval is neither perfect nor chance."""
    rng = np.random.default_rng(seed)
    caption_image = np.repeat(np.arange(images), per_image)
    if shuffled:
        rng.shuffle(caption_image)
    left = rng.standard_normal((images, dimension)).astype(np.float32)
    right = left[caption_image] * 0.6 + rng.standard_normal((len(caption_image), dimension)).astype(np.float32)
    return [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right)], caption_image


# 64 groups set the first cutoffs, 1024 lines are a block of the default: below, between and above.
@pytest.mark.parametrize("images", [12, 60, 260])
@pytest.mark.parametrize("lines", [40, 130, 1024])
@pytest.mark.parametrize("shuffled", [False, True])
def test_exact_on_the_scores_that_pass_by(monkeypatch, images, lines, shuffled):
    monkeypatch.setattr(streaming, "_MOST_LINES", lines)
    monkeypatch.setattr(streaming, "_SCORES_AT_ONCE", 2**13)
    (left, right), caption_image = trained(images, seed=images, shuffled=shuffled)
    similarity = np.concatenate([block.copy() for _, block in streaming._blocks([right], [left])]).T
    np.testing.assert_allclose(similarity, similarity_matrix(left, right), atol=1e-6)
    ours = streaming.ranks([(left, right)], caption_image, 10)
    for one, other in zip(ours, (*recall.ranks(similarity, caption_image), rerank.i2t(similarity, 10)), strict=True):
        np.testing.assert_array_equal(one, other)
    across = np.concatenate([block.copy() for _, block in streaming._blocks([left], [right])])
    np.testing.assert_array_equal(streaming.t2i([(left, right)], 10), rerank.t2i(across, 10))


def test_own_scores_that_another_blas_rounds_otherwise(monkeypatch):
    """The first guess at the own scores decides nothing: a pass that saw others is done again with those."""
    (left, right), caption_image = trained(40)
    wanted = streaming.ranks([(left, right)], caption_image, 15)
    guess = streaming._own_scores
    passes = []
    blocks = streaming._blocks
    monkeypatch.setattr(streaming, "_own_scores", lambda *sides: np.nextafter(guess(*sides), np.float32(2)))
    monkeypatch.setattr(streaming, "_blocks", lambda *sides: passes.append(sides) or blocks(*sides))
    for one, other in zip(streaming.ranks([(left, right)], caption_image, 15), wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(passes) == 2


def test_half_precision_is_multiplied_in_single(tmp_path):
    (left, right), caption_image = trained(50)
    half = left.astype(np.float16), right.astype(np.float16)
    single = tuple(side.astype(np.float32) for side in half)
    assert streaming.evaluate([half], caption_image=caption_image) == streaming.evaluate(
        [single], caption_image=caption_image
    )


def test_memory_does_not_grow_with_the_matrix(monkeypatch):
    monkeypatch.setattr(streaming, "_MOST_LINES", 1024)
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 2**16)
    monkeypatch.setattr(streaming, "_SCORES_AT_ONCE", 2**13)
    (left, right), caption_image = trained(400, dimension=16)
    models = [(left, right)]
    tracemalloc.start()
    try:
        streaming.evaluate(models, caption_image=caption_image, k1_i2t=15)
        streaming.evaluate(models, caption_image=caption_image, k1_t2i=5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(left) * len(right) * 4 / 2, f"{peak} bytes for a matrix of {len(left) * len(right) * 4}"


def sides(images, captions, dimension=4):
    return np.ones((images, dimension), np.float32), np.ones((captions, dimension), np.float32)


NAN = np.array([[0, 0], [0, np.nan]], np.float32)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([sides(4, 8)], {"folds": 3}, "4 images cannot be cut into 3 equal folds"),
        ([sides(4, 8)], {"k1_i2t": 9}, "9 candidates were asked for and there are 8 captions; choose 1 to 8"),
        ([sides(4, 8)], {"k1_t2i": 5}, "5 candidates were asked for and there are 4 images"),
        ([sides(4, 8)], {"folds": 2, "k1_i2t": 5}, "there are 4 captions in one of 2 folds; choose 1 to 4"),
        ([sides(4, 8)], {"caption_image": np.zeros(8, int)}, "3 of 4 images have no caption"),
        ([sides(4, 7)], {}, "one image index for each of 7 captions"),
        ([sides(4, 8), sides(4, 7)], {}, r"as many of each model; found \[\(4, 7\), \(4, 8\)\]"),
        ([], {}, "as many of each model"),
        ([sides(0, 0)], {}, "needs images and captions"),
        ([(sides(4, 8)[0], sides(4, 8, 5)[1])], {}, "4 dimensions and captions in 5"),
        ([(NAN, NAN)], {}, "embedding of image 1 holds NaN"),
        ([(NAN[:1], NAN)], {}, "embedding of caption 1 holds NaN"),
        ([(NAN[:1] + 1e30, NAN[:1])], {}, "too large to multiply"),
    ],
)
def test_refused_before_anything_is_multiplied(monkeypatch, models, options, message):
    monkeypatch.setattr(streaming, "_product", None)
    with pytest.raises(DualmatchError, match=message):
        streaming.evaluate(models, **{"caption_image": np.arange(8) // 2, **options})


@pytest.mark.parametrize("k", [0, 9])
def test_impossible_candidates(k):
    for way in (streaming.i2t, streaming.t2i, lambda models, k: streaming.t2i_through_neighbours(models, 2, k)):
        with pytest.raises(DualmatchError, match=f"{k} candidates were asked for"):
            way([sides(4, 8)], k)
