"""What a hundred million photographs need: the rates that decide it, measured here, and the plan that follows from them.

    python -m dualmatch.bench.scale measure BUNDLE PHOTOS --json rates.json
    python -m dualmatch.bench.scale plan rates.json --images 100000000 --machines 20 --cores 64 --price 1.0

`measure` counts processor time and not the clock, so other work on the machine matters little; `--busy` repeats the encoding on
all cores at once, for cores that share caches and memory are slower together. `plan` multiplies, and invents nothing: what it
is not given (machines, cores, prices, bandwidths) is a parameter.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.encode import encode_gallery
from dualmatch.runtime.files import sha256_of_bytes
from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.index import QUARANTINE_FILE, FileRecord, GalleryIndex, Shard, shard_files
from dualmatch.runtime.galleries.sources import photos_in
from dualmatch.runtime.galleries.writer import hash_of

folder = click.Path(path_type=Path, exists=True)
Rates = dict[str, float]


@click.group()
def cli() -> None:
    """Plan for very many photographs."""


@cli.command()
@click.argument("bundle", type=folder)
@click.argument("photos", type=folder)
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--count", default=256, show_default=True, help="Photographs that are encoded.")
@click.option("--rounds", default=3, show_default=True, help="The fastest counts.")
@click.option("--listed", default=200_000, show_default=True, help="Names in the list that is timed.")
@click.option(
    "--shards", default=24_415, show_default=True, help="Of the index that is timed: 100 million rows have 24415."
)
@click.option("--busy/--no-busy", default=True, help="Also on all cores at once.")
@click.option("--json", "out", type=click.Path(path_type=Path), required=True)
def measure(
    bundle: Path,
    photos: Path,
    *,
    backend: str,
    count: int,
    rounds: int,
    listed: int,
    shards: int,
    busy: bool,
    out: Path,
) -> None:
    """Rates of one core: encoding, listing, hashing, and what an index of that size costs."""
    command = [sys.executable, "-m", "dualmatch.bench.scale", "once", str(bundle), str(photos)]
    command += ["--backend", backend, "--count", str(count)]
    alone = [_finished([command])[0] for _ in range(rounds)]
    rates: Rates = max(alone, key=lambda one: one["images_per_cpu_second"])
    cores = len(os.sched_getaffinity(0))
    if busy:
        together = [_finished([command] * cores) for _ in range(rounds)]
        best = max(sum(one["images_per_cpu_second"] for one in round_) / cores for round_ in together)
        rates |= {"busy_cores": cores, "images_per_cpu_second_busy": best}
    rates |= _of_a_list(listed) | _of_an_index(shards, int(rates["dimension"])) | _of_a_graph(int(rates["dimension"]))
    out.write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")
    for name, value in rates.items():
        click.echo(f"{name:<34} {value:14.4g}")


@cli.command(hidden=True)
@click.argument("bundle", type=folder)
@click.argument("photos", type=folder)
@click.option("--backend", default="onnxruntime")
@click.option("--count", default=256)
def once(bundle: Path, photos: Path, *, backend: str, count: int) -> None:
    """Encode `count` photographs with one thread of the backend and one that prepares; print rates."""
    found = [photo.id for photo in photos_in(photos)][:count]
    opened = load_bundle(bundle)
    with tempfile.TemporaryDirectory() as scratch:
        names = Path(scratch, "list.txt")
        names.write_text("".join(f"{(photos / id_).resolve()}\n" for id_ in found), encoding="utf-8")

        def encode(number: int, name: str) -> float:
            names.write_text("".join(f"{(photos / id_).resolve()}\n" for id_ in found[:number]), encoding="utf-8")
            started = time.process_time()
            encode_gallery(opened, names, Path(scratch, name), backend=backend, threads=1, prepare_threads=1)
            return time.process_time() - started

        setup = encode(32, "warm")  # opening the model, and its first run
        seconds = encode(len(found), "gallery") - setup
        index = GalleryIndex.read(Path(scratch, "gallery"))
        line = json.dumps({"row": 99_999_999, "id": f"00000/{found[0]}"})
        photo_bytes = sum((photos / id_).stat().st_size for id_ in found) / len(found)
    rates = {
        "images_per_cpu_second": (len(found) - 32) / seconds,
        "setup_cpu_seconds": setup,
        "dimension": index.dimension,
        "bytes_per_vector": 2 * index.dimension,
        "bytes_per_item": len(line) + 1,
        "bytes_per_photo": photo_bytes,
    }
    click.echo(json.dumps(rates))


def _finished(commands: Sequence[list[str]]) -> list[Rates]:
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]  # noqa: S603  (this module)
    return [json.loads(process.communicate()[0]) for process in running]


def _of_a_list(listed: int) -> Rates:
    """What the one process that lists everything needs for each photograph."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "list.txt")
        path.write_text("".join(f"{row // 1000:05}/{row:09}.jpg\n" for row in range(listed)), encoding="utf-8")
        before, started = _resident(), time.process_time()
        photos = photos_in(path)
        read, held = time.process_time() - started, _resident() - before
        started = time.process_time()
        hash_of(photos)
        hashed = time.process_time() - started
        pickled = len(pickle.dumps(list(photos[:4096])))
    return {
        "list_cpu_seconds_per_million": 1e6 * (read + hashed) / listed,
        "list_bytes_per_photo": held / listed,
        "task_bytes_per_photo": pickled / min(4096, listed),
    }


def _of_an_index(shards: int, dimension: int) -> Rates:
    """Reading the index of that many shards, and opening such a gallery (of one row a shard: sizes are asked for, not read)."""
    import numpy as np

    data = np.zeros(1 << 26, np.uint8).tobytes()
    started = time.process_time()
    sha256_of_bytes(data)
    sha256 = len(data) / (time.process_time() - started)
    from io import BytesIO

    npy = BytesIO()
    np.save(npy, np.ones((1, dimension), np.float16))
    vector, line = npy.getvalue(), b'{"row": 0, "id": "x"}\n'
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        entries = []
        for number in range(shards):
            records = []
            for name, content in zip(shard_files(number), (vector, line), strict=True):
                (out / name).write_bytes(content)
                records.append(FileRecord(file=name, bytes=len(content), sha256=sha256_of_bytes(content)))
            entries.append(Shard(first_row=number, end_row=number + 1, count=1, vectors=records[0], items=records[1]))
        (out / QUARANTINE_FILE).write_bytes(b"")
        index = GalleryIndex(
            kind="images", bundle_path="../b", bundle_hash="0" * 64, dimension=dimension, dtype="float16", batch_size=1,
            rows_per_shard=1, root=None, rows=shards, source_hash="0" * 64, part=(0, shards), shards=tuple(entries),
            quarantine=FileRecord(file=QUARANTINE_FILE, bytes=0, sha256=sha256_of_bytes(b"")),
        )  # fmt: skip
        (out / "index.json").write_text(index.to_json(), encoding="utf-8")
        started = time.perf_counter()
        Gallery.open(out)
        opened = time.perf_counter() - started
        size = (out / "index.json").stat().st_size
    return {"index_shards": shards, "index_bytes": size, "open_seconds": opened, "sha256_bytes_per_second": sha256}


def _of_a_graph(dimension: int, sizes: tuple[int, ...] = (10_000, 40_000)) -> Rates:
    """Building the approximate index (`gallery index`) on one thread, at two sizes, for the rate falls as the graph grows."""
    import numpy as np
    from usearch.index import Index

    from dualmatch.runtime.galleries.ann import BUILD_EFFORT, NEIGHBOURS

    random, rates = np.random.default_rng(0), {}
    centres = random.normal(size=(200, dimension))
    for size in sizes:
        vectors = random.normal(size=(size, dimension)) + 2 * centres[random.integers(0, len(centres), size)]
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        graph = Index(ndim=dimension, metric="ip", dtype="f16", connectivity=NEIGHBOURS, expansion_add=BUILD_EFFORT)
        started = time.process_time()
        graph.add(np.arange(size), vectors, threads=1)
        rates[f"graph_vectors_per_cpu_second_{size}"] = size / (time.process_time() - started)
        rates["graph_bytes_per_vector"] = graph.serialized_length / size
    return rates


def _resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


@cli.command()
@click.argument("rates", type=folder)
@click.option("--images", default=100_000_000, show_default=True)
@click.option("--rate", type=float, help="Photographs per second of one actor, in place of the measured one (a GPU's).")
@click.option("--dimension", type=int, help="Of the vectors, in place of the measured bundle's.")
@click.option("--photo-bytes", type=float, help="Of one photograph as stored, in place of the measured mean.")
@click.option("--machines", default=20, show_default=True)
@click.option("--cores", default=64, show_default=True, help="Of one machine: actors on it.")
@click.option("--price", default=1.0, show_default=True, help="Of one machine for an hour, in any currency.")
@click.option("--storage-price", default=0.02, show_default=True, help="Of a gigabyte for a month.")
@click.option("--request-price", default=0.4, show_default=True, help="Of a million reads from the object store.")
@click.option("--bandwidth", default=20.0, show_default=True, help="Of a searching machine's memory, in GB/s.")
def plan(
    rates: Path, *, images: int, rate: float | None, dimension: int | None, photo_bytes: float | None, **given: float
) -> None:
    """Hours, bytes, and money."""
    for name, value in planned(
        json.loads(rates.read_text(encoding="utf-8")),
        images=images, rate=rate, dimension=dimension, photo_bytes=photo_bytes, **given,
    ).items():  # fmt: skip
        click.echo(f"{name:<52} {value:14,.4g}" if value < 1e4 else f"{name:<52} {value:14,.0f}")


def planned(
    measured: dict[str, Any],
    *,
    images: int,
    rate: float | None,
    dimension: int | None,
    photo_bytes: float | None,
    machines: float,
    cores: float,
    price: float,
    storage_price: float,
    request_price: float,
    bandwidth: float,
) -> Rates:
    """The plan: each line is a product of measured rates and given numbers."""
    each = rate or measured.get("images_per_cpu_second_busy", measured["images_per_cpu_second"])
    bytes_each = photo_bytes or measured["bytes_per_photo"]
    vectors = 2.0 * (dimension or measured["dimension"]) * images
    items = measured["bytes_per_item"] * images
    links = measured["graph_bytes_per_vector"] - 2 * measured["dimension"]
    hours = images / (each * machines * cores) / 3600
    shards = -(-images // 4096)
    return {
        "photographs per second of one actor": each,
        "actor-hours in all": images / each / 3600,
        "hours on the given machines": hours,
        "price of the machines": hours * machines * price,
        "GB of photographs to read": images * bytes_each / 1e9,
        "GB/s that the store must deliver": each * machines * cores * bytes_each / 1e9,
        "price of one read each": images / 1e6 * request_price,
        "GB of the gallery": (vectors + items) / 1e9,
        "price of keeping it a month": (vectors + items) / 1e9 * storage_price,
        "shards": shards,
        "shards finished per second": each * machines * cores / 4096,
        "seconds of work lost with a dead actor, at most": 4096 / each,
        "driver: CPU minutes to list and hash": measured["list_cpu_seconds_per_million"] * images / 1e6 / 60,
        "driver: GB of names": measured["list_bytes_per_photo"] * images / 1e9,
        "driver: GB of tasks in the object store": measured["task_bytes_per_photo"] * images / 1e9,
        "MB of index.json": measured["index_bytes"] / measured["index_shards"] * shards / 1e6,
        "minutes of `gallery check`, one core": (vectors + items) / measured["sha256_bytes_per_second"] / 60,
        "seconds of an exact search, one query": vectors / 1e9 / bandwidth,
        "GB of the approximate index": (vectors + links * images) / 1e9,
    }


if __name__ == "__main__":
    cli()
