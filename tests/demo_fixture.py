"""A trained run, its bundle and the demo's folder, each made once in a session; and the command line as a test calls it."""

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

# LayerNorm, because an epoch of two steps is too short for BatchNorm's running statistics.
SMALL = (
    "model.norm=layer",
    "train.epochs=1",
    "train.batch_size=16",
    "model.embed_dim=16",
    "model.num_heads=2",
    "model.text.word_dim=8",
    "model.trunk.image_size=32",
    "model.trunk.grid_size=0",
)


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def dualmatch(*arguments: object) -> Finished:
    """Run `dualmatch` in this process, through its real entry point; an error that it does not explain is raised here."""
    from dualmatch.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["dualmatch", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class DemoFolder:
    """What `dualmatch demo` left: run/, bundle/, photos/, gallery/, search.html, search.png, recall.json, latency.json."""

    root: Path
    output: str

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def photos(self) -> Path:
        return self.root / "photos"

    @property
    def gallery(self) -> Path:
        return self.root / "gallery"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFolder:
    """`dualmatch demo` with two epochs, in a process of its own: minutes, once for all of pytest's workers. Tests read it and change copies.

    $DUALMATCH_TEST_DEMO names a demo's folder to use in its place.
    """
    if given := os.environ.get("DUALMATCH_TEST_DEMO"):
        return DemoFolder(Path(given).resolve(), "")
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers have in common
    root, printed = folder / "demo" / "out", folder / "demo" / "printed.txt"
    root.parent.mkdir(exist_ok=True)
    with (folder / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            script = Path(sys.executable).with_name("dualmatch")
            command = [script, "demo", "--out", root, "--set", "train.epochs=2"]
            finished = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            assert finished.returncode == 0, finished.stderr
            printed.write_text(finished.stdout)
    return DemoFolder(root, printed.read_text())


@dataclass(frozen=True)
class SmallRun:
    """A network of a few thousand weights, trained for one epoch on a few scenes."""

    folder: Path
    dataset: Any
    data: Path
    """The same scenes as a `captions` folder."""


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Trained in this process, in seconds."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from dualmatch.runtime.datasets import make_scenes, open_dataset
    from dualmatch.training.loop import train
    from dualmatch.training.recipe import load_recipe

    root = tmp_path_factory.mktemp("small")
    data = write_captions_folder(root / "data", make_scenes(num_train=32, num_val=8, num_test=12).items)
    dataset = open_dataset(data)
    recipe = load_recipe("scenes-dsran-gru", SMALL)
    train(recipe, dataset, root / "run", data_name=str(data), cache=root / "cache")
    return SmallRun(root / "run", dataset, data)


@pytest.fixture(scope="session")
def small_bundle(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run exported at fp32. Tests read it and change copies."""
    pytest.importorskip("onnxscript")
    from dualmatch.export.bundle import export_run
    from dualmatch.training.checkpoint import load_run

    out = tmp_path_factory.mktemp("small-bundle") / "bundle"
    export_run(load_run(small_run.folder), small_run.dataset, out)
    return out


@pytest.fixture(scope="session")
def attentive(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run exported with its nodes. Tests read it and change copies."""
    pytest.importorskip("onnxscript")
    from dualmatch.export.bundle import export_run
    from dualmatch.training.checkpoint import load_run

    out = tmp_path_factory.mktemp("attentive") / "bundle"
    export_run(load_run(small_run.folder), small_run.dataset, out, attention=True)
    return out


def write_captions_folder(folder: Path, items: Any) -> Path:
    """Images and captions as a user has them: images/ and captions.json."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for item in items:
        (folder / "images" / f"{item.id}.png").write_bytes(item.read_bytes())
        entries.append({"filename": f"{item.id}.png", "split": item.split, "captions": list(item.captions)})
    (folder / "captions.json").write_text(json.dumps({"dataset": "small scenes", "images": entries}))
    return folder


def edit_manifest(bundle: Path, change: Any) -> None:
    """Rewrite a bundle's manifest.json after `change(values)`."""
    path = bundle / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def seal(bundle: Path) -> None:
    """Bring sizes and hashes in the manifest up to the files, as someone who hides a change would."""
    from dataclasses import asdict

    from dualmatch.runtime.bundle import file_entry

    def change(values: dict[str, Any]) -> None:
        values["files"] = {name: asdict(file_entry(bundle / name)) for name in values["files"]}

    edit_manifest(bundle, change)


def engine_record(**values: Any) -> dict[str, Any]:
    """What a manifest says of an engine, complete; `values` say more or otherwise."""
    return {
        "flavour": "tensorrt",
        "tensorrt_version": "10.13.2",
        "compute_capabilities": ["9.0"],
        "profiles": [],
        "file": "engines/image_encoder.tensorrt.engine",
        "sha256": "0" * 64,
        "bytes": 4,
        "onnx_sha256": "0" * 64,
        "seconds": 1.0,
        "strongly_typed": True,
    } | values


def one_sentence(text: str) -> bool:
    """Whether `dualmatch: …` is all that stands on standard error, on one line and without a traceback."""
    lines = text.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("dualmatch: ") and "Traceback" not in text
