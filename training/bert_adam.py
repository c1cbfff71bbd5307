"""The optimiser that the authors train their BERT variant with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dualmatch.runtime.configs import check_range


def warmup_linear(progress: float, warmup: float) -> float:
    """Factor on the learning rate: from 0 to 1 over the first `warmup` of training, then down to 0 at its end (progress 1)."""
    return progress / warmup if progress < warmup else max(0.0, (progress - 1) / (warmup - 1))


class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, with a clip per tensor and its own warm-up and linear decay.

    The authors' code brings it from the first PyTorch port of BERT; the paper says "Adam with a warmup rate of 0.1". Its steps count
    from 0, so that the first update has a learning rate of 0 and moves only the moments.

    Args:
        params: tensors, or groups of them.
        lr: the rate at the peak; a step decay on the group's `lr` multiplies the schedule.
        total_steps: where the schedule ends.
        warmup: share of `total_steps` over which the rate rises, in (0, 1).
        betas, epsilon: of the moments; epsilon stands outside the root.
        clip_norm: greatest norm of each tensor's gradient.

    Raises:
        DualmatchError: warmup out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        total_steps: int,
        warmup: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-6,
        clip_norm: float = 1.0,
    ) -> None:
        check_range("warmup", warmup, 1e-6, 1 - 1e-6)
        defaults = {
            "lr": lr,
            "total_steps": total_steps,
            "warmup": warmup,
            "betas": betas,
            "epsilon": epsilon,
            "clip_norm": clip_norm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; gradients are clipped in place."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        nn.utils.clip_grad_norm_(parameter, group["clip_norm"])
        gradient = parameter.grad
        assert gradient is not None
        beta_mean, beta_square = group["betas"]
        state["mean"].mul_(beta_mean).add_(gradient, alpha=1 - beta_mean)
        state["square"].mul_(beta_square).addcmul_(gradient, gradient, value=1 - beta_square)
        rate = group["lr"] * warmup_linear(state["step"] / group["total_steps"], group["warmup"])
        parameter.addcdiv_(state["mean"], state["square"].sqrt() + group["epsilon"], value=-rate)
        state["step"] += 1
