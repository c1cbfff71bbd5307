"""Region features pooled from a frozen trunk's map for boxes that a detector found."""

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualmatch.models.config import TrunkConfig
from dualmatch.models.pooling import box_geometry, box_pooling_weights
from dualmatch.models.trunks import build_trunk, preprocess_of
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import refuse_existing
from dualmatch.runtime.preprocess import open_rgb
from dualmatch.runtime.regions import read_npz

from .features import MapCache, Progress, no_progress, photograph
from .recipe import DataOptions

RegionOrder = Literal["file", "confidence", "size", "random"]


def pool_regions(
    dataset: Dataset,
    boxes: Path,
    out: Path,
    *,
    trunk: str,
    trunk_weights: Path | None = None,
    image_size: int = 320,
    order: RegionOrder = "file",
    batch_size: int = 16,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> tuple[int, int, int]:
    """Write a region file (see `runtime.regions`) with a feature and a geometry for every box.

    Photographs are squashed to a square, so that boxes in fractions of the sides stay where they are. Features are float16.

    Args:
        boxes: an `.npz` with `filenames` and `boxes` (n, regions, 4), x1 y1 x2 y2 in pixels of the stored photograph.
        order: of an image's regions, which VSRN's GRU runs over (its paper's Table 5): as in the `file` (detectors write descending
            confidence), by `confidence` (needs `scores` (n, regions) in the file), by `size` (largest first), or `random` (by image id,
            the same every time).
        cache: folder of trunk features (see `features`): the trunk does not run for images whose maps lie there, and its maps are added;
            float16. None: every image through the trunk.

    Returns:
        (images, regions, channels).

    Raises:
        DualmatchError: `out` exists, the boxes cannot be read, or a photograph has none.
    """
    refuse_existing(out, "the region file")
    if not out.parent.is_dir():
        raise DualmatchError(f"the region file {out} cannot be written: there is no folder {out.parent}.")
    row_of, pixel_boxes, scores = _read_boxes(boxes)
    if order == "confidence" and scores is None:
        raise DualmatchError(
            f"regions were asked for in order of confidence, but {boxes} has no `scores` (images, regions)."
        )
    if missing := [item.id for item in dataset.items if item.id not in row_of]:
        raise DualmatchError(
            f"{boxes} has no boxes for {len(missing)} of {len(dataset.items)} photographs, the first {missing[0]!r}."
        )
    config = TrunkConfig(name=trunk, image_size=image_size, frozen=True)  # type: ignore[arg-type]
    network = build_trunk(config, weights=trunk_weights).eval()
    preprocess = preprocess_of(config, "squash")
    cached, stems = None, []
    if cache is not None:
        cached = MapCache(cache, network, ("final",), preprocess, min_area=DataOptions.crop_min_area)
        stems = cached.prepare(dataset.items, views=1, progress=progress)
    features, positions = [], []
    for start in range(0, len(dataset.items), batch_size):
        items = dataset.items[start : start + batch_size]
        opened = [open_rgb(photograph(item)) for item in items]
        if cached is not None:
            maps = cached.load([views[0] for views in stems[start : start + batch_size]])["final"]
        else:
            pixels = torch.from_numpy(np.stack([preprocess(image) for image in opened]))
            with torch.inference_mode():
                maps = network(pixels)["final"]
        for item, image, one in zip(items, opened, maps, strict=True):
            sides = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
            row = row_of[item.id]
            fractions = (torch.from_numpy(pixel_boxes[row]).float() / sides).clamp(0, 1)
            fractions = fractions[_in_order(fractions, None if scores is None else scores[row], order, item.id)]
            weights = box_pooling_weights(fractions, one.shape[1], one.shape[2])
            features.append((weights @ one.flatten(1).T).half().numpy())
            positions.append(box_geometry(fractions).numpy())
        progress("pooling regions", start + len(items), len(dataset.items))
    part = out.with_name(f".{out.name}.part")
    with part.open("wb") as file:
        names = np.array([item.id for item in dataset.items])
        np.savez(file, filenames=names, features=np.stack(features), positions=np.stack(positions))
    part.replace(out)
    return len(features), features[0].shape[0], features[0].shape[1]


def _in_order(fractions_R4: Tensor, scores_R: NDArray[Any] | None, order: RegionOrder, image_id: str) -> list[int]:
    """Indices of an image's regions in the wanted order; equal ones keep the file's."""
    indices = list(range(len(fractions_R4)))
    if order == "random":
        random.Random(image_id).shuffle(indices)
    elif order == "size":
        sides = fractions_R4[:, 2:] - fractions_R4[:, :2]
        area = (sides[:, 0] * sides[:, 1]).tolist()
        indices.sort(key=lambda i: -area[i])
    elif order == "confidence":
        assert scores_R is not None
        indices.sort(key=lambda i: -float(scores_R[i]))
    return indices


def _read_boxes(path: Path) -> tuple[dict[str, int], NDArray[Any], NDArray[Any] | None]:
    arrays = read_npz(path, "box file", required=("filenames", "boxes"))
    names, boxes, scores = arrays["filenames"], arrays["boxes"], arrays.get("scores")
    if boxes.ndim != 3 or boxes.shape[2] != 4 or len(names) != len(boxes):
        raise DualmatchError(
            f"{path} must hold boxes (images, regions, 4) for each filename, it has {list(boxes.shape)} for {len(names)}."
        )
    if scores is not None and scores.shape != boxes.shape[:2]:
        raise DualmatchError(
            f"{path} must hold a score for each of its {list(boxes.shape[:2])} boxes, it has {list(scores.shape)}."
        )
    return {str(name): row for row, name in enumerate(names)}, boxes, scores
