"""Approximate indexes of faiss and usearch beside each other: time to build, recall, queries per second: `python -m dualmatch.bench.ann`.

This is what `runtime/galleries/ann.py` was chosen by.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.galleries.ann import BUILD_EFFORT, NEIGHBOURS
from dualmatch.runtime.galleries.export import import_faiss

from .environment import environment
from .search import Embeddings

K, NUM_QUERIES = 10, 500
EFFORTS = (16, 32, 64, 128, 256)
PROBES = (1, 4, 16, 64, 128)

Float32 = NDArray[np.float32]
Search = Callable[[Float32, int], NDArray[np.int64]]


def faiss_hnsw(vectors: Float32, threads: int) -> tuple[Search, tuple[int, ...]]:
    """faiss's graph over float16."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWSQ(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_EFFORT
    index.is_trained = index.storage.is_trained = True
    index.add(vectors)
    return lambda asked, effort: index.search(asked, K, params=faiss.SearchParametersHNSW(efSearch=effort))[1], EFFORTS


def faiss_ivf(vectors: Float32, threads: int) -> tuple[Search, tuple[int, ...]]:
    """faiss's inverted lists over float16, four square roots of the vectors many."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(threads)
    index = faiss.index_factory(
        vectors.shape[1], f"IVF{round(4 * len(vectors) ** 0.5)},SQfp16", faiss.METRIC_INNER_PRODUCT
    )
    index.train(vectors)
    index.add(vectors)
    return lambda asked, probes: index.search(asked, K, params=faiss.SearchParametersIVF(nprobe=probes))[1], PROBES


def usearch_hnsw(vectors: Float32, threads: int) -> tuple[Search, tuple[int, ...]]:
    """usearch's graph over float16, as wide as faiss's (usearch doubles the neighbours at the bottom too)."""
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", connectivity=NEIGHBOURS, expansion_add=BUILD_EFFORT)
    index.add(np.arange(len(vectors)), vectors.astype(np.float16), threads=threads)

    def search(asked: Float32, effort: int) -> NDArray[np.int64]:
        index.expansion_search = effort
        return np.asarray(index.search(asked.astype(np.float16), K, threads=threads).keys).astype(np.int64)

    return search, EFFORTS


INDEXES = {"faiss HNSW float16": faiss_hnsw, "usearch HNSW float16": usearch_hnsw, "faiss IVF float16": faiss_ivf}


@click.command()
@click.option("--vectors", default=100_000, show_default=True)
@click.option("--dimension", default=1024, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the raw results there.")
def main(vectors: int, dimension: int, threads: int, json_file: Path | None) -> None:
    """Build and search approximate indexes over random vectors shaped like embeddings."""
    if os.environ.get("OMP_NUM_THREADS") != str(threads):
        raise click.UsageError(f"start with OMP_NUM_THREADS={threads}, so that every library has as many threads.")
    embeddings = Embeddings(dimension)
    table, queries = embeddings.draw(vectors, 0), embeddings.draw(NUM_QUERIES, 1)
    exact = np.argsort(-(queries @ table.T), axis=1)[:, :K].tolist()
    rows: list[dict[str, Any]] = []
    click.echo(f"{vectors} x {dimension}, {threads} threads, recall@{K} on {NUM_QUERIES} queries")
    for name, build in INDEXES.items():
        started = time.perf_counter()
        search, efforts = build(table, threads)
        seconds = time.perf_counter() - started
        click.echo(f"{name}: built in {seconds:.0f} s")
        for effort in efforts:
            search(queries[:8], effort)
            started = time.perf_counter()
            found = search(queries, effort)
            rate = NUM_QUERIES / (time.perf_counter() - started)
            recall = float(np.mean([len({*a} & {*b}) / K for a, b in zip(exact, found.tolist(), strict=True)]))
            click.echo(f"  effort {effort:3d}: recall {recall:.4f}, {rate:.0f} queries/s")
            rows.append({"index": name, "build_s": seconds, "effort": effort, "recall": recall, "queries_per_s": rate})
    if json_file is not None:
        content = {"vectors": vectors, "dimension": dimension, "threads": threads, "rows": rows}
        write_atomically(json_file, json.dumps({**content, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
