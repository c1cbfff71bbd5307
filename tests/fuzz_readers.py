"""Damaged bytes for every reader of foreign files, for as long as asked: each must answer, or refuse with a `DualmatchError`.

    python tests/fuzz_readers.py --seconds 300 --seed 1 [--bundle BUNDLE]

Prints how many inputs each reader was given, and how many of them it refused; the first other exception ends the run with
the input's seed (`--seed S --only READER --seconds 0` repeats it).
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.journal import records
from dualmatch.runtime.galleries.sources import CaptionSource, captions_in, photos_in
from dualmatch.runtime.galleries.writer import GalleryEncoder, write_gallery
from dualmatch.runtime.preprocess import open_rgb, pixel_limit

TOKENS = [
    b"[" * 9999,
    b"9" * 5000,
    b"\x00",
    b"\xff\xff\xff\xff",
    b"null",
    b"-1",
    b"1e999",
    b'"',
    b"\n",
    b"{",
    b"}",
    b"\xed\xa0\x80",
]
JUNK = [None, True, -1, 0, 2**80, 1.5, "", "../x", [], {}, [[0, 1]], "vectors-00000.npy", "a" * 9999]


def damaged(data, chance):
    """`data` after one to four random edits."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[at % len(data)] = chance.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + chance.randint(1, 32)]
            case 4:
                data[at:at] = chance.choice(TOKENS)
            case 5:
                start = chance.randrange(len(data) + 1)
                data[at:at] = data[start : start + chance.randint(1, 256)]
            case 6:
                data[at : at + 4] = chance.randbytes(4)
    return bytes(data)


def damaged_json(data, chance):
    """Half of the time as bytes, else with values replaced, added or taken away, so that it still parses."""
    if chance.random() < 0.5:
        return damaged(data, chance)
    content = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(content))
        if not places:
            break
        parent, key = chance.choice(places)
        if chance.random() < 0.2:
            del parent[key]
        else:
            parent[key] = chance.choice(JUNK)
    return json.dumps(content).encode()


def _places(content):
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


class Numbers(GalleryEncoder):
    dimension = 4

    def prepare(self, source):
        if source.text == "#":
            raise DualmatchError("a hash")
        return np.random.default_rng(len(source.text)).normal(size=4).astype(np.float32)

    def encode(self, batch):
        return np.stack(batch)


def a_gallery(out, stop=False):
    sources = [CaptionSource(id=f"c{n}", text="#" if n == 5 else "x" * (n + 1)) for n in range(20)]

    def progress(done, _):
        if stop and done >= 12:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_gallery(
            out, sources, Numbers(), kind="captions", bundle_path=out, bundle_hash="0", batch_size=2, rows_per_shard=10,
            progress=progress,
        )  # fmt: skip
    return out


def readers(work, bundle):
    """name: (corpus, how to damage, what reads it)."""
    whole, begun = a_gallery(work / "whole"), a_gallery(work / "begun", stop=True)
    originals = {path.name: path.read_bytes() for path in whole.iterdir()}

    def gallery_with(name, *, vouched):
        def read(data):
            index = json.loads(originals["index.json"])
            if vouched:
                entries = [record for shard in index["shards"] for record in (shard["vectors"], shard["items"])]
                for record in (*entries, index["quarantine"]):
                    if record["file"] == name:
                        record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            try:
                (whole / "index.json").write_text(json.dumps(index))
                (whole / name).write_bytes(data)
                opened = Gallery.open(whole)
                opened.check()
                assert len(opened.items) == len(opened.vectors()) == len(opened)
                assert all(type(item.row) is int and type(item.id) is str for item in opened.items)
            finally:
                for file in ("index.json", name):
                    (whole / file).write_bytes(originals[file])

        return read

    def journal(data):
        (begun / "journal.bin").write_bytes(data)
        opened = Gallery.open(begun, allow_incomplete=True)
        for stored in records(begun, opened.index):
            assert len(stored.items) == len(stored.vectors)

    def file_of(name, read):
        def through(data):
            (work / name).write_bytes(data)
            read(work / name)

        return through

    def tar(path):
        for photo in photos_in(path):
            try:
                photo.read()
            except DualmatchError:
                continue

    found = {
        "index.json": ([originals["index.json"]], damaged_json, gallery_with("index.json", vouched=False)),
        "vectors (.npy)": ([originals["vectors-00000.npy"]], damaged, gallery_with("vectors-00000.npy", vouched=True)),
        "items": ([originals["items-00001.jsonl"]], damaged, gallery_with("items-00001.jsonl", vouched=True)),
        "quarantine": ([originals["quarantine.jsonl"]], damaged, gallery_with("quarantine.jsonl", vouched=True)),
        "journal": ([(begun / "journal.bin").read_bytes()], damaged, journal),
        "captions .txt": ([b"a dog\nzwei Hunde\n\n"], damaged, file_of("c.txt", captions_in)),
        "captions .jsonl": ([b'{"caption": "a", "image": "x"}\n{"caption": "b", "id": 7}\n'], damaged, file_of("c.jsonl", captions_in)),
        "captions .json": ([b'{"images": [{"filename": "x", "captions": ["a", "b"]}]}'], damaged_json, file_of("c.json", captions_in)),
        "tar.gz": ([gzip.compress(a_tar(layout)) for layout in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT)], damaged, file_of("t.tar.gz", tar)),
        "tar": ([a_tar(layout) for layout in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)], damaged, file_of("t.tar", tar)),
        "photographs": (photographs(), damaged, open_rgb),
    }  # fmt: skip
    if bundle is not None:
        copy = work / "bundle"
        shutil.copytree(bundle, copy, copy_function=os.symlink)
        manifest = (bundle / "manifest.json").read_bytes()
        (copy / "manifest.json").unlink()

        def read_manifest(data):
            (copy / "manifest.json").write_bytes(data)
            load_bundle(copy)

        found["manifest.json"] = ([manifest], damaged_json, read_manifest)
    return found


def a_tar(layout):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
        for name in ("a.jpg", "b" * 90 + ".png", "c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    return buffer.getvalue()


def photographs():
    """One small file for every format and mode that is read."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    rgb = Image.fromarray(pixels)
    deep = Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + 7)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {}), (rgb.convert("RGBA"), "PNG", {"exif": exif}), (rgb.convert("P"), "PNG", {"transparency": 3}),
        (deep, "PNG", {}), (rgb.convert("1"), "PNG", {}), (rgb, "WEBP", {}), (rgb.convert("RGBA"), "WEBP", {"lossless": True}),
        (rgb, "BMP", {}), (rgb.convert("P"), "BMP", {}), (rgb.convert("P"), "GIF", {}), (rgb, "TIFF", {}),
        (deep, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}), (rgb, "PPM", {}), (rgb, "AVIF", {}),
    ]  # fmt: skip
    files = []
    for image, layout, options in kinds:
        buffer = io.BytesIO()
        try:
            image.save(buffer, layout, **options)
        except (OSError, ValueError):
            continue
        files.append(buffer.getvalue())
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--bundle", type=Path, help="a bundle whose manifest is damaged too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, pixel_limit(2_000_000):
        chosen = readers(Path(folder), arguments.bundle)
        if arguments.only:
            chosen = {arguments.only: chosen[arguments.only]}
        counts = {name: [0, 0] for name in chosen}
        end, seed = time.monotonic() + arguments.seconds, arguments.seed
        while True:
            for name, (corpus, damage, read) in chosen.items():
                chance = random.Random(f"{name} {seed}")
                counts[name][0] += 1
                try:
                    read(damage(chance.choice(corpus), chance))
                except DualmatchError:
                    counts[name][1] += 1
                except BaseException:
                    print(f"{name}: seed {seed}", file=sys.stderr)
                    raise
            seed += 1
            if time.monotonic() > end:
                break
    for name, (given, refused) in counts.items():
        print(f"{name:<16} corpus {len(chosen[name][0]):>3}   {given:>8} inputs   {refused:>8} refused")
    print(f"seeds {arguments.seed} to {seed - 1}")


if __name__ == "__main__":
    main()
