"""The authors' BERT optimiser against its formula in NumPy."""

import numpy as np
import pytest
import torch

from dualmatch.runtime.errors import DualmatchError
from dualmatch.training.bert_adam import BertAdam, warmup_linear


def test_the_rate_rises_then_falls_to_nothing():
    rates = [warmup_linear(progress, 0.2) for progress in (0, 0.1, 0.2, 0.6, 1, 1.5)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_five_updates():
    values = np.random.default_rng(0).normal(size=3)
    gradients = np.random.default_rng(1).normal(size=(5, 3)) * 3  # norms on both sides of the clip
    gradients[3] *= 0.01
    parameter = torch.tensor(values, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    optimiser = BertAdam([parameter, unused], lr=0.1, total_steps=6, warmup=0.4)
    mean, square = np.zeros(3), np.zeros(3)
    for step, gradient in enumerate(gradients):
        parameter.grad = torch.tensor(gradient)
        optimiser.step()
        clipped = gradient * min(1, 1 / np.linalg.norm(gradient))
        mean, square = 0.9 * mean + 0.1 * clipped, 0.999 * square + 0.001 * clipped**2
        progress = step / 6
        factor = progress / 0.4 if progress < 0.4 else (1 - progress) / 0.6
        values = values - 0.1 * factor * mean / (np.sqrt(square) + 1e-6)
        np.testing.assert_allclose(parameter.detach().numpy(), values, rtol=1e-5)
    assert not unused.any()


def test_the_first_update_moves_nothing():
    parameter = torch.ones(3, requires_grad=True)
    parameter.grad = torch.ones(3)
    BertAdam([parameter], lr=1.0, total_steps=10).step()
    assert parameter.tolist() == [1, 1, 1]


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_warmup_out_of_range(warmup):
    with pytest.raises(DualmatchError, match="warmup"):
        BertAdam([torch.zeros(1)], lr=1.0, total_steps=10, warmup=warmup)
