"""DSRAN in torch, over the full product of its options: invariance, gradients, and each piece against its formula."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dualmatch.models import DSRAN, DsranConfig, RegionConfig, TextConfig, TrunkConfig
from dualmatch.models.graph_attention import GatedFusion, GraphAttention, NodeNorm
from dualmatch.models.pooling import l2_normalise
from dualmatch.models.text import minilm_folder
from dualmatch.models.trunks import TinyTrunk
from dualmatch.runtime.configs import from_mapping
from dualmatch.runtime.errors import DualmatchError

from .tiny_models import (
    IMAGE_OPTIONS,
    IMAGE_SIZE,
    TEXT_OPTIONS,
    TEXTS,
    captions,
    image_config,
    image_encoder,
    images,
    text_config,
    text_encoder,
)

MASKED_TEXTS = [options for options in TEXT_OPTIONS if options[1] == "masked"]
AUTHORS_TEXTS = [options for options in TEXT_OPTIONS if options[1] == "authors"]
ORDER = torch.tensor([3, 0, 4, 2, 1])


def ids_of(options):
    return options if isinstance(options, str) else "-".join(options)


def assert_same(got, wanted, tolerance=2e-6):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def nodes_and_mask(batch=4, num_nodes=6, dim=16):
    """Random nodes, and a mask that keeps 6, 3, 1 and 4 of them."""
    nodes = torch.randn(batch, num_nodes, dim, generator=torch.Generator().manual_seed(1))
    return nodes, torch.arange(num_nodes) < torch.tensor([6, 3, 1, 4])[:, None]


# Whole encoders.


@pytest.mark.parametrize("options", IMAGE_OPTIONS, ids=ids_of)
def test_an_image_is_embedded_alike_alone_in_a_batch_and_permuted(options):
    encoder = image_encoder(image_config(*options))
    inputs = images(encoder, 5)
    with torch.inference_mode():
        embedded = encoder(**inputs)
        alone = torch.cat([encoder(**{name: value[[row]] for name, value in inputs.items()}) for row in range(5)])
        permuted = encoder(**{name: value[ORDER] for name, value in inputs.items()})
    assert embedded.shape == (5, 16)
    assert_same(embedded.norm(dim=1), torch.ones(5))
    assert_same(alone, embedded)
    assert_same(permuted, embedded[ORDER])
    assert (embedded @ embedded.T)[~torch.eye(5, dtype=torch.bool)].max() < 0.9999


@pytest.mark.parametrize("options", IMAGE_OPTIONS, ids=ids_of)
def test_every_weight_of_an_image_encoder_gets_a_finite_gradient(options):
    encoder = image_encoder(image_config(*options)).train()
    encoder(**images(encoder, 5)).square().sum(dim=0).pow(2).sum().backward()
    for name, value in encoder.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name


@pytest.mark.parametrize("options", MASKED_TEXTS, ids=ids_of)
def test_under_masked_a_caption_is_all_that_its_embedding_depends_on(options):
    encoder = text_encoder(text_config(*options))
    ids = captions(5, 9)
    lengths = (ids != 0).sum(dim=1)
    with torch.inference_mode():
        embedded = encoder(ids)
        alone = torch.cat([encoder(ids[[row], : lengths[row]]) for row in range(5)])
        padded = encoder(nn.functional.pad(ids, (0, 31)))
        permuted = encoder(ids[ORDER])
    assert lengths.min() < lengths.max()
    assert_same(embedded.norm(dim=1), torch.ones(5))
    assert_same(alone, embedded)
    assert_same(padded, embedded)
    assert_same(permuted, embedded[ORDER])


@pytest.mark.parametrize("options", AUTHORS_TEXTS, ids=ids_of)
def test_under_authors_padding_counts(options):
    encoder = text_encoder(text_config(*options))
    ids = captions(5, 9)
    with torch.inference_mode():
        embedded, padded, permuted = encoder(ids), encoder(nn.functional.pad(ids, (0, 31))), encoder(ids[ORDER])
    assert_same(embedded.norm(dim=1), torch.ones(5))
    assert_same(permuted, embedded[ORDER])
    if options[0] == "gru" and "no-graph" in options:
        assert_same(padded, embedded)  # zeros lengthen the mean's denominator only, which normalisation undoes
    else:
        assert (padded - embedded).abs().max() > 1e-3


@pytest.mark.parametrize("options", TEXT_OPTIONS, ids=ids_of)
def test_every_weight_of_a_text_encoder_gets_a_finite_gradient_beside_padding(options):
    encoder = text_encoder(text_config(*options)).train()
    encoder(captions(5, 9)).square().sum(dim=0).pow(2).sum().backward()
    for name, value in encoder.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name


@pytest.mark.parametrize("options", TEXT_OPTIONS, ids=ids_of)
def test_only_under_authors_do_padded_words_get_a_gradient(options):
    encoder = text_encoder(text_config(*options)).train()
    ids = captions(5, 9)
    words = torch.randn(5, 9, encoder.words.width, requires_grad=True)
    encoder.embed(words, ids != 0).square().sum(dim=0).pow(2).sum().backward()
    padding = words.grad[ids == 0]
    assert words.grad[ids != 0].abs().sum(dim=1).min() > 0
    assert (padding == 0).all() if options[1] == "masked" else padding.abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("options", [option for option in MASKED_TEXTS if "bert" in option], ids=ids_of)
def test_under_masked_no_gradient_reaches_padding_through_bert(options):
    encoder = text_encoder(text_config(*options)).train()
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    encoder.words.bert.embeddings.register_forward_hook(keep)
    ids = captions(5, 9)
    encoder(ids).square().sum(dim=0).pow(2).sum().backward()
    assert (embedded[0].grad[ids == 0] == 0).all()
    assert embedded[0].grad[ids != 0].abs().sum(dim=1).min() > 0


def test_the_order_of_regions_from_files_does_not_matter():
    encoder = image_encoder(image_config("files-positions-hidden", "k4"))
    inputs = images(encoder, 3)
    with torch.inference_mode():
        assert_same(encoder(**{name: value[:, ORDER] for name, value in inputs.items()}), encoder(**inputs))
        moved = inputs | {"region_positions": inputs["region_positions"][:, ORDER]}
        assert (encoder(**moved) - encoder(**inputs)).abs().max() > 1e-4


@pytest.mark.parametrize(("paths", "names"), [
    ("grid", ("pixels",)),
    ("grid-and-files", ("pixels", "regions")),
    ("files", ("regions",)),
    ("files-positions-hidden", ("regions", "region_positions")),
    ("pyramid-final", ("pixels",)),
])  # fmt: skip
def test_an_encoder_names_its_inputs(paths, names):
    assert image_encoder(image_config(paths)).input_names == names


@pytest.mark.parametrize(("paths", "stages"), [
    ("grid", ("final",)), ("files", ()), ("grid-and-pyramid-previous", ("final", "previous")), ("pyramid-final", ("final",)),
])  # fmt: skip
def test_cached_maps_give_the_embedding_of_the_pixels(paths, stages):
    encoder = image_encoder(image_config(paths))
    assert encoder.stages == stages
    if stages:
        inputs = images(encoder, 3)
        with torch.inference_mode():
            maps = encoder.trunk(inputs["pixels"])
            assert torch.equal(encoder.embed({stage: maps[stage] for stage in stages}), encoder(**inputs))


@pytest.mark.parametrize("joint", ["k1", "k2", "k4", "no-jsr"])
@pytest.mark.parametrize("ssr", ["ssr", "no-ssr"])
def test_an_image_encoder_is_what_the_paper_draws(joint, ssr):
    """Figures 2 and 4, written out once more from the encoder's own layers."""
    encoder = image_encoder(image_config("grid-and-pyramid-previous", joint, ssr))
    inputs = images(encoder, 3)
    with torch.inference_mode():
        maps = encoder.trunk(inputs["pixels"])
        grid, regions = encoder.grid(maps["final"]), encoder.regions(maps["previous"])
        assert (grid.shape, regions.shape) == ((3, 16, 16), (3, 1 + 9, 16))
        if ssr == "ssr":
            grid, regions = encoder.grid_graph(grid), encoder.region_graph(regions)
        else:
            assert encoder.grid_graph is None
            assert encoder.region_graph is None
        v = [graph(torch.cat([grid, regions], dim=1)).mean(dim=1) for graph in encoder.joint_graphs]
        assert len(v) == {"k1": 1, "k2": 2, "k4": 4, "no-jsr": 0}[joint]
        f = list(encoder.fusions)
        if joint == "k1":
            fused = v[0]
        elif joint == "k2":
            fused = f[0](v[0], v[1])
        elif joint == "k4":
            fused = f[2](f[0](v[0], v[1]), f[1](v[2], v[3]))
        else:
            fused = f[0](grid.mean(dim=1), regions.mean(dim=1))
        assert len(f) == {"k1": 0, "k2": 1, "k4": 3, "no-jsr": 1}[joint]
        assert_same(encoder(**inputs), fused / fused.norm(dim=1, keepdim=True))


def test_regions_are_embedded_with_their_position():
    encoder = image_encoder(image_config("grid-and-pyramid-final", projection="relu"))
    regions = encoder.regions
    with torch.inference_mode():
        map_BCHW = encoder.trunk(images(encoder, 2)["pixels"])["final"]
        whole = regions.project.linear(map_BCHW.mean(dim=(2, 3))).relu()
        geometry = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
        assert_same(regions(map_BCHW)[:, 0], whole + regions.position(geometry), 1e-5)
        files = image_encoder(image_config("files-positions-hidden", projection="relu"))
        inputs = images(files, 2)
        hidden = files.regions.hidden[0](inputs["regions"]).relu()
        wanted = (
            files.regions.project.linear(hidden).relu()
            + files.regions.position.linear(inputs["region_positions"]).relu()
        )
        assert_same(files.regions(*inputs.values()), wanted, 1e-5)


# Pieces.


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_graph_attention_is_the_authors_layer(norm):
    """Attention head by head and caption by caption over the kept nodes only; two residual branches, each followed by a norm."""
    torch.manual_seed(0)
    layer = GraphAttention(16, num_heads=4, norm=norm).eval()
    nodes, mask = nodes_and_mask()
    with torch.inference_mode():
        got = layer(nodes, mask)
        for row, keep in enumerate(mask):
            x = nodes[row, keep]
            heads = []
            for head in range(4):
                c = slice(4 * head, 4 * head + 4)
                query, key, value = (part(x)[:, c] for part in (layer.query, layer.key, layer.value))
                heads.append((query @ key.T / 4**0.5).softmax(dim=-1) @ value)
            x = layer.norm_attention.norm(x + layer.merge(torch.cat(heads, dim=1)))
            x = layer.norm_output.norm(x + layer.contract(layer.expand(x).relu()))
            assert_same(got[row, keep], x)


def test_masked_nodes_are_seen_by_no_other():
    torch.manual_seed(0)
    nodes, mask = nodes_and_mask()
    other = torch.where(mask[:, :, None], nodes, 100 * torch.randn_like(nodes))
    for training in (False, True):
        layer = GraphAttention(16, num_heads=4, attention_dropout=0, residual_dropout=0).train(training)
        assert_same(layer(nodes, mask)[mask], layer(other, mask)[mask])
        assert (layer(nodes)[mask] - layer(other)[mask]).abs().max() > 1e-2


def test_batch_statistics_skip_padding():
    nodes, mask = nodes_and_mask(dim=3)
    norm, plain = NodeNorm(3, "batch").train(), nn.BatchNorm1d(3).train()
    normalised = norm(nodes, mask)
    assert_same(normalised[mask], plain(nodes[mask]))
    assert (normalised[~mask] == 0).all()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm.norm, name), getattr(plain, name))
    everything = NodeNorm(3, "batch").train()
    everything(nodes)
    assert (everything.norm.running_mean - plain.running_mean).abs().max() > 1e-3


@pytest.mark.parametrize("encoder", TEXTS)
@pytest.mark.parametrize("pad_policy", ["masked", "authors"])
def test_a_training_step_on_captions_padded_further_leaves_the_same_statistics_only_under_masked(encoder, pad_policy):
    statistics = []
    for padding in (0, 6):
        model = text_encoder(text_config(encoder, pad_policy, attention_dropout=0.0, residual_dropout=0.0))
        model.caption_graph.train()
        model(nn.functional.pad(captions(5, 9), (0, padding)))
        statistics.append(torch.cat([value for name, value in model.named_buffers() if "running" in name]))
    difference = (statistics[0] - statistics[1]).abs().max()
    assert difference < 1e-6 if pad_policy == "masked" else difference > 1e-3


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_layer_with_zero_residual_starts_as_its_norms(norm):
    layer = GraphAttention(16, norm=norm, zero_residual=True, residual_dropout=0, attention_dropout=0).train()
    nodes, mask = nodes_and_mask()
    wanted = NodeNorm(16, norm).train()(NodeNorm(16, norm).train()(nodes, mask), mask)
    assert_same(layer(nodes, mask)[mask], wanted[mask])
    plain = GraphAttention(16, norm=norm, residual_dropout=0, attention_dropout=0).train()
    assert (plain(nodes, mask)[mask] - wanted[mask]).abs().max() > 1e-2


def test_zero_residual_reaches_every_layer_and_does_not_stop_learning():
    model = DSRAN(image_config("grid-and-pyramid-final", "k4", zero_residual=True), TinyTrunk()).train()
    layers = [part for part in model.modules() if isinstance(part, GraphAttention)]
    assert len(layers) == 2 + 4 + 1
    embedded = model.image_encoder(**images(model.image_encoder, 4)) + model.text_encoder(captions(4, 5))
    embedded.square().sum(dim=0).pow(2).sum().backward()
    for layer in layers:
        assert not layer.merge.weight.any()
        assert not layer.contract.weight.any()
        assert layer.merge.weight.grad.any()
        assert layer.contract.weight.grad.any()


def test_gated_fusion_is_its_equation():
    torch.manual_seed(0)
    fusion = GatedFusion(8)
    a, b = torch.randn(2, 3, 8)
    p, q = a @ fusion.embed_a.weight.T + fusion.embed_a.bias, b @ fusion.embed_b.weight.T + fusion.embed_b.bias
    logits = p @ fusion.gate_a.weight.T + fusion.gate_a.bias + q @ fusion.gate_b.weight.T + fusion.gate_b.bias
    gate = 1 / (1 + torch.exp(-logits))
    assert_same(fusion(a, b), gate * p + (1 - gate) * q)


def test_gru_states_are_those_of_packed_captions():
    words = text_encoder(text_config("gru")).words
    ids = captions(5, 9)
    lengths = (ids != 0).sum(dim=1)
    with torch.inference_mode():
        packed = nn.utils.rnn.pack_padded_sequence(words.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        wanted, _ = nn.utils.rnn.pad_packed_sequence(words.gru(packed)[0], batch_first=True)
        assert_same(words(ids, ids != 0), wanted)


@pytest.mark.parametrize("pad_policy", ["masked", "authors"])
def test_bert_words_are_those_of_transformers(pad_policy):
    words = text_encoder(text_config("bert", pad_policy)).words
    ids = captions(5, 9)
    mask = ids != 0
    with torch.inference_mode():
        attention_mask = mask.long() if pad_policy == "masked" else torch.ones_like(ids)
        wanted = words.bert(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        got = words(ids, mask)
    assert_same(got[mask], wanted[mask])


def test_a_text_encoder_without_a_graph_is_the_normalised_mean_of_its_words():
    encoder = text_encoder(text_config("bert", graph="no-graph", projection="relu"))
    ids = captions(5, 9)
    mask = (ids != 0)[:, :, None]
    with torch.inference_mode():
        words = encoder.project.linear(encoder.words(ids, ids != 0)).relu()
        words = words / words.norm(dim=-1, keepdim=True)
        mean = (words * mask).sum(dim=1) / mask.sum(dim=1)
        assert_same(encoder(ids), mean / mean.norm(dim=-1, keepdim=True))


def test_dropouts_are_where_the_configuration_puts_them():
    config = replace(
        image_config("grid-and-pyramid-final", projection="relu"),
        text=replace(TEXTS["gru"], word_dropout=0.11),
        input_dropout=0.12,
        projection_dropout=0.13,
        attention_dropout=0.14,
        residual_dropout=0.15,
    )
    model = DSRAN(config, TinyTrunk())
    rates = {name: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout)}
    assert rates["text_encoder.words.dropout"] == 0.11
    assert rates["image_encoder.grid.project.dropout"] == rates["image_encoder.regions.project.dropout"] == 0.12
    assert rates["image_encoder.grid.project.after.1"] == 0.13
    for name in ("image_encoder.grid_graph", "image_encoder.joint_graphs.1", "text_encoder.caption_graph"):
        assert (rates[f"{name}.attention_dropout"], rates[f"{name}.residual_dropout"]) == (0.14, 0.15)


def test_a_frozen_bert_is_left_alone_by_training():
    config = text_config("bert")
    model = DSRAN(replace(config, text=replace(config.text, frozen=True)), TinyTrunk()).train()
    words = model.text_encoder.words
    assert not any(part.training for part in words.modules())
    assert not any(value.requires_grad for value in words.parameters())
    assert model.text_encoder.caption_graph.training
    model.text_encoder(captions(4, 6)).sum().backward()
    assert all(value.grad is None for value in words.parameters())
    assert model.text_encoder.project.linear.weight.grad is not None


def test_the_encoders_share_no_weight():
    model = DSRAN(text_config("bert"), TinyTrunk())
    image, text = ({id(value) for value in part.parameters()} for part in (model.image_encoder, model.text_encoder))
    assert not image & text
    assert len(image | text) == sum(1 for _ in model.parameters())


def test_minilm_weights_are_loaded_and_those_that_do_not_fit_are_refused():
    try:
        folder = minilm_folder()
    except DualmatchError as error:
        pytest.skip(str(error))
    from safetensors import safe_open

    text = TextConfig(
        encoder="bert", vocabulary_size=30522, word_dim=384, num_layers=6, pretrained="minilm", frozen=True
    )
    encoder = DSRAN(DsranConfig(trunk=TrunkConfig(name="tiny", frozen=False), text=text), TinyTrunk()).text_encoder
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in ("embeddings.word_embeddings.weight", "encoder.layer.5.output.dense.weight"):
            assert torch.equal(encoder.words.bert.state_dict()[name], file.get_tensor(name))
    with pytest.raises(DualmatchError, match="do not fit the text encoder"):
        DSRAN(DsranConfig(trunk=TrunkConfig(name="tiny", frozen=False), text=replace(text, num_layers=2)), TinyTrunk())


# Configurations that cannot be built.

NO_TRUNK: dict[str, Any] = {"name": "none"}
FILES: dict[str, Any] = {"source": "precomputed"}
BERT: dict[str, Any] = {"encoder": "bert"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"joint_graphs": 3}, r"joint_graphs must be one of 1, 2, 4, got 3"),
        ({"norm": "group"}, "norm must be one of 'batch', 'layer', 'none', got 'group'"),
        ({"pad_policy": "none"}, "pad_policy must be one of"),
        ({"embed_dim": 1001}, r"embed_dim \(1001\) must be a multiple of num_heads \(8\)"),
        ({"num_heads": 0}, "num_heads must lie between"),
        ({"embed_dim": 0}, "embed_dim must lie between"),
        ({"input_dropout": 1.0}, "input_dropout must lie between"),
        ({"l2_epsilon": -1e-12}, "l2_epsilon must lie between"),
        ({"l2_epsilon": 1e-30}, "l2_epsilon must lie between"),
        ({"global_path": False, "regional_path": False}, "both off"),
        ({"trunk": NO_TRUNK}, "without a trunk"),
        ({"trunk": NO_TRUNK, "global_path": False}, "without a trunk"),
        ({"global_path": False, "regions": FILES}, r"no path reads the maps of trunk 'resnet152'"),
        ({"trunk": {"name": "tiny", "frozen": True}}, "tiny trunk has no pretrained weights"),
        ({"trunk": {"name": "vgg"}}, r"trunk\.name must be one of"),
        ({"trunk": {"name": "resnet152", "image_size": 16}}, "image_size must lie between 32 and 1024"),
        ({"trunk": {"name": "resnet152", "grid_size": -1}}, "grid_size must lie between"),
        ({"regions": {"levels": []}}, "pyramid levels must be increasing"),
        ({"regions": {"levels": [2, 1]}}, "pyramid levels must be increasing"),
        ({"regions": {"levels": [0, 1]}}, "pyramid levels must be increasing"),
        ({"regions": {"position_dim": 4}}, "position_dim must be 0 or 6"),
        ({"regions": FILES | {"position_dim": -1}}, "position_dim must lie between"),
        ({"regions": FILES | {"feature_dim": 0}}, "feature_dim must lie between"),
        ({"text": {"frozen": True}}, "a gru text encoder is trained; frozen and pretrained"),
        ({"text": {"pretrained": "minilm"}}, "a gru text encoder is trained; frozen and pretrained"),
        ({"text": {"word_dropout": 1.0}}, "word_dropout must lie between"),
        ({"text": {"max_length": -1}}, "max_length must lie between"),
        ({"text": {"fixed_length": 32}}, "max_length must lie between 1 and 32, got 64"),
        ({"text": {"fixed_length": 32, "max_length": 0}}, "max_length must lie between 1 and 32, got 0"),
        ({"text": BERT | {"word_dim": 100}}, r"word_dim \(100\) must be a multiple of num_heads \(12\)"),
        ({"text": BERT | {"word_dim": 384, "num_heads": 0}}, "num_heads must lie between"),
        ({"text": BERT | {"word_dim": 384, "max_length": 0}}, "max_length must lie between 1 and max_positions"),
        ({"text": BERT | {"word_dim": 384, "max_length": 513}}, "max_length must lie between 1 and max_positions"),
        ({"text": BERT | {"word_dim": 384, "fixed_length": 513}}, "fixed_length must lie between 0 and 512"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_built_is_refused_in_a_sentence(values, message):
    with pytest.raises(DualmatchError, match=message):
        from_mapping(DsranConfig, values, "recipe")


def test_a_choice_is_checked_in_python_as_in_a_recipe():
    with pytest.raises(DualmatchError, match="norm must be one of"):
        DsranConfig(norm="group")
    with pytest.raises(DualmatchError, match="source must be one of"):
        RegionConfig(source="detector")


def test_what_depends_on_the_built_parts_is_refused_when_they_are_built():
    fine = TrunkConfig(name="tiny", frozen=False, image_size=IMAGE_SIZE, grid_size=5)
    with pytest.raises(
        DualmatchError, match="grid_size is 5, but the tiny trunk's final map has only 4 x 4 cells at 32"
    ):
        DSRAN(replace(image_config("grid"), trunk=fine), TinyTrunk())
    with pytest.raises(DualmatchError, match="vocabulary_size is 0"):
        DSRAN(replace(image_config("grid"), text=TextConfig()), TinyTrunk())


def test_a_vector_of_zeros_is_normalised_to_zeros_only_with_an_epsilon():
    zeros = torch.zeros(1, 4)
    assert not l2_normalise(zeros, 1e-18).any()  # the least that a configuration may ask for
    assert l2_normalise(zeros, 0.0).isnan().all()
