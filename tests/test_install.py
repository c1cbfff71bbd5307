"""The wheel in an empty environment: what a user of the runtime installs, and all that it needs."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {
    (): ["demo", "train", "evaluate-checkpoint", "export", "compile"],
    ("runtime",): ["encode-gallery", "encode-captions", "search", "similarity", "rerank", "evaluate", "verify"],
    ("bench",): ["latency"],
    ("gallery",): ["check"],
    ("data",): ["pool-regions"],
}
MOST_DISTRIBUTIONS = 28  # with onnxruntime, as many as fastembed brings


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of executables of an environment that holds `dualmatch[cpu]` from a wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("install")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    # A copy, since setuptools leaves a build folder that would go into the next wheel.
    left_out = shutil.ignore_patterns(".*", "build", "demo", "runs", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=left_out)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", folder, source], capture_output=True, text=True, check=False
    )
    if build.returncode and "setuptools" in build.stderr and "Could not find" in build.stderr:
        pytest.skip("not run: no package index can be reached")
    assert build.returncode == 0, build.stderr
    (wheel,) = folder.glob("dualmatch-*.whl")
    install = [*pip, "install", "--constraint", ROOT / "constraints.txt", f"{wheel}[cpu]"]
    subprocess.run(install, check=True, cwd=folder)
    return python.parent


def run(installed, *arguments):
    return subprocess.run(
        [installed / "dualmatch", *arguments], capture_output=True, text=True, check=False, cwd=installed
    )


def test_every_command_shows_its_help(installed):
    for group, names in COMMANDS.items():
        shown = run(installed, *group, "--help")
        assert shown.returncode == 0, shown.stderr
        for name in names:
            assert name in shown.stdout
            helped = run(installed, *group, name, "--help")
            assert helped.returncode == 0, helped.stderr
            assert helped.stdout.startswith(f"Usage: dualmatch {' '.join([*group, name])}")


def test_a_command_that_needs_an_extra_says_which(installed):
    refused = run(installed, "train", "scenes-dsran-gru", "--data", "scenes", "--out", "run")
    assert refused.returncode == 1
    assert "pip install 'dualmatch[train]'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_runtime_is_light(installed):
    listed = subprocess.run(
        [installed / "python", "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    names = {entry["name"].lower() for entry in json.loads(listed.stdout)} - {"pip", "setuptools", "wheel"}
    assert not names & {"torch", "onnx", "transformers"}
    assert len(names) <= MOST_DISTRIBUTIONS, sorted(names)


def test_public_names_import(installed):
    code = (
        "from dualmatch.runtime import Gallery, ImageEncoder, TextEncoder, load_bundle; import sys;"
        "from dualmatch.runtime import recall, rerank; recall.evaluate; rerank.i2t;"
        "assert not {'torch', 'onnx', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([installed / "python", "-c", code], check=True, cwd=installed)


def test_recipes_and_types_are_in_the_wheel(installed):
    code = (
        "from importlib.resources import files\n"
        "recipes = [entry.name for entry in files('dualmatch.training.recipes').iterdir()]\n"
        "assert 'scenes-dsran-gru.toml' in recipes, recipes\n"
        "assert files('dualmatch.runtime').joinpath('py.typed').is_file()\n"
    )
    finished = subprocess.run(
        [installed / "python", "-c", code], check=False, cwd=installed, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


if sys.platform == "win32":
    pytest.skip("not run: paths of executables differ on Windows", allow_module_level=True)
