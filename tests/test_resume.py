"""Runs that stop: resumed exactly, refused when they are others, ended in one sentence when they diverge."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dualmatch.training import step
from dualmatch.training.checkpoint import load_run, load_tensors
from dualmatch.training.state import TrainingState

from .tiny_runs import (
    PAIRS,
    assert_same_tensors,
    left_behind,
    log_of,
    refusal,
    scenes,
    train_here,
)

AVERAGED_ADAMW = ("train.average=0.9", "train.warmup=0.2", "train.schedule=cosine", "train.optimiser=adamw")
DROPOUT = ("model.residual_dropout=0.2", "model.text.word_dropout=0.2")


def stop_in_epoch(number):
    """A progress report that interrupts the run at the first step of an epoch."""

    def report(what, done, of):
        if what.startswith(f"epoch {number}/") and of:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(
    "overrides", [DROPOUT, (*DROPOUT, *AVERAGED_ADAMW), (*PAIRS, "data.augment=true", "model.norm=batch")]
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, overrides):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    best = train_here(tmp_path / "whole", *overrides, "train.epochs=4")
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path / "parts", *overrides, "train.epochs=4", resume=stop > 2, progress=stop_in_epoch(stop))
        assert len(log_of(tmp_path / "parts/run")) == stop - 1
    assert train_here(tmp_path / "parts", *overrides, "train.epochs=4", resume=True) == best
    for name in ("best", "last"):
        assert_same_tensors(tmp_path / f"whole/run/{name}.safetensors", tmp_path / f"parts/run/{name}.safetensors")
    assert log_of(tmp_path / "whole/run") == log_of(tmp_path / "parts/run")
    assert (tmp_path / "whole/run/run.json").read_text() == (tmp_path / "parts/run/run.json").read_text()
    assert left_behind(tmp_path / "parts/run") == left_behind(tmp_path / "whole/run")


def test_a_kill_between_the_log_and_the_checkpoint_leaves_no_gap(tmp_path, monkeypatch):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train_here(tmp_path / "whole")
    saved = TrainingState.save

    def killed(state, path, unfinished=None):
        if state.epoch == 2:
            raise KeyboardInterrupt
        saved(state, path, unfinished)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path / "parts")
    train_here(tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "parts/run") == log_of(tmp_path / "whole/run")
    assert_same_tensors(tmp_path / "whole/run/last.safetensors", tmp_path / "parts/run/last.safetensors")


def test_a_finished_run_may_go_on_longer(tmp_path):
    train_here(tmp_path, "train.epochs=1", "train.schedule=constant")
    assert train_here(tmp_path, "train.epochs=1", "train.schedule=constant", resume=True)["epoch"] == 1
    train_here(tmp_path, "train.epochs=3", "train.schedule=constant", resume=True)
    assert len(log_of(tmp_path / "run")) == 3
    assert load_run(tmp_path / "run").recipe.train.epochs == 3
    assert "started for 3 epochs, 2 are fewer" in refusal(
        tmp_path, "train.epochs=2", "train.schedule=constant", resume=True
    )


def test_resuming_something_else_is_refused(tmp_path):
    train_here(tmp_path, "train.epochs=1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    message = refusal(tmp_path, "train.epochs=2", "train.seed=5", "model.embed_dim=32", resume=True)
    assert "started with another model.embed_dim, train.seed;" in message
    other = replace(scenes(), items=tuple(replace(i, captions=(*i.captions[:4], "a dog")) for i in scenes().items))
    assert "other images or captions" in refusal(tmp_path, "train.epochs=2", dataset=other, resume=True)
    shutil.copy(tmp_path / "run/best.safetensors", tmp_path / "run/last.safetensors")
    assert "last.safetensors belongs to another network" in refusal(tmp_path, "train.epochs=2", resume=True)
    (tmp_path / "run/last.safetensors").write_bytes(before["last.safetensors"][:-4])
    assert "last.safetensors is damaged" in refusal(tmp_path, "train.epochs=2", resume=True)
    (tmp_path / "run/last.safetensors").unlink()
    assert "has no finished epoch to resume from" in refusal(tmp_path, "train.epochs=2", resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {
        name: content for name, content in before.items() if name != "last.safetensors"
    }


def test_resuming_nothing_is_refused(tmp_path):
    assert "there is no run folder" in refusal(tmp_path, resume=True)
    (tmp_path / "run").mkdir()
    assert "is not a training run" in refusal(tmp_path, resume=True)
    assert left_behind(tmp_path) == ["run"]


def test_an_existing_folder_or_file_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert "exists already; use --resume" in refusal(tmp_path)
    assert left_behind(tmp_path / "run") == ["notes.txt"]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    assert "exists already" in refusal(tmp_path)
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    train_here(tmp_path, "train.epochs=1")  # an empty folder is free


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_epoch(tmp_path, monkeypatch, bad):
    real = step.matching_loss
    monkeypatch.setattr(
        step, "matching_loss", lambda *a, epoch, **k: real(*a, epoch=epoch, **k) * (bad if epoch == 1 else 1)
    )
    message = refusal(tmp_path)
    assert f"the loss became {bad} in epoch 2, step 1" in message
    assert "run keeps epoch 1. Try a smaller learning_rate." in message
    monkeypatch.undo()
    assert load_run(tmp_path / "run").facts["epoch"] == 1
    assert len(log_of(tmp_path / "run")) == 1
    train_here(tmp_path, resume=True)


def test_an_absurd_learning_rate_leaves_no_run(tmp_path):
    message = refusal(
        tmp_path, "train.learning_rate=1e6", "train.weight_decay=1e6", "train.warmup=0", "train.schedule=constant",
        "model.zero_residual=false", "train.clip_norm=0", "train.epochs=100",
    )  # fmt: skip
    assert "became" in message
    assert "Try a smaller learning_rate" in message


def test_diverging_in_the_first_epoch_leaves_the_batch_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step, "matching_loss", lambda scores_IM, *_, **__: scores_IM.sum() * math.nan)
        message = refusal(tmp_path)
    assert "in epoch 1, step 1; its batch is in" in message
    assert "no epoch was finished" in message
    assert left_behind(tmp_path / "run") == ["diverged.npz"]
    with np.load(tmp_path / "run/diverged.npz") as batch:
        assert batch["similarity"].shape == (16, 32)
        assert (batch["epoch"], batch["step"]) == (1, 1)
        items = {item.id: item for item in scenes().items}
        for caption, owner in zip(batch["captions"], batch["owner"], strict=True):
            assert caption in items[batch["image_ids"][owner]].captions
        assert batch["input.pixels"].shape == (16, 3, 32, 32)
        assert len(batch["input.token_ids"]) == 32
    train_here(tmp_path, "train.epochs=1")  # such a folder is free to train into


class NanGradient(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx, scores):
        ctx.save_for_backward(scores)
        return scores.sum()

    @staticmethod
    def backward(ctx, _):
        return torch.full_like(ctx.saved_tensors[0], math.nan)


def test_gradients_that_are_no_numbers_change_no_weight_and_leave_their_batch(tmp_path, monkeypatch):
    real, calls = step.matching_loss, []

    def third_is_bad(scores_IM, *arguments, **options):
        calls.append(1)
        return NanGradient.apply(scores_IM) if len(calls) == 3 else real(scores_IM, *arguments, **options)

    save = ("train.save_steps=1", "train.batch_size=8")
    with monkeypatch.context() as patch:
        patch.setattr(step, "matching_loss", third_is_bad)
        message = refusal(tmp_path, *save)
    assert "the norm of the gradients became nan in epoch 1, step 3; its batch is in" in message
    tensors, facts = load_tensors(tmp_path / "run/last.safetensors")
    assert facts["steps"] == 2
    assert all(value.isfinite().all() for value in tensors.values())
    with np.load(tmp_path / "run/diverged.npz") as batch:
        assert (batch["epoch"], batch["step"]) == (1, 3)
    train_here(tmp_path, "train.batch_size=8", "train.save_steps=2", resume=True)  # how often it is saved may change
    assert load_tensors(tmp_path / "run/last.safetensors")[1]["epoch"] == len(log_of(tmp_path / "run"))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch):
    real = TrainingState.step

    def spoil(self):
        norm = real(self)
        next(iter(self.parameters.values())).data.fill_(math.inf)
        return norm

    monkeypatch.setattr(TrainingState, "step", spoil)
    for options in (("train.batch_size=32",), ("train.save_steps=1",)):
        assert "a weight became infinite or NaN in epoch 1; no epoch was finished" in refusal(tmp_path, *options)
        assert left_behind(tmp_path) == []
