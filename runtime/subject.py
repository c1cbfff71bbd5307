"""What an evaluation is about, for its JSON: without its data set and its networks a figure cannot be told from another's."""

from collections.abc import Sequence
from typing import Any

from .bundle import Bundle
from .datasets import Dataset


def about_data(dataset: Dataset) -> dict[str, Any]:
    """The data set as it was ranked."""
    return {
        "name": dataset.name,
        "layout": dataset.layout,
        "splits": list(dataset.splits),
        "images": len(dataset.items),
        "captions": len(dataset.captions),
    }


def about_bundle(bundle: Bundle) -> dict[str, Any]:
    """The network, the recipe that it was trained by and the options changed in it (None: not known), the precision of its graphs, and
    which bundle it is.
    """
    model = bundle.manifest.model
    precisions = dict.fromkeys(entry.precision for entry in bundle.manifest.encoders.values())
    return {
        "name": model["name"],
        "recipe": model["recipe"],
        "changed": model.get("changed"),
        "precision": "+".join(precisions),
        "bundle": bundle.hash,
    }


def subject(dataset: Dataset, models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Both, under the key `subject` of an evaluation's JSON."""
    return {"subject": {"data": about_data(dataset), "models": list(models)}}
