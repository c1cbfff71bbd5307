"""Re-ranking of a few candidates, against the dense definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dualmatch.runtime import rerank
from dualmatch.runtime.errors import DualmatchError


def order(scores):
    """Best first, ties to the smaller index."""
    return sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))


def slow_i2t(similarity, k1):
    rankings_of_images = [order(column) for column in similarity.T]
    return [
        sorted(order(row)[:k1], key=lambda caption: rankings_of_images[caption].index(image))  # sorted() is stable
        for image, row in enumerate(similarity)
    ]


def slow_t2i_through_neighbours(similarity, caption_similarity, k1, k2):
    rankings_of_captions = [order(row) for row in similarity]
    result = []
    for caption, column in enumerate(similarity.T):
        neighbours = order(caption_similarity[caption])[:k2]
        result.append(
            sorted(
                order(column)[:k1],
                key=lambda image: min(rankings_of_captions[image].index(near) for near in neighbours),
            )
        )
    return result


def with_ties(images, captions, seed=0, levels=3):
    rng = np.random.default_rng(seed)
    return (np.round(rng.standard_normal((images, captions)) * levels) / levels).astype(np.float32)


ELEMENTS = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 2.0])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_equals_the_dense_definition(data):
    images, captions = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    similarity = data.draw(hnp.arrays(np.float32, (images, captions), elements=ELEMENTS))
    caption_similarity = data.draw(hnp.arrays(np.float32, (captions, captions), elements=ELEMENTS))
    k_captions, k_images = data.draw(st.integers(1, captions)), data.draw(st.integers(1, images))
    k2 = data.draw(st.integers(1, captions))
    assert rerank.i2t(similarity, k_captions).tolist() == slow_i2t(similarity, k_captions)
    assert rerank.t2i(similarity, k_images).tolist() == slow_i2t(similarity.T, k_images)
    assert rerank.t2i_through_neighbours(
        similarity, caption_similarity, k_images, k2
    ).tolist() == slow_t2i_through_neighbours(similarity, caption_similarity, k_images, k2)


# 64 columns and 512 rows are a tile, 250 a group of the candidate search: sizes on both sides of each.
@pytest.mark.parametrize("shape", [(40, 63), (40, 65), (260, 300), (513, 130), (30, 1003)])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_boundaries(shape, levels):
    similarity = with_ties(*shape, seed=shape[0], levels=levels)
    k1 = 15
    # Stable sorts of whole rows and columns: the dense definition again, fast enough for these sizes.
    ranking = np.argsort(-similarity, axis=1, kind="stable")
    positions_of_images = np.argsort(np.argsort(-similarity, axis=0, kind="stable"), axis=0, kind="stable")
    positions_of_captions = np.argsort(ranking, axis=1, kind="stable")
    for ours, candidates, positions in (
        (rerank.i2t(similarity, k1), ranking[:, :k1], positions_of_images),
        (
            rerank.t2i(similarity, k1),
            np.argsort(-similarity.T, axis=1, kind="stable")[:, :k1],
            positions_of_captions.T,
        ),
    ):
        addresses = np.take_along_axis(positions, candidates, axis=1)
        stable = np.argsort(addresses, axis=1, kind="stable")
        np.testing.assert_array_equal(ours, np.take_along_axis(candidates, stable, axis=1))


@pytest.mark.parametrize("k", [1, 249, 250, 251, 700])
def test_best_captions_with_ties_at_the_border(k):
    similarity = with_ties(20, 700, seed=k)
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rerank.best_captions(similarity, k), expected)
    np.testing.assert_array_equal(rerank.best_images(similarity.T, k), expected)


def test_addresses_are_in_the_order_of_similarity():
    similarity = with_ties(30, 60, seed=5, levels=10**6)
    candidates, addresses = rerank.i2t_addresses(similarity, 7)
    for image, (captions, places) in enumerate(zip(candidates, addresses, strict=True)):
        assert captions.tolist() == order(similarity[image])[:7]
        assert places.tolist() == [order(similarity[:, caption]).index(image) for caption in captions]


def test_equal_addresses_keep_the_order_of_similarity():
    """Every caption has one image as its favourite, so that image's addresses are all 0."""
    similarity = with_ties(20, 100, seed=6, levels=10**6)
    similarity[4] += 100
    np.testing.assert_array_equal(rerank.i2t(similarity, 50)[4], order(similarity[4])[:50])


def test_shape_and_type():
    similarity = with_ties(20, 100)
    assert rerank.i2t(similarity).shape == (20, 15)
    assert rerank.t2i(similarity).shape == (100, 15)
    assert rerank.t2i_through_neighbours(similarity, with_ties(100, 100), 4, 3).shape == (100, 4)
    assert rerank.i2t(similarity).dtype == np.int64


def test_one_neighbour_is_the_caption_itself():
    similarity = with_ties(20, 90, seed=7)
    caption_similarity = np.eye(90, dtype=np.float32)
    np.testing.assert_array_equal(
        rerank.t2i_through_neighbours(similarity, caption_similarity, 10, 1), rerank.t2i(similarity, 10)
    )


def test_layout_and_type_do_not_matter(tmp_path):
    similarity = with_ties(70, 300, seed=8, levels=4)  # quarters: exact in float16
    on_disk = np.memmap(tmp_path / "m", np.float32, "w+", shape=similarity.shape)
    on_disk[:] = similarity
    for other in (np.asfortranarray(similarity), similarity.astype(np.float16), on_disk):
        np.testing.assert_array_equal(rerank.i2t(other), rerank.i2t(similarity))
        np.testing.assert_array_equal(rerank.t2i(other), rerank.t2i(similarity))


@pytest.mark.parametrize("k1", [0, -1, 21])
def test_impossible_k1(k1):
    with pytest.raises(DualmatchError, match=f"{k1} candidates .* there are 20 captions; choose 1 to 20"):
        rerank.i2t(with_ties(30, 20), k1)
    with pytest.raises(DualmatchError, match="there are 20 images"):
        rerank.t2i(with_ties(20, 30), k1)


def test_impossible_neighbours():
    with pytest.raises(DualmatchError, match="31 candidates"):
        rerank.t2i_through_neighbours(with_ties(20, 30), with_ties(30, 30), 5, 31)
    with pytest.raises(DualmatchError, match=r"must be \(30, 30\), got \(30, 29\)"):
        rerank.t2i_through_neighbours(with_ties(20, 30), with_ties(30, 29), 5, 2)


@pytest.mark.parametrize("way", [rerank.i2t, rerank.t2i])
def test_nan_is_named_where_it_is(way):
    similarity = with_ties(70, 140)
    similarity[66, 131] = np.nan
    with pytest.raises(DualmatchError, match="row 66 and column 131 is NaN"):
        way(similarity, 5)


@pytest.mark.parametrize("wrong", [np.zeros(5, np.float32), np.zeros((0, 4), np.float32), np.zeros((3, 3), bool)])
@pytest.mark.parametrize("way", [rerank.i2t, rerank.t2i])
def test_what_is_no_matrix(way, wrong):
    with pytest.raises(DualmatchError, match="images by captions"):
        way(wrong, 1)


@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_addresses_sorted_and_counted_are_the_same(monkeypatch, levels):
    similarity = with_ties(70, 90, seed=levels, levels=levels)
    candidates, addresses = rerank.i2t_addresses(similarity, 5)
    monkeypatch.setattr(rerank, "_addresses_among_reaching", lambda *_: None)
    counted_candidates, counted = rerank.i2t_addresses(similarity, 5)
    assert (candidates == counted_candidates).all()
    assert (addresses == counted).all()


def test_addresses_are_counted_where_half_the_matrix_reaches_the_candidates(monkeypatch):
    # Caption i is image i's best, and every later image scores it as high.
    places = np.arange(70)
    similarity = np.where(places <= places[:, None], places, -1).astype(np.float32)
    called = []
    counted = rerank._counted_addresses
    monkeypatch.setattr(rerank, "_counted_addresses", lambda *given: called.append(1) or counted(*given))
    assert rerank.i2t(similarity, 1).tolist() == slow_i2t(similarity, 1)
    assert rerank.i2t_addresses(similarity, 2)[1].tolist() == [
        [order(similarity[:, caption]).index(image) for caption in order(similarity[image])[:2]] for image in places
    ]
    assert called, "the list of scores that reach a candidate's would hold half the matrix"
