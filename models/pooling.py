"""Pooling and normalisation: boxes on a feature map, means over nodes, unit vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def l2_normalise(vectors: Tensor, epsilon: float) -> Tensor:
    """Divide by the norm over the last axis, which is taken as `epsilon` where it is smaller.

    The authors add epsilon to the norm instead. In float32 the two differ only for norms under about 1e-5; but the ONNX exporter takes
    `+ 1e-12` for `+ 0` and drops it (seen with torch 2.13), and the root's gradient at a zero vector, such as padding, is not finite.
    """
    return vectors / l2_norm(vectors, epsilon)


def l2_norm(vectors: Tensor, epsilon: float) -> Tensor:
    """What `l2_normalise` divides by, (…, 1)."""
    squares = vectors.square().sum(dim=-1, keepdim=True)
    return (squares.clamp(min=epsilon**2) if epsilon else squares).sqrt()


def mean_over_nodes(nodes_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Mean over the nodes that `mask_BN` keeps (all of them where it is None), (B, D)."""
    if mask_BN is None:
        return nodes_BND.mean(dim=1)
    weights_BN1 = mask_BN.to(nodes_BND.dtype)[:, :, None]
    return (nodes_BND * weights_BN1).sum(dim=1) / weights_BN1.sum(dim=1)


def last_node(nodes_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """The last node that `mask_BN` keeps, (B, D); those kept stand first. Of a row without any it is the first."""
    last_B11 = (mask_BN.sum(dim=1) - 1).clamp(min=0)[:, None, None]
    return nodes_BND.gather(1, last_B11.expand(-1, 1, nodes_BND.shape[2])).squeeze(1)


def pyramid_boxes(levels: Sequence[int]) -> Tensor:
    """Boxes of a multi-scale pyramid, largest first: level n holds n x n boxes of side 2/(n+1) that overlap by half.

    Returns:
        (R, 4) float32: x1, y1, x2, y2 as fractions of the image's sides; rows of a level run left to right, then down.
    """
    boxes = []
    for level in levels:
        side = 2.0 / (level + 1)
        step = side / 2
        boxes += [(i * step, j * step, i * step + side, j * step + side) for j in range(level) for i in range(level)]
    return torch.tensor(boxes, dtype=torch.float32).clamp(0, 1)


def box_geometry(boxes_R4: Tensor) -> Tensor:
    """The geometry that is embedded with a region: x1, y1, x2, y2, area and width, (R, 6), all fractions of the image."""
    x1, y1, x2, y2 = boxes_R4.unbind(dim=-1)
    return torch.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1), x2 - x1], dim=-1)


def box_pooling_weights(boxes_R4: Tensor, height: int, width: int) -> Tensor:
    """Weights that average a feature map over boxes, each cell by the share of its area that lies in the box.

    Args:
        boxes_R4: x1, y1, x2, y2 as fractions of the image's sides.
        height, width: the map's cells.

    Returns:
        (R, height * width), rows sum to 1: `weights @ map.flatten(1).T` are the regions' features.
    """

    def overlap(low_R: Tensor, high_R: Tensor, cells: int) -> Tensor:
        edges = torch.arange(cells + 1, dtype=torch.float64) / cells
        start, end = edges[None, :-1], edges[None, 1:]
        return (torch.minimum(high_R[:, None], end) - torch.maximum(low_R[:, None], start)).clamp(min=0)

    # A box thinner than rounding still averages something: the cell it lies in.
    x1, y1, x2, y2 = boxes_R4.double().clamp(0, 1).unbind(dim=-1)
    x1, y1 = torch.minimum(x1, x1.new_tensor(1 - 1e-6)), torch.minimum(y1, y1.new_tensor(1 - 1e-6))
    across_RW = overlap(x1, torch.maximum(x2, x1 + 1e-6), width)
    down_RH = overlap(y1, torch.maximum(y2, y1 + 1e-6), height)
    weights = (down_RH[:, :, None] * across_RW[:, None, :]).flatten(1)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def grid_boxes(size: int) -> Tensor:
    """The cells of a size x size grid, row by row, as boxes (size * size, 4) in fractions of the image."""
    return torch.tensor(
        [(i / size, j / size, (i + 1) / size, (j + 1) / size) for j in range(size) for i in range(size)],
        dtype=torch.float32,
    )
