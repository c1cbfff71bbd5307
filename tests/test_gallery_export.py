"""What other programs read back from an exported gallery: the living items and the very vectors."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries import export as exporting
from dualmatch.runtime.galleries.edit import remove_items
from dualmatch.runtime.galleries.export import FORMATS, export
from dualmatch.runtime.galleries.gallery import Gallery

from .demo_fixture import dualmatch, one_sentence
from .gallery_tables import unit_table, write_table


@pytest.fixture(params=["float16", "float32"])
def gallery(request, tmp_path, monkeypatch):
    """Twenty captions, two quarantined, three removed; exported a few at a time."""
    write_table(tmp_path / "g", unit_table(20), bad={3, 9}, dtype=request.param)
    remove_items(tmp_path / "g", ["c0", "c7", "c19"])
    monkeypatch.setattr(exporting, "EXPORT_ROWS", 3)
    return Gallery.open(tmp_path / "g")


def items_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numpy(gallery, tmp_path):
    export(gallery, tmp_path / "out", "npy")
    vectors = np.load(tmp_path / "out" / "vectors.npy", mmap_mode="r")
    assert vectors.dtype == gallery.index.dtype
    assert np.array_equal(vectors.astype(np.float32), gallery.vectors())
    items = items_of(tmp_path / "out" / "items.jsonl")
    assert [(item["row"], item["id"], item["caption"], item["image"]) for item in items] == [
        (item.row, item.id, item.caption, item.image) for item in gallery.items
    ]


def test_faiss(gallery, tmp_path):
    faiss = pytest.importorskip("faiss")
    export(gallery, tmp_path / "out", "faiss")
    index = faiss.read_index(str(tmp_path / "out" / "index.faiss"))
    assert (index.ntotal, index.metric_type) == (len(gallery), faiss.METRIC_INNER_PRODUCT)
    assert np.array_equal(index.reconstruct_n(0, len(gallery)), gallery.vectors())
    queries = unit_table(4, seed=2)
    assert index.search(queries, 5)[1].tolist() == gallery.search(queries, 5)[1].tolist()
    assert [item["id"] for item in items_of(tmp_path / "out" / "items.jsonl")] == [item.id for item in gallery.items]


def test_parquet(gallery, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    export(gallery, tmp_path / "out.parquet", "parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["row", "id", "caption", "image", "vector"]
    assert table["id"].to_pylist() == [item.id for item in gallery.items]
    assert table["caption"].to_pylist() == [item.caption for item in gallery.items]
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    assert np.array_equal(vectors, gallery.vectors())
    assert table.schema.metadata[b"dualmatch.bundle"].decode() == gallery.bundle_hash


def test_qdrant(gallery, tmp_path):
    export(gallery, tmp_path / "out.jsonl", "qdrant-jsonl")
    points = items_of(tmp_path / "out.jsonl")
    assert np.array_equal(np.array([point["vector"] for point in points], np.float32), gallery.vectors())
    assert [point["id"] for point in points] == [item.row for item in gallery.items]
    assert points[0]["payload"] == {"row": 1, "id": "c1", "caption": "1", "image": "0.jpg", "kind": "captions"}


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_overwritten_and_nothing_half_written(gallery, tmp_path, to, monkeypatch):
    for package in ("faiss", "pyarrow"):
        pytest.importorskip(package)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DualmatchError, match="exists already"):
        export(gallery, tmp_path / "out", to)
    assert (tmp_path / "out").read_text() == "mine"
    calls = []

    def broken(self, rows, among=None):
        for piece in pieces(self, rows, among):
            calls.append(piece)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
            yield piece

    pieces = Gallery.pieces
    monkeypatch.setattr(Gallery, "pieces", broken)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DualmatchError, match=r"other cannot be written: No space left on device"):
        export(gallery, tmp_path / "other", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_names_that_are_not_utf8_are_exported_readable(tmp_path):
    from dualmatch.runtime.galleries.export import printed

    assert printed("caf\udce9.jpg") == "caf�.jpg"
    assert printed("käse 🧀") == "käse 🧀"


@pytest.mark.parametrize(("to", "package", "extra"), [("parquet", "pyarrow", "parquet"), ("faiss", "faiss", "ann")])
def test_a_format_without_its_extra_says_which(tmp_path, to, package, extra):
    write_table(tmp_path / "g", unit_table(4))
    code = "import sys; sys.modules[sys.argv.pop(1)] = None; from dualmatch.cli.main import main; main()"
    words = ["gallery", "export", tmp_path / "g", "--to", to, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, package, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"pip install 'dualmatch[{extra}]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    write_table(tmp_path / "g", unit_table(4))
    done = dualmatch("gallery", "export", tmp_path / "g", "--to", "npy", "--out", tmp_path / "deep" / "out")
    assert done.code == 0, done.err
    assert "4 items as npy" in done.out
    again = dualmatch("gallery", "export", tmp_path / "g", "--to", "npy", "--out", tmp_path / "deep" / "out")
    assert (again.code, one_sentence(again.err)) == (1, True)
    assert dualmatch("gallery", "export", tmp_path / "g", "--to", "csv", "--out", tmp_path / "o").code == 2
