"""Torch's embeddings inside a bundle, readable without torch: what `verify` compares with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from .errors import DualmatchError
from .files import read_json, write_atomically

TENSORS, FACTS = "parity.safetensors", "parity.json"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Float32 embeddings by torch of the gate's images and captions, and a few raw inputs with their outputs.

    Attributes:
        images, captions: (n, D) and (m, D) float32.
        image_ids, image_hashes: what the images were called, and the SHA-256 of each file.
        texts: the captions.
        caption_image: for each caption the index of its image.
        samples: raw graph inputs by encoder and input name, and `embedding`, torch's output for them.
        data: the data set's name as `--data` took it, if it is one that every machine can generate (`scenes`), else None.
        split: which splits these are.
    """

    images: NDArray[np.float32]
    captions: NDArray[np.float32]
    image_ids: Sequence[str]
    image_hashes: Sequence[str]
    texts: Sequence[str]
    caption_image: NDArray[np.int64]
    samples: dict[str, dict[str, Array]]
    data: str | None
    split: str

    def write(self, folder: Path) -> None:
        """Write `parity.safetensors` and `parity.json`."""
        tensors: dict[str, Array] = {"reference.images": self.images, "reference.captions": self.captions}
        for encoder, values in self.samples.items():
            tensors |= {f"sample.{encoder}.{name}": value for name, value in values.items()}
        write_atomically(folder / TENSORS, save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))
        facts = {
            "data": self.data,
            "split": self.split,
            "images": [
                {"id": one, "sha256": digest} for one, digest in zip(self.image_ids, self.image_hashes, strict=True)
            ],
            "captions": [
                {"text": text, "image": int(image)} for text, image in zip(self.texts, self.caption_image, strict=True)
            ],
        }
        write_atomically(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def read_reference(folder: Path) -> Reference:
    """Read the reference of a bundle whose hashes have been checked.

    Raises:
        DualmatchError: files that do not fit each other.
    """
    facts = read_json(folder / FACTS, "parity reference")
    try:
        tensors = load_file(folder / TENSORS)
        samples: dict[str, dict[str, Array]] = {"image": {}, "text": {}}
        for name, value in tensors.items():
            if name.startswith("sample."):
                _, encoder, key = name.split(".", 2)
                samples[encoder][key] = value
        reference = Reference(
            images=tensors["reference.images"],
            captions=tensors["reference.captions"],
            image_ids=[image["id"] for image in facts["images"]],
            image_hashes=[image["sha256"] for image in facts["images"]],
            texts=[caption["text"] for caption in facts["captions"]],
            caption_image=np.array([caption["image"] for caption in facts["captions"]], dtype=np.int64),
            samples=samples,
            data=facts["data"],
            split=facts["split"],
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DualmatchError(
            f"the parity reference in {folder} is damaged ({error}); export the bundle again."
        ) from None
    num_images, owners = len(reference.image_ids), reference.caption_image
    fits = (
        reference.images.ndim == reference.captions.ndim == 2
        and reference.images.shape[1] == reference.captions.shape[1]
        and len(reference.images) == num_images > 0
        and len(reference.captions) == len(reference.texts) > 0
        and 0 <= owners.min() <= owners.max() < num_images
        and all("embedding" in sample for sample in samples.values())
    )
    if not fits:
        raise DualmatchError(
            f"the parity reference in {folder} does not fit its own list of items; export the bundle again."
        )
    return reference
