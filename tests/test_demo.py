"""`dualmatch demo`: what it leaves, what it says, and that it can be run again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dualmatch.runtime import Gallery, load_bundle
from dualmatch.runtime.files import sha256_of_file

STEPS = ["train", "evaluate in torch", "export --fp16", "compile --flavour", "encode-gallery", "search", "evaluate the bundle",
         "verify", "bench latency", "report", "in all"]  # fmt: skip


def test_it_leaves_a_run_a_bundle_a_gallery_and_the_sheet(demo):
    bundle = load_bundle(demo.bundle)
    assert {entry.precision for entry in bundle.manifest.encoders.values()} == {"fp16"}
    assert bundle.manifest.parity["verdict"] == "pass"
    assert bundle.manifest.provenance["checkpoint_sha256"] == sha256_of_file(demo.run / "best.safetensors")
    gallery = Gallery.open(demo.gallery)
    gallery.check()
    assert (len(gallery), gallery.quarantine, gallery.bundle_hash) == (400, [], bundle.hash)
    assert gallery.bundle_path == demo.bundle.resolve()
    assert Image.open(demo.root / "search.png").width > 200
    page = (demo.root / "search.html").read_text()
    assert page.count("data:image/") >= 20, "four searches of five hits, pictures inside"
    recall = json.loads((demo.root / "recall.json").read_text())
    assert recall["subject"]["models"][0]["bundle"] == bundle.hash
    assert [row["differs"] for row in recall["hard_pairs"]] == ["relation", "setting"]
    latency = json.loads((demo.root / "latency.json").read_text())
    assert latency["subject"]["bundle_hash"] == bundle.hash


def test_its_report_shows_it_all(demo):
    page = (demo.root / "report.html").read_text()
    for key in ("recall", "precision", "latency", "sheets", "failures", "training", "bundles"):
        assert f'<section id="{key}">' in page
    assert "Could not be read" not in page


def test_it_compiles_where_tensorrt_rtx_is_installed(demo):
    pytest.importorskip("tensorrt_rtx")
    engines = load_bundle(demo.bundle).manifest.engines
    assert [engine["flavour"] for engine in engines] == ["tensorrt-rtx"] * 2
    assert all((demo.bundle / engine["file"]).is_file() for engine in engines)


def test_it_ends_with_one_table(demo):
    if not demo.output:
        pytest.skip("not run: the demo's output is not at hand")
    table = demo.output[demo.output.index("dualmatch demo") :]
    words = " ".join(table.replace("│", " ").split())
    for step in STEPS:
        assert step in words
    assert "gate pass" in words
    assert "Traceback" not in demo.output


@pytest.mark.slow
def test_a_second_run_uses_the_finished_training_and_gives_the_same_bundle(demo):
    """Where the demo is this session's own: it is run again over itself, as a user would."""
    if not demo.output:
        pytest.skip("not run: only over a demo of this session")
    before, trained = load_bundle(demo.bundle).hash, (demo.run / "last.safetensors").stat().st_mtime_ns
    script = Path(sys.executable).with_name("dualmatch")
    command = [script, "demo", "--out", demo.root, "--set", "train.epochs=2"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert again.returncode == 0, again.stderr
    assert "was trained before" in " ".join(again.stdout.replace("│", " ").split())
    assert (demo.run / "last.safetensors").stat().st_mtime_ns == trained
    assert load_bundle(demo.bundle).hash == before
