"""What was found since the papers: generalised pooling, dropped nodes and words, each against a naive definition; and their graphs."""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from dualmatch.export.engine import build_engine
from dualmatch.export.engine_profiles import AxisRange, profile_from_text
from dualmatch.export.graph import export_encoder, specs
from dualmatch.export.half import to_half
from dualmatch.models import DSRAN
from dualmatch.models.generalised_pooling import GeneralisedPooling, place_encodings
from dualmatch.models.trunks import build_trunk
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError
from dualmatch.training.recipe import load_recipe
from dualmatch.training.state import TrainingState

from .agreement import largest_difference
from .tiny_models import NUM_REGIONS, TEXTS, captions, image_config, image_encoder, images, text_config, text_encoder
from .tiny_runs import assert_same_tensors, log_of, scenes, train_here

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed, so no engine was built: pip install 'dualmatch[tensorrt-rtx]'",
)


def pooling(longest=9):
    torch.manual_seed(3)
    module = GeneralisedPooling(longest)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def items(batch=4, count=6, dim=5):
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(1))


MASK = torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]


def naive_coefficients(module, count):
    """Section 3.2 of the paper for one number of items, without padding: positions, both directions by themselves, softmax."""
    places = torch.zeros(count, 32)
    for place in range(count):
        for channel in range(16):
            angle = place / 10000 ** (2 * channel / 32)
            places[place, 2 * channel], places[place, 2 * channel + 1] = math.sin(angle), math.cos(angle)
    states = {}
    for end in ("", "_reverse"):
        gru = nn.GRU(32, 32, batch_first=True)
        gru.load_state_dict(
            {
                name: module.gru.state_dict()[name + end]
                for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
            }
        )
        read = places.flip(0) if end else places
        states[end] = gru(read[None])[0][0]
    averaged = (states[""] + states["_reverse"].flip(0)) / 2
    scores = averaged @ module.score.weight[0]
    exponents = torch.exp((scores - scores.max()) / 0.1)
    return exponents / exponents.sum()


def naive_pooled(module, nodes, mask):
    rows = []
    for row, kept in zip(nodes, mask, strict=True):
        there = row[kept]
        weights = naive_coefficients(module, len(there))
        rows.append(
            torch.stack(
                [
                    sum(
                        weight * value
                        for weight, value in zip(weights, sorted(channel.tolist(), reverse=True), strict=True)
                    )
                    for channel in there.T
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
def test_generalised_pooling_is_its_definition(training):
    module, nodes = pooling().train(training), items()
    with torch.no_grad():
        torch.testing.assert_close(module(nodes, MASK), naive_pooled(module, nodes, MASK), rtol=0, atol=1e-5)
        torch.testing.assert_close(module(nodes), naive_pooled(module, nodes, torch.ones_like(MASK)), rtol=0, atol=1e-5)


def test_coefficients_differ_by_length_and_place_and_sum_to_one():
    module = pooling().eval()
    assert torch.equal(module.table[:, -1], torch.zeros(9))
    torch.testing.assert_close(module.table.sum(dim=1), torch.ones(9))
    for count in range(1, 10):
        assert torch.equal(module.table[count - 1, count:], torch.zeros(10 - count))
        torch.testing.assert_close(
            module.table[count - 1, :count], naive_coefficients(module, count), rtol=0, atol=1e-6
        )
    assert module.table[5, :6].std() > 1e-3


@pytest.mark.parametrize("mask", [MASK, None])
def test_pooling_knows_no_order_and_no_padding(mask):
    module, nodes = pooling().eval(), items()
    kept = torch.ones_like(MASK) if mask is None else mask
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(module(nodes[:, order], kept[:, order]), module(nodes, kept))
    longer = nn.functional.pad(nodes, (0, 0, 0, 20), value=99.0)
    torch.testing.assert_close(module(longer, nn.functional.pad(kept, (0, 20))), module(nodes, kept))


def test_the_mean_and_the_maximum_are_special_cases():
    module, nodes = pooling(), items()
    nn.init.zeros_(module.score.weight)
    torch.testing.assert_close(module.eval()(nodes), nodes.mean(dim=1))
    only_first = torch.zeros(9, 10)
    only_first[:, 0] = 1
    module.table = only_first
    torch.testing.assert_close(module(nodes), nodes.amax(dim=1))


def test_the_table_follows_the_weights():
    module, other = pooling().eval(), GeneralisedPooling(9).eval()
    assert not torch.equal(module.table, other.table)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module.table, other.table)
    assert set(module.state_dict()) == {"score.weight", *(f"gru.{name}" for name, _ in module.gru.named_parameters())}
    with torch.no_grad():
        module.score.weight.mul_(2)
    before = module.table.clone()
    assert not torch.equal(module.train().eval().table, before)


def test_every_weight_of_the_pooling_gets_a_gradient():
    module = pooling()
    module(items(), MASK).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
    assert place_encodings(3, 32)[0].tolist() == [0.0, 1.0] * 16


# Dropping.


def test_dropped_nodes_are_as_if_they_were_not_there(monkeypatch):
    """Without dropout, a step in which nodes are left out gives what the network gives for the regions that stayed."""
    config = image_config("files", "k2", norm="layer", attention_dropout=0.0, residual_dropout=0.0, drop_nodes=0.5)
    encoder = image_encoder(config)
    inputs = images(encoder, 6)
    kept = torch.rand(6, NUM_REGIONS, generator=torch.Generator().manual_seed(4)) > 0.5
    kept[:, 0] = True
    monkeypatch.setattr("dualmatch.models.dsran._kept", lambda *_: kept)
    with torch.no_grad():
        dropped = encoder.train()(**inputs)
        encoder.eval()
        alone = torch.cat([encoder(regions=inputs["regions"][[row]][:, kept[row]]) for row in range(6)])
        assert (encoder(**inputs) - dropped).abs().max() > 1e-3
    torch.testing.assert_close(dropped, alone, rtol=0, atol=2e-6)


def test_nodes_are_dropped_at_their_share_and_never_all():
    from dualmatch.models.dsran import _kept

    torch.manual_seed(0)
    assert 0.78 < _kept(200, 50, 0.2, torch.device("cpu")).float().mean() < 0.82
    assert _kept(500, 3, 0.9, torch.device("cpu")).any(dim=1).all()


@pytest.mark.parametrize("encoder_name", ["gru", "bert"])
@pytest.mark.parametrize("pool", ["mean", "last", "gpo"])
def test_dropped_words_are_as_if_they_had_not_been_written(encoder_name, pool):
    config = text_config(encoder_name, norm="layer", attention_dropout=0.0, residual_dropout=0.0, drop_words=0.5)
    config = replace(config, text=replace(config.text, pooling=pool, word_dropout=0.0, max_length=40))
    encoder, ids = text_encoder(config), captions(8, 9)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    encoder.train()
    with torch.no_grad():
        torch.manual_seed(5)
        order, mask = encoder._fewer_words(ids != 0)
        torch.manual_seed(5)
        dropped = encoder(ids)
        encoder.eval()
        shorter = [ids[row][order[row]][mask[row]] for row in range(8)]
        alone = torch.cat([encoder(one[None]) for one in shorter])
    lengths = (ids != 0).sum(dim=1)
    for one, row, length in zip(shorter, ids, lengths, strict=True):
        assert one[0] == row[0]
        assert one[-1] == row[length - 1]
    assert sum(map(len, shorter)) < lengths.sum() - 8
    torch.testing.assert_close(dropped, alone, rtol=0, atol=2e-6)


def test_cached_words_are_dropped_alike():
    config = text_config("bert", norm="layer", attention_dropout=0.0, residual_dropout=0.0, drop_words=0.5)
    encoder, ids = text_encoder(config), captions(8, 9)
    mask = ids != 0
    with torch.no_grad():
        words = encoder.words(ids, mask)
        torch.manual_seed(5)
        encoder.train()
        order, kept = encoder._fewer_words(mask)
        torch.manual_seed(5)
        dropped = encoder.embed(words, mask)
        encoder.eval()
        alone = torch.cat(
            [
                encoder.embed(
                    words[row][order[row]][kept[row]][None], torch.ones(1, int(kept[row].sum()), dtype=torch.bool)
                )
                for row in range(8)
            ]
        )
    torch.testing.assert_close(dropped, alone, rtol=0, atol=2e-6)


def test_evaluation_drops_nothing():
    config = image_config("grid-and-pyramid-final", drop_nodes=0.5, drop_words=0.5)
    plain = replace(config, drop_nodes=0.0, drop_words=0.0)
    with torch.no_grad():
        one, other = image_encoder(config), image_encoder(plain)
        assert torch.equal(one(**images(one, 3)), other(**images(other, 3)))


# Graphs.

FILES = image_config("files", "k1")
GPO_IMAGES = {
    "both": image_config("grid-and-pyramid-final", "no-jsr", norm="none", image_pooling="gpo"),
    "files": replace(FILES, image_pooling="gpo", regions=replace(FILES.regions, num_regions=NUM_REGIONS)),
}
GPO_TEXTS = {"gru": replace(text_config("gru"), text=replace(TEXTS["gru"], pooling="gpo", max_length=40))}
LENGTHS = (1, 2, 5, 17, 40)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Each encoder with its exported graph, by name."""
    folder, made = tmp_path_factory.mktemp("modern"), {}
    for side, configs, build in (("image", GPO_IMAGES, image_encoder), ("text", GPO_TEXTS, text_encoder)):
        for name, config in configs.items():
            encoder = build(config)
            for module in encoder.modules():
                if isinstance(module, GeneralisedPooling):  # coefficients far apart, so that a wrong one shows
                    nn.init.normal_(module.score.weight, std=0.3)
            encoder.eval()
            example = {"token_ids": captions(3, 7)} if side == "text" else images(encoder, 2)
            path = folder / f"{side}-{name}.onnx"
            made[f"{side}-{name}"] = encoder, path, export_encoder(encoder, example, path, output=f"{side}_embedding")
    return made


NAMES = [*(f"image-{name}" for name in GPO_IMAGES), *(f"text-{name}" for name in GPO_TEXTS)]


def feeds(encoder, name, batch, length):
    tensors = (
        {"token_ids": captions(batch, length, seed=batch + length)}
        if name.startswith("text")
        else images(encoder, batch)
    )
    return {key: value.numpy() for key, value in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_onnx_gives_torchs_embeddings_on_every_shape(name, graphs):
    encoder, path, _ = graphs[name]
    lengths = LENGTHS if name.startswith("text") else (0,)
    batches = [feeds(encoder, name, batch, length) for batch in (1, 2, 7) for length in lengths]
    assert largest_difference(encoder, path, batches) < 1e-5


def test_padding_changes_nothing_in_the_graph(graphs):
    """Padded also past the longest caption that there are coefficients for."""
    _, path, _ = graphs["text-gru"]
    ids = captions(4, 9, seed=3).numpy()
    with open_session(path) as session:
        (alone,) = session.run({"token_ids": ids}).values()
        (padded,) = session.run({"token_ids": np.pad(ids, ((0, 0), (0, 50)))}).values()
    np.testing.assert_allclose(padded, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_points_where_float32_does(name, graphs, tmp_path):
    encoder, _, model = graphs[name]
    path = tmp_path / "half.onnx"
    onnx.save(to_half(model), path)
    inputs = feeds(encoder, name, 7, 17)
    with open_session(path) as session, torch.inference_mode():
        (half,) = session.run(inputs).values()
        single = encoder(**{key: torch.from_numpy(value) for key, value in inputs.items()}).numpy()
    assert (single * half).sum(axis=1).min() > 0.999


@rtx
@pytest.mark.parametrize("name", ["image-both", "text-gru"])
def test_the_graphs_build_as_engines(name, graphs, tmp_path):
    _, path, model = graphs[name]
    inputs = specs(model.graph.input)
    length = AxisRange(1, 12, 40) if name.startswith("text") else None
    record = build_engine(
        path,
        tmp_path / "e",
        flavour="tensorrt-rtx",
        inputs=inputs,
        profiles=[profile_from_text("1:4:16", inputs, length=length)],
    )
    assert record.bytes > 10_000


# Refusals, and whole runs.


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("model.text.pooling=gpo", "model.text.max_length=0"), "max_length must lie between 1 and 512, got 0"),
        (("model.text.pooling=gpo", "model.pad_policy=authors"), 'set pad_policy = "masked"'),
        (("model.image_pooling=gpo", "model.regions.source=precomputed"), "set regions.num_regions to 1"),
        (("model.image_pooling=max",), "image_pooling must be one of 'mean', 'gpo'"),
        (("model.drop_nodes=1.0",), "drop_nodes must lie between 0.0 and 0.95"),
        (("model.drop_words=-0.1",), "drop_words must lie between"),
        (("loss.num_negatives=0",), "num_negatives must lie between 1 and"),
        (("loss.num_negatives=2",), 'it needs kind = "hinge"'),
        (("loss.kind=hinge", "loss.hardest=false", "loss.num_negatives=2"), "hardest = true"),
        (("train.optimiser=bertadam", "train.weight_decay=0"), 'takes schedule = "step" or "constant"'),
        (("train.optimiser=bertadam", "train.weight_decay=0", "train.schedule=step", "train.warmup=0"), "a warmup"),
        (("train.optimiser=bertadam",), 'weight_decay is for optimiser = "adamw"; set it to 0 for bertadam'),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, sentence):
    with pytest.raises(DualmatchError) as caught:
        load_recipe("scenes-dsran-gru", overrides)
    assert sentence in str(caught.value)


def test_vsrn_refuses_generalised_pooling_of_words():
    with pytest.raises(DualmatchError, match="is for DSRAN"):
        load_recipe("scenes-vsrn", ["model.text.pooling=gpo"])


def test_more_nodes_than_coefficients_are_refused():
    config = image_config("grid-and-files", "k1")
    config = replace(config, image_pooling="gpo", regions=replace(config.regions, num_regions=500))
    with pytest.raises(DualmatchError, match="pools at most 512 nodes, the network has 516"):
        DSRAN(replace(config, text=TEXTS["gru"]), build_trunk(config.trunk))


MODERN = (
    "model.image_pooling=gpo",
    "model.text.pooling=gpo",
    "model.drop_nodes=0.2",
    "model.drop_words=0.2",
    "loss.kind=hinge",
    "loss.num_negatives=3",
    "loss.warmup_epochs=1",
    "loss.warmup=sum",
    "train.word_learning_rate=0.1",
)
BERTADAM = (
    "train.optimiser=bertadam",
    "train.weight_decay=0",
    "train.schedule=step",
    "train.step_epochs=2",
    "train.warmup=0.25",
    "train.clip_norm=1.0",
)


@pytest.mark.parametrize("options", [MODERN, BERTADAM], ids=["modern", "bertadam"])
def test_a_run_with_these_options_resumes_bit_for_bit(options, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train_here(whole, *options, dataset=scenes())
    stopped = _stopped_after(parts, *options, epochs=2)
    assert stopped == 2
    train_here(parts, *options, dataset=scenes(), resume=True)
    assert log_of(whole / "run") == log_of(parts / "run")
    assert_same_tensors(whole / "run" / "last.safetensors", parts / "run" / "last.safetensors")


def _stopped_after(folder, *options, epochs):
    """A run that a kill ends once so many epochs are saved: the schedules know the whole length from the start."""

    class KilledError(Exception):
        pass

    def progress(what, *_):
        if what.startswith(f"epoch {epochs}/") and "val Rsum" in what:
            raise KilledError

    with pytest.raises(KilledError):
        train_here(folder, *options, dataset=scenes(), progress=progress)
    return len(log_of(folder / "run"))


def test_bertadams_rate_is_warm_up_times_linear_decay_times_step():
    from dualmatch.training.objective import Objective

    recipe = load_recipe(
        "scenes-dsran-gru", ["train.epochs=4", "train.learning_rate=1.0", *BERTADAM, "model.text.vocabulary_size=9"]
    )
    model = DSRAN(recipe.model, build_trunk(recipe.model.trunk))
    state = TrainingState(recipe, Objective(model), steps_per_epoch=5)
    rates, weight = [], model.text_encoder.words.embed.weight
    for _ in range(20):
        before = weight.detach().clone()
        for parameter in state.parameters.values():
            parameter.grad = torch.ones_like(parameter) * 100
        rates.append(state.learning_rate)
        norm = state.step()
        assert norm > 100  # before clipping
        moved = (weight.detach() - before).abs().max().item()
        assert (moved == 0) == (rates[-1] == 0)
    wanted = [
        (step / 20 / 0.25 if step < 5 else (1 - step / 20) / 0.75) * (0.1 if step >= 10 else 1) for step in range(20)
    ]
    assert rates == pytest.approx(wanted)
