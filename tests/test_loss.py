"""Matching losses against the authors' formula, loops, and torch's cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from dualmatch.training.loss import hinge_loss, infonce_loss, matching_loss
from dualmatch.training.recipe import LossOptions

OWNER = torch.tensor([0, 0, 1, 2, 2, 2, 3])


def scores(rows, columns, seed=0, *, tied=False):
    drawn = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return drawn.mul(5).round().div(5) if tied else drawn


def authors_loss(similarity, margin, *, hardest):
    """reference/official-code.md, section 6, line by line."""
    diagonal = similarity.diagonal()
    cost_s = (margin + similarity - diagonal[:, None]).clamp(min=0)
    cost_im = (margin + similarity - diagonal[None, :]).clamp(min=0)
    cost_s = cost_s - torch.diag(cost_s.diagonal())
    cost_im = cost_im - torch.diag(cost_im.diagonal())
    if hardest:
        return cost_s.max(dim=1).values.sum() + cost_im.max(dim=0).values.sum()
    return cost_s.sum() + cost_im.sum()


def loop_hinge(similarity, owner, margin, *, hardest, same=()):
    """Every caption with its image is a pair; `same` are (row, row) of the same image."""
    total = 0.0
    for caption, image in enumerate(owner):
        positive = similarity[image, caption]
        to_captions = [
            max(0, margin + similarity[image, c] - positive)
            for c in range(len(owner))
            if owner[c] != image and (image, owner[c]) not in same
        ]
        to_images = [
            max(0, margin + similarity[i, caption] - positive)
            for i in range(len(similarity))
            if i != image and (i, image) not in same
        ]
        reduce = (lambda costs: max(costs, default=0)) if hardest else sum
        total += reduce(to_captions) + reduce(to_images)
    return total


def loop_infonce(similarity, owner, temperature, *, same=()):
    total = 0.0
    for caption, image in enumerate(owner):
        positive = similarity[image, caption] / temperature
        captions = [
            similarity[image, c] / temperature
            for c in range(len(owner))
            if c == caption or (owner[c] != image and (image, owner[c]) not in same)
        ]
        images = [similarity[i, caption] / temperature for i in range(len(similarity)) if (i, image) not in same]
        for others in (captions, images):
            total += math.log(sum(math.exp(other - positive) for other in others))
    return total / len(owner) / 2


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_hinge_is_the_authors(hardest, tied, seed):
    similarity = scores(6, 6, seed, tied=tied).requires_grad_()
    ours, theirs = hinge_loss(similarity, hardest=hardest), authors_loss(similarity, 0.2, hardest=hardest)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    if not tied:  # at a tie every one of the hardest negatives is a valid subgradient
        (mine,), (reference,) = torch.autograd.grad(ours, similarity), torch.autograd.grad(theirs, similarity)
        torch.testing.assert_close(mine, reference)


def test_hinge_by_hand():
    similarity = torch.tensor([[0.9, 0.8], [0.1, 0.5]])
    # row 0: 0.2 + 0.8 - 0.9 = 0.1; row 1: 0; column 0: 0; column 1: 0.2 + 0.8 - 0.5 = 0.5
    assert hinge_loss(similarity).item() == pytest.approx(0.6)
    assert hinge_loss(similarity, margin=0.0).item() == pytest.approx(0.3)


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_hinge_with_several_captions(hardest, tied):
    similarity = scores(4, 7, seed=3, tied=tied)
    ours = hinge_loss(similarity, OWNER, hardest=hardest).item()
    assert ours == pytest.approx(loop_hinge(similarity.numpy(), OWNER.tolist(), 0.2, hardest=hardest))


def test_infonce_square_is_cross_entropy_both_ways():
    similarity, target = scores(6, 6), torch.arange(6)
    expected = (F.cross_entropy(similarity / 0.1, target) + F.cross_entropy(similarity.T / 0.1, target)) / 2
    torch.testing.assert_close(infonce_loss(similarity, temperature=0.1), expected)


def test_infonce_with_several_captions():
    similarity = scores(4, 7, seed=4)
    ours = infonce_loss(similarity, OWNER, temperature=0.3).item()
    assert ours == pytest.approx(loop_infonce(similarity.numpy(), OWNER.tolist(), 0.3))


@pytest.mark.parametrize("kind", ["hinge", "infonce"])
def test_rows_and_captions_may_come_in_any_order(kind):
    options, similarity = LossOptions(kind=kind, temperature=0.2), scores(4, 7, seed=5)
    captions, ids = torch.randperm(7, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    before = matching_loss(similarity, OWNER, ids, options, epoch=0)
    after = matching_loss(similarity[:, captions], OWNER[captions], ids, options, epoch=0)
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("kind", ["hinge", "infonce"])
@pytest.mark.parametrize("hardest", [True, False])
def test_captions_of_the_same_image_are_no_negatives(kind, hardest):
    ids, owner, similarity = torch.tensor([7, 8, 7]), torch.arange(3), scores(3, 3, seed=6)
    similarity[0, 2] = similarity[2, 0] = 0.99  # would be the hardest negatives
    same = {(0, 2), (2, 0)}
    masked = LossOptions(kind=kind, hardest=hardest, temperature=0.2)
    counted = LossOptions(kind=kind, hardest=hardest, temperature=0.2, mask_same_image=False)

    def by_loop(same):
        if kind == "hinge":
            return loop_hinge(similarity.numpy(), owner.tolist(), 0.2, hardest=hardest, same=same)
        return loop_infonce(similarity.numpy(), owner.tolist(), 0.2, same=same)

    assert matching_loss(similarity, owner, ids, masked, epoch=0).item() == pytest.approx(by_loop(same))
    assert matching_loss(similarity, owner, ids, counted, epoch=0).item() == pytest.approx(by_loop(()))
    assert by_loop(same) < by_loop(())


@pytest.mark.parametrize("kind", ["hinge", "infonce"])
def test_a_batch_of_one_image_has_no_loss_and_no_gradient(kind):
    similarity = scores(2, 2).requires_grad_()
    loss = matching_loss(similarity, torch.arange(2), torch.tensor([4, 4]), LossOptions(kind=kind), epoch=0)
    loss.backward()
    assert loss.item() == 0
    assert not similarity.grad.any()  # NaN would count as something


@pytest.mark.parametrize("kind", ["hinge", "infonce"])
@pytest.mark.parametrize("hardest", [True, False])
def test_gradients(kind, hardest):
    options, ids = LossOptions(kind=kind, hardest=hardest, temperature=0.2), torch.tensor([5, 6, 5, 9])
    similarity = scores(4, 7, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: matching_loss(s, OWNER, ids, options, epoch=0), similarity)


def test_warm_up_is_infonce_and_then_hinge():
    similarity, ids = scores(4, 7, seed=9), torch.arange(4)
    options = LossOptions(kind="hinge", warmup_epochs=2, temperature=0.1)
    by_epoch = [matching_loss(similarity, OWNER, ids, options, epoch=epoch) for epoch in range(4)]
    infonce, hinge = infonce_loss(similarity, OWNER, temperature=0.1), hinge_loss(similarity, OWNER)
    assert by_epoch == [infonce, infonce, hinge, hinge]


def test_warm_up_on_the_sum_over_all_negatives():
    similarity, ids = scores(4, 7, seed=9), torch.arange(4)
    options = LossOptions(kind="hinge", warmup_epochs=1, warmup="sum")
    first, second = (matching_loss(similarity, OWNER, ids, options, epoch=epoch) for epoch in (0, 1))
    assert first == hinge_loss(similarity, OWNER, hardest=False)
    assert second == hinge_loss(similarity, OWNER) != first


def test_options_reach_the_loss():
    similarity, ids = scores(4, 7, seed=10), torch.arange(4)
    options = LossOptions(kind="hinge", margin=0.5, hardest=False)
    expected = hinge_loss(similarity, OWNER, margin=0.5, hardest=False)
    assert matching_loss(similarity, OWNER, ids, options, epoch=0) == expected
    assert expected != hinge_loss(similarity, OWNER)


def loop_top_k(similarity, owner, margin, count, same=()):
    """The mean of each pair's `count` largest costs, or of all it has."""
    total = 0.0
    for caption, image in enumerate(owner):
        positive = similarity[image, caption]
        captions = [
            similarity[image, c] for c in range(len(owner)) if owner[c] != image and (image, owner[c]) not in same
        ]
        images = [similarity[i, caption] for i in range(len(similarity)) if i != image and (i, image) not in same]
        for negatives in (captions, images):
            largest = sorted((max(0, margin + one - positive) for one in negatives), reverse=True)[:count]
            total += sum(largest) / max(1, len(largest))
    return total


@pytest.mark.parametrize("count", [2, 3, 50])
@pytest.mark.parametrize("tied", [True, False])
def test_several_hard_negatives_are_the_mean_of_the_largest_costs(count, tied):
    similarity = scores(4, 7, seed=11, tied=tied)
    ours = hinge_loss(similarity, OWNER, num_negatives=count).item()
    assert ours == pytest.approx(loop_top_k(similarity.numpy(), OWNER.tolist(), 0.2, count))


def test_several_hard_negatives_leave_out_the_same_image_and_reach_the_loss():
    similarity, ids = scores(4, 7, seed=12), torch.tensor([5, 6, 5, 9])
    options = LossOptions(kind="hinge", num_negatives=2, warmup_epochs=1, warmup="sum")
    ours = [matching_loss(similarity, OWNER, ids, options, epoch=epoch).item() for epoch in (0, 1)]
    same = {(0, 2), (2, 0)}
    assert ours[0] == pytest.approx(loop_hinge(similarity.numpy(), OWNER.tolist(), 0.2, hardest=False, same=same))
    assert ours[1] == pytest.approx(loop_top_k(similarity.numpy(), OWNER.tolist(), 0.2, 2, same))


def test_one_of_several_hard_negatives_is_the_hardest_bit_for_bit():
    similarity = scores(4, 7, seed=13)
    assert hinge_loss(similarity, OWNER, num_negatives=1) == hinge_loss(similarity, OWNER)
    drawn = similarity.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: hinge_loss(s, OWNER, num_negatives=3), drawn)
