"""A Flickr30K-style evaluation from pixels: our runtime (every image once) against eager torch as the authors' loop goes (once per caption).

    python -m dualmatch.bench.evaluation RUN BUNDLE --data DATA --json evaluation.json

Both ways decode, encode and rank all images against all captions. The authors' data loader yields (image, caption) pairs, so each image is
decoded and encoded once for each of its captions, in batches of 128 pairs. That loop takes hours for a large trunk: it is timed on a
stated number of batches, spread over the data, and extrapolated by pairs; `--whole` runs all of it. The ranks compared are those of all
pairs; torch's embeddings for them come from the bundle's own reference, in float32 and each image once, as encoding an image again
changes nothing.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.datasets import Dataset, open_dataset
from dualmatch.runtime.encoders import ImageEncoder, TextEncoder
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.recall import evaluate, ranks
from dualmatch.runtime.reference import read_reference

from .environment import environment
from .torch_baseline import TorchSession, torch_encoders

AUTHORS_BATCH = 128
TIE = 1e-5  # scores closer than this may change places in float32


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, metavar="DATA", help="The data that the bundle was gated on.")
@click.option("--threads", default=2, show_default=True)
@click.option("--batch-size", default=32, show_default=True, help="Images in a batch of our runtime.")
@click.option(
    "--baseline-batches", default=4, show_default=True, help="Batches of 128 pairs of the authors' loop to time."
)
@click.option("--whole", is_flag=True, help="Time all of the authors' loop.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write every figure here.")
def main(
    run: Path,
    bundle: Path,
    *,
    data: str,
    threads: int,
    batch_size: int,
    baseline_batches: int,
    whole: bool,
    out: Path | None,
) -> None:
    """Time both evaluations and compare their ranks."""
    try:
        report = compared(
            run, bundle, open_dataset(data),
            threads=threads, batch_size=batch_size, baseline_batches=None if whole else baseline_batches,
        )  # fmt: skip
    except DualmatchError as error:
        raise SystemExit(f"evaluation: {error}") from None
    if out is not None:
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    click.echo(lines(report))


def compared(
    run: Path, bundle: Path, dataset: Dataset, *, threads: int, batch_size: int, baseline_batches: int | None
) -> dict[str, Any]:
    """Both evaluations' seconds and ranks.

    Raises:
        DualmatchError: the data set is not the one that the bundle was gated on.
    """
    opened = load_bundle(bundle)
    reference = read_reference(opened)
    if [item.content_hash() for item in dataset.items] != list(reference.image_hashes):
        raise DualmatchError(f"data set {dataset.name!r} is not the one that {bundle} was gated on, in its order.")
    owners = np.asarray(dataset.caption_image, dtype=np.int64)
    entries = opened.manifest.encoders

    started = time.perf_counter()
    with ImageEncoder(opened, threads=threads, batch_size=batch_size) as encoder:
        images = encoder.encode_items(dataset.items)
    images_s = time.perf_counter() - started
    with TextEncoder(opened, threads=threads) as text_encoder:
        captions = text_encoder.encode(dataset.captions)
    captions_s = time.perf_counter() - started - images_s
    similarity = images @ captions.T
    recall = evaluate(similarity, caption_image=owners, split=", ".join(dataset.splits))
    ours = time.perf_counter() - started

    pairs = len(owners)
    chosen = _batches(pairs, baseline_batches)
    modules = torch_encoders(run)
    sessions = {name: TorchSession(modules[name], entries[name], threads=threads) for name in ("image", "text")}
    with ImageEncoder(opened) as encoder, TextEncoder(opened) as text_encoder:  # for their pre-processing alone
        _authors_batch(sessions, encoder, text_encoder, dataset, range(2))  # torch's first call allocates
        began = time.perf_counter()
        for batch in chosen:
            _authors_batch(sessions, encoder, text_encoder, dataset, batch)
        timed = time.perf_counter() - began
    timed_pairs = sum(len(batch) for batch in chosen)
    theirs = timed * pairs / timed_pairs
    return {
        "run": run.name,
        "bundle": opened.hash,
        "precision": {name: entry.precision for name, entry in entries.items()},
        "environment": environment(),
        "threads": threads,
        "images": len(dataset.items),
        "captions": pairs,
        "ours_s": {"images": images_s, "captions": captions_s, "all": ours},
        "baseline_s": {"timed": timed, "timed_pairs": timed_pairs, "all": theirs, "extrapolated": timed_pairs < pairs},
        "speedup": theirs / ours,
        "recall": recall.to_json(),
        "ranks": _rank_changes(reference.images @ reference.captions.T, similarity, owners),
    }


def _batches(pairs: int, count: int | None) -> list[range]:
    """The authors' batches, all or evenly spaced ones."""
    whole = [range(start, min(start + AUTHORS_BATCH, pairs)) for start in range(0, pairs, AUTHORS_BATCH)]
    if count is None or count >= len(whole):
        return whole
    return [whole[index * len(whole) // count] for index in range(count)]


def _authors_batch(
    sessions: dict[str, TorchSession], encoder: ImageEncoder, text: TextEncoder, dataset: Dataset, pairs: range
) -> None:
    """One batch of (image, caption) pairs, every image decoded and encoded as often as it occurs."""
    owners, captions = dataset.caption_image, dataset.captions
    items = [dataset.items[owners[pair]] for pair in pairs]
    prepared = [encoder.prepare(item.read_bytes(), item.id) for item in items]
    sessions["image"].run({name: np.stack([one[name] for one in prepared]) for name in prepared[0]})
    sessions["text"].run({"token_ids": text.tokenizer([captions[pair] for pair in pairs])})


def _rank_changes(
    before: NDArray[np.float32], after: NDArray[np.float32], owners: NDArray[np.int64]
) -> dict[str, int | float]:
    """Queries whose rank changed, and those among them that a change of scores below `TIE` cannot explain."""
    moved = unexplained = 0
    for first, second, old, new in zip(
        ranks(before, owners), ranks(after, owners), (before, before.T), (after, after.T), strict=True
    ):
        for query in np.flatnonzero(first != second).tolist():
            moved += 1
            unexplained += float(np.abs(old[query] - new[query]).max()) >= TIE
    return {
        "queries": sum(before.shape),
        "moved": moved,
        "moved_beyond_rounding": unexplained,
        "largest_change_of_a_score": float(np.abs(before - after).max()),
    }


def lines(report: dict[str, Any]) -> str:
    """The report for people."""
    ours, theirs, moved = report["ours_s"], report["baseline_s"], report["ranks"]
    how = (
        f"extrapolated from {theirs['timed_pairs']} pairs in {theirs['timed']:.1f} s"
        if theirs["extrapolated"]
        else "measured"
    )
    return "\n".join(
        [
            f"{report['run']} {report['precision']}, {report['images']} images, {report['captions']} captions, {report['threads']} threads",
            f"our runtime {ours['all']:.1f} s (images {ours['images']:.1f}, captions {ours['captions']:.1f})",
            f"eager torch, every image once per caption: {theirs['all']:.1f} s ({how})",
            f"{report['speedup']:.1f} times faster; Rsum {report['recall']['rsum']:.2f}",
            f"ranks: {moved['moved']} of {moved['queries']} queries moved, {moved['moved_beyond_rounding']} of them by more than rounding",
            f"the largest change of a score is {moved['largest_change_of_a_score']:.1e}; rounding is below {TIE:g}",
        ]
    )


if __name__ == "__main__":
    main()
