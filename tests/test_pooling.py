"""Boxes on a map against brute force, means over nodes, and unit vectors with their gradients at zero."""

import pytest
import torch

from dualmatch.models.pooling import (
    box_geometry,
    box_pooling_weights,
    grid_boxes,
    l2_normalise,
    mean_over_nodes,
    pyramid_boxes,
)


def shares_by_area(box, height, width):
    """The share of the box that lies in each cell, cell by cell."""
    x1, y1, x2, y2 = (float(value) for value in box)
    shares = torch.zeros(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            wide = min(x2, (column + 1) / width) - max(x1, column / width)
            high = min(y2, (row + 1) / height) - max(y1, row / height)
            shares[row, column] = max(wide, 0) * max(high, 0)
    return (shares / shares.sum()).flatten().float()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 7), (3, 5), (1, 1)])
def test_box_weights_are_shares_of_area(height, width):
    chance = torch.Generator().manual_seed(height * 10 + width)
    corners = torch.rand(50, 2, 2, generator=chance).sort(dim=1).values  # (boxes, low and high, x and y)
    boxes = torch.cat([corners.flatten(1), pyramid_boxes([1, 2, 3, 5]), grid_boxes(3)])
    weights = box_pooling_weights(boxes, height, width)
    assert weights.shape == (len(boxes), height * width)
    for box, row in zip(boxes, weights, strict=True):
        torch.testing.assert_close(row, shares_by_area(box, height, width), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(boxes)))


@pytest.mark.parametrize(
    ("box", "cell"),
    [
        ((0.3, 0.6, 0.3, 0.6), (2, 1)),  # a point
        ((0.3, 0.1, 0.3, 0.2), (0, 1)),  # a line
        ((0.6, 0.6, 0.55, 0.55), (2, 2)),  # right of itself
        ((1.0, 1.0, 1.0, 1.0), (3, 3)),  # the last corner
        ((0.0, 0.0, 0.0, 0.0), (0, 0)),
        ((1.2, -0.5, 1.4, -0.1), (0, 3)),  # outside
    ],
)
def test_a_box_without_area_takes_the_cell_that_it_lies_in(box, cell):
    weights = box_pooling_weights(torch.tensor([box]), 4, 4).view(4, 4)
    expected = torch.zeros(4, 4)
    expected[cell] = 1
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(("size", "pooled"), [(8, 4), (6, 3), (6, 1), (5, 5)])
def test_a_grid_that_divides_the_map_is_average_pooling(size, pooled):
    map_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    cells_BNC = map_BCHW.flatten(2).transpose(1, 2)
    got = box_pooling_weights(grid_boxes(pooled), size, size) @ cells_BNC
    wanted = torch.nn.functional.adaptive_avg_pool2d(map_BCHW, pooled).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_the_pyramid_runs_from_large_to_small_and_row_by_row():
    boxes = pyramid_boxes([1, 2, 3])
    assert boxes.shape == (1 + 4 + 9, 4)
    areas = box_geometry(boxes)[:, 4]
    assert (areas.diff() <= 1e-6).all()
    torch.testing.assert_close(boxes[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    third = 1 / 3
    wanted = [(0, 0), (third, 0), (0, third), (third, third)]
    torch.testing.assert_close(boxes[1:5, :2], torch.tensor(wanted))
    torch.testing.assert_close(boxes[1:5, 2:] - boxes[1:5, :2], torch.full((4, 2), 2 * third))
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_geometry_is_corners_area_and_width():
    geometry = box_geometry(torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 0.5]]))
    wanted = [[0.25, 0.5, 0.75, 1.0, 0.25, 0.5], [0.0, 0.0, 1.0, 0.5, 0.5, 1.0]]
    torch.testing.assert_close(geometry, torch.tensor(wanted))


def test_a_masked_mean_is_the_mean_of_what_is_kept():
    nodes = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([5, 2, 1])[:, None]
    wanted = torch.stack([nodes[row, :length].mean(dim=0) for row, length in enumerate((5, 2, 1))])
    torch.testing.assert_close(mean_over_nodes(nodes, mask), wanted)
    torch.testing.assert_close(mean_over_nodes(nodes, None), nodes.mean(dim=1))


@pytest.mark.parametrize("epsilon", [1e-12, 0.0])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_normalised_vectors_have_unit_norm(epsilon, scale):
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * scale
    torch.testing.assert_close(l2_normalise(vectors, epsilon), torch.nn.functional.normalize(vectors, eps=0))


def test_a_zero_vector_stays_zero_and_has_a_finite_gradient():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    unit = l2_normalise(vectors, 1e-12)
    torch.testing.assert_close(unit, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    unit[1, 0].backward()
    torch.testing.assert_close(vectors.grad, torch.tensor([[0.0, 0.0], [0.128, -0.096]]))
    vectors.grad = None
    l2_normalise(vectors, 1e-12).sum().backward()
    assert vectors.grad.isfinite().all()
