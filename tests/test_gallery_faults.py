"""What can go wrong around a gallery: locks and forks, full disks, two writers, and files that someone or something has changed."""

import gzip
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.journal import rows_kept
from dualmatch.runtime.galleries.sources import CaptionSource, captions_in, photos_in
from dualmatch.runtime.galleries.store import locked
from dualmatch.runtime.galleries.writer import GalleryEncoder, write_gallery

DIMENSION = 8


class HashEncoder(GalleryEncoder):
    """A vector from a caption's text; `#` cannot be used."""

    dimension = DIMENSION

    def prepare(self, source):
        if source.text == "#":
            raise DualmatchError("a hash.")
        return np.random.default_rng(list(source.text.encode())).normal(size=DIMENSION).astype(np.float32)

    def encode(self, batch):
        return np.stack(batch)


def write(out, count=30, encoder=None, **options):
    sources = [CaptionSource(id=f"c{n}", text="#" if n % 11 == 5 else f"text {n}") for n in range(count)]
    given = {"kind": "captions", "bundle_path": out.parent / "b", "bundle_hash": "0" * 64, "dtype": "float32"}
    return write_gallery(
        out, sources, encoder or HashEncoder(), **given | {"batch_size": 4, "rows_per_shard": 8} | options
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The lock


def test_the_lock_dies_with_its_owner_and_not_with_the_workers_it_forked(tmp_path):
    """The owner is killed while a worker that it forked lives on, with every file handle that it inherited."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from dualmatch.runtime.galleries.store import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    worker = os.fork()\n"
        "    if worker:\n"
        "        print(worker, flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path / "g"], stdout=subprocess.PIPE, text=True)
    worker = int(owner.stdout.readline())
    try:
        with pytest.raises(DualmatchError, match=rf"being written by another process \({owner.pid}\)"):
            write(tmp_path / "g")
        owner.kill()
        owner.wait()
        os.kill(worker, 0)  # it lives
        assert write(tmp_path / "g").rows == 30
    finally:
        os.kill(worker, signal.SIGKILL)
        owner.stdout.close()


def test_a_forked_worker_neither_holds_nor_frees_its_parents_lock(tmp_path):
    def try_to_write(answers):
        try:
            with locked(tmp_path / "g"):
                answers.put("locked")
        except DualmatchError as error:
            answers.put(str(error))

    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    with locked(tmp_path / "g"):
        for _ in range(2):
            worker = fork.Process(target=try_to_write, args=(answers,))
            worker.start()
            worker.join()
            assert f"another process ({os.getpid()})" in answers.get(timeout=10)
        with pytest.raises(DualmatchError, match="another process"), locked(tmp_path / "g"):
            pass
    with locked(tmp_path / "g"):
        pass


def test_two_writers_at_once_leave_one_whole_gallery(tmp_path):
    """Four processes begin the same gallery together, again and again: one writes, the others are refused, nothing is twice."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_gallery_faults as t\n"
        "while time.time() < float(sys.argv[3]): time.sleep(0.001)\n"
        "try: print('wrote', t.write(Path(sys.argv[2]), resume=True).resumed_rows)\n"
        "except t.DualmatchError as error: print(error)\n"
    )
    at = time.time() + 3
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "g"), str(at)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), said
    assert sum(out == "wrote 0\n" for out, _ in said) == 1
    assert all(out in ("wrote 0\n", "wrote 30\n") or "by another process" in out for out, _ in said), said
    write(tmp_path / "whole")
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


# Full disks


@pytest.mark.parametrize("limit", [0, 100, 300, 500, 800, 1000, 1200, 1500, 2000])
def test_a_disk_that_is_full_at_any_moment_loses_nothing(tmp_path, limit):
    write(tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(DualmatchError, match=r"cannot be written: File too large; .* safe, go on with --resume"):
            write(tmp_path / "g")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = rows_kept(tmp_path / "g")[0] if (tmp_path / "g").exists() else 0
    assert write(tmp_path / "g", resume=True).resumed_rows == kept
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("not run: root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(DualmatchError, match="cannot be written: Permission denied"):
        write(tmp_path / "g")


# Files that were changed: every reader gives what was written, or a sentence


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.just([]), st.just({}),
    st.just("../../etc/passwd"), st.lists(st.integers(-2, 40), max_size=3),
)  # fmt: skip


@st.composite
def changes(draw, data):
    """`data` with bytes flipped, cut off, repeated, inserted or replaced."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "zero"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"[" * 99_999, b"9" * 5000]))
            case "repeat":
                data[at:at] = data[: draw(st.integers(0, 64))]
            case "zero":
                data[at : at + 8] = bytes(len(data[at : at + 8]))
    return bytes(data)


def require_one_line(error):
    assert "\n" not in str(error)


def read_everything(gallery):
    """What a gallery says, after `check` has found nothing wrong with it."""
    opened = Gallery.open(gallery)
    opened.check()
    items = [(item.row, item.id, item.caption, item.image) for item in opened.items]
    return opened.vectors().tobytes(), items, [(q.row, q.id, q.reason) for q in opened.quarantine]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    out = tmp_path_factory.mktemp("read") / "g"
    write(out)
    return out


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["index.json", "vectors-00000.npy", "items-00001.jsonl", "quarantine.jsonl"])
def test_damage_to_any_file_is_a_sentence_or_has_no_effect(gallery, name, data):
    path, good = gallery / name, read_everything(gallery)
    original = path.read_bytes()
    try:
        path.write_bytes(data.draw(changes(original)))
        assert read_everything(gallery) == good
    except DualmatchError as error:
        require_one_line(error)
    finally:
        path.write_bytes(original)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["vectors-00000.npy", "items-00001.jsonl", "quarantine.jsonl"])
def test_damage_that_the_index_vouches_for_is_a_sentence_too(gallery, name, data):
    """Someone has changed a file and brought size and hash in the index up to it: what is read may differ, how it fails may not."""
    import hashlib

    path, index = gallery / name, gallery / "index.json"
    original, was = path.read_bytes(), index.read_bytes()
    changed = data.draw(changes(original))
    content = json.loads(was)
    records = [record for shard in content["shards"] for record in (shard["vectors"], shard["items"])]
    for record in [*records, content["quarantine"]]:
        if record["file"] == name:
            record.update(bytes=len(changed), sha256=hashlib.sha256(changed).hexdigest())
    try:
        path.write_bytes(changed)
        index.write_text(json.dumps(content))
        vectors, items, _ = read_everything(gallery)
        assert len(items) * DIMENSION * 4 == len(vectors)
    except DualmatchError as error:
        require_one_line(error)
    finally:
        path.write_bytes(original)
        index.write_bytes(was)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_index_of_wrong_values_is_a_sentence_or_has_no_effect(gallery, data):
    path, good = gallery / "index.json", read_everything(gallery)
    original = path.read_bytes()
    content = json.loads(original)
    parent, key = data.draw(st.sampled_from(list(_places(content))))
    if data.draw(st.booleans()):
        parent[key] = data.draw(JUNK)
    elif isinstance(parent, dict):
        parent[data.draw(st.sampled_from(["removed", "dropped", "root", "part", "x"]))] = data.draw(JUNK)
    else:
        parent.insert(key, data.draw(JUNK))
    try:
        path.write_text(json.dumps(content))
        vectors, items, quarantine = read_everything(gallery)
        assert (vectors, quarantine) == (good[0], good[2])
        assert items == good[1]
    except DualmatchError as error:
        require_one_line(error)
    finally:
        path.write_bytes(original)


def _places(content):
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


class StoppedError(Exception):
    pass


class Stopping(HashEncoder):
    def __init__(self):
        self.left = 5

    def encode(self, batch):
        self.left -= 1
        if self.left < 0:
            raise StoppedError
        return super().encode(batch)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_journal_never_reaches_the_gallery(gallery, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("journal") / "g"
    with pytest.raises(StoppedError):
        write(out, encoder=Stopping())
    path = out / "journal.bin"
    path.write_bytes(data.draw(changes(path.read_bytes())))
    assert write(out, resume=True).resumed_rows in (16, 20)
    assert contents(out) == contents(gallery)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".tar", ".tar.gz"])
def test_damaged_sources_are_a_sentence_or_sources(tmp_path_factory, suffix, data):
    good = {
        ".txt": b"a dog\nzwei Hunde im Schnee\n\nein \xc3\xa4lterer\n",
        ".jsonl": b'{"caption": "a", "image": "x.jpg"}\n{"caption": "b", "id": 7}\n\n{"caption": ""}\n',
        ".json": b'{"images": [{"filename": "x.jpg", "captions": ["a", "b"]}, {"filename": "y", "captions": []}]}',
        ".tar": _tar(),
        ".tar.gz": gzip.compress(_tar()),
    }[suffix]
    path = tmp_path_factory.mktemp("source") / f"f{suffix}"
    path.write_bytes(data.draw(changes(good)))
    try:
        sources = photos_in(path) if ".tar" in suffix else captions_in(path)
    except DualmatchError as error:
        require_one_line(error)
        return
    for source in sources:
        assert source.id
        if ".tar" in suffix:
            try:
                source.read()
            except DualmatchError:
                continue


def _tar():
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "ä" * 60 + ".png", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    return buffer.getvalue()
