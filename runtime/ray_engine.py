"""`encode-gallery --engine ray`: the shards of a gallery encoded by actors of Ray Data, on one machine or many.

The driver lists the photographs and cuts them where a single run cuts them; an actor encodes a shard and puts it into the
gallery; the driver writes the index when all are there. Until then the gallery has no index, so there is none; what is
finished is known by its record, and `resume` leaves it as it is.
"""

import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .bundle import Bundle
from .errors import DualmatchError
from .files import sha256_of_bytes
from .galleries.index import INDEX_FILE, QUARANTINE_FILE, FileRecord, GalleryIndex, relative
from .galleries.photos import FilePhotos
from .galleries.sources import photos_in, photos_root
from .galleries.store import LOCK_FILE, commit, files_of, is_own, locked, remove_all_but, require_same
from .galleries.urls import Folder, folder_at, is_url, local_path
from .galleries.writer import OnError, Summary, hash_of, planned
from .preprocess import MAX_PIXELS
from .ray_records import RECORDS, Record, attempts_file, index_in, plan_in, record_file
from .ray_shards import Job, ShardEncoder
from .signature import VARIABLE

CPU_BACKENDS = frozenset({"onnxruntime", "openvino"})
PREPARE_THREADS_PER_GPU = 8
OBJECT_STORE_BYTES = 256 * 2**20  # of a cluster on this machine: it holds names of photographs, never pixels


def encode_gallery_on_ray(
    bundle: Bundle,
    photos: str | Path,
    out: str | Path,
    *,
    actors: int | None = None,
    address: str | None = None,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 32,
    dtype: Literal["float16", "float32"] = "float16",
    regions: Path | None = None,
    column: str | None = None,
    max_pixels: int = MAX_PIXELS,
    rows_per_shard: int | None = None,
    prepare_threads: int | None = None,
    resume: bool = False,
    on_error: OnError = "quarantine",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Summary, str]:
    """The gallery that `encode.encode_gallery` makes, byte for byte on the same kind of processor and as many `threads`.

    Args:
        photos: as of `encode_gallery`; what it names must be there for every machine of the cluster.
        out: a folder that all machines share, or a URL that fsspec can write.
        actors: encoders that run at once; by default as many as the cluster has room for.
        address: of a running cluster (`auto`, `host:6379`); by default one is started on this machine and ended with the run.
        threads: of each actor's backend, and the cores that Ray keeps for it; 0 is one. On a GPU an actor takes one GPU.
        prepare_threads: of each actor; by default 1, beside a GPU 8, which Ray then keeps cores for.
        progress: called at the start and after every shard with (rows done, rows in all).

    Returns:
        What was done, and what the encoders really ran on.

    Raises:
        DualmatchError: Ray is not installed or not reached, no room for one actor, and what `encode_gallery` raises.
    """
    sources = photos_in(_absolute(photos), column=column)
    if isinstance(sources, FilePhotos):
        sources.folder = sources.folder.absolute()  # an actor's working directory is its own
    local = None if is_url(out) else local_path(out).absolute()
    root = photos_root(_absolute(photos))
    plan = planned(
        kind="images",
        # In an object store there is nothing to be relative to: a bundle is looked for beside the gallery.
        bundle_path=relative(bundle.path, local) if local else f"../{bundle.path.resolve().name}",
        bundle_hash=bundle.hash,
        dimension=bundle.manifest.embedding_dimension,
        dtype=dtype,
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        root=relative(root, local) if local and root else None,
        total=len(sources),
        source_hash=hash_of(sources),
    )
    on_gpu = backend not in CPU_BACKENDS
    job = Job(
        bundle_path=bundle.path.absolute(),
        bundle_hash=bundle.hash,
        out=str(local or out),
        plan=plan,
        backend=backend,
        threads=threads if on_gpu else max(1, threads),
        prepare_threads=prepare_threads or (PREPARE_THREADS_PER_GPU if on_gpu else 1),
        regions=None if regions is None else regions.absolute(),
        max_pixels=max_pixels,
        on_error=on_error,
        signature_key=os.environ.get(VARIABLE) or None,
    )
    size = _ActorSize(num_cpus=job.prepare_threads if on_gpu else job.threads, num_gpus=int(on_gpu))
    existed = local is not None and local.exists()
    try:
        with nullcontext() if local is None else locked(local):
            return _Run(job, folder_at(job.out), local, progress).run(
                resume=resume,
                encode=lambda missing: _encoded(job, sources, missing, actors=actors, address=address, size=size),
            )
    finally:
        if local is not None and not existed:
            with suppress(OSError):  # not empty: what is finished stays
                local.rmdir()


class _Run:
    """A job's way to a finished gallery; `records` are of the shards that are there."""

    def __init__(
        self, job: Job, folder: Folder, local: Path | None, progress: Callable[[int, int], None] | None
    ) -> None:
        self.job, self.folder, self.local, self.progress = job, folder, local, progress
        self.records: dict[int, Record] = {}
        self.rows_done = 0

    def run(
        self, *, resume: bool, encode: Callable[[list[int]], Generator[dict[str, Any], None, None]]
    ) -> tuple[Summary, str]:
        """Take up what is there, have the rest encoded, and commit."""
        finished = self._begin(resume=resume)
        if finished is not None:
            self.folder.remove(RECORDS)
            return self._summary(finished, finished.rows), "nothing"
        providers: set[str] = set()
        resumed_rows = self.rows_done
        missing = [shard for shard in range(self.job.num_shards) if shard not in self.records]
        try:
            self._report()
            with closing(encode(missing)) as answers:
                for answer in answers:
                    if answer["error"]:
                        raise DualmatchError(answer["error"])
                    self._take(int(answer["shard"]))
                    providers.add(answer["provider"])
                    self._report()
            index = self._commit()
        except BaseException:
            if not self.records:
                self._forget()
            raise
        return self._summary(index, resumed_rows), " and ".join(sorted(providers)) or "nothing"

    def _begin(self, *, resume: bool) -> GalleryIndex | None:
        """Read what an earlier run left; gives the index where it had finished."""
        job, plan = self.job, self.job.plan
        present = self.folder.sizes()
        index, begun = index_in(self.folder, INDEX_FILE), plan_in(self.folder)
        found = begun or index
        if found is None:
            if foreign := sorted(name for name in present if not is_own(name) and name not in (LOCK_FILE, RECORDS)):
                raise DualmatchError(
                    f"{job.out} is no gallery but holds {foreign[0]}; give a path that does not exist yet."
                )
            self.folder.write(f"{RECORDS}/{INDEX_FILE}", plan.to_json().encode())
            return None
        if not resume:
            state, advice = ("finished", "remove it first") if index else ("unfinished", "go on with --resume")
            raise DualmatchError(f"gallery {job.out} exists and is {state}: {advice}, or give another path.")
        require_same(job.out, found, plan)
        if index is not None:
            if not index.complete:
                raise DualmatchError(
                    f"gallery {job.out} was begun without --engine ray: go on with it as it was begun."
                )
            return index
        names = self.folder.sizes(RECORDS)
        for shard in range(job.num_shards):
            if Path(attempts_file(shard)).name in names:
                self.folder.write(attempts_file(shard), b"")
            record = (
                Record.parsed(self.folder.read(record_file(shard))) if Path(record_file(shard)).name in names else None
            )
            if record and all(present.get(one.file) == one.bytes for one in (record.shard.vectors, record.shard.items)):
                self._keep(shard, record)
        return None

    def _take(self, shard: int) -> None:
        record = Record.parsed(self.folder.read(record_file(shard)))
        if record is None:
            raise DualmatchError(
                f"an actor has finished shard {shard} and it is not in {self.job.out}: that must be a folder that all machines share, or a URL."
            )
        self._keep(shard, record)

    def _keep(self, shard: int, record: Record) -> None:
        if self.job.on_error == "fail" and record.quarantine:
            first = record.quarantine.splitlines()[0].decode()
            raise DualmatchError(f"gallery {self.job.out} has an unreadable source already: {first}.")
        self.records[shard] = record
        self.rows_done += record.shard.end_row - record.shard.first_row

    def _commit(self) -> GalleryIndex:
        records = [self.records[shard] for shard in range(self.job.num_shards)]
        quarantine = b"".join(record.quarantine for record in records)
        index = replace(
            self.job.plan,
            shards=tuple(record.shard for record in records),
            quarantine=FileRecord(file=QUARANTINE_FILE, bytes=len(quarantine), sha256=sha256_of_bytes(quarantine)),
        )
        if not index.count:
            self.records = {}
            raise DualmatchError(
                f"none of the {index.rows} sources could be read: {quarantine.splitlines()[0].decode()}."
            )
        self.folder.write(QUARANTINE_FILE, quarantine)
        if self.local is not None:
            # What killed actors were in the middle of writing.
            remove_all_but(self.local, {LOCK_FILE, QUARANTINE_FILE, *files_of(index)})
            commit(self.local, index)
        else:
            self.folder.write(INDEX_FILE, index.to_json().encode())
        self.folder.remove(RECORDS)
        return index

    def _forget(self) -> None:
        """Nothing is finished: leave nothing behind."""
        self.folder.remove(RECORDS)
        if self.local is not None:
            remove_all_but(self.local, {LOCK_FILE})

    def _summary(self, index: GalleryIndex, resumed_rows: int) -> Summary:
        return Summary(
            path=self.local or Path(self.job.out),
            rows=index.rows,
            count=index.count,
            quarantined=index.quarantined,
            resumed_rows=resumed_rows,
        )

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.rows_done, self.job.plan.rows)


@dataclass(frozen=True, kw_only=True)
class _ActorSize:
    num_cpus: int
    num_gpus: int

    def __str__(self) -> str:
        return f"{self.num_cpus} CPU(s)" + (f" and {self.num_gpus} GPU" if self.num_gpus else "")


def _encoded(
    job: Job, sources: Any, missing: list[int], *, actors: int | None, address: str | None, size: _ActorSize
) -> Generator[dict[str, Any], None, None]:
    """What the actors answer, a shard at a time, in no order."""
    if not missing:
        return
    with _cluster(address) as ray:
        import ray.data as ray_data

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # we report ourselves
        context = ray_data.DataContext.get_current()
        context.enable_progress_bars = False
        num_actors = min(len(missing), _num_actors(ray, actors, size, own=address is None))
        tasks = [
            {"shard": shard, "photos": pickle.dumps(list(sources[slice(*job.rows_of(shard))]))} for shard in missing
        ]
        dataset = ray_data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            ShardEncoder,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="numpy",
            # One at a time: a shard takes minutes, and one that waits behind another at the end keeps an actor idle.
            compute=ray_data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=1),
            num_cpus=size.num_cpus,
            num_gpus=size.num_gpus or None,
        )
        try:
            yield from dataset.iter_rows()
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]
            raise DualmatchError(f"the Ray job has failed: {cause}; go on with --resume.") from None


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected: to `address`, to what the caller is connected to already, or to a cluster of this machine's own."""
    # Before Ray is imported, and handed on to what it starts: no reports to its makers, no lines between ours.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError:
        raise DualmatchError(
            "--engine ray needs Ray, which is not installed: pip install 'dualmatch[distributed]'."
        ) from None
    if ray.is_initialized():
        yield ray
        return
    own = {
        "num_cpus": len(os.sched_getaffinity(0)),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    with _same_signals():
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if address is None else {}),
            )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            what = "cannot be started here" if address is None else f"is not reached at {address}"
            raise DualmatchError(f"Ray {what}: {(str(error).splitlines() or ['no reason given'])[0]}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _same_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; ours ends a run after the shard in hand."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _num_actors(ray: Any, asked: int | None, size: _ActorSize, *, own: bool) -> int:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        min(int(node.get("CPU", 0)) // size.num_cpus, int(node.get("GPU", 0)) if size.num_gpus else 2**31)
        for node in nodes
    )
    # A cluster elsewhere may grow when more is asked for; but without any room Ray would wait without a word.
    if room < (asked or 1 if own else 1):
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise DualmatchError(
            f"{asked or 1} actor(s) of {size} each are asked for, and there is room for {room} (nodes: {have}): "
            "lower --actors, --threads or --prepare-threads, or add machines."
        )
    return asked or room


def _absolute(photos: str | Path) -> str:
    return str(photos) if str(photos) == "-" or is_url(photos) else str(local_path(photos).absolute())
