"""Exact search over a large gallery against faiss and usearch on the same vectors, in one run: `python -m dualmatch.bench.search FOLDER`.

Writes a gallery of random unit vectors around a few thousand centres into FOLDER (2 GB for a million of 1024 dimensions; an
existing one is used again), then times top-10 for 1 and 64 queries, and what the memory and a bare matrix product allow.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.files import sha256_of_bytes, write_atomically
from dualmatch.runtime.galleries.exact import ENGINES
from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.index import QUARANTINE_FILE, FileRecord, GalleryIndex, Shard
from dualmatch.runtime.galleries.store import commit, write_shard

from .environment import environment

LATENT, CENTRES, SEED = 48, 2000, 0
ROWS_PER_SHARD = 4096
K = 10
FAISS_BLOCK = 20_000  # vectors handed to faiss at a time
Float32 = NDArray[np.float32]


class Embeddings:
    """Unit vectors like a network's: few directions carry most of it, items gather around centres, some noise in all directions."""

    def __init__(self, dimension: int) -> None:
        generator = np.random.default_rng(SEED)
        self.directions = generator.standard_normal((LATENT, dimension), dtype=np.float32)
        self.centres = generator.standard_normal((CENTRES, LATENT), dtype=np.float32)

    def draw(self, count: int, seed: int) -> Float32:
        """float32 (count, dimension)."""
        generator = np.random.default_rng([SEED, seed])
        latent = self.centres[generator.integers(0, CENTRES, count)]
        latent = latent + np.float32(0.7) * generator.standard_normal(latent.shape, dtype=np.float32)
        drawn = latent @ self.directions
        drawn += np.float32(0.5) * generator.standard_normal(drawn.shape, dtype=np.float32)
        return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float32)


def write_random_gallery(
    out: Path, count: int, dimension: int, *, bundle: tuple[Path, str] = (Path("none"), "0" * 64)
) -> Gallery:
    """A gallery of `count` random float16 embeddings, as `encode-gallery` would have left it; one that is there is opened.

    Args:
        out: the gallery.
        count, dimension: of the vectors.
        bundle: path and hash to record, so that a command can search it with a real encoder.
    """
    if (out / "index.json").exists():
        gallery = Gallery.open(out)
        assert (len(gallery), gallery.dimension) == (count, dimension), f"{out} holds something else"
        return gallery
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / QUARANTINE_FILE, b"")
    embeddings, shards = Embeddings(dimension), []
    for number, first in enumerate(range(0, count, ROWS_PER_SHARD)):
        rows = range(first, min(first + ROWS_PER_SHARD, count))
        lines = [json.dumps({"row": row, "id": f"{row // 1000:04}/{row:08}.jpg"}).encode() for row in rows]
        records = write_shard(out, number, embeddings.draw(len(rows), number).astype(np.float16), lines)
        shards.append(Shard(first_row=first, end_row=rows.stop, count=len(rows), vectors=records[0], items=records[1]))
    index = GalleryIndex(
        kind="images", bundle_path=str(bundle[0]), bundle_hash=bundle[1], dimension=dimension, dtype="float16",
        batch_size=32, rows_per_shard=ROWS_PER_SHARD, root="../photos", rows=count, part=(0, count),
        source_hash="0" * 64, shards=tuple(shards),
        quarantine=FileRecord(file=QUARANTINE_FILE, bytes=0, sha256=sha256_of_bytes(b"")),
    )  # fmt: skip
    commit(out, index)
    return Gallery.open(out)


def in_turns(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each work, the median of `repeats` runs, taken in turns after one run each to warm up."""
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in taken.items()}


def flat_float32(gallery: Gallery, _threads: int) -> Callable[[Float32], Any]:
    """faiss's flat index in float32: twice the gallery's bytes."""
    import faiss

    index = faiss.IndexFlatIP(gallery.dimension)
    for _, block in gallery.blocks(FAISS_BLOCK):
        index.add(block)
    return lambda queries: index.search(queries, K)[1]


def scalar_float16(gallery: Gallery, _threads: int) -> Callable[[Float32], Any]:
    """faiss's scalar quantiser to float16, searched exhaustively."""
    import faiss

    index = faiss.IndexScalarQuantizer(gallery.dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True  # float16 has nothing to learn
    for _, block in gallery.blocks(FAISS_BLOCK):
        index.add(block)
    return lambda queries: index.search(queries, K)[1]


def usearch_float16(gallery: Gallery, threads: int) -> Callable[[Float32], Any]:
    """usearch's exact search over one float16 array."""
    from usearch.index import MetricKind, search

    vectors = np.concatenate([gallery.stored(number) for number in range(len(gallery.index.shards))])
    return lambda queries: search(
        vectors, queries.astype(np.float16), K, MetricKind.IP, exact=True, threads=threads
    ).keys.astype(np.int64)


OTHERS = {
    "faiss flat float32": flat_float32,
    "faiss scalar float16": scalar_float16,
    "usearch exact float16": usearch_float16,
}


def compare(gallery: Gallery, numbers: Sequence[int], threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Both of our engines beside each other library, in turns (many queries a third as often); and whether it found the same."""
    for name, build in OTHERS.items():
        theirs = build(gallery, threads)
        for num_queries in numbers:
            queries = Embeddings(gallery.dimension).draw(num_queries, 10**6)
            works: dict[str, Callable[[], Any]] = {
                f"dualmatch, {engine}": partial(gallery.search, queries, K, engine=engine, threads=threads)
                for engine in ENGINES
            }
            seconds = in_turns({**works, name: partial(theirs, queries)}, repeats if num_queries == 1 else repeats // 3)
            found, reference = np.asarray(theirs(queries)).reshape(num_queries, -1), gallery.search(queries, K)[1]
            overlap = float(
                np.mean([len({*a} & {*b}) / K for a, b in zip(found.tolist(), reference.tolist(), strict=True)])
            )
            yield {
                "other": name,
                "queries": num_queries,
                "seconds": seconds,
                "same_top10": overlap,
                "chosen": gallery.engine_for(num_queries),
            }
        del theirs


def ceilings(gallery: Gallery, threads: int, repeats: int) -> dict[str, float]:
    """What the machine gives: bytes per second of this gallery read by as many threads, and float32 operations per second of a product."""
    words = [gallery.stored(number).view(np.uint64) for number in range(len(gallery.index.shards))]
    big = np.ones((2048, 2048), dtype=np.float32)
    with ThreadPoolExecutor(threads) as pool:
        seconds = in_turns({"read": lambda: list(pool.map(np.max, words)), "product": lambda: big @ big}, repeats)
    return {"bytes_per_s": gallery_bytes(gallery) / seconds["read"], "flops": 2 * 2048**3 / seconds["product"]}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--vectors", default=1_000_000, show_default=True)
@click.option("--dimension", default=1024, show_default=True)
@click.option("--queries", "numbers", multiple=True, default=(1, 64), show_default=True, help="At once.")
@click.option("--threads", default=2, show_default=True, help="Of every library; OMP_NUM_THREADS must say the same.")
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(3))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the raw results there.")
def main(
    folder: Path,
    *,
    vectors: int,
    dimension: int,
    numbers: tuple[int, ...],
    threads: int,
    repeats: int,
    json_file: Path | None,
) -> None:
    """Time exact search over a gallery of random vectors in FOLDER."""
    if os.environ.get("OMP_NUM_THREADS") != str(threads):  # BLAS reads it once, at start
        raise click.UsageError(f"start with OMP_NUM_THREADS={threads}, so that every library has as many threads.")
    gallery = write_random_gallery(folder / f"gallery-{vectors}x{dimension}", vectors, dimension)
    limits = ceilings(gallery, threads, repeats)
    click.echo(
        f"{vectors} x {dimension} float16, top {K}, {threads} threads, median of {repeats} rounds taken in turns"
    )
    click.echo(
        f"memory read {limits['bytes_per_s'] / 1e9:.1f} GB/s, float32 product {limits['flops'] / 1e9:.0f} GFLOP/s"
    )
    rows = []
    for row in compare(gallery, numbers, threads, repeats):
        rows.append(row)
        seconds = row["seconds"]
        ours, theirs = seconds[f"dualmatch, {row['chosen']}"], seconds[row["other"]]
        parts = ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items())
        click.echo(
            f"{row['queries']:3d} queries: {parts}; chosen {row['chosen']}: {theirs / ours:.2f} times as fast, "
            f"{gallery_bytes(gallery) / ours / limits['bytes_per_s']:.0%} of memory read, "
            f"{2 * row['queries'] * vectors * dimension / ours / limits['flops']:.0%} of the product, "
            f"same top {K}: {row['same_top10']:.1%}"
        )
    if json_file is not None:
        content = {"vectors": vectors, "dimension": dimension, "threads": threads, "limits": limits, "rows": rows}
        write_atomically(json_file, json.dumps({**content, "environment": environment()}, indent=1) + "\n")


def gallery_bytes(gallery: Gallery) -> int:
    """Bytes of its vectors."""
    return sum(shard.vectors.bytes for shard in gallery.index.shards)


if __name__ == "__main__":
    main()
