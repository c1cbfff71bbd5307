"""One shard of a gallery at a time, on whatever machine: what a Ray actor does, and the record that says a shard is done.

An actor encodes a shard into a folder of its own and then puts it where the gallery is: vectors, items, and last the
record. Two actors that were given the same shard (the first seemed dead) write the same bytes, so nothing is locked.
"""

import os
import pickle
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from .bundle import load_bundle
from .encode import PhotoGalleryEncoder
from .encoders import ImageEncoder
from .errors import DualmatchError
from .galleries.index import QUARANTINE_FILE, GalleryIndex, shard_files
from .galleries.photos import Photo
from .galleries.urls import Folder, folder_at
from .galleries.writer import OnError, write_gallery
from .preprocess import pixel_limit
from .ray_records import Record, attempts_file, plan_in, record_file
from .regions import RegionFile
from .signature import VARIABLE

MAX_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every actor has to know: the bundle and how to run it, and the gallery as it is planned."""

    bundle_path: Path
    bundle_hash: str
    out: str
    plan: GalleryIndex
    backend: str
    threads: int
    prepare_threads: int
    regions: Path | None
    max_pixels: int
    on_error: OnError
    signature_key: str | None

    def rows_of(self, shard: int) -> tuple[int, int]:
        """Source rows [first, end) of a shard."""
        first = shard * self.plan.rows_per_shard
        return first, min(first + self.plan.rows_per_shard, self.plan.rows)

    @property
    def num_shards(self) -> int:
        return -(-self.plan.rows // self.plan.rows_per_shard)


class ShardEncoder:
    """A Ray Data actor: a batch is one shard (`shard`, and its photographs pickled by the driver), the answer is `shard`, `error`, `provider`.

    What is wrong with a bundle, a file or the machine is answered in `error`, with the machine's name: an exception would
    reach the driver without its sentence. The model is loaded at the first shard.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._encoder: ImageEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        shard = int(batch["shard"][0])
        error = provider = ""
        try:
            encoder = self._encoder = self._encoder or _opened(self.job)
            encode_shard(self.job, encoder, shard, pickle.loads(batch["photos"][0]))  # noqa: S301  (of our own driver)
            provider = encoder.provider
        except DualmatchError as trouble:
            error = f"on the Ray worker {socket.gethostname()}: {trouble}"
        return {"shard": [shard], "error": [error], "provider": [provider]}


def encode_shard(job: Job, encoder: ImageEncoder, shard: int, photos: Sequence[Photo]) -> None:
    """Encode one shard's photographs and put its files and then its record where the gallery is.

    Raises:
        DualmatchError: as `write_gallery`; the gallery's place is not there, or cannot be written; three earlier attempts at
            this shard ended with the death of their process.
    """
    folder = folder_at(job.out)
    rows = job.rows_of(shard)
    try:
        _count_attempt(folder, job, shard)
        with tempfile.TemporaryDirectory(prefix="dualmatch-shard-") as scratch, pixel_limit(job.max_pixels):
            part = Path(scratch) / "part"
            write_gallery(
                part,
                _Rows(job.plan.rows, rows[0], photos),
                PhotoGalleryEncoder(encoder),
                kind=job.plan.kind,
                bundle_path=job.bundle_path,
                bundle_hash=job.bundle_hash,
                source_hash=job.plan.source_hash,
                rows=rows,
                batch_size=job.plan.batch_size,
                rows_per_shard=job.plan.rows_per_shard,
                dtype="float16" if job.plan.dtype == "float16" else "float32",
                on_error=job.on_error,
                threads=job.prepare_threads,
            )
            (encoded,) = GalleryIndex.read(part).shards
            names = shard_files(shard)
            for name, record in zip(names, (encoded.vectors, encoded.items), strict=True):
                folder.write(name, (part / record.file).read_bytes())
            named = replace(
                encoded,
                vectors=replace(encoded.vectors, file=names[0]),
                items=replace(encoded.items, file=names[1]),
            )
            quarantine = (part / QUARANTINE_FILE).read_bytes()
        folder.write(record_file(shard), Record(shard=named, quarantine=quarantine).to_json())
    except OSError as error:
        raise DualmatchError(
            f"rows {rows[0]}:{rows[1]} cannot be written to {job.out}: {error.strerror or error}; go on with --resume."
        ) from None


class _Rows(Sequence[Photo]):
    """A whole list of which only the rows from `first` on are at hand."""

    def __init__(self, total: int, first: int, photos: Sequence[Photo]) -> None:
        self.total, self.first, self.photos = total, first, photos

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, index: int) -> Photo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Photo]: ...
    def __getitem__(self, index: int | slice) -> Photo | Sequence[Photo]:
        assert isinstance(index, int)
        return self.photos[index - self.first]


def _opened(job: Job) -> ImageEncoder:
    if job.signature_key is not None:
        os.environ[VARIABLE] = job.signature_key
    try:
        bundle = load_bundle(job.bundle_path)
    except DualmatchError as error:
        raise DualmatchError(f"{error} Every machine of the cluster needs the bundle under this path.") from None
    if bundle.hash != job.bundle_hash:
        raise DualmatchError(
            f"the bundle {job.bundle_path} is another one ({bundle.hash[:12]}) than where the job was started ({job.bundle_hash[:12]}): copy that one there."
        )
    regions = None if job.regions is None else RegionFile(job.regions)
    return ImageEncoder(
        bundle, backend=job.backend, threads=job.threads, batch_size=job.plan.batch_size, regions=regions
    )


def _count_attempt(folder: Folder, job: Job, shard: int) -> None:
    """Note that a shard is begun. Ray starts a dead actor again without end; a photograph that kills its process must not use that."""
    if plan_in(folder) is None:
        raise DualmatchError(f"{job.out} is not there: it must be a folder that all machines share, or a URL.")
    before = len(folder.read(attempts_file(shard)) or b"")
    first, end = job.rows_of(shard)
    if before >= MAX_ATTEMPTS:
        raise DualmatchError(
            f"rows {first}:{end} ended the process that encoded them {before} times (too little memory, or a photograph that crashes a "
            "decoder); find it with --rows and a small --rows-per-shard, or go on with --resume to try again."
        )
    folder.write(attempts_file(shard), b"." * (before + 1))
