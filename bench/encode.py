"""How fast photographs and captions become a gallery, against the bare model on the same batches and against a plain loop.

    python -m dualmatch.bench.encode speed BUNDLE PHOTOS --threads 1 --prepare-threads 1
    python -m dualmatch.bench.encode captions BUNDLE CAPTIONS --threads 1
    python -m dualmatch.bench.encode prepare BUNDLE PHOTOS
    python -m dualmatch.bench.encode memory BUNDLE PHOTOS --counts 1000,10000,50000

Every round times each way once, one after the other, so that a machine that slows down slows all of them; ratios are of medians.
The bare model runs on batches that are ready in memory: what is above it is the cost of reading, preparing and storing. Give the
backend (`--threads`) fewer cores than the machine has: preparing needs the others, on a CPU nothing hides its work.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np

from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.encode import CaptionGalleryEncoder, PhotoGalleryEncoder
from dualmatch.runtime.encoders import ImageEncoder, TextEncoder
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.photos import FilePhoto, FilePhotos, Photo
from dualmatch.runtime.galleries.pipeline import prepared_units
from dualmatch.runtime.galleries.sources import captions_in, photos_in
from dualmatch.runtime.galleries.writer import write_gallery
from dualmatch.runtime.preprocess import Preprocess

MIB = 2**20
folder = click.Path(path_type=Path, exists=True)


@click.group()
def cli() -> None:
    """Measure encoding into a gallery."""


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--backend", default="onnxruntime", show_default=True),
        click.option("--threads", default=1, show_default=True, help="The backend's."),
        click.option("--prepare-threads", default=1, show_default=True),
        click.option("--batch-size", default=32, show_default=True),
        click.option("--count", default=1000, show_default=True, help="Photographs or captions, repeated as needed."),
        click.option("--rounds", default=5, show_default=True),
        click.option("--json", "out", type=click.Path(path_type=Path), help="Write the raw figures here."),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("bundle", type=folder)
@click.argument("photos", type=folder)
@click.option("--loader/--no-loader", default=True, help="Also a plain loop with a torch DataLoader.")
@_shared
def speed(bundle: Path, photos: Path, *, loader: bool, count: int, rounds: int, out: Path | None, **how: Any) -> None:
    """Photographs per second: the bare model, our pipeline, a plain loop."""
    threads, batch_size = how["prepare_threads"], how["batch_size"]
    with (
        ImageEncoder(bundle, backend=how["backend"], threads=how["threads"], batch_size=batch_size) as encoder,
        _repeated(photos, count) as sources,
    ):
        ours = PhotoGalleryEncoder(encoder)
        units = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        ready = [
            batch
            for unit in prepared_units(sources, ours, units, batch_size=batch_size, threads=threads)
            for _, batch in unit.batches
        ]
        encoder.run(ready[0])
        ways: dict[str, Callable[[], object]] = {
            "bare model": lambda: [encoder.run(batch) for batch in ready],
            "pipeline": lambda: _gallery(bundle, sources, ours, how),
        }
        if loader:
            from .encode_loader import loader_batches

            preprocess = encoder.bundle.manifest.preprocessing
            assert preprocess is not None
            paths = [str(source.folder / source.id) for source in sources]
            batches = partial(loader_batches, preprocess, paths, batch_size=batch_size)
            ways["loop, 0 workers"] = lambda: [encoder.run({"pixels": pixels}) for pixels in batches(workers=0)]
            ways[f"loop, {threads} workers"] = lambda: [
                encoder.run({"pixels": pixels}) for pixels in batches(workers=threads)
            ]
        _report(ways, count, rounds, out, how)


@cli.command()
@click.argument("bundle", type=folder)
@click.argument("captions", type=folder)
@_shared
def captions(bundle: Path, captions: Path, *, count: int, rounds: int, out: Path | None, **how: Any) -> None:
    """Captions per second: the bare model on our batches, our pipeline, and a plain loop in the file's order."""
    threads, batch_size = how["prepare_threads"], how["batch_size"]
    texts = [caption for caption in captions_in(captions) if caption.problem is None][:count]
    with TextEncoder(bundle, backend=how["backend"], threads=how["threads"], batch_size=batch_size) as encoder:
        ours = CaptionGalleryEncoder(encoder)
        step = batch_size * ours.window_batches
        units = [range(start, min(start + step, len(texts))) for start in range(0, len(texts), step)]
        ready = [
            batch
            for unit in prepared_units(texts, ours, units, batch_size=batch_size, threads=threads)
            for _, batch in unit.batches
        ]
        encoder.encode_prepared(ready[0])

        def loop() -> None:
            for start in range(0, len(texts), batch_size):
                rows = texts[start : start + batch_size]
                encoder.encode_prepared(encoder.tokenizer.ids([row.text for row in rows]))

        ways: dict[str, Callable[[], object]] = {
            "bare model": lambda: [encoder.encode_prepared(batch) for batch in ready],
            "pipeline": lambda: _gallery(bundle, texts, ours, how),
            "loop in the file's order": loop,
        }
        _report(ways, len(texts), rounds, out, how)


@cli.command()
@click.argument("bundle", type=folder)
@click.argument("photos", type=folder)
@_shared
def prepare(bundle: Path, photos: Path, *, count: int, rounds: int, out: Path | None, **how: Any) -> None:
    """Photographs per second through decoding and pre-processing alone: threads against processes."""
    preprocess = load_bundle(bundle).manifest.preprocessing
    assert preprocess is not None
    cores = len(os.sched_getaffinity(0))
    numbers = sorted({1, 2, 4, 8, 16, cores} & set(range(1, cores + 1)))
    with _repeated(photos, count) as sources:
        paths = [str(source.folder / source.id) for source in sources]
        pools: dict[str, Executor] = {}
        for number in numbers:
            pools[f"{number} threads"] = ThreadPoolExecutor(number)
            pools[f"{number} processes"] = ProcessPoolExecutor(number, mp_context=get_context("spawn"))
        work = partial(_prepared, preprocess)
        for pool in pools.values():  # start every worker
            list(pool.map(work, paths[:64]))
        ways: dict[str, Callable[[], object]] = {"one after another": lambda: [work(path) for path in paths]}
        for name, pool in pools.items():
            ways[name] = partial(_through, pool, work, paths)
        _report(ways, count, rounds, out, how)
        for pool in pools.values():
            pool.shutdown()


@cli.command()
@click.argument("bundle", type=folder)
@click.argument("photos", type=folder)
@click.option("--counts", default="1000,10000,50000", show_default=True)
@_shared
def memory(bundle: Path, photos: Path, *, counts: str, count: int, rounds: int, out: Path | None, **how: Any) -> None:  # noqa: ARG001
    """Peak resident memory of a whole run at several numbers of photographs, each in a process of its own."""
    figures = {}
    for number in map(int, counts.split(",")):
        given = [text for name, value in how.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        with _repeated(photos, number) as sources:
            command = [sys.executable, "-m", "dualmatch.bench.encode", "once", str(bundle), str(sources.folder), *given]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (this module)
        if done.returncode:
            raise DualmatchError(f"the run over {number} photographs failed: {done.stderr.strip()[-300:]}")
        figures[number] = json.loads(done.stdout)
        click.echo(
            f"{number:>8} photographs   peak {figures[number]['peak'] / MIB:7.1f} MiB   before {figures[number]['before'] / MIB:7.1f} MiB"
        )
    peaks = [figure["peak"] for figure in figures.values()]
    click.echo(f"largest over smallest number of photographs: {peaks[-1] / peaks[0]:.3f} times the peak")
    if out is not None:
        out.write_text(json.dumps({"how": how, "bytes": figures}, indent=1) + "\n", encoding="utf-8")


@cli.command(hidden=True)
@click.argument("bundle", type=folder)
@click.argument("photos", type=folder)
@_shared
def once(bundle: Path, photos: Path, *, count: int, rounds: int, out: Path | None, **how: Any) -> None:  # noqa: ARG001
    """One whole run, and what it needed."""
    with ImageEncoder(bundle, backend=how["backend"], threads=how["threads"]) as encoder:
        before = _resident("VmRSS")
        _gallery(bundle, photos_in(photos), PhotoGalleryEncoder(encoder), how)
        click.echo(json.dumps({"before": before, "peak": _resident("VmHWM")}))


def _gallery(bundle: Path, sources: Any, encoder: PhotoGalleryEncoder | CaptionGalleryEncoder, how: Any) -> None:
    with tempfile.TemporaryDirectory() as out:
        write_gallery(
            Path(out) / "gallery",
            sources,
            encoder,
            kind="images" if isinstance(encoder, PhotoGalleryEncoder) else "captions",
            bundle_path=bundle,
            bundle_hash="0" * 64,
            batch_size=how["batch_size"],
            threads=how["prepare_threads"],
        )


@contextmanager
def _repeated(photos: Path, count: int) -> Iterator[FilePhotos]:
    """`count` photographs: links to those of a folder, over and over."""
    found: list[Photo] = list(photos_in(photos))
    with tempfile.TemporaryDirectory() as links:
        names = []
        for number in range(count):
            source = found[number % len(found)]
            assert isinstance(source, FilePhoto)
            names.append(f"{number:07}{source.path.suffix}")
            Path(links, names[-1]).symlink_to(source.path.resolve())
        yield FilePhotos(names, Path(links))


def _prepared(preprocess: Preprocess, path: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return preprocess(Path(path).read_bytes())


def _through(pool: Executor, work: Callable[[str], object], paths: list[str]) -> None:
    for _ in pool.map(work, paths, chunksize=8):
        pass


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _report(ways: dict[str, Callable[[], object]], count: int, rounds: int, out: Path | None, how: Any) -> None:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            rates[name].append(count / (time.perf_counter() - started))
    first = next(iter(ways))
    reference = statistics.median(rates[first])
    for name, measured in rates.items():
        middle = statistics.median(measured)
        click.echo(
            f"{name:<26} {middle:8.1f} /s   ({min(measured):.1f} … {max(measured):.1f})   {middle / reference:5.3f} of {first}"
        )
    if out is not None:
        out.write_text(json.dumps({"count": count, "how": how, "per second": rates}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli()
