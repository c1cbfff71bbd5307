"""Gradients of a batch's loss: at once, or in parts that together give the whole batch's (GradCache; Gao et al., 2021)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import Group
from .loss import matching_loss
from .objective import Batch, Objective, part_of
from .recipe import LossOptions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Losses:
    """A whole batch's losses as numbers, and the similarities (I, M) that the matching loss was computed from."""

    matching: float
    captioning: float
    scores_IM: Tensor

    @property
    def total(self) -> float:
        """What is minimised."""
        return self.matching + self.captioning


class Differentiator:
    """Computes gradients of a loss over the batch of all processes.

    Args:
        scaler: scales the loss where gradients are float16; it is for the caller to take the scale off again.
        accumulate: into how many parts a process divides the images of its share; the network holds one part's activations at a time.
            Embeddings are computed twice, first without gradients, so that the loss is the whole batch's; BatchNorm sees a part at a time.
        precision: `fp32`, or what autocast computes the network in; embeddings and loss are float32 always.
    """

    def __init__(
        self,
        objective: Objective,
        group: Group,
        options: LossOptions,
        *,
        scaler: torch.amp.GradScaler,
        accumulate: int = 1,
        precision: str = "fp32",
    ) -> None:
        self.objective, self.group, self.options, self.scaler = objective, group, options, scaler
        self.accumulate = accumulate
        self.device = next(objective.parameters()).device
        self.dtype = DTYPES.get(precision)
        self.wrapped: nn.Module = DistributedDataParallel(objective) if group.size > 1 else objective

    def gradients(self, batch: Batch, owner_M: Tensor, image_ids_I: Tensor, *, epoch: int) -> Losses:
        """Add the gradients of the batch's loss to the parameters'; nothing is added where the loss is not finite.

        Args:
            batch: this process's share, on the device.
            owner_M, image_ids_I: of the whole batch, on the device.
        """
        # From the smallest share: processes that divided theirs into other numbers of parts would wait for one another for ever.
        num_parts = max(1, min(self.accumulate, len(image_ids_I) // self.group.size // 2))
        if num_parts == 1:
            images_ID, captions_MD, caption_loss = self._forward(self.wrapped, batch)
            shared = caption_loss * (len(captions_MD) / len(owner_M))
            matching, scores_IM = self._matching(images_ID, captions_MD, owner_M, image_ids_I, epoch)
            losses = self._losses(matching, shared, scores_IM)
            if _is_finite(losses.total):
                self._scaled(matching + shared).backward()  # type: ignore[no-untyped-call]
            return losses
        bounds = [part_of(len(batch.image_ids_I), index, num_parts) for index in range(num_parts)]
        parts = [batch.rows(first, last) for first, last in bounds]
        states, embedded = [], []
        with torch.no_grad(), _statistics_kept(self.objective):
            for part in parts:
                states.append(rng_state(self.device))
                embedded.append(self._forward(self.objective, part))
        images_ID = torch.cat([images for images, _, _ in embedded]).requires_grad_()
        captions_MD = torch.cat([captions for _, captions, _ in embedded]).requires_grad_()
        weights = [len(captions) / len(owner_M) for _, captions, _ in embedded]
        shared = sum((one * weight for (_, _, one), weight in zip(embedded, weights, strict=True)), torch.zeros(()))
        matching, scores_IM = self._matching(images_ID, captions_MD, owner_M, image_ids_I, epoch)
        losses = self._losses(matching, shared, scores_IM)
        if not _is_finite(losses.total):
            return losses
        self._scaled(matching).backward()  # type: ignore[no-untyped-call]
        assert images_ID.grad is not None
        assert captions_MD.grad is not None
        image_gradients = torch.split(images_ID.grad, [last - first for first, last in bounds])
        caption_gradients = torch.split(captions_MD.grad, [len(captions) for _, captions, _ in embedded])
        for index, part in enumerate(parts):
            set_rng_state(states[index], self.device)  # the same dropout as when the loss was computed
            waits = isinstance(self.wrapped, DistributedDataParallel) and index < num_parts - 1
            with self.wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]
                images, captions, caption_loss = self._forward(self.wrapped, part)
                outputs, gradients = [images, captions], [image_gradients[index], caption_gradients[index]]
                if caption_loss.requires_grad:
                    outputs.append(self._scaled(caption_loss * weights[index]))
                    gradients.append(torch.ones_like(outputs[-1]))
                torch.autograd.backward(outputs, gradients)
        return losses

    def _forward(self, network: nn.Module, part: Batch) -> tuple[Tensor, Tensor, Tensor]:
        # A context for each call: autocast keeps the weights that it has cast, also those cast where no gradient was wanted.
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            images_ID, captions_MD, caption_loss = network(part)
        return images_ID, captions_MD, caption_loss

    def _matching(
        self, images_ID: Tensor, captions_MD: Tensor, owner_M: Tensor, image_ids_I: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """The matching loss of all processes' rows, and its scores."""
        starts = [part_of(len(image_ids_I), rank, self.group.size)[0] for rank in range(self.group.size)]
        firsts = torch.searchsorted(owner_M, torch.tensor(starts, device=owner_M.device)).tolist()
        everyone_ID = self.group.gather(images_ID, [*starts, len(image_ids_I)])
        everyone_MD = self.group.gather(captions_MD, [*firsts, len(owner_M)])
        scores_IM = everyone_ID @ everyone_MD.T
        return matching_loss(scores_IM, owner_M, image_ids_I, self.options, epoch=epoch), scores_IM.detach()

    def _scaled(self, loss: Tensor) -> Tensor:
        # DistributedDataParallel takes the mean of the processes' gradients where we need the sum.
        scaled: Tensor = self.scaler.scale(loss * self.group.size)
        return scaled

    def _losses(self, matching: Tensor, shared: Tensor, scores_IM: Tensor) -> Losses:
        captioning = 0.0 if self.objective.captioner is None else sum(self.group.collect(shared.item()))
        return Losses(matching=matching.item(), captioning=captioning, scores_IM=scores_IM)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators that this device draws from, by name."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Continue from `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:  # an epoch that was begun on a CPU goes on with the GPU's own
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def _statistics_kept(objective: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics afterwards as before: what is computed twice must not count twice."""
    norms = [part for part in objective.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    before = [[(buffer, buffer.clone()) for buffer in norm.buffers()] for norm in norms if norm.training]
    try:
        yield
    finally:
        for buffers in before:
            for buffer, value in buffers:
                buffer.copy_(value)


def _is_finite(value: float) -> bool:
    return value - value == 0
