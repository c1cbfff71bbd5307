"""The model card that goes into a bundle: what the network is and is for, and the recall that was measured before and after export.

The front matter is what model hubs read (https://huggingface.co/docs/hub/model-cards).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualmatch.runtime.bundle import Manifest
from dualmatch.runtime.files import sha256_of_file
from dualmatch.training.recipe import ForeignRecipe, Recipe

from .metadata import TRAINED, origins

PAPERS = {
    "dsran": "DSRAN: Wen, Gu and Cheng, *Learning Dual Semantic Relations with Graph Attention for Image-Text Matching*, IEEE TCSVT 2020 "
    "([doi:10.1109/TCSVT.2020.3030656](https://doi.org/10.1109/TCSVT.2020.3030656))",
    "vsrn": "VSRN: Li, Zhang, Li, Li and Fu, *Visual Semantic Reasoning for Image-Text Matching*, ICCV 2019 "
    "([arXiv:1909.02701](https://arxiv.org/abs/1909.02701))",
}


def model_card(manifest: Manifest, recipe: Recipe | ForeignRecipe, folder: Path, *, trained_on: str = "") -> str:
    """Markdown with YAML front matter.

    Args:
        folder: where the bundle is being built; its graphs and tokenizer are hashed for the card.
        trained_on: the training data's name.
    """
    parity = manifest.parity
    comparison = parity["comparison"]
    data = manifest.provenance["data"]
    own = isinstance(recipe, Recipe)
    includes = "**includes the pairs" if own else "**may include pairs"
    return f"""{_front_matter(manifest, recipe)}
# {recipe.name}

{recipe.description or "An image-text retrieval network."}

Two encoders that map photographs and captions to unit vectors of {manifest.embedding_dimension} dimensions; their dot product ranks.

| encoder | file | precision | inputs |
|---|---|---|---|
{_encoder_rows(manifest)}

{_quantisation(manifest)}{_padding(manifest)} Opened and served by `dualmatch.runtime`, without torch. {PAPERS.get(manifest.model["name"], "")}

## Intended use

Finding photographs by a sentence, sentences by a photograph, and photographs like another, in a collection of the kind that it was trained on.
The scores rank; they are no probabilities, and no threshold on them was calibrated.

It is not meant to identify people, to judge them, or to decide anything about them; nor to filter content where a miss does harm.

## Training data

{_training_data(manifest, recipe, trained_on)}

## Recall before and after export

Measured on data set `{data["name"]}`, splits {", ".join(data["splits"])}, which {includes} that the network was trained on**: it shows
that export kept retrieval, not how well the network generalises.{_validation(manifest)}

{_recall_table(comparison)}

Protocol: {_protocol(comparison["before"]["protocol"])}.

Verdict: **{parity["verdict"]}** ({parity["reason"]}).
Worst cosine to torch: images {comparison["image_cosine"][0]:.6f}, captions {comparison["caption_cosine"][0]:.6f}.
Same first answer: {comparison["same_first"]:.2f} %; common among the first ten: {comparison["overlap_at_10"]:.2f} %.

`dualmatch runtime verify BUNDLE --data DATA` repeats this on any machine and backend.

## Limitations

- Measured on {comparison["before"]["protocol"]["images"]} images: a larger collection has more that looks alike, and recall there is lower.
- Captions in other words, styles or languages than the training captions', and photographs of other kinds, retrieve worse; by how much was not measured.
- Whatever its training captions and pretrained parts hold of stereotypes about people, it ranks by.
{_caption_limit(manifest)}

## How to use

```
pip install 'dualmatch[cpu]'
dualmatch runtime encode-gallery BUNDLE PHOTOS --out GALLERY
dualmatch runtime search GALLERY --text "two dogs on a beach"
```

```python
from dualmatch.runtime import ImageEncoder, TextEncoder

with ImageEncoder("BUNDLE") as images, TextEncoder("BUNDLE") as captions:
    scores = captions.encode(["two dogs on a beach"]) @ images.encode(["beach.jpg"]).T
```

## Licence

{_licences(manifest)}

What dualmatch does not know it does not guess: settle it before you publish or sell these weights.

## Files

The manifest lists SHA-256 and size of every file, and `dualmatch` opens none that differs.

| file | SHA-256 |
|---|---|
{_hash_rows(manifest, folder)}

Checkpoint: SHA-256 `{manifest.provenance["checkpoint_sha256"]}`. Made with {", ".join(f"{name} {version}" for name, version in manifest.provenance["versions"].items())}.
"""


def _front_matter(manifest: Manifest, recipe: Recipe | ForeignRecipe) -> str:
    """YAML; every text is written as JSON, which YAML reads."""
    tags = ["image-text-retrieval", "cross-modal-retrieval", manifest.model["name"], "onnx"]
    lines = [
        "---",
        "library_name: dualmatch",
        "pipeline_tag: feature-extraction",
        "license: other",
        "license_name: see-the-card",
        "license_link: README.md",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    rsum = manifest.provenance["val_rsum"]
    if rsum is not None:
        lines += [
            "model-index:",
            f"- name: {json.dumps(recipe.name)}",
            "  results:",
            "  - task:",
            "      type: image-text-retrieval",
            "    dataset:",
            f"      name: {json.dumps('validation split of the training data')}",
            "      type: custom",
            "      split: validation",
            "    metrics:",
            "    - type: rsum",
            "      name: Rsum of the epoch that was chosen by it",
            f"      value: {float(rsum)}",
        ]
    return "\n".join([*lines, "---", ""])


def _encoder_rows(manifest: Manifest) -> str:
    return "\n".join(
        f"| {name} | `{entry.file}` | {entry.precision} | {', '.join(f'`{spec.name}` {spec.dtype} {list(spec.shape)}' for spec in entry.inputs)} |"
        for name, entry in manifest.encoders.items()
    )


def _training_data(manifest: Manifest, recipe: Recipe | ForeignRecipe, trained_on: str) -> str:
    if not isinstance(recipe, Recipe):
        return "As the authors of the checkpoint describe it in their paper; the checkpoint itself does not say."
    name = f"`{trained_on}`" if trained_on else "the run's data set"
    train, val = ", ".join(recipe.data.train_splits), ", ".join(recipe.data.val_splits)
    parts = [one for one in origins(manifest) if one.source != TRAINED]
    pretrained = "".join(f" Its {one.part} is pretrained: {one.source}." for one in parts)
    return f"Splits {train} of {name}; the epoch was chosen on {val}.{pretrained}"


def _validation(manifest: Manifest) -> str:
    rsum = manifest.provenance["val_rsum"]
    return "" if rsum is None else f" Validation Rsum of the checkpoint: {rsum}."


def _protocol(protocol: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in protocol.items())


def _caption_limit(manifest: Manifest) -> str:
    options = manifest.tokenizer
    limit = options.fixed_length or options.max_length
    return (
        f"- Captions are cut at {limit} tokens."
        if limit
        else "- Captions of any length are taken; long ones were not measured."
    )


def _licences(manifest: Manifest) -> str:
    return "\n".join(f"- {one.part} ({one.source}): {one.licence}." for one in origins(manifest))


def _hash_rows(manifest: Manifest, folder: Path) -> str:
    graphs = [file for entry in manifest.encoders.values() for file in (entry.file, entry.engine_graph)]
    names = dict.fromkeys([*graphs, "tokenizer.json"])
    return "\n".join(f"| `{name}` | `{sha256_of_file(folder / name)}` |" for name in names)


def _quantisation(manifest: Manifest) -> str:
    """How int8 was made, and the layers that stay in float32."""
    paragraphs = []
    for name, entry in manifest.encoders.items():
        if not (facts := entry.quantisation):
            continue
        excluded = facts["excluded"]
        left_out = (
            f"{len(excluded)} stay in float32, the most sensitive first: "
            + ", ".join(f"`{one['layer']}` (noise {one['noise']:.2g})" for one in excluded)
            if excluded
            else "none stays in float32"
        )
        by_engine = len(facts.get("engine_excluded", excluded))
        if by_engine > len(excluded):
            left_out += f"; in the graph for TensorRT, whose codes are coarser, {'all' if by_engine == facts['layers'] else by_engine} stay in float32"
        paragraphs.append(
            f"The {name} encoder is int8: {facts['scheme']}. Ranges from {facts['calibration_items']} items of `{facts['calibration']['name']}`, "
            f"clipped at the {facts['percentile']:g}th percentile{', loud channels smoothed' if facts.get('smoothed') else ''}. Of its {facts['layers']} layers {left_out}.\n\n"
        )
    return "".join(paragraphs)


def _padding(manifest: Manifest) -> str:
    fixed = manifest.tokenizer.fixed_length
    chosen = f"Padding policy: `{manifest.pad_policy}`{f', captions of exactly {fixed} tokens' if fixed else ''}."
    trained = manifest.provenance.get("reference_padding")
    if trained is None:
        return chosen
    length = (
        f"to {trained['fixed_length']} tokens"
        if trained["fixed_length"]
        else f"in batches of {trained['caption_batch']}"
    )
    return f"{chosen} The network was trained with `{trained['pad_policy']}` {length}: the table below says what the change costs."


def _recall_table(comparison: dict[str, Any]) -> str:
    rows = ["| | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | Rsum |", "|---|---|---|---|---|---|---|---|"]
    for label, key in (("torch, float32", "before"), ("this bundle", "after")):
        recall = comparison[key]
        cells = [f"{recall[way][cut]:.1f}" for way in ("i2t", "t2i") for cut in ("r1", "r5", "r10")]
        rows.append(f"| {label} | {' | '.join(cells)} | {recall['rsum']:.1f} |")
    return "\n".join(rows)
