"""Torch's embeddings inside a bundle, readable without torch: what `verify` compares with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .bundle import Bundle
from .errors import DualmatchError
from .files import strict_json, write_atomically

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
        samples: raw graph inputs by encoder and input name, and `embedding`, torch's output for them, and `nodes` where the graph has
            them.
        text_checks: token ids at several batch sizes and lengths, none of them the traced one, with torch's outputs likewise; a bundle
            from before they were kept has none.
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
    text_checks: Sequence[dict[str, Array]] = ()

    def checks(self, encoder: str) -> list[dict[str, Array]]:
        """What an encoder is checked on: the samples in batches of 1, 2, all and 3 more (repeated), and the `text_checks`."""
        sample = self.samples[encoder]
        if encoder == "text":
            # A caption's embedding may depend on its batch (policy `authors`): only batches that torch has seen can be compared.
            return [sample, *self.text_checks]
        count = len(sample["embedding"])
        batches = dict.fromkeys((1, min(2, count), count, count + 3))
        return [
            {name: np.resize(value, (batch, *value.shape[1:])) for name, value in sample.items()} for batch in batches
        ]

    def write(self, folder: Path) -> None:
        """Write `parity.safetensors` and `parity.json`."""
        tensors: dict[str, Array] = {"reference.images": self.images, "reference.captions": self.captions}
        for encoder, values in self.samples.items():
            tensors |= {f"sample.{encoder}.{name}": value for name, value in values.items()}
        for number, values in enumerate(self.text_checks):
            tensors |= {f"check.text.{number}.{name}": value for name, value in values.items()}
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


def read_reference(source: Bundle | Path) -> Reference:
    """Read the reference of an opened bundle, from the bytes that were hashed; or one that lies in a folder by itself.

    Raises:
        DualmatchError: files that are missing, damaged, or do not fit each other.
    """
    folder = source.path if isinstance(source, Bundle) else source
    read = source.read if isinstance(source, Bundle) else lambda name: (folder / name).read_bytes()
    try:
        facts = strict_json(read(FACTS))
        tensors = load(read(TENSORS))
        samples: dict[str, dict[str, Array]] = {"image": {}, "text": {}}
        text_checks: dict[int, dict[str, Array]] = {}
        for name, value in tensors.items():
            if name.startswith("sample."):
                _, encoder, key = name.split(".", 2)
                samples[encoder][key] = value
            if name.startswith("check.text."):
                *_, number, key = name.split(".")
                text_checks.setdefault(int(number), {})[key] = value
        reference = Reference(
            images=tensors["reference.images"],
            captions=tensors["reference.captions"],
            image_ids=[_text(image["id"]) for image in facts["images"]],
            image_hashes=[_text(image["sha256"]) for image in facts["images"]],
            texts=[_text(caption["text"]) for caption in facts["captions"]],
            caption_image=np.array([caption["image"] for caption in facts["captions"]], dtype=np.int64),
            samples=samples,
            data=None if facts["data"] is None else _text(facts["data"]),
            split=_text(facts["split"]),
            text_checks=[text_checks[number] for number in sorted(text_checks)],
        )
    except DualmatchError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
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
        and all(_is_check(one) for one in (*samples.values(), *text_checks.values()))
    )
    if not fits:
        raise DualmatchError(
            f"the parity reference in {folder} does not fit its own list of items; export the bundle again."
        )
    return reference


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.50} stands where a text belongs")
    return value


def _is_check(values: dict[str, Array]) -> bool:
    """Inputs and an embedding, all of one batch."""
    return "embedding" in values and len(values) > 1 and len({value.shape[:1] for value in values.values()}) == 1
