"""Matching losses over a batch of pairs. Shape suffix: B pairs; scores_BB has images in rows and captions in columns."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .recipe import LossOptions


def hinge_loss(
    scores_BB: Tensor, *, margin: float = 0.2, hardest: bool = True, excluded_BB: Tensor | None = None
) -> Tensor:
    """Triplet ranking loss (DSRAN eq 21; VSE++), summed over the batch and both directions, as the authors' code does.

    Args:
        scores_BB: similarities; pair i is on the diagonal.
        hardest: only the hardest negative of each row and column counts.
        excluded_BB: true where a pair off the diagonal is no negative.
    """
    positives_B1 = scores_BB.diagonal()[:, None]
    skip_BB = torch.eye(len(scores_BB), dtype=torch.bool, device=scores_BB.device)
    if excluded_BB is not None:
        skip_BB = skip_BB | excluded_BB
    cost_captions_BB = (margin + scores_BB - positives_B1).clamp(min=0).masked_fill(skip_BB, 0)
    cost_images_BB = (margin + scores_BB - positives_B1.T).clamp(min=0).masked_fill(skip_BB, 0)
    if hardest:
        return cost_captions_BB.amax(dim=1).sum() + cost_images_BB.amax(dim=0).sum()
    return cost_captions_BB.sum() + cost_images_BB.sum()


def infonce_loss(scores_BB: Tensor, *, temperature: float, excluded_BB: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy of each pair against the batch (van den Oord et al., 2018; CLIP), mean over the batch."""
    logits_BB = scores_BB / temperature
    if excluded_BB is not None:
        logits_BB = logits_BB.masked_fill(excluded_BB, float("-inf"))
    targets_B = torch.arange(len(scores_BB), device=scores_BB.device)
    return (F.cross_entropy(logits_BB, targets_B) + F.cross_entropy(logits_BB.T, targets_B)) / 2


def matching_loss(
    images_BD: Tensor, captions_BD: Tensor, image_ids_B: Tensor, options: LossOptions, *, epoch: int
) -> Tensor:
    """The recipe's loss for a batch of unit vectors; `image_ids_B` tells which pairs share an image, `epoch` counts from 0."""
    scores_BB = images_BD @ captions_BD.T
    excluded_BB = None
    if options.mask_same_image:
        excluded_BB = image_ids_B[:, None] == image_ids_B[None, :]
        excluded_BB = excluded_BB & ~torch.eye(len(excluded_BB), dtype=torch.bool, device=excluded_BB.device)
    if options.kind == "infonce" or epoch < options.warmup_epochs:
        return infonce_loss(scores_BB, temperature=options.temperature, excluded_BB=excluded_BB)
    return hinge_loss(scores_BB, margin=options.margin, hardest=options.hardest, excluded_BB=excluded_BB)
