"""Which pairs a step sees, and their inputs; from cached features where a part is frozen.

What is drawn (order, captions, views, crops) is decided in a `Plan`, in one thread and from (seed, epoch) alone; loading a plan draws
nothing, so worker threads may do it in any order and a process that takes part of a batch loads only that part.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualmatch.models import DSRAN, VSRN
from dualmatch.runtime.datasets import Dataset, ImageItem
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import Preprocess, open_rgb
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .encode import image_inputs
from .features import MapCache, Progress, WordCache, augmented, photograph
from .objective import Batch, part_of
from .recipe import Recipe

# Decoded images are kept in memory where all of them together need no more bytes than this.
MEMORY_LIMIT = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What batches and validation share: the network and everything that turns data into its inputs."""

    recipe: Recipe
    model: DSRAN | VSRN
    preprocess: Preprocess
    tokenizer: CaptionTokenizer
    regions: RegionFile | None
    cache: Path
    progress: Progress

    def map_cache(self, items: Sequence[ImageItem], *, views: int) -> tuple[MapCache | None, list[list[Path]]]:
        """The frozen trunk's cached maps for these images, and where each image's views lie; (None, []) where nothing is frozen, or
        where every image is augmented anew.
        """
        encoder = self.model.image_encoder
        frozen = self.recipe.model.trunk.frozen and not self.recipe.data.augment
        if encoder.trunk is None or not frozen or not encoder.stages:
            return None, []
        maps = MapCache(
            self.cache, encoder.trunk, encoder.stages, self.preprocess, min_area=self.recipe.data.crop_min_area
        )
        return maps, maps.prepare(items, views=views, progress=self.progress)

    def word_cache(self, captions: Sequence[str]) -> WordCache | None:
        """The frozen word encoder's cached features of these captions; None where it is trained, and under the authors' policy,
        whose word features depend on the padding of the batch.
        """
        if (
            not isinstance(self.model, DSRAN)
            or not self.model.config.text.frozen
            or self.model.config.pad_policy == "authors"
        ):
            return None
        return WordCache(self.cache, self.model, self.tokenizer, captions, progress=self.progress)

    def region_inputs(self, items: Sequence[ImageItem]) -> dict[str, Tensor]:
        """Precomputed regions of a batch, by input name; empty for networks that take none."""
        inputs = image_inputs(self.model, self.preprocess, items, self.regions, pixels=False)
        return {name: torch.from_numpy(value) for name, value in inputs.items()}


def seed_of_epoch(recipe: Recipe, epoch: int) -> int:
    """Every random draw of an epoch follows from this number."""
    return recipe.train.seed * 1_000_003 + epoch + 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step sees.

    Attributes:
        images: rows of the training set.
        captions: of those images, image by image.
        owner: each caption's place in `images`.
        views: which cached view of each image; empty where none are cached.
        crop_seed: what the images' random crops follow from.
    """

    images: Sequence[int]
    captions: Sequence[int]
    owner: Sequence[int]
    views: Sequence[int] = ()
    crop_seed: int = 0


class Batches:
    """The training set, batch by batch.

    Args:
        share: (rank, size): which of `size` equal parts of every batch this process loads.
    """

    def __init__(self, setup: Setup, dataset: Dataset, *, share: tuple[int, int] = (0, 1)) -> None:
        self.setup, self.items, self.share = setup, dataset.items, share
        recipe, self.captions = setup.recipe, dataset.captions
        self.image_of_caption = np.asarray(dataset.caption_image)
        self.first_caption = np.concatenate([[0], np.cumsum([len(item.captions) for item in self.items])])
        self.maps, self.stems = setup.map_cache(self.items, views=recipe.data.views)
        self.words = setup.word_cache(self.captions)
        self.ids = self.words.ids if self.words else setup.tokenizer.ids(self.captions)
        self.takes_pixels = self.maps is None and "pixels" in setup.model.image_encoder.input_names
        self.pixels = None
        if self.takes_pixels and not recipe.data.augment:
            size = 4 * 3 * setup.preprocess.image_size**2 * len(self.items)
            if size <= MEMORY_LIMIT:
                self.pixels = np.stack([setup.preprocess(photograph(item)) for item in self.items])
        samples = len(self.items) if recipe.train.epoch_over == "images" else len(self.captions)
        if samples < 2:
            raise DualmatchError(
                f"the training splits hold {samples} pairs; at least two are needed to have a negative."
            )
        self.batch_size = recipe.train.batch_size
        if self.batch_size < 2 * share[1]:
            raise DualmatchError(
                f"a batch of {self.batch_size} cannot be shared by {share[1]} processes: each needs two of it; raise train.batch_size."
            )
        # The authors keep the last, smaller batch; a batch of one pair has no negative and BatchNorm no variance, so that one is left out.
        self.steps_per_epoch = samples // self.batch_size + int(samples % self.batch_size >= 2 * share[1])
        if not self.steps_per_epoch:
            raise DualmatchError(f"{samples} pairs are too few for {share[1]} processes: each needs two in a batch.")

    def plans(self, epoch: int) -> Iterator[Plan]:
        """The plans of an epoch, in an order that follows from the seed and the epoch."""
        recipe = self.setup.recipe
        chance = np.random.default_rng(seed_of_epoch(recipe, epoch))
        over_images = recipe.train.epoch_over == "images"
        order = chance.permutation(len(self.items) if over_images else len(self.image_of_caption)).tolist()
        for start in range(0, self.steps_per_epoch * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            captions = [caption for image in chosen for caption in self._draw(image, chance)] if over_images else chosen
            images = chosen if over_images else self.image_of_caption[chosen].tolist()
            row_of = {image: row for row, image in enumerate(images)}
            owner = (
                [row_of[image] for image in self.image_of_caption[captions].tolist()]
                if over_images
                else list(range(len(captions)))
            )
            views, crop_seed = [], 0
            if self.maps is not None:
                views = chance.integers(0, recipe.data.views, size=len(images)).tolist()
            elif self.takes_pixels and recipe.data.augment:
                crop_seed = int(chance.integers(2**63))
            yield Plan(images=images, captions=captions, owner=owner, views=views, crop_seed=crop_seed)

    def load(self, plan: Plan) -> Batch:
        """This process's share of a plan's inputs; draws nothing, so that any thread may do it."""
        rank, size = self.share
        first, last = part_of(len(plan.images), rank, size)
        rows = range(first, last)
        chosen = [(caption, owner) for caption, owner in zip(plan.captions, plan.owner, strict=True) if owner in rows]
        captions = [caption for caption, _ in chosen]
        words, mask = self.words.load(captions) if self.words is not None else (None, None)
        # As long as the whole batch's longest: under the authors' padding an embedding depends on it.
        longest = max(len(self.ids[caption]) for caption in plan.captions)
        images, maps = self._images(plan, rows)
        return Batch(
            images=images,
            maps=maps,
            token_ids_MT=self._token_ids(captions, longest),
            words_MTW=words,
            word_mask_MT=mask,
            owner_M=torch.tensor([owner - first for _, owner in chosen]),
            image_ids_I=torch.tensor([plan.images[row] for row in rows]),
        )

    def _token_ids(self, captions: Sequence[int], longest: int) -> Tensor:
        ids = torch.from_numpy(self.setup.tokenizer.pad([self.ids[caption] for caption in captions]))
        return torch.nn.functional.pad(ids, (0, max(0, longest - ids.shape[1])))

    def _draw(self, image: int, chance: np.random.Generator) -> list[int]:
        """Some of an image's captions."""
        first, last = self.first_caption[image], self.first_caption[image + 1]
        wanted = min(self.setup.recipe.train.captions_per_image, last - first)
        return [int(caption) for caption in chance.choice(np.arange(first, last), size=wanted, replace=False)]

    def _images(self, plan: Plan, rows: range) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The image encoder's inputs, and the maps that stand for pixels."""
        images = [plan.images[row] for row in rows]
        inputs = self.setup.region_inputs([self.items[image] for image in images])
        if self.maps is not None:
            return inputs, self.maps.load([self.stems[plan.images[row]][plan.views[row]] for row in rows])
        if self.takes_pixels:
            pixels = self.pixels[images] if self.pixels is not None else self._decoded(plan, rows)
            # Channels last in memory, which a trunk's convolutions are faster on; the values are the same.
            inputs["pixels"] = torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)
        return inputs, {}

    def _decoded(self, plan: Plan, rows: range) -> NDArray[np.float32]:
        preprocess, data = self.setup.preprocess, self.setup.recipe.data
        decoded = []
        for row in rows:
            image = photograph(self.items[plan.images[row]])
            if data.augment:  # each image from a number of its own: another process may load its neighbours
                draw = random.Random(plan.crop_seed + row)
                view = augmented(open_rgb(image), preprocess, draw, min_area=data.crop_min_area)
                decoded.append(preprocess.normalise(view))
            else:
                decoded.append(preprocess(image))
        return np.stack(decoded)
