"""Galleries: what is stored, what survives, what is refused, and what a search finds.

Run as a program, this file kills writers of a gallery in `argv[1]` and compares what their successors make of it; it is a
program of its own so that the forks start from a process without other threads.
"""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.gallery import Gallery, top_k
from dualmatch.runtime.galleries.index import GalleryIndex
from dualmatch.runtime.galleries.journal import rows_kept
from dualmatch.runtime.galleries.photos import FilePhoto
from dualmatch.runtime.galleries.sources import CaptionSource, photos_in
from dualmatch.runtime.galleries.store import locked
from dualmatch.runtime.galleries.writer import GalleryEncoder, write_gallery

DIMENSION = 16


class PixelEncoder(GalleryEncoder):
    """Unit vectors from the pixels of a 4 by 4 thumbnail; `mix` makes them depend on their batch, as a real model's last bits do."""

    dimension = DIMENSION

    def __init__(self, *, mix=False, delay=0.0):
        self.mix, self.delay, self.batches = mix, delay, []

    def prepare(self, source):
        time.sleep(random.random() * self.delay)
        with Image.open(source.path) as image:
            return np.asarray(image.convert("L").resize((4, 4)), np.float32).ravel() + 1

    def encode(self, prepared):
        pixels = np.stack(prepared)
        self.batches.append(len(pixels))
        if self.mix:
            pixels = pixels + pixels.mean(axis=0)
        return pixels / np.linalg.norm(pixels, axis=1, keepdims=True)


class TableEncoder(GalleryEncoder):
    """Captions to given vectors: the caption is the row of the table."""

    def __init__(self, table):
        self.table, self.dimension = table, table.shape[1]

    def prepare(self, source):
        return self.table[int(source.text)]

    def encode(self, prepared):
        return np.stack(prepared)


def draw_photos(folder, count, broken=()):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:03}.jpg"
        Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8)).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:-200])
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirty photographs; rows 5, 9 and 16 to 23 (a whole shard of eight) are cut off."""
    return draw_photos(tmp_path_factory.mktemp("source") / "photos", 30, broken={5, 9, *range(16, 24)})


def write(out, photos, encoder=None, **options):
    sources = photos_in(photos) if isinstance(photos, Path) else photos
    settings = {"kind": "images", "bundle_path": out.parent / "bundle", "bundle_hash": "b" * 64}
    settings |= {"root": photos} if isinstance(photos, Path) else {}
    return write_gallery(
        out, sources, encoder or PixelEncoder(), **settings | {"batch_size": 4, "rows_per_shard": 8} | options
    )


def write_table(out, table, **options):
    sources = [CaptionSource(id=f"c{row}", text=str(row)) for row in range(len(table))]
    return write(out, sources, TableEncoder(table), **{"kind": "captions", "dtype": "float32"} | options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class _StopError(Exception):
    pass


class Stopping(PixelEncoder):
    """Fails at its fourth batch of four rows: eight rows are then in a shard, and four in the journal."""

    stop_at = 3

    def encode(self, prepared):
        if len(self.batches) == self.stop_at:
            raise _StopError
        return super().encode(prepared)


def write_12_rows(out, photos):
    with pytest.raises(_StopError):
        write(out, photos, Stopping())


# What is stored


def test_vectors_and_items_stand_in_source_order_and_holes_keep_their_rows(tmp_path, photos):
    encoder = PixelEncoder()
    summary = write(tmp_path / "g", photos, encoder)
    gallery = Gallery.open(tmp_path / "g")
    good = [row for row in range(30) if row not in {5, 9, *range(16, 24)}]
    assert (summary.rows, summary.count, summary.quarantined, summary.resumed_rows) == (30, 20, 10, 0)
    assert [item.row for item in gallery.items] == good
    assert [item.id for item in gallery.items] == [f"{row:03}.jpg" for row in good]
    assert encoder.batches == [4, 3, 3, 4, 4, 2]  # cut by source row: nobody moves up
    expected = [PixelEncoder().encode([PixelEncoder().prepare(source)])[0] for source in photos_in(photos)[:5]]
    assert np.abs(gallery.vectors()[:5] - expected).max() < 1e-3
    assert gallery.vectors().dtype == np.float32
    assert len(gallery) == 20
    assert gallery.item(5).row == 6
    gallery.check()


def test_quarantine_names_row_id_and_reason(tmp_path, photos):
    write(tmp_path / "g", photos)
    quarantine = Gallery.open(tmp_path / "g").quarantine
    assert [entry.row for entry in quarantine] == [5, 9, *range(16, 24)]
    assert quarantine[0].id == "005.jpg"
    assert "truncated" in quarantine[0].reason


def test_a_photo_that_vanished_is_quarantined(tmp_path, photos):
    sources = [*photos_in(photos)[:3], FilePhoto(id="gone.jpg", folder=tmp_path)]
    write(tmp_path / "g", sources)
    assert [(e.id, e.reason) for e in Gallery.open(tmp_path / "g").quarantine] == [
        ("gone.jpg", "No such file or directory")
    ]


def test_reasons_hold_nothing_that_differs_between_runs(tmp_path, photos):
    class Opener(PixelEncoder):
        def prepare(self, source):
            if source.id == "001.jpg":
                raise DualmatchError(f"cannot identify {object()}.")
            return super().prepare(source)

    write(tmp_path / "g", photos_in(photos)[:3], Opener())
    assert Gallery.open(tmp_path / "g").quarantine[0].reason == "cannot identify <object object>"


def test_an_unreadable_photo_changes_no_other_batch(tmp_path, photos):
    whole = draw_photos(tmp_path / "whole", 30)
    write(tmp_path / "a", whole, PixelEncoder(mix=True), root=None)
    write(tmp_path / "b", photos, PixelEncoder(mix=True), root=None)
    rows = [item.row for item in Gallery.open(tmp_path / "b").items]
    changed = {
        row
        for row, a, b in zip(
            rows, Gallery.open(tmp_path / "a").vectors()[rows], Gallery.open(tmp_path / "b").vectors(), strict=True
        )
        if (a != b).any()
    }
    assert changed == {4, 6, 7, 8, 10, 11}  # the batches of rows 5 and 9, and no other


def test_storage_is_float16_unless_asked_otherwise(tmp_path, photos):
    write(tmp_path / "half", photos)
    write(tmp_path / "single", photos, dtype="float32")
    half, single = Gallery.open(tmp_path / "half"), Gallery.open(tmp_path / "single")
    assert np.load(tmp_path / "half" / "vectors-00000.npy").dtype == np.float16
    assert np.array_equal(half.vectors(), single.vectors().astype(np.float16).astype(np.float32))
    assert half.index.shards[0].vectors.bytes < single.index.shards[0].vectors.bytes


def test_index_says_where_bundle_and_photos_are_seen_from_the_gallery(tmp_path, photos):
    local = draw_photos(tmp_path / "here" / "photos", 3)
    write(tmp_path / "here" / "g", local)
    (tmp_path / "here").rename(tmp_path / "there")
    gallery = Gallery.open(tmp_path / "there" / "g")
    assert gallery.bundle_path == tmp_path / "there" / "bundle"
    assert gallery.photo_path(1) == tmp_path / "there" / "photos" / "001.jpg"
    assert gallery.photo_path(1).exists()


def test_captions_keep_their_text_and_image(tmp_path):
    sources = [CaptionSource(id="a.jpg#0", text="0", image="a.jpg"), CaptionSource(id="x", text="1")]
    write(tmp_path / "g", sources, TableEncoder(np.eye(2, dtype=np.float32)), kind="captions")
    gallery = Gallery.open(tmp_path / "g")
    assert [(i.id, i.caption, i.image) for i in gallery.items] == [("a.jpg#0", "0", "a.jpg"), ("x", "1", None)]
    with pytest.raises(DualmatchError, match="names no folder"):
        gallery.photo_path(0)


def test_ids_that_are_not_utf8_survive(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    folder = draw_photos(tmp_path / "p", 1)
    (folder / "000.jpg").rename(folder / name)
    write(tmp_path / "g", folder)
    assert Gallery.open(tmp_path / "g").photo_path(0).exists()


def test_threads_and_their_pace_do_not_change_a_byte(tmp_path, photos):
    for threads in (1, 7):
        write(tmp_path / f"g{threads}", photos, PixelEncoder(mix=True, delay=0.003), threads=threads)
    assert contents(tmp_path / "g1") == contents(tmp_path / "g7")


def test_reading_stays_a_few_batches_ahead(tmp_path):
    started = []

    class Counting(TableEncoder):
        def prepare(self, source):
            started.append(source.id)
            return super().prepare(source)

        def encode(self, prepared):
            ahead.append(len(started) - done[0])
            done[0] += len(prepared)
            return super().encode(prepared)

    ahead, done = [], [0]
    table = np.ones((80, 2), np.float32)
    sources = [CaptionSource(id=f"c{row}", text=str(row)) for row in range(80)]
    write(tmp_path / "g", sources, Counting(table), kind="captions")
    assert max(ahead) <= 3 * 4


def test_progress_goes_from_what_is_done_to_all(tmp_path, photos):
    write_12_rows(tmp_path / "g", photos)
    calls = []
    write(tmp_path / "g", photos, resume=True, progress=lambda *call: calls.append(call))
    assert calls == [(12, 30), (16, 30), (20, 30), (24, 30), (28, 30), (30, 30)]


# What survives


def test_killed_writers_leave_nothing_that_a_successor_cannot_finish_to_the_same_bytes(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] >= 50, report
    assert min(report.values()) >= 1, report


def test_an_unfinished_gallery_is_not_opened_by_accident(tmp_path, photos):
    write_12_rows(tmp_path / "g", photos)
    with pytest.raises(DualmatchError, match=r"unfinished \(8 of 30 rows\).*--resume"):
        Gallery.open(tmp_path / "g")
    partial = Gallery.open(tmp_path / "g", allow_incomplete=True)
    partial.check()
    assert len(partial) == 7
    assert partial.search(partial.vectors()[:1], 1)[1].tolist() == [[0]]


def test_a_failed_run_without_a_finished_batch_leaves_nothing(tmp_path, photos):
    class Failing(PixelEncoder):
        def encode(self, prepared):
            raise _StopError

    with pytest.raises(_StopError):
        write(tmp_path / "g", photos, Failing())
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_encodes_no_batch_twice(tmp_path, photos):
    write_12_rows(tmp_path / "g", photos)
    encoder = PixelEncoder()
    summary = write(tmp_path / "g", photos, encoder, resume=True)
    assert (summary.resumed_rows, encoder.batches) == (12, [4, 4, 2])
    write(tmp_path / "whole", photos)
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "junk", "gone", "of an earlier shard"])
def test_a_damaged_journal_costs_its_rows_and_nothing_else(tmp_path, photos, damage):
    write_12_rows(tmp_path / "g", photos)
    path = tmp_path / "g" / "journal.bin"
    data = path.read_bytes()
    changed = {
        "cut": data[:-1],
        "flipped": data[:90] + bytes([data[90] ^ 1]) + data[91:],
        "junk": b'{"rows": [8, 12], "bytes": [1e9, -5, null]}\n' + data,
        "gone": None,
        "of an earlier shard": data.replace(b"[8, 12]", b"[4, 8]"),
    }[damage]
    path.unlink() if changed is None else path.write_bytes(changed)
    encoder = PixelEncoder()
    assert write(tmp_path / "g", photos, encoder, resume=True).resumed_rows == 8
    assert encoder.batches == [3, 4, 4, 2]
    write(tmp_path / "whole", photos)
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


def test_resume_of_a_finished_gallery_does_nothing(tmp_path, photos):
    write(tmp_path / "g", photos)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "g").iterdir()}
    encoder = PixelEncoder()
    summary = write(tmp_path / "g", photos, encoder, resume=True)
    assert (summary.count, summary.resumed_rows, encoder.batches) == (20, 30, [])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "g").iterdir()}


def test_a_full_disk_is_one_sentence_and_can_be_resumed(tmp_path):
    table = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    table[24:] = np.float32(1)
    reference = tmp_path / "reference"
    write_table(reference, table, batch_size=8, rows_per_shard=8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = sorted({len(data) for data in contents(reference).values()})
    try:  # a limit that the growing index passes first
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, limits[1]))
        with pytest.raises(DualmatchError, match=r"cannot be written: File too large; .*(safe|kept)"):
            write_table(tmp_path / "g", table, batch_size=8, rows_per_shard=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_table(tmp_path / "g", table, batch_size=8, rows_per_shard=8, resume=True)
    assert contents(tmp_path / "g") == contents(reference)


def test_only_one_writes_at_a_time(tmp_path, photos):
    with (
        locked(tmp_path / "g"),
        pytest.raises(DualmatchError, match=rf"being written by another process \({os.getpid()}\)"),
    ):
        write(tmp_path / "g", photos)
    write(tmp_path / "g", photos, resume=True)
    assert not (tmp_path / "g" / ".lock").exists()


# What is refused


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"bundle_hash": "c" * 64}, "another bundle hash: bbb"),
        ({"batch_size": 2}, "another batch size: 4 then, 2 now"),
        ({"rows_per_shard": 16}, "another number of rows per shard"),
        ({"dtype": "float32"}, "another dtype: float16 then, float32 now"),
        ({"kind": "captions"}, "another kind"),
        ({"root": Path("/elsewhere")}, "another folder of photographs"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_resume_with_other_settings_is_refused_and_costs_nothing(tmp_path, photos, change, what, finished):
    if finished:
        write(tmp_path / "g", photos)
    else:
        write_12_rows(tmp_path / "g", photos)
    before = contents(tmp_path / "g")
    with pytest.raises(DualmatchError, match=what):
        write(tmp_path / "g", photos, resume=True, **change)
    assert contents(tmp_path / "g") == before


def test_resume_with_other_sources_is_refused(tmp_path):
    write_table(tmp_path / "g", np.ones((4, 2), np.float32))
    with pytest.raises(DualmatchError, match="another number of sources: 4 then, 5 now"):
        write_table(tmp_path / "g", np.ones((5, 2), np.float32), resume=True)
    sources = [CaptionSource(id=f"c{row}", text=str(3 - row)) for row in range(4)]
    with pytest.raises(DualmatchError, match="another source list"):
        write(tmp_path / "g", sources, TableEncoder(np.ones((4, 2), np.float32)), kind="captions", dtype="float32", resume=True)  # fmt: skip


def test_resume_over_damage_is_refused(tmp_path, photos):
    write_12_rows(tmp_path / "g", photos)
    (tmp_path / "g" / "vectors-00000.npy").unlink()
    with pytest.raises(DualmatchError, match=r"vectors-00000.npy is missing"):
        write(tmp_path / "g", photos, resume=True)


def test_an_existing_gallery_is_not_written_over(tmp_path, photos):
    write(tmp_path / "g", photos)
    before = contents(tmp_path / "g")
    with pytest.raises(DualmatchError, match="exists and is finished"):
        write(tmp_path / "g", photos)
    assert contents(tmp_path / "g") == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path, photos, resume):
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "thesis.doc").write_text("mine")
    with pytest.raises(DualmatchError, match=r"no gallery but holds thesis\.doc"):
        write(tmp_path / "g", photos, resume=resume)
    assert contents(tmp_path / "g") == {"thesis.doc": b"mine"}


@pytest.mark.parametrize("when", ["met", "in the journal", "in a shard"])
def test_on_error_fail_names_the_file_and_keeps_what_came_before(tmp_path, photos, when):
    sources = photos_in(photos)[4:]  # row 1 is broken
    encoder = Stopping()
    encoder.stop_at = {"met": 0, "in the journal": 1, "in a shard": 2}[when]
    with pytest.raises(_StopError):
        write(tmp_path / "g", sources, encoder)
    with pytest.raises(DualmatchError, match=r"005\.jpg.*: .*truncated"):
        write(tmp_path / "g", sources, on_error="fail", resume=True)
    assert (tmp_path / "g").exists() == (when != "met")
    write(tmp_path / "g", sources, resume=True)
    Gallery.open(tmp_path / "g").check()


def test_on_error_fail_keeps_finished_shards_for_a_forgiving_resume(tmp_path):
    folder = draw_photos(tmp_path / "p", 14, broken={9})
    with pytest.raises(DualmatchError, match=r"cannot read 009\.jpg"):
        write(tmp_path / "g", folder, on_error="fail")
    with pytest.raises(DualmatchError, match="unfinished"):
        Gallery.open(tmp_path / "g")
    assert write(tmp_path / "g", folder, resume=True).resumed_rows == 8
    write(tmp_path / "reference", folder)
    assert contents(tmp_path / "g") == contents(tmp_path / "reference")
    with pytest.raises(DualmatchError, match=r"unreadable source already: 009\.jpg"):
        write(tmp_path / "g", folder, resume=True, on_error="fail")


def test_nothing_readable_is_an_error_that_leaves_nothing(tmp_path):
    folder = draw_photos(tmp_path / "p", 11, broken=range(11))
    with pytest.raises(DualmatchError, match=r"none of the 11 sources could be read; 00\d\.jpg: .*truncated"):
        write(tmp_path / "g", folder)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e-9, 1e6])
def test_a_vector_that_nothing_could_find_is_an_error(tmp_path, value):
    table = np.ones((12, 3), np.float32)
    table[9] = value
    with pytest.raises(DualmatchError, match="zero vector for c9"):
        write_table(tmp_path / "g", table, dtype="float16")


def test_an_encoder_of_another_shape_or_dtype_is_an_error(tmp_path):
    encoder = TableEncoder(np.ones((2, 3)))
    sources = [CaptionSource(id="a", text="0"), CaptionSource(id="b", text="1")]
    with pytest.raises(DualmatchError, match=r"gave float64 \[2, 3\] for a"):
        write(tmp_path / "g", sources, encoder, kind="captions")
    encoder = TableEncoder(np.ones((2, 3), np.float32))
    encoder.dimension = 4
    with pytest.raises(DualmatchError, match=r"expected float32 \[2, 4\]"):
        write(tmp_path / "g", sources, encoder, kind="captions")


def test_a_fault_of_the_encoder_is_not_quarantined(tmp_path, photos):
    class Faulty(PixelEncoder):
        def prepare(self, source):
            raise KeyError(source.id)

    with pytest.raises(KeyError):
        write(tmp_path / "g", photos, Faulty())


def test_a_machine_out_of_file_handles_does_not_quarantine_good_photos(tmp_path, photos):
    class Starved(PixelEncoder):
        def prepare(self, source):
            raise OSError(24, "Too many open files")

    with pytest.raises(DualmatchError, match="Too many open files"):
        write(tmp_path / "g", photos, Starved())


def test_wrong_settings_are_refused(tmp_path, photos):
    with pytest.raises(DualmatchError, match=r"rows per shard \(10\) must be a multiple of the batch size \(4\)"):
        write(tmp_path / "g", photos, rows_per_shard=10)
    with pytest.raises(DualmatchError, match="nothing to encode"):
        write(tmp_path / "g", [])
    with pytest.raises(DualmatchError, match=r"id '000.jpg' occurs twice"):
        write(tmp_path / "g", photos_in(photos)[:1] * 2)
    (tmp_path / "file").touch()
    with pytest.raises(DualmatchError, match="cannot be written: "):
        write(tmp_path / "file", photos)
    assert not (tmp_path / "g").exists()


def test_another_bundles_embeddings_are_refused(tmp_path, photos):
    write(tmp_path / "g", photos)
    gallery = Gallery.open(tmp_path / "g")
    gallery.require_bundle("b" * 64)
    with pytest.raises(DualmatchError, match="encoded by bundle bbbbbbbbbbbb, not by the given 123412341234"):
        gallery.require_bundle("1234" * 16)


@pytest.mark.parametrize("name", ["vectors-00000.npy", "items-00001.jsonl", "quarantine.jsonl"])
def test_check_finds_one_flipped_bit(tmp_path, photos, name):
    write(tmp_path / "g", photos)
    path = tmp_path / "g" / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    gallery = Gallery.open(tmp_path / "g")  # opening reads no shard
    with pytest.raises(DualmatchError, match=rf"damaged: {name} \(hash\)"):
        gallery.check()


@pytest.mark.parametrize("name", ["vectors-00000.npy", "items-00001.jsonl", "quarantine.jsonl", "index.json"])
def test_open_finds_missing_and_cut_files(tmp_path, photos, name):
    write(tmp_path / "g", photos)
    path = tmp_path / "g" / name
    path.write_bytes(path.read_bytes()[:-1] if name != "index.json" else path.read_bytes()[:-9])
    with pytest.raises(DualmatchError, match=name.replace(".", r"\.")):
        Gallery.open(tmp_path / "g")
    path.unlink()
    with pytest.raises(DualmatchError, match=name.replace(".", r"\.")):
        Gallery.open(tmp_path / "g")


def test_what_is_no_gallery_is_said_to_be_none(tmp_path):
    with pytest.raises(DualmatchError, match="there is no file"):
        Gallery.open(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text('["something", "else"]')
    with pytest.raises(DualmatchError, match="not the index of a gallery"):
        Gallery.open(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "dualmatch-gallery", "version": 3}')
    with pytest.raises(DualmatchError, match="has version 3, this dualmatch reads versions 1 to 2"):
        Gallery.open(tmp_path)


def test_index_round_trips(tmp_path, photos):
    write(tmp_path / "g", photos)
    index = GalleryIndex.read(tmp_path / "g")
    assert index.to_json() == (tmp_path / "g" / "index.json").read_text()


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 99), st.floats(), st.text(max_size=4), st.just([]), st.just({})
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_index_is_refused_with_a_sentence_or_harmless(tmp_path, photos, data):
    gallery = tmp_path / "g"
    if not gallery.exists():
        write(gallery, photos)
    original = (gallery / "index.json").read_bytes()
    content = json.loads(original)
    places = list(_places(content))
    parent, key = data.draw(st.sampled_from(places))
    if data.draw(st.booleans()):
        parent[key] = data.draw(JUNK)
    else:
        del parent[key]
    try:
        (gallery / "index.json").write_text(json.dumps(content))
        opened = Gallery.open(gallery)
        assert opened.dimension == DIMENSION
        assert len(opened) == 20
    except DualmatchError:
        pass
    finally:
        (gallery / "index.json").write_bytes(original)


def _places(content):
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


# What a search finds


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 40),
    queries=st.integers(1, 4),
    k=st.integers(1, 45),
    block_bytes=st.sampled_from([1, 60, 10**6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_search_equals_sorting_everything(tmp_path_factory, count, queries, k, block_bytes, seed):
    generator = np.random.default_rng(seed)
    table = generator.integers(-1, 2, (count, 3)).astype(np.float32)  # exact products, and many equal scores
    table[~table.any(axis=1)] = 1
    asked = generator.integers(-1, 2, (queries, 3)).astype(np.float32)
    out = tmp_path_factory.mktemp("search") / "g"
    write_table(out, table, dtype="float16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualmatch.runtime.galleries.gallery.SEARCH_BLOCK_BYTES", block_bytes)
        scores, positions = Gallery.open(out).search(asked, k)
    everything = asked @ table.T
    expected = np.argsort(-everything, axis=1, kind="stable")[:, :k]
    assert positions.tolist() == expected.tolist()
    assert scores.tolist() == np.take_along_axis(everything, expected, axis=1).tolist()
    assert (scores.dtype, positions.dtype) == (np.float32, np.int64)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_top_k_takes_the_smaller_column_of_equals(seed, k):
    scores = np.random.default_rng(seed).integers(0, 3, (5, 9)).astype(np.float32)
    assert top_k(scores, k).tolist() == np.argsort(-scores, axis=1, kind="stable")[:, :k].tolist()


def test_search_finds_each_photo_by_its_own_vector(tmp_path, photos):
    write(tmp_path / "g", photos)
    gallery = Gallery.open(tmp_path / "g")
    scores, positions = gallery.search(gallery.vectors(), k=3)
    assert positions[:, 0].tolist() == list(range(20))
    assert np.allclose(scores[:, 0], 1, atol=1e-3)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones((1, 3), np.float32), 1, r"float32 \(n, 2\), got float32 \[1, 3\]"),
        (np.ones(2, np.float32), 1, r"got float32 \[2\]"),
        (np.ones((1, 2)), 1, "got float64"),
        (np.full((1, 2), np.nan, np.float32), 1, "finite"),
        (np.ones((1, 2), np.float32), 0, "k = 0"),
    ],
)
def test_search_refuses_what_it_cannot_answer(tmp_path, queries, k, message):
    write_table(tmp_path / "g", np.eye(2, dtype=np.float32))
    with pytest.raises(DualmatchError, match=message):
        Gallery.open(tmp_path / "g").search(queries, k)


def test_search_notices_damage_that_makes_nonsense(tmp_path):
    write_table(tmp_path / "g", np.eye(2, dtype=np.float32))
    path = tmp_path / "g" / "vectors-00000.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(DualmatchError, match="NaN or infinity"):
        Gallery.open(tmp_path / "g").search(np.ones((1, 2), np.float32))


# The killing, in a process of its own


def _kill_writers(folder):
    photos = draw_photos(folder / "photos", 24, broken={3, 13, 14})
    encoder = PixelEncoder(mix=True)
    write(folder / "reference", photos, encoder)
    reference = contents(folder / "reference")
    chance = random.Random(6)
    calls, seconds = _run_to_the_end(folder, photos)
    report = {"killed": 0, "before_index": 0, "between_shards": 0, "with_leftovers": 0, "with_journal": 0}
    for number in range(100):  # a loaded machine kills fewer writers a gallery: go on until enough have died
        if number >= 20 and report["killed"] >= 50 and min(report.values()) >= 1:
            break
        out = folder / f"g{number}"
        while True:
            # Half of the writers die at a chosen call, so that every step is hit; the other half whenever the clock says.
            die_at = chance.randrange(calls) if number % 2 else None
            delay = chance.uniform(0, seconds)
            child = os.fork()
            if not child:
                _write_and_exit(out, photos, die_at)
            if die_at is None:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, f"a successor failed on {out}"
                break
            report["killed"] += 1
            _look_at_the_remains(out, report)
        assert contents(out) == reference, f"{out} differs from the uninterrupted gallery"
    print(json.dumps(report))


def _look_at_the_remains(out, report):
    if not (out / "index.json").exists():
        report["before_index"] += 1
        return
    remains = Gallery.open(out, allow_incomplete=True)
    remains.check()
    report["between_shards"] += 0 < remains.index.rows_done < remains.index.rows
    report["with_journal"] += rows_kept(out)[0] > remains.index.rows_done
    listed = {f for s in remains.index.shards for f in (s.vectors.file, s.items.file)}
    report["with_leftovers"] += bool(
        {p.name for p in out.iterdir()} - listed - {"index.json", "quarantine.jsonl", ".lock", "journal.bin"}
    )


def _run_to_the_end(folder, photos):
    """How many calls, and how many seconds, an undisturbed writer takes."""
    calls = [0]

    def count(_frame, event, _argument):
        calls[0] += event == "c_call"

    seconds = math.inf
    for number in range(5):  # the fastest of five: where one is held up, later writers would end before they are killed
        started = time.perf_counter()
        write(folder / f"timed{number}", photos, PixelEncoder(mix=True))
        seconds = min(seconds, time.perf_counter() - started)
    threading.setprofile(count)
    sys.setprofile(count)
    write(folder / "counted", photos, PixelEncoder(mix=True))
    sys.setprofile(None)
    threading.setprofile(None)
    return calls[0], seconds


def _write_and_exit(out, photos, die_at):
    left = [die_at]

    def count_down(_frame, event, _argument):
        left[0] -= event == "c_call"
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        if die_at is not None:
            threading.setprofile(count_down)
            sys.setprofile(count_down)
        write(out, photos, PixelEncoder(mix=True), resume=True)
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    _kill_writers(Path(sys.argv[1]))
