"""Batches of pairs as embeddings with gradients, and the validation set's recall; from cached features where a part is frozen."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualmatch.models import DSRAN
from dualmatch.runtime.datasets import Dataset, ImageItem
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import Preprocess, open_rgb
from dualmatch.runtime.recall import Recall, evaluate
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .encode import encode_captions, encode_images, image_inputs
from .features import MapCache, Progress, WordCache, augmented, photograph
from .recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What batches and validation share: the network and everything that turns data into its inputs."""

    recipe: Recipe
    model: DSRAN
    preprocess: Preprocess
    tokenizer: CaptionTokenizer
    regions: RegionFile | None
    cache: Path
    progress: Progress

    def map_cache(self, items: Sequence[ImageItem], *, views: int) -> tuple[MapCache | None, list[list[Path]]]:
        """The frozen trunk's cached maps for these images, and where each image's views lie; (None, []) where nothing is frozen."""
        encoder = self.model.image_encoder
        if encoder.trunk is None or not self.recipe.model.trunk.frozen or not encoder.stages:
            return None, []
        maps = MapCache(
            self.cache, encoder.trunk, encoder.stages, self.preprocess, min_area=self.recipe.data.crop_min_area
        )
        return maps, maps.prepare(items, views=views, progress=self.progress)

    def word_cache(self, captions: Sequence[str]) -> WordCache | None:
        """The frozen word encoder's cached features of these captions; None where it is trained, and under the authors' policy,
        whose word features depend on the padding of the batch.
        """
        if not self.recipe.model.text.frozen or self.recipe.model.pad_policy == "authors":
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
class Batch:
    """Embeddings with gradients: images (I, D), captions (M, D), each caption's row in images (M,), which image each row is (I,)."""

    images_ID: Tensor
    captions_MD: Tensor
    owner_M: Tensor
    image_ids_I: Tensor


class Batches:
    """The training set, batch by batch."""

    def __init__(self, setup: Setup, dataset: Dataset) -> None:
        self.setup, self.items = setup, dataset.items
        recipe, captions = setup.recipe, dataset.captions
        self.image_of_caption = np.asarray(dataset.caption_image)
        self.first_caption = np.concatenate([[0], np.cumsum([len(item.captions) for item in self.items])])
        self.maps, self.stems = setup.map_cache(self.items, views=recipe.data.views)
        self.words = setup.word_cache(captions)
        self.ids = self.words.ids if self.words else setup.tokenizer.ids(captions)
        self.takes_pixels = self.maps is None and "pixels" in setup.model.image_encoder.input_names
        self.pixels = None
        if self.takes_pixels and not recipe.data.augment:
            self.pixels = np.stack([setup.preprocess(photograph(item)) for item in self.items])
        samples = len(self.items) if recipe.train.epoch_over == "images" else len(captions)
        if samples < 2:
            raise DualmatchError(
                f"the training splits hold {samples} pairs; at least two are needed to have a negative."
            )
        self.batch_size = recipe.train.batch_size
        # The authors keep the last, smaller batch; a batch of one pair has no negative and BatchNorm no variance, so that one is left out.
        self.steps_per_epoch = samples // self.batch_size + int(samples % self.batch_size > 1)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, in an order that follows from the seed and the epoch."""
        chance = np.random.default_rng(seed_of_epoch(self.setup.recipe, epoch))
        over_images = self.setup.recipe.train.epoch_over == "images"
        order = chance.permutation(len(self.items) if over_images else len(self.image_of_caption)).tolist()
        for start in range(0, self.steps_per_epoch * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            captions = [caption for image in chosen for caption in self._draw(image, chance)] if over_images else chosen
            images = chosen if over_images else self.image_of_caption[chosen].tolist()
            row_of = {image: row for row, image in enumerate(images)}
            owner = (
                [row_of[image] for image in self.image_of_caption[captions].tolist()]
                if over_images
                else range(len(captions))
            )
            yield Batch(
                images_ID=self._embed_images(images, chance),
                captions_MD=self._embed_captions(captions),
                owner_M=torch.tensor(list(owner)),
                image_ids_I=torch.tensor(images),
            )

    def _draw(self, image: int, chance: np.random.Generator) -> list[int]:
        """Some of an image's captions."""
        first, last = self.first_caption[image], self.first_caption[image + 1]
        wanted = min(self.setup.recipe.train.captions_per_image, last - first)
        return [int(caption) for caption in chance.choice(np.arange(first, last), size=wanted, replace=False)]

    def _embed_images(self, images: Sequence[int], chance: np.random.Generator) -> Tensor:
        encoder = self.setup.model.image_encoder
        inputs = self.setup.region_inputs([self.items[i] for i in images])
        if self.maps is not None:
            views = chance.integers(0, self.setup.recipe.data.views, size=len(images))
            maps = self.maps.load([self.stems[i][view] for i, view in zip(images, views, strict=True)])
            return encoder.embed(maps, **inputs)
        if self.takes_pixels:
            inputs["pixels"] = torch.from_numpy(
                self.pixels[list(images)] if self.pixels is not None else self._augmented(images, chance)
            )
        return encoder(**inputs)

    def _augmented(self, images: Sequence[int], chance: np.random.Generator) -> NDArray[np.float32]:
        preprocess, area = self.setup.preprocess, self.setup.recipe.data.crop_min_area
        draw = random.Random(int(chance.integers(2**63)))
        images_opened = (open_rgb(photograph(self.items[i])) for i in images)
        return np.stack(
            [preprocess.normalise(augmented(image, preprocess, draw, min_area=area)) for image in images_opened]
        )

    def _embed_captions(self, captions: Sequence[int]) -> Tensor:
        if self.words is not None:
            return self.setup.model.text_encoder.embed(*self.words.load(captions))
        return self.setup.model.text_encoder(
            torch.from_numpy(self.setup.tokenizer.pad([self.ids[i] for i in captions]))
        )


class Validation:
    """Recall on the validation splits, ranked together."""

    def __init__(self, setup: Setup, dataset: Dataset) -> None:
        self.setup, self.dataset = setup, dataset
        self.maps, self.stems = setup.map_cache(dataset.items, views=1)
        self.words = setup.word_cache(dataset.captions)

    def recall(self) -> Recall:
        """Recall at the weights as they are."""
        setup = self.setup
        setup.model.eval()
        if self.maps is None:
            images = encode_images(setup.model, setup.preprocess, self.dataset.items, regions=setup.regions)
        else:
            images = self._cached_images(self.maps)
        if self.words is None:
            captions = encode_captions(setup.model, setup.tokenizer, self.dataset.captions)
        else:
            captions = self._cached_captions(self.words)
        return evaluate(images @ captions.T, caption_image=self.dataset.caption_image)

    def _cached_images(self, maps: MapCache) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(self.stems), 64):
            inputs = self.setup.region_inputs(self.dataset.items[start : start + 64])
            with torch.inference_mode():
                loaded = maps.load([views[0] for views in self.stems[start : start + 64]])
                parts.append(self.setup.model.image_encoder.embed(loaded, **inputs).numpy())
        return np.concatenate(parts)

    def _cached_captions(self, words: WordCache) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(words.ids), 128):
            with torch.inference_mode():
                loaded = words.load(range(start, min(start + 128, len(words.ids))))
                parts.append(self.setup.model.text_encoder.embed(*loaded).numpy())
        return np.concatenate(parts)
