"""The recall of one variant: what its speed is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dualmatch.runtime import recall
from dualmatch.runtime.bundle import Bundle
from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.encoders import ImageEncoder, TextEncoder

from .case import TORCH, Case, open_case
from .diagnostic import NULL, split_behaviour


def measured_recall(case: Case, bundle: Bundle, data: str, splits: Sequence[str]) -> dict[str, Any] | None:
    """Recall of a variant on a data set, both encoders on its backend; None for the null backend, which has no embeddings."""
    name, _ = split_behaviour(case.backend)
    if name == NULL:
        return None
    dataset = open_dataset(data).select(splits)
    opened = "onnxruntime" if name in TORCH else name
    with ImageEncoder(bundle, backend=opened, threads=case.threads) as encoder:
        if name in TORCH:
            encoder.session.close()
            encoder.session = open_case(replace(case, encoder="image"), bundle)
        images = encoder.encode_items(dataset.items)
    size = bundle.manifest.caption_batch
    with TextEncoder(bundle, backend=opened, threads=case.threads, batch_size=size) as text_encoder:
        if name in TORCH:
            text_encoder.session.close()
            text_encoder.session = open_case(replace(case, encoder="text"), bundle)
        captions = text_encoder.encode(dataset.captions)
    found = recall.evaluate(images @ captions.T, caption_image=dataset.caption_image, split=",".join(splits))
    return {**found.to_json(), "source": f"measured on {data}"}


def recorded_recall(case: Case, bundle: Bundle) -> dict[str, Any] | None:
    """The recall that the bundle's gate recorded: of the graphs, or of torch for a torch backend; None where it recorded none."""
    name, _ = split_behaviour(case.backend)
    comparison: Mapping[str, Any] = bundle.manifest.parity.get("comparison") or {}
    found = comparison.get("before" if name in TORCH else "after")
    if name == NULL or found is None:
        return None
    return {**found, "source": "recorded by the gate at export"}
