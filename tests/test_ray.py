"""`encode-gallery --engine ray` on a local cluster of two cores: the bytes of one process, whatever dies on the way; and object stores."""

import gzip
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.encode import encode_gallery
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.photos import SourceGoneError
from dualmatch.runtime.galleries.sources import photos_in
from dualmatch.runtime.galleries.urls import UrlFolder

from .demo_fixture import dualmatch, one_sentence

SHAPE = {"threads": 1, "batch_size": 2, "rows_per_shard": 4}
OPTIONS = ("--threads", 1, "--batch-size", 2, "--rows-per-shard", 4)
NUM_PHOTOS, BAD = 46, {5, *range(12, 16), 45}  # rows 12 to 15 are a whole shard


@pytest.fixture(scope="module")
def cluster():
    """Two cores, no dashboard, no reports to anyone, a small object store."""
    pytest.importorskip("fsspec")
    ray = pytest.importorskip("ray")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False
        )
        yield ray
        ray.shutdown()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory, demo):
    """A bundle, photographs that take long enough to be interrupted in, some of them damaged, and the gallery of one process."""
    root = tmp_path_factory.mktemp("ray")
    bundle = shutil.copytree(demo.bundle, root / "bundle")
    (root / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    for row in range(NUM_PHOTOS):
        path = root / "photos" / f"{row:03}.png"
        Image.fromarray(np.roll(noise, row * 16, axis=0)).save(path, compress_level=1)
        if row in BAD:
            path.write_bytes(path.read_bytes()[:2000])
    encode_gallery(load_bundle(bundle), root / "photos", root / "plain", **SHAPE)
    return root


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_ray(place, out, **options):
    from dualmatch.runtime.ray_engine import encode_gallery_on_ray

    photos = options.pop("photos", place / "photos")
    bundle = options.pop("bundle", None) or load_bundle(place / "bundle")
    return encode_gallery_on_ray(bundle, photos, out, **SHAPE | options)


def workers():
    """Process ids of the actors."""
    psutil = pytest.importorskip("psutil")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "".join(process.cmdline()).startswith("ray::MapWorker(MapBatches(ShardEncoder))"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_command_gives_the_bytes_of_one_process(cluster, place):
    done = dualmatch(
        "runtime", "encode-gallery", place / "bundle", place / "photos", "--out", place / "ray",
        *OPTIONS, "--engine", "ray", "--actors", 2, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["count"]) == (NUM_PHOTOS, NUM_PHOTOS - len(BAD))
    assert {int(entry["id"][:3]) for entry in done.json["quarantined"]} == BAD
    assert done.json["provider"] == "CPUExecutionProvider"
    assert contents(place / "ray") == contents(place / "plain")
    Gallery.open(place / "ray").check()


def test_a_killed_actor_is_replaced_and_the_bytes_stay_the_same(cluster, place):
    begun_twice, kills = set(), []
    records = place / "killed" / "ray-shards"

    def begun():
        return {path.stem: path.stat().st_size for path in records.glob("*.attempts")}

    def kill(done, _total):
        begun_twice.update(shard for shard, times in begun().items() if times > 1)
        if not done or begun_twice or len(kills) > 4:
            return
        alive, deadline = workers(), time.monotonic() + 20
        # In the middle of a shard: it is begun and not finished (the one that is all damaged takes no time).
        while not begun().keys() - {path.stem for path in records.glob("*.json")} - {"00003"}:
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        for process in alive:
            process.kill()
        kills.append(len(alive))

    summary, _ = on_ray(place, place / "killed", actors=2, progress=kill)
    assert sum(kills)
    assert begun_twice, "no actor was in the middle of a shard"
    assert summary.resumed_rows == 0
    assert contents(place / "killed") == contents(place / "plain")


def test_after_the_driver_was_killed_a_resumed_run_keeps_what_is_finished(cluster, place):
    out = place / "resumed"
    command = [
        Path(sys.executable).with_name("dualmatch"),
        "runtime",
        "encode-gallery",
        place / "bundle",
        place / "photos",
    ]
    command += ["--out", out, *OPTIONS, "--engine", "ray", "--actors", 1]
    driver = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(out.glob("ray-shards/*.json"))) < 4:  # the plan and three shards
        assert driver.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert not (out / "index.json").exists()
    with pytest.raises(DualmatchError, match="unfinished: go on with --resume"):
        on_ray(place, out)
    with pytest.raises(DualmatchError, match="another number of rows per shard"):
        on_ray(place, out, resume=True, rows_per_shard=8)
    time.sleep(1)  # its actor ends with its cluster; what it still writes are the same bytes
    finished = [path.stem for path in out.glob("ray-shards/0*.json")]
    torn = out / "ray-shards" / f"{finished[0]}.json"
    torn.write_bytes(torn.read_bytes()[:-9])
    (out / f"vectors-{finished[1]}.npy").write_bytes(b"cut")
    kept = {name: (out / f"vectors-{name}.npy").stat().st_mtime_ns for name in finished[2:]}
    summary, _ = on_ray(place, out, resume=True)
    assert summary.resumed_rows == 4 * len(kept) > 0
    assert {name: (out / f"vectors-{name}.npy").stat().st_mtime_ns for name in kept} == kept
    assert contents(out) == contents(place / "plain")
    assert on_ray(place, out, resume=True)[0].resumed_rows == NUM_PHOTOS  # nothing to do: not even a model is loaded


def test_what_an_actor_cannot_do_comes_back_as_a_sentence(cluster, place, tmp_path):
    moved = load_bundle(shutil.copytree(place / "bundle", tmp_path / "bundle"))
    (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    with pytest.raises(
        DualmatchError, match=r"on the Ray worker .*bundle.*Every machine of the cluster needs the bundle"
    ):
        on_ray(place, tmp_path / "g", bundle=moved)
    assert not (tmp_path / "g").exists()
    with pytest.raises(DualmatchError, match=r"cannot read 005.png \(row 5\): .*truncated"):
        on_ray(place, tmp_path / "g", on_error="fail", actors=1)


def test_more_actors_than_fit_are_refused(cluster, place, tmp_path):
    with pytest.raises(DualmatchError, match=r"3 actor\(s\) of 1 CPU\(s\) each .* room for 2 .*lower --actors"):
        on_ray(place, tmp_path / "g", actors=3)
    assert not (tmp_path / "g").exists()


def test_archives_and_gallery_in_an_object_store(cluster, place, tmp_path):
    """`local://` stands for a store: its files are reached through fsspec alone, by every process."""
    rows = range(NUM_PHOTOS)
    for number, chosen in enumerate((rows[:20], rows[20:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for row in chosen:
                tar.add(place / "photos" / f"{row:03}.png", f"{row:03}.png")
    url = f"local://{tmp_path}"
    summary, _ = on_ray(place, f"{url}/g", photos=f"{url}/{{0,1}}.tar")
    assert summary.quarantined == len(BAD)
    written, expected = contents(tmp_path / "g"), contents(place / "plain")
    assert {n: d for n, d in written.items() if n[0] == "v"} == {n: d for n, d in expected.items() if n[0] == "v"}
    index, ids = json.loads(written["index.json"]), [item.id for item in Gallery.open(tmp_path / "g").items]
    assert (index["source"]["root"], index["bundle"]["path"]) == (None, "../bundle")
    assert ids == [f"{int(row >= 20)}.tar/{row:03}.png" for row in rows if row not in BAD]
    Gallery.open(tmp_path / "g").check()
    assert "ray-shards" not in written


# Without a cluster.


def test_without_ray_the_extra_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = dualmatch(
        "runtime", "encode-gallery", place / "bundle", place / "photos", "--out", tmp_path / "g", "--engine", "ray"
    )
    assert one_sentence(done.err)
    assert "pip install 'dualmatch[distributed]'" in done.err
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--actors", 2), "belong to --engine ray"),
        (("--engine", "ray", "--rows", "0:4"), "splits the rows itself"),
        (("--out", "s3://bucket/g"), "--engine ray` writes to object stores"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(place, tmp_path, arguments, message):
    done = dualmatch(
        "runtime", "encode-gallery", place / "bundle", place / "photos", "--out", tmp_path / "g", *arguments
    )
    assert (done.code, message in done.err) == (2, True)


def test_a_gallery_begun_by_one_engine_is_not_taken_up_by_the_other(place, tmp_path):
    def stop(done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_gallery(load_bundle(place / "bundle"), place / "photos", tmp_path / "g", progress=stop, **SHAPE)
    with pytest.raises(DualmatchError, match="was begun without --engine ray"):
        on_ray(place, tmp_path / "g", resume=True)
    (tmp_path / "h" / "ray-shards").mkdir(parents=True)
    with pytest.raises(DualmatchError, match="holds ray-shards"):
        encode_gallery(load_bundle(place / "bundle"), place / "photos", tmp_path / "h", resume=True, **SHAPE)


def test_a_shard_that_ends_its_process_again_and_again_is_given_up(place, tmp_path):
    from dualmatch.runtime.encoders import ImageEncoder
    from dualmatch.runtime.galleries.index import GalleryIndex
    from dualmatch.runtime.ray_shards import Job, encode_shard

    bundle = load_bundle(place / "bundle")
    plan = GalleryIndex.read(place / "plain")
    job = Job(
        bundle_path=bundle.path, bundle_hash=bundle.hash, out=str(tmp_path), plan=plan, backend="onnxruntime", threads=1,
        prepare_threads=1, regions=None, max_pixels=10**6, on_error="quarantine", signature_key=None,
    )  # fmt: skip
    photos = list(photos_in(place / "photos")[4:8])
    with ImageEncoder(bundle, threads=1) as encoder:
        with pytest.raises(DualmatchError, match="a folder that all machines share"):
            encode_shard(job, encoder, 1, photos)
        (tmp_path / "ray-shards").mkdir()
        (tmp_path / "ray-shards" / "index.json").write_text(plan.to_json())
        for _ in range(4):
            encode_shard(job, encoder, 1, photos)
            (tmp_path / "ray-shards" / "00001.json").unlink()  # as if it had died before its record
        with pytest.raises(DualmatchError, match=r"rows 4:8 ended the process that encoded them 4 times"):
            encode_shard(job, encoder, 1, photos)
    assert (tmp_path / "vectors-00001.npy").read_bytes() == (place / "plain" / "vectors-00001.npy").read_bytes()


@pytest.fixture
def memory(place):
    """fsspec's store in memory with a list: ten photographs, of which one is damaged, one empty and one missing."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for row in range(8):
        files.pipe_file(f"/bucket/photos/{row:03}.png", (place / "photos" / f"{row:03}.png").read_bytes())
    files.pipe_file("/bucket/photos/empty.png", b"")
    lines = [f"photos/{row:03}.png" for row in range(7)] + [
        "memory://bucket/photos/007.png",
        "photos/empty.png",
        "photos/lost.png",
    ]
    files.pipe_file("/bucket/list.txt", "\n".join(lines).encode())
    yield files
    files.rm("/bucket", recursive=True)


def test_a_list_in_an_object_store(memory, place, tmp_path):
    encode_gallery(load_bundle(place / "bundle"), "memory://bucket/list.txt", tmp_path / "g", **SHAPE)
    gallery = Gallery.open(tmp_path / "g")
    assert [(one.row, one.reason) for one in gallery.quarantine] == [
        (5, Gallery.open(place / "plain").quarantine[0].reason),
        (8, "it is empty"),
        (9, "No such file or directory"),
    ]
    assert np.array_equal(gallery.vectors(), Gallery.open(place / "plain").vectors()[:7])
    assert gallery.items[-1].id == "memory://bucket/photos/007.png"
    assert not gallery.has_photos(0)


def test_trouble_of_the_store_is_not_a_photographs(memory, monkeypatch):
    photo = photos_in("memory://bucket/list.txt")[0]
    monkeypatch.setattr(
        type(memory), "cat_file", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no credentials"))
    )
    with pytest.raises(SourceGoneError, match="cannot be reached now: no credentials; go on with --resume"):
        photo.read()
    monkeypatch.undo()
    memory.rm("/bucket/photos/000.png")
    with pytest.raises(FileNotFoundError):
        photo.read()
    memory.rm("/bucket/list.txt")
    with pytest.raises(SourceGoneError, match=r"list memory://bucket/list.txt has vanished"):
        photo.read()


def test_archives_in_an_object_store(memory):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in {"a.jpg": b"first", "a.txt": b"caption", "b.jpg": b"second"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    memory.pipe_file("/bucket/shards/000.tar", data.getvalue())
    memory.pipe_file("/bucket/shards/001.tar", data.getvalue()[:-9000])
    memory.pipe_file("/bucket/shards/002.tar.gz", gzip.compress(data.getvalue()))
    photos = photos_in("memory://bucket/shards/002.tar.gz")
    assert [(one.id, one.read()) for one in photos] == [("002.tar.gz/a.jpg", b"first"), ("002.tar.gz/b.jpg", b"second")]
    memory.rm("/bucket/shards/002.tar.gz")
    with pytest.raises(SourceGoneError, match=r"archive .*002.tar.gz has vanished"):
        photos[0].read()
    photos = photos_in("memory://bucket/shards/*.tar")
    assert [(one.id, one.read()) for one in photos[:2]] == [("000.tar/a.jpg", b"first"), ("000.tar/b.jpg", b"second")]
    memory.rm("/bucket/shards/000.tar")
    with pytest.raises(SourceGoneError, match=r"archive .*000.tar has vanished"):
        photos[0].read()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://bucket/none.txt", "there is no list"),
        ("memory://bucket/none/*.tar", "nothing matches"),
        ("memory://bucket/photos", "neither a list .* nor .tar or .tar.gz archives"),
        ("nosuch://bucket/list.txt", "cannot be opened: Protocol not known"),
    ],
)
def test_what_an_object_store_does_not_hold(memory, source, message):
    with pytest.raises(DualmatchError, match=message):
        photos_in(source)


def test_a_folder_in_an_object_store(memory):
    folder = UrlFolder("memory://bucket/g/")
    assert (folder.read("x"), folder.sizes(), folder.sizes("y")) == (None, {}, {})
    folder.write("x", b"12")
    folder.write("y/z", b"345")
    assert (folder.read("x"), folder.read("y/z"), folder.sizes("y")) == (b"12", b"345", {"z": 3})
    assert folder.sizes()["x"] == 2
    folder.remove("y")
    folder.remove("y")
    assert (folder.read("y/z"), folder.read("x")) == (None, b"12")


def test_the_plan_for_many_photographs_multiplies():
    from dualmatch.bench.scale import planned

    measured = {
        "images_per_cpu_second": 50.0, "images_per_cpu_second_busy": 40.0, "dimension": 256, "bytes_per_item": 60, "bytes_per_photo": 1e5,
        "list_cpu_seconds_per_million": 6.0, "list_bytes_per_photo": 200.0, "task_bytes_per_photo": 40.0, "index_bytes": 1e6,
        "index_shards": 1000, "sha256_bytes_per_second": 1e9, "graph_bytes_per_vector": 662.0,
    }  # fmt: skip
    given = {"machines": 10, "cores": 50, "price": 2.0, "storage_price": 0.02, "request_price": 0.4, "bandwidth": 20.0}
    plan = planned(measured, images=72_000_000, rate=None, dimension=None, photo_bytes=None, **given)
    assert plan["hours on the given machines"] == pytest.approx(1.0)  # 72e6 / (40 * 500) seconds
    assert plan["price of the machines"] == pytest.approx(20.0)
    assert plan["GB/s that the store must deliver"] == pytest.approx(2.0)
    assert plan["GB of the gallery"] == pytest.approx(72e6 * (512 + 60) / 1e9)
    assert plan["GB of the approximate index"] == pytest.approx(72e6 * 662 / 1e9)
    wider = planned(measured, images=72_000_000, rate=4000.0, dimension=1024, photo_bytes=None, **given)
    assert wider["hours on the given machines"] == pytest.approx(0.01)
    assert wider["GB of the approximate index"] == pytest.approx(72e6 * (2048 + 150) / 1e9)
