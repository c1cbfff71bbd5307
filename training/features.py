"""What frozen parts compute, cached on disk: a trunk's maps per image and view, a frozen BERT's word features per caption.

Entries are keyed by the frozen weights, the pre-processing, the image's own bytes and the view, so a changed photograph or trunk can
never be served an old feature. float16, since features are inputs of training only; evaluation always starts from pixels.
"""

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dualmatch.models import DSRAN
from dualmatch.models.trunks import hash_of_weights
from dualmatch.runtime.datasets import ImageItem
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes
from dualmatch.runtime.preprocess import Preprocess, open_rgb
from dualmatch.runtime.tokenizer import CaptionTokenizer

Progress = Callable[[str, int, int], None]  # what, done, of


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


def augmented(image: Image.Image, preprocess: Preprocess, chance: random.Random, *, min_area: float) -> Image.Image:
    """A random crop (area min_area to 1, aspect 3/4 to 4/3) scaled to the input, flipped half the time (the authors' transform)."""
    width, height = image.size
    left, top, wide, high = 0, 0, width, height
    for _ in range(10):
        area = width * height * chance.uniform(min_area, 1.0)
        aspect = 2.0 ** chance.uniform(-0.415037, 0.415037)  # log-uniform between 3/4 and 4/3
        candidate = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if candidate[0] <= width and candidate[1] <= height:
            wide, high = candidate
            left, top = chance.randint(0, width - wide), chance.randint(0, height - high)
            break
    size = (preprocess.image_size, preprocess.image_size)
    view = image.resize(size, preprocess.resampling, box=(left, top, left + wide, top + high))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else view


def photograph(item: ImageItem) -> Path | bytes:
    """What to open an image from: its file, so that errors name it, or its bytes where it is generated."""
    return item.path or item.read_bytes()


class MapCache:
    """Maps of a frozen trunk for images and views: view 0 is the evaluation view, view 1 its mirror image, the others random crops."""

    def __init__(
        self, folder: Path, trunk: nn.Module, stages: Sequence[str], preprocess: Preprocess, *, min_area: float
    ) -> None:
        self.trunk = trunk.eval()
        self.stages = tuple(stages)
        self.preprocess = preprocess
        self.min_area = min_area
        key = f"{hash_of_weights(trunk)}|{preprocess}|{min_area}"
        self.folder = folder / f"maps-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def prepare(
        self, items: Sequence[ImageItem], *, views: int, batch_size: int = 16, progress: Progress = no_progress
    ) -> list[list[Path]]:
        """Compute what is missing; returns for every item and view the path stem of its maps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stems, missing = [], []
        for item in items:
            content = item.content_hash()
            stems.append([self.folder / f"{content[:32]}-{view}" for view in range(views)])
            missing += [(item, view, stems[-1][view]) for view in range(views) if not self._complete(stems[-1][view])]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            pixels = torch.from_numpy(np.stack([self._pixels(item, view, stem) for item, view, stem in batch]))
            with torch.inference_mode():
                maps = self.trunk(pixels.to(next(self.trunk.parameters()).device))
            for row, (_, _, stem) in enumerate(batch):
                for stage in self.stages:
                    self._save(stem, stage, maps[stage][row].cpu())
            progress("computing trunk features", min(start + batch_size, len(missing)), len(missing))
        return stems

    def load(self, stems: Sequence[Path]) -> dict[str, Tensor]:
        """Maps of a batch by stage, (B, C, H, W) float32."""
        return {
            stage: torch.from_numpy(np.stack([np.load(f"{stem}-{stage}.npy") for stem in stems])).float()
            for stage in self.stages
        }

    def _pixels(self, item: ImageItem, view: int, stem: Path) -> np.ndarray:
        if view <= 1:
            pixels = self.preprocess(photograph(item))
            return pixels if view == 0 else np.ascontiguousarray(pixels[:, :, ::-1])
        chance = random.Random(stem.name)
        return self.preprocess.normalise(
            augmented(open_rgb(photograph(item)), self.preprocess, chance, min_area=self.min_area)
        )

    def _complete(self, stem: Path) -> bool:
        return all(Path(f"{stem}-{stage}.npy").is_file() for stage in self.stages)

    def _save(self, stem: Path, stage: str, value: Tensor) -> None:
        if value.abs().max() > torch.finfo(torch.float16).max:
            raise DualmatchError("a trunk feature is larger than float16 can hold; the cache would lose it.")
        _save_whole(Path(f"{stem}-{stage}.npy"), value.half().numpy())


class WordCache:
    """Word features of a frozen BERT for a list of captions, in memory, backed by one file; for the masked policy, where padding has no say."""

    def __init__(
        self,
        folder: Path,
        model: DSRAN,
        tokenizer: CaptionTokenizer,
        captions: Sequence[str],
        *,
        progress: Progress = no_progress,
    ) -> None:
        assert model.config.pad_policy == "masked"
        words = (
            model.text_encoder.words.eval()
        )  # without it, a network just built would write dropout's noise into the cache
        self.ids = tokenizer.ids(captions)
        self._starts = np.concatenate([[0], np.cumsum([len(one) for one in self.ids])])
        key = f"{hash_of_weights(words)}|{tokenizer.options}|{sha256_of_bytes(repr(self.ids).encode())}"
        path = folder / f"words-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
        if path.is_file():
            self._features = np.load(path)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._features = np.empty((self._starts[-1], words.width), dtype=np.float16)
        by_length = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]))
        for start in range(0, len(by_length), 64):
            batch = by_length[start : start + 64]
            ids = torch.from_numpy(tokenizer.pad([self.ids[i] for i in batch]))
            ids = ids.to(next(words.parameters()).device)
            with torch.inference_mode():
                features = words(ids, ids != 0).cpu().numpy()
            for row, i in enumerate(batch):
                self._features[self._starts[i] : self._starts[i + 1]] = features[row, : len(self.ids[i])]
            progress("computing word features", start + len(batch), len(by_length))
        _save_whole(path, self._features)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Word features (B, T, W) float32, zero at padding, and their mask (B, T)."""
        lengths = [len(self.ids[i]) for i in indices]
        features = np.zeros((len(indices), max(lengths), self._features.shape[1]), dtype=np.float32)
        mask = np.zeros(features.shape[:2], dtype=bool)
        for row, (i, length) in enumerate(zip(indices, lengths, strict=True)):
            features[row, :length] = self._features[self._starts[i] : self._starts[i + 1]]
            mask[row, :length] = True
        return torch.from_numpy(features), torch.from_numpy(mask)


def _save_whole(path: Path, array: np.ndarray) -> None:
    """Write an array so that it is there wholly or not at all; runs that share a cache write under different names."""
    part = path.with_suffix(f".{os.getpid()}.part.npy")
    np.save(part, array)
    part.replace(path)
