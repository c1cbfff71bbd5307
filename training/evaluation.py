"""Recall of a trained run in torch: the reference for every exported form of it."""

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.models import DSRAN
from dualmatch.models.config import RegionConfig
from dualmatch.runtime import rerank
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.recall import Recall, evaluate
from dualmatch.runtime.regions import RegionFile

from .about import about_run
from .batches import Setup
from .checkpoint import Run, load_run
from .encode import encode_captions, encode_images
from .features import Progress, no_progress
from .recipe import Recipe
from .validation import Validation


def regions_of(run: Run, given: RegionFile | None) -> RegionFile | None:
    """The region file given, else the one that the run was trained with.

    Raises:
        DualmatchError: the file holds features or positions of another width than the network takes.
    """
    trained_with = run.recipe.data.regions
    regions = given or (RegionFile(Path(trained_with)) if trained_with else None)
    names = run.model.image_encoder.input_names
    if regions is not None and "regions" in names:
        takes = run.model.config.regions if isinstance(run.model, DSRAN) else run.model.config
        if regions.feature_dim != takes.feature_dim:
            raise DualmatchError(
                f"the network takes regions of {takes.feature_dim} channels, {regions.path} has {regions.feature_dim}."
            )
        if (
            isinstance(takes, RegionConfig)
            and "region_positions" in names
            and regions.position_dim != takes.position_dim
        ):
            raise DualmatchError(
                f"the network takes region positions of {takes.position_dim} numbers, {regions.path} has {regions.position_dim}."
            )
    return regions


def encode_run(
    folder: Path,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    regions: RegionFile | None = None,
    progress: Progress = no_progress,
) -> tuple[dict[str, Any], NDArray[np.float32], NDArray[np.float32]]:
    """What the run is (see `runtime.subject`), and its embeddings of images and captions by its best epoch, float32, every image once."""
    run = load_run(folder)
    images = encode_images(
        run.model,
        run.preprocess,
        dataset.items,
        regions=regions_of(run, regions),
        batch_size=batch_size,
        progress=progress,
    )
    captions = encode_captions(run.model, run.tokenizer, dataset.captions, progress=progress)
    return about_run(folder), images, captions


def evaluate_run(
    folder: Path,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    regions: RegionFile | None = None,
    rerank_k1: int | None = None,
    save_embeddings: Path | None = None,
    progress: Progress = no_progress,
) -> Recall:
    """Encode `dataset` with the run's best epoch, float32, from pixels, every image once; all images ranked together.

    Args:
        rerank_k1: re-rank image-to-text with so many candidates.
        save_embeddings: an `.npz` to write `images`, `captions`, `image_ids` and `caption_image` to.
    """
    _, images, captions = encode_run(folder, dataset, batch_size=batch_size, regions=regions, progress=progress)
    if save_embeddings is not None:
        write_embeddings(save_embeddings, dataset, images, captions)
    return evaluate(
        images @ captions.T,
        caption_image=dataset.caption_image,
        i2t=partial(rerank.i2t, k1=rerank_k1) if rerank_k1 else None,
        split=", ".join(dataset.splits),
    )


def embed_from_cache(
    folder: Path, dataset: Dataset, cache: Path, *, progress: Progress = no_progress
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Embeddings of images and captions by the run's best epoch, what its frozen parts compute taken from the cache and added to it.

    For many runs on one large frozen trunk, which then runs once. The cache is float16, so that a rank may differ from `evaluate_run`'s
    now and then; without frozen parts both are the same.
    """
    run = load_run(folder)
    assert isinstance(run.recipe, Recipe)
    setup = Setup(
        recipe=run.recipe,
        model=run.model,
        preprocess=run.preprocess,
        tokenizer=run.tokenizer,
        regions=regions_of(run, None),
        cache=cache,
        progress=progress,
    )
    return Validation(setup, dataset).embeddings()


def write_embeddings(
    path: Path, dataset: Dataset, images: NDArray[np.float32], captions: NDArray[np.float32], **facts: Any
) -> None:
    """Write an `.npz` with `images`, `captions`, `image_ids` and `caption_image`, and each of the facts as a string."""
    arrays: dict[str, Any] = {
        "images": images,
        "captions": captions,
        "image_ids": np.array([item.id for item in dataset.items]),
        "caption_image": np.asarray(dataset.caption_image),
    }
    buffer = BytesIO()
    np.savez(buffer, **arrays, **facts)
    write_atomically(path, buffer.getvalue())
