"""Embeddings by torch, float32, from files and captions: the reference that everything exported is compared with."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dualmatch.models import DSRAN, VSRN
from dualmatch.runtime.datasets import ImageItem
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import Preprocess
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .features import Progress, no_progress, photograph


def device_of(model: DSRAN | VSRN) -> torch.device:
    """Where a network's weights are."""
    return next(model.parameters()).device


def image_inputs(
    model: DSRAN | VSRN,
    preprocess: Preprocess,
    items: Sequence[ImageItem],
    regions: RegionFile | None,
    *,
    pixels: bool = True,
) -> dict[str, NDArray[np.float32]]:
    """The image encoder's inputs for a batch of images, by input name; without `pixels` where cached maps stand for them."""
    names = model.image_encoder.input_names
    if "regions" in names and regions is None:
        raise DualmatchError(
            "this network takes precomputed regions; say where they are (data.regions in the recipe, or --regions FILE)."
        )
    inputs: dict[str, NDArray[np.float32]] = {}
    if pixels and "pixels" in names:
        inputs["pixels"] = np.stack([preprocess(photograph(item)) for item in items])
    if regions is not None and "regions" in names:
        inputs["regions"] = np.stack([regions.features(item.id) for item in items])
    if regions is not None and "region_positions" in names:
        inputs["region_positions"] = np.stack([regions.positions(item.id) for item in items])
    return inputs


def encode_images(
    model: DSRAN | VSRN,
    preprocess: Preprocess,
    items: Sequence[ImageItem],
    *,
    regions: RegionFile | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> NDArray[np.float32]:
    """Embeddings of images, (n, D) float32, from pixels; every image once."""
    model.eval()
    parts, device = [], device_of(model)
    for start in range(0, len(items), batch_size):
        inputs = image_inputs(model, preprocess, items[start : start + batch_size], regions)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
            parts.append(model.image_encoder(**tensors).cpu().numpy())
        progress("encoding images with torch", min(start + batch_size, len(items)), len(items))
    return np.concatenate(parts)


def encode_captions(
    model: DSRAN | VSRN,
    tokenizer: CaptionTokenizer,
    captions: Sequence[str],
    *,
    batch_size: int = 128,
    progress: Progress = no_progress,
) -> NDArray[np.float32]:
    """Embeddings of captions, (n, D) float32, in batches of the captions' order, each padded to its longest."""
    model.eval()
    parts, device = [], device_of(model)
    for start in range(0, len(captions), batch_size):
        ids = torch.from_numpy(tokenizer(captions[start : start + batch_size])).to(device)
        with torch.inference_mode():
            parts.append(model.text_encoder(ids).cpu().numpy())
        progress("encoding captions with torch", min(start + batch_size, len(captions)), len(captions))
    return np.concatenate(parts)
