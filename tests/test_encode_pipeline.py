"""From sources to batches: what is in a batch, what waits for what, and that parts and bundles give one run's bytes."""

import gzip
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.photos import FilePhoto
from dualmatch.runtime.galleries.pipeline import prepared_units
from dualmatch.runtime.galleries.sources import CaptionSource, photos_in
from dualmatch.runtime.galleries.writer import GalleryEncoder, write_gallery

from .demo_fixture import dualmatch, one_sentence


class LengthEncoder(GalleryEncoder):
    """A caption's vector says how long it is and how long the longest of its batch is; `#` cannot be used."""

    dimension = 2

    def __init__(self, *, window=1, pace=0.0):
        self.window_batches, self.pace, self.threads, self.batches = window, pace, set(), []

    def prepare(self, source):
        time.sleep(self.pace)
        if source.text == "#":
            raise DualmatchError("a hash.")
        return source.text

    def size(self, prepared):
        return len(prepared) if self.window_batches > 1 else 0

    def collate(self, prepared):
        self.threads.add(threading.current_thread().name.partition("_")[0])
        return prepared, max(map(len, prepared))

    def encode(self, batch):
        texts, longest = batch
        self.batches.append([len(text) for text in texts])
        return np.array([[len(text), longest] for text in texts], np.float32)


def captions(texts):
    return [CaptionSource(id=str(row), text=text) for row, text in enumerate(texts)]


def write(out, sources, encoder, **options):
    given = {"kind": "captions", "bundle_path": out.parent / "b", "bundle_hash": "0" * 64, "dtype": "float32"}
    return write_gallery(out, sources, encoder, **given | {"batch_size": 2, "rows_per_shard": 8} | options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.sampled_from(["a", "bb", "cccc", "#", "dddddd"]), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    window=st.integers(1, 4),
    threads=st.integers(1, 4),
)
def test_every_row_is_in_one_batch_of_its_own_window(texts, batch_size, window, threads):
    encoder = LengthEncoder(window=window)
    length = batch_size * window
    units = [range(start, min(start + length, len(texts))) for start in range(0, len(texts), length)]
    done = list(prepared_units(captions(texts), encoder, units, batch_size=batch_size, threads=threads))
    assert [unit.rows for unit in done] == units
    for unit in done:
        rows = [row for chosen, _ in unit.batches for row in chosen]
        assert sorted([*rows, *unit.unreadable]) == list(unit.rows)
        assert {texts[row] for row in unit.unreadable} <= {"#"}
        assert all(0 < len(chosen) <= batch_size for chosen, _ in unit.batches)
        assert all([texts[row] for row in chosen] == batch[0] for chosen, batch in unit.batches)
        if window > 1:  # in order of length
            sizes = [len(texts[row]) for row in rows]
            assert sizes == sorted(sizes)
        else:
            assert rows == sorted(rows)


def test_rows_of_similar_length_share_a_batch_and_return_to_their_places(tmp_path):
    texts = ["a" * n for n in (9, 1, 8, 2, 7, 3, 6, 4, 5, 1)]
    encoder = LengthEncoder(window=4)
    write(tmp_path / "g", captions(texts), encoder)
    assert encoder.batches == [[1, 2], [3, 4], [6, 7], [8, 9], [1, 5]]
    assert Gallery.open(tmp_path / "g").vectors()[:, 0].tolist() == [9, 1, 8, 2, 7, 3, 6, 4, 5, 1]
    in_order = LengthEncoder()
    write(tmp_path / "h", captions(texts), in_order)
    assert in_order.batches == [[9, 1], [8, 2], [7, 3], [6, 4], [5, 1]]


def test_a_window_ends_with_its_shard_and_is_the_same_after_a_stop(tmp_path):
    texts = ["a" * (1 + 7 * n % 11) for n in range(30)]

    class Stopping(LengthEncoder):
        def encode(self, batch):
            if len(self.batches) == 9:
                raise KeyboardInterrupt
            return super().encode(batch)

    options = {"rows_per_shard": 10}
    write(tmp_path / "whole", captions(texts), whole := LengthEncoder(window=3), **options)
    assert [len(b) for b in whole.batches] == [2] * 15  # shards of ten rows: windows of six and four
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "g", captions(texts), Stopping(window=3), **options)
    assert write(tmp_path / "g", captions(texts), LengthEncoder(window=3), resume=True, **options).resumed_rows == 16
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


def test_batches_are_put_together_off_the_encoders_thread(tmp_path):
    encoder = LengthEncoder()
    write(tmp_path / "g", captions(["a"] * 9), encoder)
    assert encoder.threads == {"assemble"}


def test_preparing_encoding_and_storing_overlap(tmp_path, monkeypatch):
    """The second batch is not encoded before the third is being prepared, nor the first stored before the second is encoded."""
    from dualmatch.runtime.galleries import writer

    third_prepared, second_encoded = threading.Event(), threading.Event()
    waited = []

    class Waiting(LengthEncoder):
        def prepare(self, source):
            if source.id == "4":
                third_prepared.set()
            return super().prepare(source)

        def encode(self, batch):
            if len(self.batches) == 1:
                waited.append(third_prepared.wait(30))
                second_encoded.set()
            return super().encode(batch)

    append = writer.append_record

    def storing(out, stored):
        if stored.rows.start == 0:
            waited.append(second_encoded.wait(30))
        append(out, stored)

    monkeypatch.setattr(writer, "append_record", storing)
    write(tmp_path / "g", captions(["a"] * 16), Waiting(), threads=1)
    assert waited == [True, True]


def test_a_failed_store_lets_nothing_behind_it_through(tmp_path, monkeypatch):
    from dualmatch.runtime.galleries import writer

    append, calls = writer.append_record, []

    def failing(out, stored):
        calls.append(stored.rows.start)
        if stored.rows.start == 10:
            time.sleep(0.05)  # later units are encoded and waiting by then
            raise OSError(28, "No space left on device")
        append(out, stored)

    monkeypatch.setattr(writer, "append_record", failing)
    sources = captions(["a" * (n % 5 + 1) for n in range(30)])
    with pytest.raises(DualmatchError, match=r"No space left on device; its first 8 rows are safe"):
        write(tmp_path / "g", sources, LengthEncoder())
    assert calls[-1] == 10
    monkeypatch.undo()
    assert write(tmp_path / "g", sources, LengthEncoder(), resume=True).resumed_rows == 10
    write(tmp_path / "whole", sources, LengthEncoder())
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


def test_what_photographs_lie_in_may_not_vanish(tmp_path):
    class Pixels(LengthEncoder):
        def prepare(self, source):
            return source.read().decode()

    sources = [FilePhoto(id=f"{row}.jpg", folder=tmp_path / "p") for row in range(4)]
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.jpg").write_text("here")
    assert write(tmp_path / "g", sources, Pixels(), kind="images").quarantined == 3
    (tmp_path / "p" / "0.jpg").unlink()
    (tmp_path / "p").rmdir()
    with pytest.raises(DualmatchError, match=r"folder .*p has vanished.*--resume"):
        write(tmp_path / "h", sources, Pixels(), kind="images")


# Parts


def test_parts_hold_the_shards_of_one_run(tmp_path):
    sources = captions(["#" if n in (3, 20) else "a" * (n % 7 + 1) for n in range(30)])
    write(tmp_path / "whole", sources, LengthEncoder(window=2))
    whole = Gallery.open(tmp_path / "whole")
    shards, quarantine = [], b""
    for number, rows in enumerate([(0, 8), (8, 24), (24, None)]):
        summary = write(tmp_path / f"{number}", sources, LengthEncoder(window=2), rows=rows)
        part = Gallery.open(tmp_path / f"{number}")
        part.check()
        assert part.index.part == (rows[0], rows[1] or 30)
        assert summary.rows == summary.count + summary.quarantined == part.index.part[1] - part.index.part[0]
        shards += [
            (part.path / s.vectors.file).read_bytes() + (part.path / s.items.file).read_bytes()
            for s in part.index.shards
        ]
        quarantine += (part.path / "quarantine.jsonl").read_bytes()
        assert part.index.source_hash == whole.index.source_hash
    assert shards == [
        (whole.path / s.vectors.file).read_bytes() + (whole.path / s.items.file).read_bytes()
        for s in whole.index.shards
    ]
    assert quarantine == (whole.path / "quarantine.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((4, 8), "row 4 lies inside a shard of 8 rows: cut at 0 or 8"),
        ((8, 29), "row 29 lies inside a shard of 8 rows: cut at 24 or 30"),
        ((8, 8), "rows 8:8 are asked for, the sources have rows 0:30"),
        ((16, 8), "rows 16:8 are asked for"),
        ((24, 40), "rows 24:40 are asked for"),
    ],
)
def test_parts_are_cut_between_shards(tmp_path, rows, message):
    with pytest.raises(DualmatchError, match=message):
        write(tmp_path / "g", captions(["a"] * 30), LengthEncoder(), rows=rows)
    assert not (tmp_path / "g").exists()


def test_a_part_is_not_resumed_as_another(tmp_path):
    sources = captions(["a"] * 30)
    write(tmp_path / "g", sources, LengthEncoder(), rows=(0, 8))
    with pytest.raises(DualmatchError, match=r"another part of the rows: \(0, 8\) then, \(0, 30\) now"):
        write(tmp_path / "g", sources, LengthEncoder(), resume=True)


# With a real bundle, as a user


@pytest.fixture(scope="module")
def photos(demo, tmp_path_factory):
    """Forty of the demo's photographs, linked, and with them what is none."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((demo.photos / "images").iterdir())[:40]:
        (folder / path.name).symlink_to(path)
    (folder / "a\x1b[31m\n.jpg").write_bytes(b"no image")
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    Image.new("1", (500, 500)).save(folder / "bomb.png")
    return folder


def encode(demo, photos, out, *options):
    return dualmatch(
        "runtime", "encode-gallery", demo.bundle, photos, "--out", out, "--batch-size", 4, "--rows-per-shard", 8,
        "--max-pixels", 200_000, "--threads", 1, *options,
    )  # fmt: skip


def test_every_kind_of_source_gives_the_same_vectors(demo, photos, tmp_path):
    import tarfile

    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    files = [photo for photo in photos_in(photos) if photo.id.isprintable()]
    assert encode(demo, photos, tmp_path / "folder", "--json").code == 0
    folder = Gallery.open(tmp_path / "folder")
    for number, chosen in enumerate((files[:20], files[20:])):
        with tarfile.open(tmp_path / f"s{number}.tar", "w") as tar:
            for photo in chosen:
                tar.add(photo.path.resolve(), photo.id)
        pq.write_table(pa.table({"image": [p.path.read_bytes() for p in chosen]}), tmp_path / f"t{number}.parquet")
    (tmp_path / "list.txt").write_text("\n".join(str(photo.path) for photo in files))
    by_id = {item.id: vector for item, vector in zip(folder.items, folder.vectors(), strict=True)}
    expected = np.stack([by_id[photo.id] for photo in files if photo.id in by_id])
    assert len(expected) == 40
    for number in range(2):
        (tmp_path / f"z{number}.tar.gz").write_bytes(gzip.compress((tmp_path / f"s{number}.tar").read_bytes()))
    for name, source in {
        "tar": tmp_path / "s{0..1}.tar",
        "tar.gz": tmp_path / "z{0..1}.tar.gz",
        "parquet": tmp_path / "t*.parquet",
        "list": tmp_path / "list.txt",
    }.items():
        done = encode(demo, source, tmp_path / name)
        assert done.code == 0, done.err
        gallery = Gallery.open(tmp_path / name)
        gallery.check()
        assert np.abs(gallery.vectors() - expected).max() < 2e-3, name
    stdin = subprocess.run(
        [sys.executable, "-c", "from dualmatch.cli.main import main; main()", "runtime", "encode-gallery", demo.bundle, "-",
         "--out", tmp_path / "stdin", "--threads", "1"],
        input=(tmp_path / "list.txt").read_bytes(), capture_output=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert b"41 of 41 encoded" in stdin.stdout


def test_names_cannot_write_to_the_terminal_and_bombs_are_refused(demo, photos, tmp_path):
    done = encode(demo, photos, tmp_path / "g")
    assert done.code == 0
    assert "\x1b" not in done.out
    assert r"quarantined: a\x1b[31m\n.jpg: the image is not an image" in done.out
    assert r"quarantined: caf\udce9.jpg: it is empty" in done.out
    assert "bomb.png: the image has 500 x 500 pixels, above the limit of 200000" in done.out
    listed = encode(demo, photos, tmp_path / "g", "--resume", "--json").json
    assert (listed["count"], listed["resumed_rows"]) == (40, 43)
    assert {one["id"] for one in listed["quarantined"]} == {"a\x1b[31m\n.jpg", os.fsdecode(b"caf\xe9.jpg"), "bomb.png"}
    failed = encode(demo, photos, tmp_path / "h", "--on-error", "fail")
    assert failed.code == 1
    assert "\x1b" not in failed.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_between_batches(demo, photos, tmp_path, number):
    whole = encode(demo, photos, tmp_path / "whole")
    assert whole.code == 0
    command = [
        sys.executable, "-c",
        ("import time, dualmatch.runtime.encode as e\n"
        "encode = e.PhotoGalleryEncoder.encode\n"
        "e.PhotoGalleryEncoder.encode = lambda *a: (time.sleep(0.3), encode(*a))[1]\n"
        "from dualmatch.cli.main import main; main()"),
        "runtime", "encode-gallery", demo.bundle, photos, "--out", tmp_path / "g", "--batch-size", "4",
        "--rows-per-shard", "8", "--max-pixels", "200000", "--threads", "1",
    ]  # fmt: skip
    running = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "g" / "items-00000.jsonl").exists():
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(number)
    error = running.communicate(timeout=60)[1]
    assert running.returncode == 128 + number
    assert f"stopped by {number.name}" in error
    assert "of 43 rows are kept in" in error
    assert "Traceback" not in error
    resumed = encode(demo, photos, tmp_path / "g", "--resume")
    assert "of the rows by an earlier run" in resumed.out
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


@pytest.mark.parametrize("rows", ["5", "a:b", "-1:8", "1:2:3"])
def test_rows_that_are_no_range_are_wrong_usage(demo, tmp_path, rows):
    done = encode(demo, demo.photos, tmp_path / "g", f"--rows={rows}")
    assert done.code == 2
    assert "is not A:B" in done.err


def test_rows_on_the_command_line(demo, photos, tmp_path):
    done = encode(demo, photos, tmp_path / "g", "--rows", "16:24")
    assert "8 of 8 encoded" in done.out, done.err
    refused = encode(demo, photos, tmp_path / "h", "--rows", "3:")
    assert refused.code == 1
    assert one_sentence(refused.err)


def test_empty_captions_are_quarantined(demo, tmp_path):
    (tmp_path / "c.txt").write_text("a dog\n\na cat on a mat\n")
    done = dualmatch(
        "runtime", "encode-captions", demo.bundle, tmp_path / "c.txt", "--out", tmp_path / "g", "--threads", 1
    )
    assert done.code == 0, done.err
    assert "quarantined: 2: the line is empty" in done.out
    assert [item.row for item in Gallery.open(tmp_path / "g").items] == [0, 2]
