"""The training loop on a few scenes: it learns, batches hold what they should, and whatever the recipe asks for trains."""

import math
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.tokenizer import CaptionTokenizer
from dualmatch.training import loop
from dualmatch.training.batches import Batches, Setup
from dualmatch.training.checkpoint import build_model, load_run, load_tensors, tokenizer_options
from dualmatch.training.distributed import Group
from dualmatch.training.evaluation import evaluate_run
from dualmatch.training.features import no_progress
from dualmatch.training.objective import Objective
from dualmatch.training.state import TrainingState
from dualmatch.training.step import Differentiator
from dualmatch.training.vocabulary import build_tokenizer, save_tokenizer
from dualmatch.training.workers import LoadedAhead

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


def parts_of(batches, epoch):
    """An epoch's plans with what they load."""
    return [(plan, batches.load(plan)) for plan in batches.plans(epoch)]


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
    return TrainingState(recipe, Objective(build_model(recipe, pretrained=True)), steps_per_epoch=steps_per_epoch)


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
    state = state_of("train.graph_learning_rate=0.5", "train.word_learning_rate=0.1", "train.weight_decay=0.1")
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
            assert (group["factor"] == 0.1) == name.startswith("text_encoder.words."), name
            assert (group["weight_decay"] == 0.1) == (parameter.ndim > 1), name
    assert sorted(seen) == sorted(state.parameters)


def test_gradients_are_clipped():
    state = state_of("train.clip_norm=0.001", "train.optimiser=adam", "train.weight_decay=0")
    sum((parameter * 100).sum() for parameter in state.parameters.values()).backward()
    before = state.step()
    assert before == pytest.approx(100 * math.sqrt(sum(p.numel() for p in state.parameters.values())), rel=1e-3)
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in state.parameters.values()))
    assert norm == pytest.approx(0.001, rel=1e-3)


def test_an_epoch_over_pairs_sees_every_pair_once(tmp_path):
    batches = batches_of(tmp_path, *PAIRS, "train.batch_size=30")
    parts = parts_of(batches, 0)
    assert [len(part.image_ids_I) for _, part in parts] == [30, 30, 30, 30, 30, 10]
    assert batches.steps_per_epoch == 6
    drawn = [caption for plan, _ in parts for caption in plan.captions]
    assert sorted(drawn) == list(range(160))
    assert drawn != sorted(drawn)
    assert torch.cat([part.image_ids_I for _, part in parts]).tolist() == [caption // 5 for caption in drawn]
    assert all(part.owner_M.tolist() == list(range(len(part.image_ids_I))) for _, part in parts)
    again = [plan.images for plan in batches.plans(0)]
    assert again == [plan.images for plan, _ in parts]
    assert again != [plan.images for plan in batches.plans(1)]


def test_an_epoch_over_images_draws_their_captions(tmp_path):
    batches = batches_of(tmp_path, "train.captions_per_image=3", "train.batch_size=12")
    seen = []
    for plan, part in parts_of(batches, 0):
        rows = part.image_ids_I.tolist()
        seen += rows
        assert len(part.token_ids_MT) == 3 * len(rows) == len(set(plan.captions))
        assert [rows[owner] for owner in part.owner_M.tolist()] == [caption // 5 for caption in plan.captions]
    assert sorted(seen) == list(range(32))


def test_a_batch_holds_the_images_and_captions_of_its_plan(tmp_path):
    batches = batches_of(tmp_path, "train.captions_per_image=2", "train.batch_size=8")
    setup, captions = batches.setup, scenes().select(["train"]).captions
    plan, part = parts_of(batches, 3)[1]
    for row, image in enumerate(plan.images):
        expected = setup.preprocess(batches.items[image].read_bytes())
        np.testing.assert_array_equal(part.images["pixels"][row].numpy(), expected)
    expected = setup.tokenizer([captions[caption] for caption in plan.captions])
    np.testing.assert_array_equal(part.token_ids_MT.numpy(), expected)


def test_pictures_too_many_for_memory_are_decoded_when_they_are_needed(tmp_path, monkeypatch):
    kept = batches_of(tmp_path, "train.batch_size=8")
    monkeypatch.setattr("dualmatch.training.batches.MEMORY_LIMIT", 1000)
    decoded = batches_of(tmp_path, "train.batch_size=8")
    assert kept.pixels is not None
    assert decoded.pixels is None
    for (_, one), (_, other) in zip(parts_of(kept, 0), parts_of(decoded, 0), strict=True):
        assert torch.equal(one.images["pixels"], other.images["pixels"])


@pytest.mark.parametrize("options", [("data.augment=true",), ("train.captions_per_image=3",), PAIRS])
def test_the_shares_of_processes_are_together_the_batch(tmp_path, options):
    batches = batches_of(tmp_path, *options, "train.batch_size=13")
    whole = parts_of(batches, 1)
    for size in (2, 3):
        shares = []
        for rank in range(size):
            batches.share = (rank, size)
            shares.append([batches.load(plan) for plan, _ in whole])
        for index, (_, all_of_it) in enumerate(whole):
            parts = [share[index] for share in shares]
            assert torch.equal(torch.cat([part.images["pixels"] for part in parts]), all_of_it.images["pixels"])
            assert torch.equal(torch.cat([part.token_ids_MT for part in parts]), all_of_it.token_ids_MT)
            assert torch.equal(torch.cat([part.image_ids_I for part in parts]), all_of_it.image_ids_I)
            rows = [len(part.image_ids_I) for part in parts]
            owners = [part.owner_M + sum(rows[:rank]) for rank, part in enumerate(parts)]
            assert torch.equal(torch.cat(owners), all_of_it.owner_M)
            assert max(rows) - min(rows) <= 1


def test_images_with_fewer_captions_give_all_they_have(tmp_path):
    few = [
        replace(item, captions=item.captions[: 1 + i % 3]) for i, item in enumerate(scenes().select(["train"]).items)
    ]
    data = Dataset(name="few", layout="scenes", items=tuple(few))
    ((_, part),) = parts_of(batches_of(tmp_path, "train.captions_per_image=2", "train.batch_size=32", dataset=data), 0)
    counts = torch.bincount(part.owner_M, minlength=32).tolist()
    assert counts == [min(2, 1 + image % 3) for image in part.image_ids_I.tolist()]


def test_a_last_batch_of_one_is_left_out(tmp_path):
    def sizes(count):
        batches = batches_of(tmp_path, "train.batch_size=4", dataset=first(scenes(), "train", count))
        return [len(part.image_ids_I) for _, part in parts_of(batches, 0)]

    assert sizes(9) == [4, 4]
    assert sizes(3) == [3]


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
    plan, part = parts_of(batches, 0)[0]
    captions = [batches.captions[i] for i in plan.captions]
    with torch.inference_mode():
        fresh = batches.setup.model.text_encoder(torch.from_numpy(batches.setup.tokenizer(captions)))
        _, cached, _ = Objective(batches.setup.model).eval()(part)
        torch.testing.assert_close(cached, fresh, rtol=0, atol=2e-3)


def test_images_of_a_frozen_trunk_embed_as_fresh_ones(tmp_path):
    batches = batches_of(tmp_path, *LITE0, "data.views=1", dataset=first(scenes(), "train", 4))
    ((plan, part),) = parts_of(batches, 0)
    with torch.inference_mode():
        pixels = np.stack([batches.setup.preprocess(batches.items[image].read_bytes()) for image in plan.images])
        fresh = batches.setup.model.image_encoder(torch.from_numpy(pixels))
        cached, _, _ = Objective(batches.setup.model).eval()(part)
        torch.testing.assert_close(cached, fresh, rtol=0, atol=2e-3)
    assert batches.pixels is None
    assert part.images == {}


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


def objective_of(folder, *overrides):
    """An objective in training mode with the first batch of its data."""
    batches = batches_of(folder, *overrides)
    plan = next(batches.plans(0))
    objective = Objective(batches.setup.model).train()
    return objective, batches.setup.recipe, (batches.load(plan), torch.tensor(plan.owner), torch.tensor(plan.images))


def differentiator_of(objective, recipe, **options):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Differentiator(objective, Group(), recipe.loss, scaler=scaler, **options)


def test_parts_are_embedded_twice_with_the_same_dropout_and_counted_once_by_batchnorm(tmp_path):
    objective, recipe, batch = objective_of(tmp_path, *DROPOUT, "model.norm=batch")
    seen = []
    objective.register_forward_hook(lambda _module, _inputs, outputs: seen.append([one.detach() for one in outputs]))
    torch.manual_seed(1)
    differentiator_of(objective, recipe, accumulate=3).gradients(*batch, epoch=0)
    assert len(seen) == 6
    for first_pass, second_pass in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first_pass[0], second_pass[0])
        assert torch.equal(first_pass[1], second_pass[1])
    counters = {v.item() for name, v in objective.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counters == {3}
    assert not torch.equal(seen[0][0], seen[1][0][: len(seen[0][0])])


def test_bfloat16_is_near_float32_and_leaves_float32_weights(tmp_path):
    objective, recipe, batch = objective_of(tmp_path)
    exact = differentiator_of(objective, recipe).gradients(*batch, epoch=0)
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad()
    near = differentiator_of(objective, recipe, precision="bf16").gradients(*batch, epoch=0)
    assert near.matching != exact.matching
    assert near.matching == pytest.approx(exact.matching, rel=0.02)
    assert near.scores_IM.dtype == torch.float32
    for name, p in objective.named_parameters():
        assert p.grad.dtype == torch.float32
        norm = gradients[name].norm()
        if norm > 1e-3:
            assert torch.nn.functional.cosine_similarity(p.grad.flatten(), gradients[name].flatten(), dim=0) > 0.8, name


@pytest.mark.parametrize("overrides", [("train.precision=bf16",), ("train.accumulate=3", *DROPOUT)])
def test_runs_in_bfloat16_and_in_parts_learn(tmp_path, overrides):
    train_here(tmp_path, *overrides, "train.epochs=4", "train.learning_rate=5e-3")
    log = log_of(tmp_path / "run")
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]


def test_loading_ahead_keeps_the_order_and_is_bounded():
    started, finished = [], []

    def load(plan):
        started.append(plan)
        time.sleep(0.001 * (plan % 3))
        finished.append(plan)
        return plan * plan

    loader = LoadedAhead(range(20), load, workers=3, ahead=4)
    for plan, value in loader:
        assert value == plan * plan
        assert len(started) <= plan + 1 + 4 + 1
    assert sorted(started) == list(range(20))
    assert loader.waited > 0
    assert [value for _, value in LoadedAhead(range(5), load, workers=0)] == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_cannot_load_ends_the_epoch(workers):
    def load(plan):
        if plan == 3:
            raise DualmatchError("no image")
        return plan

    seen = []
    with pytest.raises(DualmatchError, match="no image"):
        seen.extend(plan for plan, _ in LoadedAhead(range(6), load, workers=workers))


def test_threads_change_nothing(tmp_path):
    options = (*DROPOUT, "data.augment=true", "train.epochs=2")
    for workers in (0, 3):
        (tmp_path / str(workers)).mkdir()
        train_here(tmp_path / str(workers), *options, workers=workers)
    assert_same_tensors(tmp_path / "0/run/last.safetensors", tmp_path / "3/run/last.safetensors")


def test_curves_and_tensorboard_are_kept_beside_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dualmatch.training.watch import RunWatch

    train_here(tmp_path, watch=RunWatch())
    assert (tmp_path / "run/curves.svg").read_text().count("<svg") == 1
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/matching")] == [1, 2, 3, 4, 5, 6]
    rsums = [event.value for event in events.Scalars("recall/Rsum")]
    assert rsums == pytest.approx([line["val_rsum"] for line in log_of(tmp_path / "run")], abs=1e-3)
    assert "learning rate" in events.Tags()["scalars"]
