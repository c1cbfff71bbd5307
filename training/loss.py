"""Matching losses over a batch. Shape suffixes: I images, M captions; scores_IM has images in rows and captions in columns.

Caption m belongs to image owner_M[m]; where every image has one caption and owner is 0, 1, 2, … these are the losses of the papers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .recipe import LossOptions


def hinge_loss(
    scores_IM: Tensor,
    owner_M: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    num_negatives: int = 1,
    excluded_IM: Tensor | None = None,
) -> Tensor:
    """Triplet ranking loss (DSRAN eq 21; VSE++), summed over all pairs and both directions, as the authors' code does.

    Args:
        scores_IM: similarities.
        owner_M: for each caption its image's row; None for the diagonal.
        hardest: only the hardest negative of each pair and direction counts.
        num_negatives: or the mean cost of so many of the hardest, or of all where there are fewer (average top-k; Fan et al., 2017).
        excluded_IM: true where an image and a caption of another row are no negatives of each other.
    """
    owner_M = _owner(scores_IM, owner_M)
    no_negative_IM = owner_M[None, :] == torch.arange(len(scores_IM), device=scores_IM.device)[:, None]
    if excluded_IM is not None:
        no_negative_IM = no_negative_IM | excluded_IM
    positives_M = scores_IM[owner_M, torch.arange(len(owner_M), device=scores_IM.device)]
    cost_images_IM = (margin + scores_IM - positives_M[None, :]).clamp(min=0).masked_fill(no_negative_IM, 0)
    cost_captions_MM = (
        (margin + scores_IM[owner_M] - positives_M[:, None]).clamp(min=0).masked_fill(no_negative_IM[owner_M], 0)
    )
    if hardest and num_negatives > 1:
        return (
            _mean_of_largest(cost_captions_MM, ~no_negative_IM[owner_M], num_negatives).sum()
            + _mean_of_largest(cost_images_IM.T, ~no_negative_IM.T, num_negatives).sum()
        )
    if hardest:
        return cost_captions_MM.amax(dim=1).sum() + cost_images_IM.amax(dim=0).sum()
    return cost_captions_MM.sum() + cost_images_IM.sum()


def infonce_loss(
    scores_IM: Tensor, owner_M: Tensor | None = None, *, temperature: float, excluded_IM: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy of each pair against the batch (van den Oord et al., 2018; CLIP), mean over pairs.

    An image with several captions is classified once for each of them, its other captions left out of the sum.
    """
    owner_M = _owner(scores_IM, owner_M)
    logits_IM = scores_IM / temperature
    if excluded_IM is not None:
        logits_IM = logits_IM.masked_fill(excluded_IM, float("-inf"))
    own_IM = owner_M[None, :] == torch.arange(len(scores_IM), device=scores_IM.device)[:, None]
    positives_M = logits_IM[owner_M, torch.arange(len(owner_M), device=scores_IM.device)]
    negatives_I = logits_IM.masked_fill(own_IM, float("-inf")).logsumexp(dim=1)
    to_text = torch.logaddexp(positives_M, negatives_I[owner_M]) - positives_M
    return (to_text.mean() + F.cross_entropy(logits_IM.T, owner_M)) / 2


def matching_loss(
    scores_IM: Tensor, owner_M: Tensor, image_ids_I: Tensor, options: LossOptions, *, epoch: int
) -> Tensor:
    """The recipe's loss; `image_ids_I` tells which rows are the same image, `epoch` counts from 0."""
    excluded_IM = None
    if options.mask_same_image:
        rows_I = torch.arange(len(image_ids_I), device=scores_IM.device)
        excluded_IM = (image_ids_I[:, None] == image_ids_I[owner_M][None, :]) & (rows_I[:, None] != owner_M[None, :])
    warming_up = epoch < options.warmup_epochs
    if options.kind == "infonce" or (warming_up and options.warmup == "infonce"):
        return infonce_loss(scores_IM, owner_M, temperature=options.temperature, excluded_IM=excluded_IM)
    hardest = options.hardest and not warming_up
    return hinge_loss(
        scores_IM,
        owner_M,
        margin=options.margin,
        hardest=hardest,
        num_negatives=options.num_negatives,
        excluded_IM=excluded_IM,
    )


def _mean_of_largest(costs_MN: Tensor, is_negative_MN: Tensor, count: int) -> Tensor:
    """Mean (M,) of the largest costs of each row, of at most as many as it has negatives; what is no negative costs 0."""
    largest_MK = costs_MN.topk(min(count, costs_MN.shape[1]), dim=1).values
    return largest_MK.sum(dim=1) / is_negative_MN.sum(dim=1).clamp(1, count)


def _owner(scores_IM: Tensor, owner_M: Tensor | None) -> Tensor:
    if owner_M is not None:
        return owner_M
    assert scores_IM.shape[0] == scores_IM.shape[1]
    return torch.arange(len(scores_IM), device=scores_IM.device)
