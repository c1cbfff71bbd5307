"""`dualmatch runtime rerank`."""

from io import BytesIO
from pathlib import Path
from typing import Any

import click

from .common import existing, json_option, print_json, recall_lines


@click.command("rerank")
@click.argument("sims", type=existing)
@click.option("--direction", type=click.Choice(["i2t", "t2i"]), required=True, help="Which side asks.")
@click.option(
    "--k1", type=click.IntRange(1), default=15, show_default=True, help="Candidates of each query that are re-ranked."
)
@click.option(
    "--through",
    type=existing,
    metavar="CAPTIONS_GALLERY",
    help="With t2i: let a caption's nearest captions ask for it; the gallery SIMS was made from.",
)
@click.option(
    "--k2", type=click.IntRange(1), default=3, show_default=True, help="With --through: how many nearest captions."
)
@click.option(
    "--out", type=existing, metavar="FILE", help="Write the re-ranked candidates, int64 (queries, k1), as .npy."
)
@json_option
def command(
    sims: Path, direction: str, k1: int, through: Path | None, k2: int, out: Path | None, *, as_json: bool
) -> None:
    """Re-rank the best candidates of SIMS by how they rank the query in return (DSRAN section III-G)."""
    import numpy as np

    from dualmatch.runtime import recall, rerank
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.runtime.evaluate import caption_neighbours
    from dualmatch.runtime.files import write_atomically
    from dualmatch.runtime.similarity import load_sims, sims_paths

    if through is not None and direction != "t2i":
        raise click.UsageError("--through is for --direction t2i: captions ask through captions.")
    similarity, info = load_sims(sims)
    if out is not None and out.resolve() in [path.resolve() for path in sims_paths(sims)]:
        raise DualmatchError(f"--out {out} is the similarity matrix itself; give the candidates another file.")
    if direction == "i2t":
        candidates = rerank.i2t(similarity, k1)
    elif through is None:
        candidates = rerank.t2i(similarity, k1)
    else:
        recall.require_k(k1, len(info.image_ids), "images")
        candidates = rerank.t2i_through(similarity, caption_neighbours(through, info, k2), k1)
    if out is not None:
        # Aside and then renamed: SIMS is memory-mapped, and writing over it in place would destroy it.
        data = BytesIO()
        np.save(data, candidates)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data.getvalue())

    recalls = {}
    unnamed = len(info.image_ids) - len(set(info.caption_image or ()))
    if not unnamed:
        image_of = np.asarray(info.caption_image)
        of_images, of_captions = recall.ranks(similarity, image_of)
        facts: dict[str, Any] = {
            "split": info.protocol.get("split"),
            "ensemble": info.protocol.get("ensemble", 1),
        }
        recalls["plain"] = recall.summary([(of_images, of_captions)], image_of, **facts)
        if direction == "i2t":
            facts["k1_i2t"], of_images = k1, recall.reranked_i2t(of_images, candidates, image_of)
        else:
            facts["k1_t2i"], of_captions = k1, recall.reranked_t2i(of_captions, candidates, image_of)
        recalls["reranked"] = recall.summary([(of_images, of_captions)], image_of, **facts)
    if as_json:
        print_json({"queries": len(candidates), "k1": k1, **{name: found.to_json() for name, found in recalls.items()}})
        return
    for name, found in recalls.items():
        click.echo(f"{name}:\n{recall_lines(found)}")
    if info.caption_image is None:
        click.echo("the captions name no images, so there is no recall to report.")
    elif unnamed:
        click.echo(f"{unnamed} of {len(info.image_ids)} images have no caption, so there is no recall to report.")
    if out is not None:
        click.echo(f"{out}: {candidates.shape[0]} queries x {k1} candidates")
