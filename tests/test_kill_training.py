"""Runs that are killed with kill -9 while they write, and runs that are asked to stop: what is resumed is the uninterrupted run."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from dualmatch.runtime import files
from dualmatch.training.interrupt import TrainingStoppedError
from dualmatch.training.loop import train
from dualmatch.training.step import Differentiator

from .tiny_runs import assert_same_tensors, left_behind, log_of, refusal, scenes, tiny_recipe, train_here

DROPOUT = ("model.residual_dropout=0.2", "model.text.word_dropout=0.2", "train.average=0.9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(folder, *DROPOUT)
    return folder / "run"


def assert_same_run(run, whole):
    for name in ("best", "last"):
        assert_same_tensors(run / f"{name}.safetensors", whole / f"{name}.safetensors")
    assert log_of(run) == log_of(whole)
    assert left_behind(run) == left_behind(whole)


def train_until_write(folder, name, number, resume, written):
    """In a process of its own: train, and at the file's so-and-so-many-th write leave half the bytes and wait to be killed."""
    count, real = 0, os.fsync

    def fsync(handle):
        nonlocal count
        real(handle)
        count += Path(f"/proc/self/fd/{handle}").readlink().name.startswith(f".{name}.")
        if count == number:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            written.set()
            time.sleep(600)

    files.os.fsync = fsync
    train(tiny_recipe(*DROPOUT), scenes(), folder / "run", data_name="scenes", cache=folder, resume=resume, workers=0)


def killed_at_write(folder, name, number, *, resume):
    # A fork of this process would inherit torch's threads as locks that nobody holds: the server that forks has started none.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    written = context.Event()
    process = context.Process(target=train_until_write, args=(folder, name, number, resume, written))
    process.start()
    while not written.wait(0.05):
        assert process.is_alive(), "the run ended before that write"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(left.startswith(f".{name}.") for left in left_behind(folder / "run"))


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="not run: the names of open files are not to be had here"
)


@needs_proc
@pytest.mark.parametrize(
    "kills",
    [
        (("last.safetensors", 2),),
        (("best.safetensors", 2),),
        (("log.jsonl", 3),),
        (("last.safetensors", 2), ("run.json", 1), ("last.safetensors", 1), ("log.jsonl", 1)),
    ],
)
def test_killed_in_the_middle_of_a_write(tmp_path, whole, kills):
    for place, (name, number) in enumerate(kills):
        killed_at_write(tmp_path, name, number, resume=place > 0)
    train_here(tmp_path, *DROPOUT, resume=True)
    assert_same_run(tmp_path / "run", whole)


@needs_proc
def test_killed_in_the_first_epoch(tmp_path):
    killed_at_write(tmp_path, "best.safetensors", 1, resume=False)
    assert "has no finished epoch to resume from; remove it and start again" in refusal(tmp_path, *DROPOUT, resume=True)


def stopping_at(step, signals=(signal.SIGINT,)):
    """A progress report that sends this process signals after a step counted over all epochs."""
    count = 0

    def report(what, done, of):
        nonlocal count
        if what.startswith("epoch ") and of:
            count += 1
            if count == step:
                for number in signals:
                    os.kill(os.getpid(), number)

    return report


# Two steps an epoch: in the middle of the first, of the second epoch, and at an epoch's last step.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_asked_to_stop_it_finishes_the_step_and_resumes_there(tmp_path, whole, step, number):
    with pytest.raises(TrainingStoppedError) as stopped:
        train_here(tmp_path, *DROPOUT, progress=stopping_at(step, (number,)))
    where = {1: "step 1 of 2 of epoch 1", 2: "epoch 1 of 3, which is finished", 3: "step 1 of 2 of epoch 2"}[step]
    assert str(stopped.value).startswith(f"stopped after {where}; ")
    assert "--resume continues it" in str(stopped.value)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train_here(tmp_path, *DROPOUT, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_stopped_at_every_step(tmp_path, whole):
    for resume in (False, True, True, True, True):
        with pytest.raises(TrainingStoppedError):
            train_here(tmp_path, *DROPOUT, resume=resume, progress=stopping_at(1))
    train_here(tmp_path, *DROPOUT, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_the_second_signal_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_here(tmp_path, progress=stopping_at(1, (signal.SIGINT, signal.SIGINT)))
    assert left_behind(tmp_path) == []


def test_saved_between_epochs_and_killed(tmp_path, whole, monkeypatch):
    real = Differentiator.gradients
    steps = 0

    def killed(self, *arguments, **options):
        nonlocal steps
        steps += 1
        if steps == 4:  # the second of the second epoch
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    options = (*DROPOUT, "train.save_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(Differentiator, "gradients", killed)
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path, *options)
    redone = []
    train_here(
        tmp_path, *options, resume=True, progress=lambda what, done, of: redone.append((what, done)) if of else 0
    )
    assert [one for one in redone if one[0].startswith("epoch")] == [
        ("epoch 2/3", 2),
        ("epoch 3/3", 1),
        ("epoch 3/3", 2),
    ]
    for name in ("best", "last"):
        assert_same_tensors(tmp_path / f"run/{name}.safetensors", whole / f"{name}.safetensors")
