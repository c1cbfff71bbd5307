"""`dualmatch runtime rerank`."""

from functools import partial
from io import BytesIO
from pathlib import Path

import click

from .common import existing, json_option, print_json, recall_lines


@click.command("rerank")
@click.argument("sims", type=existing)
@click.option("--direction", type=click.Choice(["i2t", "t2i"]), required=True, help="Which side asks.")
@click.option(
    "--k1", type=click.IntRange(1), default=15, show_default=True, help="Candidates of each query that are re-ranked."
)
@click.option(
    "--out", type=existing, metavar="FILE", help="Write the re-ranked candidates, int64 (queries, k1), as .npy."
)
@json_option
def command(sims: Path, direction: str, k1: int, out: Path | None, *, as_json: bool) -> None:
    """Re-rank the best candidates of SIMS by how they rank the query in return (DSRAN section III-G)."""
    import numpy as np

    from dualmatch.runtime import rerank
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.runtime.files import write_atomically
    from dualmatch.runtime.recall import evaluate
    from dualmatch.runtime.similarity import load_sims, sims_paths

    similarity, info = load_sims(sims)
    function = {"i2t": rerank.i2t, "t2i": rerank.t2i}[direction]
    if out is not None and out.resolve() in [path.resolve() for path in sims_paths(sims)]:
        raise DualmatchError(f"--out {out} is the similarity matrix itself; give the candidates another file.")
    candidates = function(similarity, k1)
    if out is not None:
        # Aside and then renamed: SIMS is memory-mapped, and writing over it in place would destroy it.
        data = BytesIO()
        np.save(data, candidates)
        write_atomically(out, data.getvalue())
    recalls = {}
    if info.caption_image is not None:
        split = info.protocol.get("split")
        recalls["plain"] = evaluate(similarity, caption_image=info.caption_image, split=split)
        again = partial(function, k1=k1)
        i2t, t2i = (again, None) if direction == "i2t" else (None, again)
        recalls["reranked"] = evaluate(similarity, caption_image=info.caption_image, split=split, i2t=i2t, t2i=t2i)
    if as_json:
        print_json(
            {"queries": len(candidates), "k1": k1, **{name: recall.to_json() for name, recall in recalls.items()}}
        )
        return
    for name, recall in recalls.items():
        click.echo(f"{name}:\n{recall_lines(recall)}")
    if not recalls:
        click.echo("the captions name no images, so there is no recall to report.")
    if out is not None:
        click.echo(f"{out}: {candidates.shape[0]} queries x {k1} candidates")
