"""Gzipped tar archives: what an uncompressed one gives, in any order and in one pass; damage, bombs, resume."""

import gzip
import pickle
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries import compressed
from dualmatch.runtime.galleries.compressed import CompressedArchive
from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.photos import SourceGoneError
from dualmatch.runtime.galleries.sources import photos_in

from .test_gallery import PixelEncoder, contents, write
from .test_sources import MEMBERS, lost, touch, write_tar


def many(count):
    return [(f"{i:03}.jpg", np.random.default_rng(i).bytes(900 + 37 * i)) for i in range(count)]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
def test_photographs_of_compressed_archives_are_those_of_the_archive(tmp_path, suffix):
    members = [*MEMBERS, *many(40)]
    path = tmp_path / f"s{suffix}"
    write_tar(tmp_path / "s.tar", members)
    path.write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    plain, photos = photos_in(tmp_path / "s.tar"), photos_in(path)
    assert [photo.id for photo in photos] == [photo.id.replace("s.tar", path.name) for photo in plain]
    orders = (range(43), reversed(range(43)), np.random.default_rng(0).permutation(43).tolist(), [5, 5, 42, 0, 42])
    for order in orders:
        assert all(photos[i].read() == plain[i].read() for i in order)
    sent = pickle.loads(pickle.dumps(photos))
    assert [photo.read() for photo in sent[20:]] == [photo.read() for photo in plain[20:]]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda photo: photo.read(), photos)) == [photo.read() for photo in plain]


def test_one_pass_reads_a_compressed_archive_and_leaves_no_file_open(tmp_path, monkeypatch):
    photos = photos_in(write_tar(tmp_path / "s.tar.gz", many(40), compression="gz"))
    passes = []
    inside = CompressedArchive._contents
    monkeypatch.setattr(CompressedArchive, "_contents", lambda archive: passes.append(1) or inside(archive))
    for i in range(0, 40, 4):  # as threads do: each block of rows from its end
        for k in reversed(range(i, i + 4)):
            photos[k].read()
    assert len(passes) == 1
    monkeypatch.setattr(compressed, "WAITING_BYTES", 3000)
    photos = photos_in(tmp_path / "s.tar.gz")
    photos[30].read()
    assert sum(map(len, photos[0].archive._waiting.values())) <= 3000
    assert photos[2].read() == many(40)[2][1]


def test_a_cut_or_damaged_compressed_archive_says_what_is_lost(tmp_path):
    path = write_tar(tmp_path / "s.tar.gz", many(20), compression="gz")
    whole, wanted = path.read_bytes(), {f"s.tar.gz/{name}": data for name, data in many(20)}
    damaged = [whole[:length] for length in range(0, len(whole) - 8, 997)]
    damaged += [whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :] for at in range(2, len(whole), 1009)]
    for data in damaged:
        path.write_bytes(data)
        *photos, last = photos_in(path)
        assert last.id == "s.tar.gz"
        assert re.search("what follows is lost|the archive is damaged", lost(last))
        unreadable = []
        for photo in photos:
            try:
                assert len(photo.read()) == len(wanted[photo.id])
            except DualmatchError as error:
                unreadable.append(str(error))
        assert len(unreadable) <= 1
        assert all(re.search("ends|damaged|cannot be read", text) for text in unreadable)


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("dualmatch.runtime.preprocess.MAX_PIXELS", 2**19)  # 3 MiB of file
    path = write_tar(
        tmp_path / "s.tgz", [("a.jpg", b"1"), ("big.jpg", bytes(4 * 2**20)), ("b.jpg", b"2")], compression="gz"
    )
    first, big, end = photos_in(path)
    assert first.read() == b"1"
    assert "above the limit" in lost(big)
    assert "decompression bomb" in lost(end)
    # A header that claims to be huge is refused before it is read.
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**32
    path.write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(2**16)))
    (photo,) = photos_in(path)
    assert "a header of" in lost(photo)


def test_what_is_not_gzip_and_a_compressed_archive_that_vanishes(tmp_path):
    write_tar(tmp_path / "s.tar.gz", MEMBERS)
    (photo,) = photos_in(tmp_path / "s.tar.gz")
    assert "Not a gzipped file" in lost(photo)
    photos = photos_in(write_tar(tmp_path / "t.tar.gz", MEMBERS, compression="gz"))
    (tmp_path / "t.tar.gz").unlink()
    with pytest.raises(SourceGoneError, match=r"archive .*t\.tar\.gz has vanished.*--resume"):
        photos[0].read()


def test_other_compressions_are_named(tmp_path):
    touch(tmp_path, "a.tar.zst")
    with pytest.raises(DualmatchError, match=r"\.tar, \.tar\.gz"):
        photos_in(tmp_path / "a.tar.zst")


class BytesEncoder(PixelEncoder):
    """Vectors from a photograph's first bytes."""

    def prepare(self, source):
        return np.frombuffer(source.read()[:16], np.uint8).astype(np.float32) + 1


class StoppingBytes(BytesEncoder):
    def encode(self, prepared):
        if len(self.batches) == 3:
            raise KeyboardInterrupt
        return super().encode(prepared)


def test_a_stopped_run_resumes_to_the_bytes_of_one_over_the_plain_archive(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        members = [(f"{number}/{name}", data) for name, data in many(23)]
        write_tar(folder / f"s{number}.tar", members)
        write_tar(folder / f"s{number}.tar.gz", members, compression="gz")
    given = {"source_hash": "0" * 64, "threads": 4}
    write(tmp_path / "plain", photos_in(folder / "s*.tar"), BytesEncoder(), **given)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "packed", photos_in(folder / "s*.tar.gz"), StoppingBytes(), **given)
    done = write(tmp_path / "packed", photos_in(folder / "s*.tar.gz"), BytesEncoder(), resume=True, **given)
    assert (done.count, done.resumed_rows) == (46, 12)
    packed, plain = Gallery.open(tmp_path / "packed"), Gallery.open(tmp_path / "plain")
    assert np.array_equal(packed.vectors(), plain.vectors())
    assert [item.id.replace(".tar.gz/", ".tar/") for item in packed.items] == [item.id for item in plain.items]
    write(tmp_path / "again", photos_in(folder / "s*.tar.gz"), BytesEncoder(), **given)
    assert contents(tmp_path / "again") == contents(tmp_path / "packed")
    part = write(tmp_path / "part", photos_in(folder / "s*.tar.gz"), BytesEncoder(), rows=(32, None), **given)
    assert part.count == 14
    assert np.array_equal(Gallery.open(tmp_path / "part").vectors(), plain.vectors()[32:])
