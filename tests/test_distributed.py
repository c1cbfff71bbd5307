"""Two processes that torchrun started compute what one computes on the same batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualmatch.runtime.datasets import make_scenes
from dualmatch.runtime.errors import DualmatchError
from dualmatch.training.checkpoint import load_tensors
from dualmatch.training.distributed import Group, device_named, process_group

from .demo_fixture import write_captions_folder
from .tiny_runs import log_of, refusal, write_regions
from .two_processes import CASES, UNEVEN, gradients, short_run


def torchrun(*arguments, processes=2):
    """Run under torchrun on this machine, each process on one core."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes' results."""
    folder = tmp_path_factory.mktemp("two")
    write_regions(folder / "regions.npz", make_scenes(num_train=20, num_val=4, num_test=0))
    done = torchrun(Path(__file__).with_name("two_processes.py"), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_loss_and_gradients_of_one(folder, tmp_path, name):
    write_regions(tmp_path / "regions.npz", make_scenes(num_train=20, num_val=4, num_test=0))
    alone = gradients(tmp_path, name, Group())
    assert alone["matching"] > 0
    assert (alone["captioning"] > 0) == (name == "vsrn")
    for rank in (0, 1):
        assert_close(load_tensors(folder / f"{name}-{rank}.safetensors")[0], alone)


def test_the_shares_alone_would_have_another_loss(tmp_path):
    write_regions(tmp_path / "regions.npz", make_scenes(num_train=20, num_val=4, num_test=0))
    whole = gradients(tmp_path, "infonce", Group())
    half = gradients(tmp_path, "infonce", Group(), extra=("train.batch_size=7",))
    assert abs(whole["matching"] - half["matching"]) > 0.1


def test_parts_have_the_loss_and_gradients_of_the_whole(folder, tmp_path):
    write_regions(tmp_path / "regions.npz", make_scenes(num_train=20, num_val=4, num_test=0))
    for name in CASES:
        alone = gradients(tmp_path, name, Group())
        for accumulate in (2, 5):
            assert_close(gradients(tmp_path, name, Group(), accumulate=accumulate), alone)
    alone = gradients(tmp_path, "vsrn", Group())
    for rank in (0, 1):
        assert_close(load_tensors(folder / f"vsrn-accumulated-{rank}.safetensors")[0], alone)


def test_shares_that_could_be_divided_differently_do_not_wait_for_each_other(folder, tmp_path):
    write_regions(tmp_path / "regions.npz", make_scenes(num_train=20, num_val=4, num_test=0))
    alone = gradients(tmp_path, "infonce", Group(), extra=UNEVEN)
    for rank in (0, 1):
        assert_close(load_tensors(folder / f"uneven-{rank}.safetensors")[0], alone)


def test_a_run_of_two_processes_is_the_run_of_one(folder, tmp_path):
    write_regions(tmp_path / "regions.npz", make_scenes(num_train=20, num_val=4, num_test=0))
    short_run(tmp_path, tmp_path / "run")
    alone, facts = load_tensors(tmp_path / "run/last.safetensors")
    together, other_facts = load_tensors(folder / "run/last.safetensors")
    assert facts == other_facts
    weights = [name for name in alone if name.startswith("model.")]
    for name in weights:  # Adam turns rounding into steps where a gradient is nearly 0
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=2e-4)
    assert len(log_of(folder / "run")) == 2
    for one, other in zip(log_of(folder / "run"), log_of(tmp_path / "run"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert json.loads((folder / "run/run.json").read_text())["format"] == "dualmatch-run"


def test_the_command_under_torchrun(tmp_path):
    data = write_captions_folder(tmp_path / "data", make_scenes(num_train=16, num_val=4, num_test=0).items)
    sizes = ("model.embed_dim=16", "model.num_heads=2", "model.trunk.image_size=32", "model.trunk.grid_size=0")
    options = [part for one in (*sizes, "train.epochs=1", "train.batch_size=8") for part in ("--set", one)]
    command = ["train", "scenes-dsran-gru", "--data", data, "--no-tensorboard", *options]
    script = Path(sys.executable).with_name("dualmatch")
    done = torchrun("--no-python", script, *command, "--out", tmp_path / "run", "--cache", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best epoch 1") == 1
    assert (tmp_path / "run/best.safetensors").is_file()
    assert (tmp_path / "run/curves.svg").is_file()


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DualmatchError, match="finds no GPU here"):
        device_named("cuda")
    assert 'precision = "fp16" needs a GPU' in refusal(tmp_path, "train.precision=fp16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(DualmatchError, match="did not find each other"),
        process_group(torch.device("cpu")),
    ):
        pass
