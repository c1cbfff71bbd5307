"""What survived, measured and ruled on: embeddings before and after, from equal to shuffled."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dualmatch.runtime import parity
from dualmatch.runtime.bootstrap import bound, images_needed
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.parity import TOLERANCES, Tolerances, compare, decide

from .demo_fixture import edit_manifest, seal

FP16, FP32 = TOLERANCES["fp16"], TOLERANCES["fp32"]
LOOSE = Tolerances(rsum_loss=0.5, worst_cosine=-1.0)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pairs(images=250, counts=None, noise=1.1, seed=0, dimension=16):
    """(images, captions), caption_image: captions near their image, near enough to others for ranks to vary."""
    chance = np.random.default_rng(seed)
    owner = np.repeat(np.arange(images), 2 if counts is None else counts)
    image = unit(chance.normal(size=(images, dimension)))
    caption = unit(image[owner] + noise * unit(chance.normal(size=(len(owner), dimension))))
    return (image, caption), owner


def jittered(embeddings, amount, seed=1):
    chance = np.random.default_rng(seed)
    return tuple(unit(one + amount * chance.normal(size=one.shape)) for one in embeddings)


def rank(scores, target):
    """0-based, by hand: how many score higher, or the same with a smaller index."""
    return sum(s > scores[target] or (s == scores[target] and i < target) for i, s in enumerate(scores))


def test_nothing_changed():
    before, owner = pairs(images=700)
    found = compare(before, before, owner, split="test")
    assert (found.rsum_loss, found.largest_difference) == (0, 0)
    assert found.bound == pytest.approx(300 / 700)  # that nothing flipped does not promise that nothing ever will
    assert (found.hits_lost, found.hits_won, found.flips) == (0, 0, ())
    assert (found.same_first, found.overlap_at_10) == (100, 100)
    assert found.worst_cosine == pytest.approx(1)
    assert found.before == found.after
    assert found.before.protocol.split == "test"
    assert 100 < found.before.rsum < 590, "the pairs are too easy or too hard to test anything"
    for tolerances in (FP16, FP32):
        assert decide(found, tolerances).verdict == "pass"


def test_a_small_change_passes_and_says_the_smallest_tolerance():
    before, owner = pairs(images=900, noise=0.3)
    found = compare(before, jittered(before, 1e-4), owner)
    decision = decide(found, FP16)
    assert decision.verdict == "pass"
    assert decision.reason.endswith(f"the smallest tolerance that would have passed is {decision.smallest.rsum_loss}")
    assert 0 <= decision.smallest.rsum_loss - found.bound < 0.01


@pytest.mark.parametrize("component", [None, 1e-9, 1.0])
@pytest.mark.parametrize("amount", [0.0, 1e-6, 1e-3, 0.1, 1.0])
def test_the_smallest_tolerances_always_pass_and_tighter_ones_never_do(amount, component):
    before, owner = pairs(images=60)
    found = compare(before, jittered(before, amount), owner)
    given = Tolerances(rsum_loss=0.3, worst_cosine=0.9, component=component)
    smallest = decide(found, given).smallest
    assert (smallest.component is None) == (component is None)
    assert decide(found, smallest).verdict == "pass"
    if smallest.worst_cosine < 0.99999:
        assert decide(found, replace(smallest, worst_cosine=smallest.worst_cosine + 2e-6)).verdict == "fail"
    if component is None:
        assert decide(found, replace(smallest, rsum_loss=smallest.rsum_loss - 0.02)).verdict != "pass"
    elif amount:
        assert decide(found, replace(smallest, component=smallest.component * 0.97)).verdict == "fail"


@pytest.mark.parametrize("side", [0, 1])
def test_a_shuffled_side_fails_on_recall(side):
    before, owner = pairs()
    after = list(before)
    after[side] = np.roll(before[side], 7, axis=0)
    found = compare(before, tuple(after), owner)
    assert found.rsum_loss > 100
    assert found.hits_lost > found.hits_won
    decision = decide(found, LOOSE)
    assert decision.verdict == "fail"
    would_pass = float(decision.reason.rsplit("tolerance of ", 1)[1].split()[0])
    assert decide(found, Tolerances(rsum_loss=would_pass, worst_cosine=-1.0)).verdict == "pass"
    assert decide(found, Tolerances(rsum_loss=would_pass - 0.02, worst_cosine=-1.0)).verdict != "pass"


def test_a_common_rotation_keeps_retrieval_but_not_the_cosine():
    """Both sides turned alike rank as before; mixed with galleries of the original they would not, so the floor refuses them."""
    before, owner = pairs()
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(16, 16)))
    after = tuple((one @ turn).astype(np.float32) for one in before)
    found = compare(before, after, owner)
    assert abs(found.rsum_loss) < 0.5
    decision = decide(found, FP16)
    assert decision.verdict == "fail"
    assert "worst cosine" in decision.reason
    floor = float(decision.reason.rsplit("a floor of ", 1)[1].split()[0])
    assert "worst cosine" not in decide(found, Tolerances(rsum_loss=0.5, worst_cosine=floor)).reason


def test_one_turned_embedding_among_many_is_found():
    before, owner = pairs()
    images = before[0].copy()
    images[17] = -images[17]
    found = compare(before, (images, before[1]), owner)
    assert found.image_cosine[0] == pytest.approx(-1)
    assert found.image_cosine[2] == pytest.approx(1)
    assert found.caption_cosine[0] == pytest.approx(1)
    assert decide(found, FP16).verdict == "fail"


def test_float32_is_decided_by_components_on_any_number_of_pairs():
    before, owner = pairs(images=3)
    assert decide(compare(before, before, owner), FP32).verdict == "pass"
    changed = before[0].copy()
    changed[1, 4] += 2e-5
    found = compare(before, (changed, before[1]), owner)
    assert found.largest_difference == pytest.approx(2e-5, rel=0.01)
    decision = decide(found, FP32)
    assert decision.verdict == "fail"
    would_pass = float(decision.reason.rsplit("a tolerance of ", 1)[1].split()[0])
    again = Tolerances(rsum_loss=0.1, worst_cosine=0.999, component=would_pass)
    assert decide(found, again).verdict == "pass"


@pytest.mark.parametrize(("images", "verdict"), [(590, "too few pairs"), (600, "pass")])
def test_without_a_single_flip_the_rule_of_three_decides(images, verdict):
    """None of n was lost: with 95 % confidence fewer than 3 in n are, each worth 100 points of its image."""
    before, owner = pairs(images=images)
    decision = decide(compare(before, before, owner), FP16)
    assert decision.verdict == verdict
    if verdict == "too few pairs":
        assert decision.pairs_needed == pytest.approx(600, rel=0.05)
        assert f"about {decision.pairs_needed} images with captions are needed" in decision.reason


def test_a_loss_that_cannot_be_told_from_the_tolerance_asks_for_more_pairs():
    before, owner = pairs(noise=1.2)
    for amount in np.linspace(0.005, 0.1, 40):
        found = compare(before, jittered(before, amount), owner)
        if found.rsum_loss <= LOOSE.rsum_loss < found.bound:
            break
    decision = decide(found, LOOSE)
    assert decision.verdict == "too few pairs"
    assert decision.pairs_needed is not None
    assert decision.pairs_needed > 250
    assert str(decision.pairs_needed) in decision.reason
    wide = Tolerances(rsum_loss=math.ceil(found.bound * 100) / 100, worst_cosine=-1.0)
    assert decide(found, wide).verdict == "pass"


def test_the_bound_is_the_same_every_time():
    before, owner = pairs()
    after = jittered(before, 0.05)
    first, second = (compare(before, after, owner) for _ in range(2))
    assert first == second
    assert first.bound > first.rsum_loss


def test_the_bound_covers_the_loss_and_grows_with_the_damage():
    before, owner = pairs()
    found = [compare(before, jittered(before, amount), owner) for amount in (0.0, 0.05, 0.2, 0.8)]
    bounds = [one.bound for one in found]
    assert bounds == sorted(bounds)
    assert all(one.bound >= one.rsum_loss for one in found)


def test_the_bound_narrows_with_more_images():
    spreads = []
    for images in (50, 800):
        before, owner = pairs(images=images, noise=1.5)
        found = compare(before, jittered(before, 0.1), owner)
        spreads.append(found.bound - found.rsum_loss)
    assert spreads[1] < spreads[0] / 2


def test_the_bound_is_a_paired_bootstrap_over_images():
    """Against another way of counting it: resampled lists of queries, with unequal numbers of captions."""
    chance = np.random.default_rng(5)
    counts = chance.integers(1, 6, size=60)
    before, owner = pairs(images=60, counts=counts)
    after = jittered(before, 0.15)
    found = compare(before, after, owner)

    lost = []
    for images, captions in (before, after):
        scores = images @ captions.T
        i2t = np.array([min(rank(scores[i], c) for c in np.flatnonzero(owner == i)) for i in range(60)])
        t2i = np.array([rank(scores[:, c], owner[c]) for c in range(len(owner))])
        lost.append((i2t, t2i))
    (i2t_before, t2i_before), (i2t_after, t2i_after) = lost

    def rsum(i2t, t2i):
        return sum(100 * np.mean(ranks < k) for ranks in (i2t, t2i) for k in (1, 5, 10))

    assert found.rsum_loss == pytest.approx(rsum(i2t_before, t2i_before) - rsum(i2t_after, t2i_after))
    losses = []
    for _ in range(1500):
        images = chance.integers(0, 60, size=60)
        captions = np.concatenate([np.flatnonzero(owner == i) for i in images])
        losses.append(rsum(i2t_before[images], t2i_before[captions]) - rsum(i2t_after[images], t2i_after[captions]))
    spread = np.quantile(losses, 0.95) - found.rsum_loss
    assert found.bound - found.rsum_loss == pytest.approx(spread, rel=0.15)


def test_flips_have_the_ranks_of_before_and_after():
    before, owner = pairs(images=40, noise=0.9)
    after = jittered(before, 0.2)
    found = compare(before, after, owner)
    assert found.flips
    matrices = [images @ captions.T for images, captions in (before, after)]
    lost = won = 0
    expected = set()
    for direction, queries in (("i2t", 40), ("t2i", len(owner))):
        for query in range(queries):
            if direction == "i2t":
                old, new = (min(rank(m[query], c) for c in np.flatnonzero(owner == query)) for m in matrices)
            else:
                old, new = (rank(m[:, query], owner[query]) for m in matrices)
            lost += sum(old < k <= new for k in (1, 5, 10))
            won += sum(new < k <= old for k in (1, 5, 10))
            if any((old < k) != (new < k) for k in (1, 5, 10)):
                expected.add((direction, query, old, new))
    assert {(f.direction, f.query, f.rank_before, f.rank_after) for f in found.flips} == expected
    for flip in found.flips:
        scores = [matrix[flip.query] if flip.direction == "i2t" else matrix[:, flip.query] for matrix in matrices]
        assert [flip.first_before, flip.first_after] == [int(one.argmax()) for one in scores]
    assert (found.hits_lost, found.hits_won) == (lost, won)
    falls = [flip.rank_after - flip.rank_before for flip in found.flips]
    assert falls == sorted(falls, reverse=True)


def test_agreement_counts_both_directions():
    """Two images, two captions; after the change one image prefers the other caption."""
    before = (np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
    after = (unit(np.array([[1.0, 0.0], [1.0, 0.5]])), np.eye(2, dtype=np.float32))
    found = compare(before, after, np.array([0, 1]))
    # Images 0 and 1 now both prefer caption 0; caption 0 still prefers image 0, caption 1 still image 1.
    assert found.same_first == 75
    assert found.overlap_at_10 == 100


def test_overlap_is_of_the_first_ten():
    chance = np.random.default_rng(2)
    before, owner = pairs(images=30, counts=[1] * 30)
    after = tuple(unit(chance.normal(size=one.shape)) for one in before)
    found = compare(before, after, owner)
    shares = []
    for old, new in (
        (before[0] @ before[1].T, after[0] @ after[1].T),
        (before[1] @ before[0].T, after[1] @ after[0].T),
    ):
        shares += [len({*np.argsort(-a)[:10]} & {*np.argsort(-b)[:10]}) / 10 for a, b in zip(old, new, strict=True)]
    assert found.overlap_at_10 == pytest.approx(100 * np.mean(shares))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_refused(bad, when, side):
    good, owner = pairs(images=5)
    broken = [one.copy() for one in good]
    broken[side][2, 3] = bad
    first, second = (tuple(broken), good) if when == "before" else (good, tuple(broken))
    with pytest.raises(DualmatchError, match="NaN or infinity"):
        compare(first, second, owner)


def test_a_vector_of_zeros_is_refused():
    before, owner = pairs()
    images = before[0].copy()
    images[9] = 0
    found = compare(before, (images, before[1]), owner)
    assert found.worst_cosine == 0
    assert decide(found, FP16).verdict == "fail"


def test_other_shapes_are_refused():
    before, owner = pairs(images=5)
    with pytest.raises(DualmatchError, match="images are"):
        compare(before, (before[0][:4], before[1]), owner)
    with pytest.raises(DualmatchError, match="captions are"):
        compare(before, (before[0], before[1][:, :8]), owner)
    with pytest.raises(DualmatchError):
        compare(before, before, owner + 1)


def test_a_comparison_becomes_json():
    import json

    before, owner = pairs(images=60, noise=1.0)
    found = compare(before, jittered(before, 0.5), owner)
    assert len(found.flips) > 20
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["flips"] == len(found.flips)
    assert values["before"]["rsum"] == found.before.rsum
    assert values["bound"] == found.bound


# The statistics, on losses whose truth is known.


def lost_points(chance, images, lost, won, *, captions=5):
    """Points that each image lost: every query loses and wins a hit with these probabilities; the expected loss of Rsum beside them."""

    def net(queries):
        return chance.binomial(queries, lost, images) - chance.binomial(queries, won, images)

    return 100.0 * net(1) + 100.0 * net(captions) / captions, 200 * (lost - won)


@pytest.mark.parametrize("images", [150])
@pytest.mark.parametrize(("lost", "won"), [(0.002, 0.0), (0.005, 0.004), (0.02, 0.018), (0.1, 0.1)])
def test_the_bound_covers_the_true_loss_as_often_as_it_says(lost, won, images):
    """From a hundred images that hardly ever flip to many that do; a plain bootstrap covers the first in seven of ten."""
    chance = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        points, truth = lost_points(chance, images, lost, won)
        covered += bound(points) >= truth
    assert covered / 200 >= 0.92  # 0.95, less two standard errors of 200 trials


def test_the_bound_is_not_so_wide_that_nothing_passes():
    """Where flips are common it is the normal one: 1.645 standard errors above the measured loss."""
    chance = np.random.default_rng(3)
    points, _ = lost_points(chance, 2000, 0.1, 0.1)
    standard_error = points.std() / math.sqrt(len(points))
    assert bound(points) - points.mean() == pytest.approx(1.645 * standard_error, rel=0.1)


@pytest.mark.parametrize(("lost_hits", "exact"), [(0, 3.0), (1, 4.74), (3, 7.75), (10, 16.96)])
def test_the_bound_on_rare_losses_is_near_the_exact_one(lost_hits, exact):
    """Against the upper limit of a Poisson mean of which so many were seen."""
    points = np.zeros(1000)
    points[:lost_hits] = 100.0
    assert bound(points) * 10 == pytest.approx(exact, abs=1.0)


def test_losses_are_points_of_rsum_with_unequal_numbers_of_captions():
    counts = np.random.default_rng(5).integers(1, 6, size=60)
    before, owner = pairs(images=60, counts=counts)
    found = compare(before, jittered(before, 0.3), owner)
    assert found.losses.shape == (60,)
    assert found.losses.mean() == pytest.approx(found.rsum_loss)
    assert found.rsum_loss != 0


@pytest.mark.parametrize(("lost", "won", "limit"), [(0.0, 0.0, 0.5), (0.004, 0.004, 0.5), (0.02, 0.02, 1.0)])
def test_as_many_pairs_as_were_asked_for_mostly_decide(lost, won, limit):
    """Taken over several samples of 150 images: about half of the sets of that size decide, and hardly one of a quarter of it."""
    chance = np.random.default_rng(11)
    estimates = []
    for _ in range(9):
        points, _ = lost_points(chance, 150, lost, won)
        assert bound(points) > limit
        estimates.append(images_needed(points - points.mean(), limit))
    needed = int(np.median(estimates))
    assert max(estimates) < 5 * min(estimates)

    def share_settled(images):
        return np.mean([bound(lost_points(chance, images, lost, won)[0]) <= limit for _ in range(40)])

    assert share_settled(needed) >= 0.3
    assert share_settled(2 * needed) >= 0.6
    assert share_settled(needed // 4) <= 0.2


def test_no_number_of_pairs_settles_a_loss_at_the_tolerance():
    points = np.zeros(400)
    points[:2] = 100.0
    assert points.mean() == 0.5
    assert images_needed(points, 0.5) is None
    assert images_needed(points, 1.0) is not None


@pytest.mark.parametrize(
    "given", [{"rsum_loss": -0.1}, {"rsum_loss": math.nan}, {"worst_cosine": 1.5}, {"component": -1e-5}]
)
def test_tolerances_that_mean_nothing(given):
    with pytest.raises(DualmatchError, match="must lie between"):
        Tolerances(**{"rsum_loss": 0.5, "worst_cosine": 0.9, **given})


def test_a_tolerance_of_nothing_asks_for_more_pairs_than_there_are():
    before, owner = pairs(images=20)
    decision = decide(compare(before, before, owner), Tolerances(rsum_loss=0.0, worst_cosine=-1.0))
    assert decision.verdict == "too few pairs"
    assert decision.pairs_needed is None
    assert "no number of pairs would settle it" in decision.reason


def test_the_default_tolerances_are_the_ones_that_are_promised():
    assert parity.TOLERANCES["fp16"].rsum_loss == 0.5
    assert parity.TOLERANCES["fp32"].component == 1e-5


# The suite in tests/parity, on bundles with a planted fault whose hashes were brought up to it.


SUITE = """
import os, sys, pytest
for os.environ["DUALMATCH_PARITY_BUNDLE"] in sys.argv[2:]:
    code = pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]])
    print("ENDED", int(code), flush=True)
"""


def run_suite(bundles, data):
    """The suite's exit code on each bundle and the names of the tests that failed; all in one fresh process."""
    environment = os.environ | {"DUALMATCH_PARITY_DATA": str(data)}
    command = [sys.executable, "-c", SUITE, Path(__file__).parent / "parity", *bundles]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    *reports, end = re.split(r"^ENDED (\d)\n", done.stdout, flags=re.MULTILINE)
    assert not end
    failures = [set(re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", text, flags=re.MULTILINE)) for text in reports[::2]]
    return list(zip(map(int, reports[1::2]), failures, strict=True))


def changed_weight(path, rank):
    """Turn a weight of the graph round: the largest of this rank."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    weight = max((w for w in model.graph.initializer if len(w.dims) == rank), key=lambda w: math.prod(w.dims))
    values = np.ascontiguousarray(onnx.numpy_helper.to_array(weight)[..., ::-1])
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)


def plant(bundle, fault):
    if fault == "image weight":
        changed_weight(bundle / "image_encoder.onnx", 4)
    if fault == "text weight":
        changed_weight(bundle / "text_encoder.onnx", 3)
    if fault == "tokenizer":
        values = json.loads((bundle / "tokenizer.json").read_text())
        values["normalizer"] = None
        (bundle / "tokenizer.json").write_text(json.dumps(values).replace('"a"', '"the "').replace('"ball"', '"a"'))
    if fault == "preprocessing":
        edit_manifest(bundle, lambda values: values["preprocessing"].update(mean=[0.0, 0.0, 0.0]))
    if fault == "dimension":
        edit_manifest(bundle, lambda values: values.update(embedding_dimension=17))
    if fault == "padding":
        pad_changes_the_caption(bundle / "text_encoder.onnx")
    if fault != "unsealed byte":
        seal(bundle)
    else:
        data = bytearray((bundle / "image_encoder.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / "image_encoder.onnx").write_bytes(data)


def pad_changes_the_caption(path):
    """Make padding an ordinary word: a graph that forgot its mask."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["unpadded" if name == "token_ids" else name for name in node.input]
    kept = list(graph.node)
    del graph.node[:]
    graph.initializer.append(onnx.numpy_helper.from_array(np.int64(4), "word"))
    graph.node.extend([onnx.helper.make_node("Max", ["token_ids", "word"], ["unpadded"]), *kept])
    onnx.save(model, path)


NOTICED_BY = {
    "none": set(),
    "unsealed byte": {"test_every_hash_matches", "test_retrieval_is_torchs"},
    "image weight": {"test_the_stored_samples_give_torchs_embeddings", "test_retrieval_is_torchs"},
    "text weight": {"test_the_stored_samples_give_torchs_embeddings", "test_captions_give_torchs_embeddings", "test_retrieval_is_torchs"},
    "tokenizer": {"test_captions_give_torchs_embeddings", "test_retrieval_is_torchs"},
    "preprocessing": {"test_retrieval_is_torchs"},
    "dimension": {"test_the_graph_takes_and_gives_what_the_manifest_says"},
    "padding": {"test_a_caption_alone_is_the_caption_in_a_batch"},
}  # fmt: skip


@pytest.fixture(scope="module")
def suite(small_bundle, small_run, tmp_path_factory):
    """How the suite ended for each fault."""
    folder = tmp_path_factory.mktemp("parity")
    bundles = {fault: shutil.copytree(small_bundle, folder / fault) for fault in NOTICED_BY}
    for fault, bundle in bundles.items():
        plant(bundle, fault)
    return dict(zip(bundles, run_suite(bundles.values(), small_run.data), strict=True))


@pytest.mark.parametrize("fault", NOTICED_BY)
def test_the_parity_suite_notices_a_planted_fault(fault, suite):
    (code, failed), noticed_by = suite[fault], NOTICED_BY[fault]
    assert code == (1 if noticed_by else 0)
    assert noticed_by <= failed
    if fault not in ("unsealed byte", "dimension", "padding"):
        assert failed == noticed_by
