"""Recall on the validation splits during training."""

import numpy as np
import torch
from numpy.typing import NDArray

from dualmatch.models import DSRAN
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.recall import Recall, evaluate

from .batches import Setup
from .encode import device_of, encode_captions, encode_images
from .features import MapCache, WordCache


class Validation:
    """Recall on the validation splits, ranked together, in float32; a frozen part's features come from the cache, float16."""

    def __init__(self, setup: Setup, dataset: Dataset) -> None:
        self.setup, self.dataset = setup, dataset
        self.maps, self.stems = setup.map_cache(dataset.items, views=1)
        self.words = setup.word_cache(dataset.captions)

    def recall(self) -> Recall:
        """Recall at the weights as they are."""
        images, captions = self.embeddings()
        return evaluate(images @ captions.T, caption_image=self.dataset.caption_image)

    def embeddings(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embeddings of images (n, D) and captions (m, D) at the weights as they are."""
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
        return images, captions

    def _cached_images(self, maps: MapCache) -> NDArray[np.float32]:
        parts, device = [], device_of(self.setup.model)
        for start in range(0, len(self.stems), 64):
            inputs = self.setup.region_inputs(self.dataset.items[start : start + 64])
            with torch.inference_mode():
                loaded = maps.load([views[0] for views in self.stems[start : start + 64]])
                embedded = self.setup.model.image_encoder.embed(
                    {stage: value.to(device) for stage, value in loaded.items()},
                    **{name: value.to(device) for name, value in inputs.items()},
                )
                parts.append(embedded.cpu().numpy())
        return np.concatenate(parts)

    def _cached_captions(self, words: WordCache) -> NDArray[np.float32]:
        assert isinstance(self.setup.model, DSRAN)
        parts, device = [], device_of(self.setup.model)
        for start in range(0, len(words.ids), 128):
            with torch.inference_mode():
                features, mask = words.load(range(start, min(start + 128, len(words.ids))))
                parts.append(self.setup.model.text_encoder.embed(features.to(device), mask.to(device)).cpu().numpy())
        return np.concatenate(parts)
