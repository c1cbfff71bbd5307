"""Galleries of given vectors, and what a process that is killed in the middle of a change leaves."""

import os
import random
import signal
import sys

import numpy as np

from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.pipeline import GalleryEncoder
from dualmatch.runtime.galleries.sources import CaptionSource
from dualmatch.runtime.galleries.writer import write_gallery


class TableEncoder(GalleryEncoder):
    """A caption `<row>` to the row of a table; `bad` cannot be read."""

    def __init__(self, table):
        self.table, self.dimension = table, table.shape[1]

    def prepare(self, source):
        if source.text == "bad":
            raise OSError(5, "Input/output error")
        return self.table[int(source.text)]

    def encode(self, batch):
        return np.stack(list(batch))


def unit_table(count, dimension=16, seed=0):
    table = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def write_table(out, table, *, prefix="c", bad=(), bundle="b" * 64, **options):
    """A gallery of captions whose vectors are the table's rows, in shards of eight."""
    sources = [
        CaptionSource(id=f"{prefix}{row}", text="bad" if row in bad else str(row), image=f"{row // 5}.jpg")
        for row in range(len(table))
    ]
    settings = {"kind": "captions", "bundle_path": out.parent / "bundle", "bundle_hash": bundle, "batch_size": 4}
    write_gallery(out, sources, TableEncoder(table), **settings | {"rows_per_shard": 8} | options)
    return Gallery.open(out)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_in_the_middle(work, seed, calls):
    """Fork, run `work` and kill the fork at a random one of its `calls` calls into C; whether it was killed."""
    die_at = random.Random(seed).randrange(calls)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    status = 1
    try:
        left = [die_at]

        def count_down(_frame, event, _argument):
            left[0] -= event == "c_call"
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count_down)
        work()
        status = 0
    finally:
        os._exit(status)


def calls_of(work):
    """How many calls into C `work` makes."""
    calls = [0]

    def count(_frame, event, _argument):
        calls[0] += event == "c_call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls[0]
