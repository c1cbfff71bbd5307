"""Ranking at the size of COCO 5K: recall and re-ranking against research loops, against the bare product, and their memory.

`python -m dualmatch.bench.ranking [--json]`; 5000 images, 25000 captions and 1024 dimensions by default, some minutes and 3 GiB.
Embeddings are random, a caption's near its image's, so that recalls are those of a trained model.

Where two figures make a ratio they were taken in turns, and the ratio is that of the fastest; the raw times are in the JSON. The loops
are what evaluation scripts do, a sort per query and a search in it, in NumPy's default sort; that one breaks ties as it likes, so identity of the
ranks is checked against the same loops with a stable sort, which are not timed.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime import recall, rerank, streaming
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.similarity import similarity_matrix

from .environment import environment, peak_memory_bytes

K1 = 15
Float32 = NDArray[np.float32]
Order = NDArray[np.int64]
Sort = Literal["stable"] | None
MEMORY = ("streaming", "materialised")


def embeddings(images: int, captions_per_image: int, dimension: int) -> tuple[Float32, Float32]:
    """Unit vectors (images, d), (images * captions_per_image, d)."""
    rng = np.random.default_rng(0)
    image_vectors = rng.standard_normal((images, dimension), dtype=np.float32)
    noise = rng.standard_normal((images * captions_per_image, dimension), dtype=np.float32)
    # Cosines of about 0.13 with the own image, against a spread of 0.03 among strangers, at 1024 dimensions.
    caption_vectors = np.repeat(image_vectors, captions_per_image, axis=0) * np.float32(0.13) + noise
    image_vectors /= np.linalg.norm(image_vectors, axis=1, keepdims=True)
    caption_vectors /= np.linalg.norm(caption_vectors, axis=1, keepdims=True)
    return image_vectors, caption_vectors


def loop_recall(similarity: Float32, transposed: Float32, sort: Sort) -> tuple[Order, Order]:
    """0-based ranks, image by image and caption by caption; captions in the order of their images."""
    per_image = len(transposed) // len(similarity)
    ranks_of_images, ranks_of_captions = [], []
    for image, scores in enumerate(similarity):
        order = _descending(scores, sort)
        own = range(image * per_image, (image + 1) * per_image)
        ranks_of_images.append(min(np.where(order == caption)[0][0] for caption in own))
    for caption, scores in enumerate(transposed):
        ranks_of_captions.append(np.where(_descending(scores, sort) == caption // per_image)[0][0])
    return np.array(ranks_of_images), np.array(ranks_of_captions)


def loop_rerank(similarity: Float32, transposed: Float32, sort: Sort) -> Order:
    """Re-ranked captions (images, K1): everything sorted, then a search for each candidate."""
    orders_of_images = [_descending(scores, sort) for scores in similarity]
    orders_of_captions = [_descending(scores, sort) for scores in transposed]
    result = []
    for image, order in enumerate(orders_of_images):
        addresses = [np.where(orders_of_captions[caption] == image)[0][0] for caption in order[:K1]]
        result.append(order[:K1][np.argsort(addresses, kind="stable")])
    return np.array(result)


def _descending(scores: Float32, sort: Sort) -> Order:
    return np.argsort(-scores, kind="stable") if sort == "stable" else np.argsort(scores)[::-1]


def in_turns(rounds: int, **workloads: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each workload in each of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    for _ in range(rounds):
        for name, workload in workloads.items():
            start = time.perf_counter()
            workload()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(images: Float32, captions: Float32, rounds: int, loop_rounds: int) -> dict[str, Any]:
    """Seconds of everything, and whether loops and counting agree."""
    owner = np.repeat(np.arange(len(images)), len(captions) // len(images))
    similarity = similarity_matrix(images, captions)
    product = np.empty_like(similarity)

    def from_embeddings() -> recall.Recall:
        return streaming.evaluate([(images, captions)], caption_image=owner, k1_i2t=K1)

    def materialised() -> recall.Recall:
        matrix = similarity_matrix(images, captions, out=product)
        return recall.evaluate(matrix, caption_image=owner, i2t=lambda part: rerank.i2t(part, K1))

    from_embeddings()
    seconds = in_turns(
        rounds,
        product=lambda: np.matmul(images, captions.T, out=product),
        streamed=from_embeddings,
        materialised=materialised,
        rerank_t2i=lambda: rerank.t2i(similarity, K1),
        streamed_t2i=lambda: streaming.t2i([(images, captions)], K1),
    )
    product = np.empty((0, 0), np.float32)  # half a gigabyte that the loops need
    transposed = np.ascontiguousarray(similarity.T)
    seconds |= in_turns(
        loop_rounds,
        loop_recall=lambda: loop_recall(similarity, transposed, None),
        recall=lambda: recall.evaluate(similarity, caption_image=owner),
        loop_rerank_i2t=lambda: loop_rerank(similarity, transposed, None),
        rerank_i2t=lambda: rerank.i2t(similarity, K1),
    )
    ours, loops = recall.ranks(similarity, owner), loop_recall(similarity, transposed, "stable")
    reranked = rerank.i2t(similarity, K1)
    *streamed, candidates = streaming.ranks([(images, captions)], owner, K1)
    identical = {
        "ranks_as_loops": all(map(np.array_equal, ours, loops)),
        "reranking_as_loops": np.array_equal(reranked, loop_rerank(similarity, transposed, "stable")),
        "streamed_as_matrix": all(map(np.array_equal, streamed, ours))
        and np.array_equal(np.asarray(candidates), reranked),
    }
    return {"seconds": seconds, "identical": identical, "recall": from_embeddings().to_json()}


def memory(folder: Path, how: str) -> dict[str, float]:
    """Bytes of resident memory of a fresh process that evaluates with re-ranking: with its inputs loaded, and at its peak."""
    code = "import sys; from dualmatch.bench.ranking import child; child(*sys.argv[1:])"
    finished = subprocess.run(  # noqa: S603 -- this Python, this file
        [sys.executable, "-c", code, str(folder), how], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise DualmatchError(f"the measuring process failed: {finished.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(finished.stdout)
    return found


def child(folder: str, how: str) -> None:
    """What `memory` runs."""
    images, captions = (np.load(Path(folder) / name) for name in ("images.npy", "captions.npy"))
    owner = np.repeat(np.arange(len(images)), len(captions) // len(images))
    before = peak_memory_bytes()
    if how == "streaming":
        streaming.evaluate([(images, captions)], caption_image=owner, k1_i2t=K1)
    else:
        matrix = similarity_matrix(images, captions)
        recall.evaluate(matrix, caption_image=owner, i2t=lambda part: rerank.i2t(part, K1))
    peak = peak_memory_bytes()
    click.echo(json.dumps({"inputs_loaded": before, "peak": peak, "growth": peak - before}))


def run(num_images: int, captions_per_image: int, dimension: int, rounds: int, loop_rounds: int) -> dict[str, Any]:
    """The whole report, ready for JSON."""
    images, captions = embeddings(num_images, captions_per_image, dimension)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images)
        np.save(Path(folder) / "captions.npy", captions)
        peaks = {how: memory(Path(folder), how) for how in MEMORY}
    found = measure(images, captions, rounds, loop_rounds)
    fastest = {name: min(times) for name, times in found["seconds"].items()}
    matrix_bytes = 4 * len(images) * len(captions)
    return {
        "environment": environment(),
        "size": {"images": len(images), "captions": len(captions), "dimension": dimension, "k1": K1},
        **found,
        "ratios": {
            "loop_recall / recall": fastest["loop_recall"] / fastest["recall"],
            "loop_rerank_i2t / rerank_i2t": fastest["loop_rerank_i2t"] / fastest["rerank_i2t"],
            "streamed / product": fastest["streamed"] / fastest["product"],
            "materialised / product": fastest["materialised"] / fastest["product"],
            "materialised growth / matrix": peaks["materialised"]["growth"] / matrix_bytes,
        },
        "memory": {**peaks, "matrix": matrix_bytes},
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    size, peaks, mebi = report["size"], report["memory"], 2**20
    lines = [
        f"{size['images']} images x {size['captions']} captions, {size['dimension']} dimensions, k1 = {size['k1']}"
    ]
    lines += [f"{name:16} {min(times):8.3f} s   (fastest of {len(times)})" for name, times in report["seconds"].items()]
    lines += [f"{name:30} {ratio:7.2f}" for name, ratio in report["ratios"].items()]
    for how in MEMORY:
        lines.append(
            f"memory, {how}: peak {peaks[how]['peak'] / mebi:.0f} MiB in all, {peaks[how]['growth'] / mebi:.0f} MiB above the loaded "
            f"embeddings (the matrix has {peaks['matrix'] / mebi:.0f} MiB)"
        )
    lines += [
        f"{name.replace('_', ' ')}: {'identical' if same else 'NOT identical'}"
        for name, same in report["identical"].items()
    ]
    return "\n".join([*lines, f"Rsum {report['recall']['rsum']:.1f} ({report['recall']['protocol']['rerank']})"])


@click.command()
@click.option("--images", default=5000, show_default=True)
@click.option("--captions-per-image", default=5, show_default=True)
@click.option("--dimension", default=1024, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Turns of the product and of what is compared with it.")
@click.option(
    "--loop-rounds",
    default=3,
    show_default=True,
    help="Turns of the loops, over all queries, and of what they are compared with.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(images: int, captions_per_image: int, dimension: int, rounds: int, loop_rounds: int, *, as_json: bool) -> None:
    """Time recall and re-ranking against loops and the bare product, and measure their memory."""
    report = run(images, captions_per_image, dimension, rounds, loop_rounds)
    click.echo(json.dumps(report, indent=1) if as_json else table(report))
    # Streamed scores may be rounded otherwise than the matrix's by another BLAS; on the same scores nothing may differ.
    if not (report["identical"]["ranks_as_loops"] and report["identical"]["reranking_as_loops"]):
        raise DualmatchError("the loops and the counting disagree.")


if __name__ == "__main__":
    main()
