"""The model card that goes into a bundle: what the network is, and the recall that was measured before and after export."""

from typing import Any

from dualmatch.runtime.bundle import Manifest
from dualmatch.training.recipe import Recipe


def model_card(manifest: Manifest, recipe: Recipe) -> str:
    """Markdown."""
    parity = manifest.parity
    comparison = parity["comparison"]
    data = manifest.provenance["data"]
    encoders = "\n".join(
        f"| {name} | `{entry.file}` | {entry.precision} | {', '.join(f'`{spec.name}` {spec.dtype} {list(spec.shape)}' for spec in entry.inputs)} |"
        for name, entry in manifest.encoders.items()
    )
    return f"""# {recipe.name}

{recipe.description or "A DSRAN image-text retrieval network."}

Two encoders that map photographs and captions to unit vectors of {manifest.embedding_dimension} dimensions; their dot product ranks.

| encoder | file | precision | inputs |
|---|---|---|---|
{encoders}

Padding policy: `{manifest.pad_policy}`. Opened and served by `dualmatch.runtime`, without torch.

## Recall before and after export

Measured on data set `{data["name"]}`, splits {", ".join(data["splits"])}, which **includes the pairs that the network was trained on**: it shows
that export kept retrieval, not how well the network generalises. Validation Rsum of the checkpoint: {manifest.provenance["val_rsum"]}.

{_recall_table(comparison)}

Verdict: **{parity["verdict"]}** ({parity["reason"]}).
Worst cosine to torch: images {comparison["image_cosine"][0]:.6f}, captions {comparison["caption_cosine"][0]:.6f}.
Same first answer: {comparison["same_first"]:.2f} %; common among the first ten: {comparison["overlap_at_10"]:.2f} %.

`dualmatch runtime verify BUNDLE --data DATA` repeats this on any machine and backend.
"""


def _recall_table(comparison: dict[str, Any]) -> str:
    rows = ["| | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | Rsum |", "|---|---|---|---|---|---|---|---|"]
    for label, key in (("torch, float32", "before"), ("this bundle", "after")):
        recall = comparison[key]
        cells = [f"{recall[way][cut]:.1f}" for way in ("i2t", "t2i") for cut in ("r1", "r5", "r10")]
        rows.append(f"| {label} | {' | '.join(cells)} | {recall['rsum']:.1f} |")
    return "\n".join(rows)
