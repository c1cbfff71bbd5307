"""The training loop on a few scenes: it learns, batches hold what they should, and whatever the recipe asks for trains."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.tokenizer import CaptionTokenizer
from dualmatch.training import loop
from dualmatch.training.batches import Batches, Setup
from dualmatch.training.checkpoint import build_model, load_run, load_tensors, tokenizer_options
from dualmatch.training.evaluation import evaluate_run
from dualmatch.training.features import no_progress
from dualmatch.training.state import TrainingState
from dualmatch.training.vocabulary import build_tokenizer, save_tokenizer

from .tiny_runs import (
    BERT,
    LITE0,
    PAIRS,
    assert_same_tensors,
    first,
    log_of,
    scenes,
    tiny_recipe,
    train_here,
)

DROPOUT = ("model.residual_dropout=0.2", "model.text.word_dropout=0.2")


def batches_of(folder, *overrides, dataset=None):
    """The training set's batches, with the untrained network."""
    recipe, data = tiny_recipe(*overrides), (dataset or scenes()).select(["train"])
    vocabulary = build_tokenizer(recipe.model.text, data.captions, min_count=1)
    folder.mkdir(exist_ok=True)
    save_tokenizer(vocabulary, folder / "tokenizer.json")
    tokenizer = CaptionTokenizer(folder / "tokenizer.json", tokenizer_options(recipe))
    text = replace(recipe.model.text, vocabulary_size=tokenizer.vocabulary_size)
    recipe = replace(recipe, model=replace(recipe.model, text=text))
    torch.manual_seed(0)
    model = build_model(recipe, pretrained=True)  # in training mode, as the loop has it
    setup = Setup(
        recipe=recipe,
        model=model,
        preprocess=loop.preprocess_of(recipe.model.trunk, recipe.data.resize),
        tokenizer=tokenizer,
        regions=None,
        cache=folder / "cache",
        progress=no_progress,
    )
    batches = Batches(setup, data)
    model.eval()
    return batches


def test_the_loss_falls_and_the_best_epoch_is_kept(tmp_path):
    best = train_here(tmp_path, "train.epochs=8", "train.learning_rate=5e-3")
    log = log_of(tmp_path / "run")
    assert [line["epoch"] for line in log] == list(range(1, 9))
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    rsums = [line["val_rsum"] for line in log]
    assert best["epoch"] == 1 + rsums.index(max(rsums))
    run = load_run(tmp_path / "run")
    assert run.facts == {"epoch": best["epoch"], "val_rsum": pytest.approx(best["val_rsum"], abs=1e-4)}
    assert evaluate_run(tmp_path / "run", scenes().select(["val"])).rsum == pytest.approx(best["val_rsum"])
    trained_on = evaluate_run(tmp_path / "run", scenes().select(["train"])).rsum
    assert trained_on > 150  # chance is about 50: 32 images, 160 captions


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        train_here(tmp_path / name, *DROPOUT, f"train.seed={seed}", "train.epochs=2")
    assert_same_tensors(tmp_path / "a/run/last.safetensors", tmp_path / "b/run/last.safetensors")
    assert log_of(tmp_path / "a/run") == log_of(tmp_path / "b/run") != log_of(tmp_path / "c/run")


@pytest.mark.parametrize(
    "overrides",
    [
        (*PAIRS, "loss.kind=hinge", "train.optimiser=adam", "train.weight_decay=0", "train.schedule=step"),
        ("loss.kind=hinge", "loss.warmup_epochs=1", "loss.hardest=false", "train.schedule=constant"),
        (*PAIRS, "model.pad_policy=authors", "model.norm=batch", "loss.mask_same_image=false"),
        (*BERT, "model.pad_policy=authors", "model.text.fixed_length=32", "model.text.max_length=32"),
        (*BERT, "model.pad_policy=authors", "model.text.frozen=true"),
        ("data.augment=true", "data.resize=crop"),
        ("train.captions_per_image=5", "train.clip_norm=0", "train.graph_learning_rate=0.1"),
        ("model.regional_path=false", "model.joint_graphs=4", "data.min_word_count=3"),
    ],
)
def test_every_option_trains(tmp_path, overrides):
    train_here(tmp_path, *overrides, "train.epochs=4")
    log = log_of(tmp_path / "run")
    assert log[-1]["loss"] < log[1]["loss"]  # the first epoch may be one of another loss
    assert evaluate_run(tmp_path / "run", scenes().select(["val"])).rsum == pytest.approx(
        load_run(tmp_path / "run").facts["val_rsum"], abs=1e-3
    )


def test_the_moving_average_is_what_best_holds(tmp_path):
    train_here(tmp_path, "train.average=0.9", "train.epochs=1")
    best, _ = load_tensors(tmp_path / "run/best.safetensors")
    last, _ = load_tensors(tmp_path / "run/last.safetensors")
    name = "image_encoder.joint_graphs.0.query.weight"
    assert torch.equal(best[name], last[f"average.{name}"])
    assert not torch.equal(best[name], last[f"model.{name}"])


def state_of(*overrides, steps_per_epoch=10):
    recipe = tiny_recipe(*overrides)
    text = replace(recipe.model.text, vocabulary_size=9)
    recipe = replace(recipe, model=replace(recipe.model, text=text))
    return TrainingState(recipe, build_model(recipe, pretrained=True), steps_per_epoch=steps_per_epoch)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.schedule=constant", "train.warmup=0"), {0: 1, 29: 1}),
        (("train.schedule=constant", "train.warmup=0.2"), {0: 1 / 6, 5: 1, 6: 1}),
        (("train.schedule=cosine", "train.warmup=0"), {0: 1, 15: 0.5, 29: 0.5 * (1 + math.cos(math.pi * 29 / 30))}),
        (("train.schedule=cosine", "train.warmup=0.2"), {0: 1 / 6, 5: 1, 6: 1, 18: 0.5}),
        (("train.schedule=step", "train.step_epochs=1", "train.warmup=0"), {0: 1, 9: 1, 10: 0.1, 29: 0.01}),
    ],
)
def test_schedules(overrides, expected):
    state = state_of("train.learning_rate=1.0", "train.epochs=3", *overrides)
    for step, rate in expected.items():
        state.steps = step
        assert state.learning_rate == pytest.approx(rate), step


def test_parameter_groups():
    state = state_of("train.graph_learning_rate=0.5", "train.weight_decay=0.1")
    name_of = {parameter: name for name, parameter in state.parameters.items()}
    seen = []
    for group in state.optimiser.param_groups:
        for parameter in group["params"]:
            name = name_of[parameter]
            seen.append(name)
            in_graph = any(
                part in name for part in ("grid_graph", "region_graph", "joint_graphs", "caption_graph", "fusions")
            )
            assert (group["factor"] == 0.5) == in_graph, name
            assert (group["weight_decay"] == 0.1) == (parameter.ndim > 1), name
    assert sorted(seen) == sorted(state.parameters)


def test_gradients_are_clipped():
    state = state_of("train.clip_norm=0.001", "train.optimiser=adam", "train.weight_decay=0")
    state.step(sum((parameter * 100).sum() for parameter in state.parameters.values()))
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in state.parameters.values()))
    assert norm == pytest.approx(0.001, rel=1e-3)


def test_an_epoch_over_pairs_sees_every_pair_once(tmp_path):
    batches = batches_of(tmp_path, *PAIRS, "train.batch_size=30")
    drawn, embedded = [], batches._embed_captions
    batches._embed_captions = lambda captions: (drawn.extend(captions), embedded(captions))[1]
    parts = list(batches.epoch(0))
    assert [len(part.images_ID) for part in parts] == [30, 30, 30, 30, 30, 10]
    assert batches.steps_per_epoch == 6
    assert sorted(drawn) == list(range(160))
    assert drawn != sorted(drawn)
    assert torch.cat([part.image_ids_I for part in parts]).tolist() == [caption // 5 for caption in drawn]
    assert all(part.owner_M.tolist() == list(range(len(part.images_ID))) for part in parts)
    again = [part.image_ids_I.tolist() for part in batches.epoch(0)]
    assert again == [part.image_ids_I.tolist() for part in parts]
    assert again != [part.image_ids_I.tolist() for part in batches.epoch(1)]


def test_an_epoch_over_images_draws_their_captions(tmp_path):
    batches = batches_of(tmp_path, "train.captions_per_image=3", "train.batch_size=12")
    drawn, embedded = [], batches._embed_captions
    batches._embed_captions = lambda captions: (drawn.append(captions), embedded(captions))[1]
    seen = []
    for part, captions in zip(list(batches.epoch(0)), drawn, strict=True):
        rows = part.image_ids_I.tolist()
        seen += rows
        assert len(part.captions_MD) == 3 * len(rows) == len(set(captions))
        assert [rows[owner] for owner in part.owner_M.tolist()] == [caption // 5 for caption in captions]
    assert sorted(seen) == list(range(32))


def test_images_with_fewer_captions_give_all_they_have(tmp_path):
    few = [
        replace(item, captions=item.captions[: 1 + i % 3]) for i, item in enumerate(scenes().select(["train"]).items)
    ]
    data = Dataset(name="few", layout="scenes", items=tuple(few))
    (part,) = batches_of(tmp_path, "train.captions_per_image=2", "train.batch_size=32", dataset=data).epoch(0)
    counts = torch.bincount(part.owner_M, minlength=32).tolist()
    assert counts == [min(2, 1 + image % 3) for image in part.image_ids_I.tolist()]


def test_a_last_batch_of_one_is_left_out(tmp_path):
    data = first(scenes(), "train", 9)
    assert [len(part.images_ID) for part in batches_of(tmp_path, "train.batch_size=4", dataset=data).epoch(0)] == [4, 4]
    data = first(scenes(), "train", 3)
    assert [len(part.images_ID) for part in batches_of(tmp_path, "train.batch_size=4", dataset=data).epoch(0)] == [3]


@pytest.mark.parametrize("policy", ["masked", "authors"])
def test_captions_of_a_frozen_word_encoder_embed_as_fresh_ones(tmp_path, policy):
    options = (
        f"model.pad_policy={policy}",
        "model.text.frozen=true",
        "model.text.fixed_length=24",
        "model.text.max_length=24",
    )
    batches = batches_of(tmp_path, *BERT, *options)
    assert (batches.words is None) == (policy == "authors")
    chosen = [7, 90, 13]
    captions = [scenes().select(["train"]).captions[i] for i in chosen]
    with torch.inference_mode():
        fresh = batches.setup.model.text_encoder(torch.from_numpy(batches.setup.tokenizer(captions)))
        torch.testing.assert_close(batches._embed_captions(chosen), fresh, rtol=0, atol=2e-3)


def test_images_of_a_frozen_trunk_embed_as_fresh_ones(tmp_path):
    batches = batches_of(tmp_path, *LITE0, "data.views=1", dataset=first(scenes(), "train", 4))
    with torch.inference_mode():
        pixels = np.stack([batches.setup.preprocess(item.read_bytes()) for item in batches.items])
        fresh = batches.setup.model.image_encoder(torch.from_numpy(pixels))
        cached = batches._embed_images([0, 1, 2, 3], np.random.default_rng(0))
        torch.testing.assert_close(cached, fresh, rtol=0, atol=2e-3)
    assert batches.pixels is None


def test_cached_views_are_drawn_and_not_computed_twice(tmp_path):
    data = Dataset(
        name="six", layout="scenes", items=first(scenes(), "train", 6).items + first(scenes(), "val", 4).items
    )
    computed = []
    options = (*LITE0, "data.views=3", "train.batch_size=3")
    report = lambda what, done, of: computed.append(of) if what == "computing trunk features" else None  # noqa: E731
    train_here(tmp_path, *options, dataset=data, progress=report)
    assert max(computed) == 6 * 3
    assert len(list((tmp_path / "cache").glob("maps-*/*-final.npy"))) == 6 * 3 + 4
    shutil.move(tmp_path / "run", tmp_path / "before")
    computed.clear()
    train_here(tmp_path, *options, dataset=data, progress=report)
    assert computed == []
    assert_same_tensors(tmp_path / "before/last.safetensors", tmp_path / "run/last.safetensors")
