"""The model card that goes into a bundle: what the network is, and the recall that was measured before and after export."""

from typing import Any

from dualmatch.runtime.bundle import Manifest
from dualmatch.training.recipe import ForeignRecipe, Recipe


def model_card(manifest: Manifest, recipe: Recipe | ForeignRecipe) -> str:
    """Markdown."""
    rsum = manifest.provenance["val_rsum"]
    chosen = "" if rsum is None else f" Validation Rsum of the checkpoint: {rsum}."
    includes = "**includes the pairs" if isinstance(recipe, Recipe) else "**may include pairs"
    parity = manifest.parity
    comparison = parity["comparison"]
    data = manifest.provenance["data"]
    encoders = "\n".join(
        f"| {name} | `{entry.file}` | {entry.precision} | {', '.join(f'`{spec.name}` {spec.dtype} {list(spec.shape)}' for spec in entry.inputs)} |"
        for name, entry in manifest.encoders.items()
    )
    return f"""# {recipe.name}

{recipe.description or "An image-text retrieval network."}

Two encoders that map photographs and captions to unit vectors of {manifest.embedding_dimension} dimensions; their dot product ranks.

| encoder | file | precision | inputs |
|---|---|---|---|
{encoders}

{_padding(manifest)} Opened and served by `dualmatch.runtime`, without torch.

## Recall before and after export

Measured on data set `{data["name"]}`, splits {", ".join(data["splits"])}, which {includes} that the network was trained on**: it shows
that export kept retrieval, not how well the network generalises.{chosen}

{_recall_table(comparison)}

Verdict: **{parity["verdict"]}** ({parity["reason"]}).
Worst cosine to torch: images {comparison["image_cosine"][0]:.6f}, captions {comparison["caption_cosine"][0]:.6f}.
Same first answer: {comparison["same_first"]:.2f} %; common among the first ten: {comparison["overlap_at_10"]:.2f} %.

`dualmatch runtime verify BUNDLE --data DATA` repeats this on any machine and backend.
"""


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
