"""VSRN: its options, what its embeddings depend on, its captioning branch, its graphs in float32 and float16, and its engines."""

import importlib.util
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from dualmatch.export.engine import build_engine
from dualmatch.export.engine_profiles import AxisRange, profile_from_text
from dualmatch.export.graph import export_encoder, specs
from dualmatch.export.half import to_half
from dualmatch.models import VSRN, VsrnConfig
from dualmatch.models.authors_vsrn import authors_states, captioner_ours_from_authors, load_captioner
from dualmatch.models.config import TextConfig
from dualmatch.models.vsrn import RelationLayer, similarity
from dualmatch.models.vsrn_caption import Captioner, caption_targets
from dualmatch.models.vsrn_config import CaptionConfig
from dualmatch.runtime.backends import TensorSpec, open_session
from dualmatch.runtime.configs import from_mapping
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.similarity import order_similarity

from .agreement import largest_difference
from .tiny_models import VOCABULARY, captions, randomised

torch.set_num_threads(1)

WIDTH, CHANNELS, REGIONS = 16, 20, 6
TEXT = TextConfig(
    encoder="gru", vocabulary_size=VOCABULARY, word_dim=12, word_dropout=0.0, normalise_tokens=False, max_length=0
)
COCO = VsrnConfig(feature_dim=CHANNELS, embed_dim=WIDTH, text=TEXT)
CONFIGS = {
    "coco": COCO,
    "f30k": replace(COCO, normalise_projected=False, final_norm=True),
    "mean-pool": replace(COCO, num_relation_layers=0, global_reasoning="mean"),
    "relations": replace(COCO, num_relation_layers=1, global_reasoning="mean"),
    "reasoning": replace(COCO, num_relation_layers=0),
    "plain": replace(COCO, num_relation_layers=1, normalise_projected=False, normalise_related=False),
    "order": replace(COCO, measure="order", absolute=True, normalise_images=False, l2_epsilon=1e-6),
}
EXPORTED = ["coco", "f30k", "mean-pool", "order"]
each_config = pytest.mark.parametrize("name", CONFIGS)
each_exported = pytest.mark.parametrize("name", EXPORTED)
each_side = pytest.mark.parametrize("side", ["image", "text"])
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed, so no half graph was built as an engine: pip install 'dualmatch[tensorrt-rtx]'",
)


@cache
def network(name):
    """A random network in evaluation mode, its BatchNorms as after training."""
    torch.manual_seed(0)
    model = VSRN(CONFIGS[name])
    randomised(model)
    for layer in model.image_encoder.relations:
        # A message grows with the cube of its input: four layers with random scales near 1 carry an odd image out of float16's range.
        layer.norm.norm.weight.data *= 0.3
    model.train()
    with torch.no_grad():
        for seed in range(60):
            model.image_encoder(regions(16, seed=100 + seed))
    return model.eval()


def regions(batch, seed=0, number=REGIONS):
    return torch.randn(batch, number, CHANNELS, generator=torch.Generator().manual_seed(seed))


def embedded(name, values):
    with torch.no_grad():
        return network(name).image_encoder(values)


# Options.


@each_config
def test_embeddings_and_their_norms(name):
    images = embedded(name, regions(5))
    with torch.no_grad():
        texts = network(name).text_encoder(captions(5, 9))
    assert images.shape == texts.shape == (5, WIDTH)
    assert torch.isfinite(images).all()
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(5))
    if CONFIGS[name].normalise_images:
        torch.testing.assert_close(images.norm(dim=1), torch.ones(5))
    else:
        assert (images.norm(dim=1) - 1).abs().max() > 1e-3
    if CONFIGS[name].absolute:
        assert (images >= 0).all()
        assert (texts >= 0).all()
    else:
        assert (images < 0).any()
        assert (texts < 0).any()


@each_config
def test_a_network_has_the_parts_that_its_options_name(name):
    config, encoder = CONFIGS[name], network(name).image_encoder
    assert encoder.input_names == ("regions",)
    assert len(encoder.relations) == config.num_relation_layers
    assert (encoder.reasoning is not None) == (config.global_reasoning == "gru")
    assert (encoder.final_norm is not None) == config.final_norm


def test_the_options_change_the_embedding():
    """All of these have the tensors of the COCO network, so only what is computed can differ."""
    model = network("coco")
    before = embedded("coco", regions(5))
    for changed in (
        {"normalise_projected": False},
        {"normalise_related": False},
        {"normalise_images": False},
        {"absolute": True},
    ):
        other = VSRN(replace(COCO, **changed)).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert (other.image_encoder(regions(5)) - before).abs().max() > 1e-3, changed


def test_the_mean_pool_baseline_is_the_mean_of_projected_regions():
    bare = VSRN(
        replace(CONFIGS["mean-pool"], normalise_projected=False, normalise_related=False, normalise_images=False)
    )
    bare.load_state_dict(network("mean-pool").state_dict())
    with torch.no_grad():
        wanted = bare.image_encoder.project(regions(3)).mean(dim=1)
        torch.testing.assert_close(bare.eval().image_encoder(regions(3)), wanted)


def test_a_channel_is_normalised_over_the_regions():
    with torch.no_grad():
        related = network("coco").image_encoder.relate(regions(3))
    torch.testing.assert_close(related.norm(dim=1), torch.ones(3, WIDTH))
    assert (related.norm(dim=2) - 1).abs().max() > 0.1


def test_a_new_relation_layer_changes_nothing_and_learns():
    torch.manual_seed(0)
    layer, nodes = RelationLayer(WIDTH), torch.randn(2, REGIONS, WIDTH)
    torch.testing.assert_close(layer(nodes), nodes, rtol=0, atol=0)
    layer(nodes).square().sum().backward()
    assert layer.norm.norm.weight.grad.abs().max() > 0


def test_a_relation_layer_by_the_equations():
    torch.manual_seed(0)
    layer = RelationLayer(WIDTH)
    randomised(layer)
    layer.eval()
    (nodes,) = torch.randn(1, REGIONS, WIDTH)
    affinity = torch.stack([torch.stack([layer.query(i) @ layer.key(j) for j in nodes]) for i in nodes]) / REGIONS
    message = layer.merge(sum_of(affinity, layer.value(nodes)))
    with torch.no_grad():
        torch.testing.assert_close(layer(nodes[None])[0], nodes + layer.norm.norm(message), rtol=1e-5, atol=1e-5)


def sum_of(affinity, values):
    return torch.stack([sum(weight * value for weight, value in zip(row, values, strict=True)) for row in affinity])


# What an embedding depends on.


@each_config
def test_an_image_does_not_depend_on_its_batch(name):
    images = regions(5)
    together = embedded(name, images)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(embedded(name, images[order]), together[order], rtol=0, atol=2e-6)
    for image, wanted in zip(images, together, strict=True):
        torch.testing.assert_close(embedded(name, image[None])[0], wanted, rtol=0, atol=2e-6)


@each_config
def test_the_regions_order_counts_for_the_gru_only(name):
    images = regions(5)
    difference = (embedded(name, images.flip(1)) - embedded(name, images)).abs().max()
    if CONFIGS[name].global_reasoning == "gru":
        assert difference > 1e-3
    else:
        assert difference < 2e-6


@each_config
def test_any_number_of_regions(name):
    for number in (1, 3, 36):
        assert torch.isfinite(embedded(name, regions(2, number=number))).all()


def test_a_caption_depends_on_nothing_but_its_words():
    encoder = network("coco").text_encoder
    ids = captions(5, 9)
    with torch.no_grad():
        together = encoder(ids)
        torch.testing.assert_close(encoder(torch.nn.functional.pad(ids, (0, 31))), together, rtol=0, atol=2e-6)
        order = torch.tensor([3, 0, 4, 2, 1])
        torch.testing.assert_close(encoder(ids[order]), together[order], rtol=0, atol=2e-6)
        for caption, wanted in zip(ids, together, strict=True):
            alone = caption[caption != 0]
            torch.testing.assert_close(encoder(alone[None])[0], wanted, rtol=0, atol=2e-6)
            states, _ = encoder.words.gru(encoder.words.embed(alone[None]))
            torch.testing.assert_close(wanted, states[0, -1] / states[0, -1].norm(), rtol=0, atol=2e-6)
        shorter = ids.clone()
        shorter[0, -1] = 0
        assert (encoder(shorter)[0] - together[0]).abs().max() > 1e-3


def test_zeros_are_refused_by_no_one_but_an_epsilon_keeps_them_finite():
    """A channel that is 0 in all regions: the authors' code gives NaN."""
    zeros = torch.zeros(1, REGIONS, CHANNELS)
    for epsilon, finite in ((0.0, False), (1e-6, True)):
        model = VSRN(replace(CONFIGS["mean-pool"], l2_epsilon=epsilon)).eval()
        assert bool(torch.isfinite(model.image_encoder(zeros)).all()) is finite


# Similarity.


def test_similarities_are_the_runtimes():
    images, texts = torch.rand(4, WIDTH), torch.rand(7, WIDTH)
    torch.testing.assert_close(similarity(images, texts, "cosine"), images @ texts.T)
    wanted = order_similarity(images.numpy(), texts.numpy())
    np.testing.assert_allclose(similarity(images, texts, "order").numpy(), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(network("order").similarity(images, texts).numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_the_order_measure_has_a_finite_gradient_where_it_is_zero():
    images = torch.ones(2, WIDTH, requires_grad=True)
    similarity(images, torch.zeros(3, WIDTH), "order").sum().backward()
    assert torch.isfinite(images.grad).all()


# Captioning.

BRANCH = CaptionConfig(hidden_dim=10, word_dim=8, max_length=9, dropout=0.2)
each_direction = pytest.mark.parametrize("bidirectional", [False, True])


def captioner(*, bidirectional=False):
    torch.manual_seed(0)
    return Captioner(replace(BRANCH, bidirectional=bidirectional), feature_dim=WIDTH, vocabulary_size=VOCABULARY).eval()


def tokens(*lengths):
    """Captions <start> words <end>, of so many tokens, padded to the longest."""
    rows = [[1, *range(4, 2 + length), 2] + [0] * (max(lengths) - length) for length in lengths]
    return torch.tensor(rows)


def test_labels_and_mask():
    labels, mask = caption_targets(tokens(2, 5, 8, 9, 10, 13), max_length=9)
    assert labels.tolist() == [
        [1, 2, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 4, 5, 6, 2, 0, 0, 0, 0, 0],
        [1, 4, 5, 6, 7, 8, 9, 2, 0, 0],
        [1, 4, 5, 6, 7, 8, 9, 10, 2, 0],
        [1, 4, 5, 6, 7, 8, 9, 10, 2, 0],
        [1, 4, 5, 6, 7, 8, 9, 10, 2, 0],
    ]
    assert mask.sum(dim=1).tolist() == [3, 6, 9, 10, 10, 10]
    assert all(row == sorted(row, reverse=True) for row in mask.tolist())
    short, _ = caption_targets(tokens(2, 5), max_length=9)
    assert short.tolist() == labels[:2].tolist()
    assert caption_targets(tokens(4), max_length=9)[0].shape == (1, 10)


@each_direction
def test_the_caption_loss_is_a_sum_over_words_by_the_batch(bidirectional):
    branch = captioner(bidirectional=bidirectional)
    nodes = torch.randn(3, REGIONS, WIDTH)
    labels, mask = caption_targets(tokens(3, 6, 12), max_length=9)
    with torch.no_grad():
        log_probabilities = branch(nodes, labels[:, :8])
        assert log_probabilities.shape == (3, 8, VOCABULARY)
        torch.testing.assert_close(log_probabilities.exp().sum(dim=2), torch.ones(3, 8))
        wanted = 0.0
        for row, words in enumerate(labels):
            for step in range(8):  # max_length - 1 targets
                wanted -= mask[row, step + 1] * log_probabilities[row, step, words[step + 1]] / 3
        torch.testing.assert_close(branch.loss(nodes, labels, mask), wanted)
        # Shorter captions ask for fewer steps; the loss is the same sum.
        alone = sum(branch.loss(nodes[i : i + 1], labels[i : i + 1], mask[i : i + 1]) for i in range(3)) / 3
        torch.testing.assert_close(alone, wanted)


@each_direction
def test_greedy_decoding_follows_the_likeliest_words(bidirectional):
    branch = captioner(bidirectional=bidirectional)
    randomised(branch)
    nodes = torch.randn(3, REGIONS, WIDTH)
    words, log_probabilities = branch.decode_greedily(nodes)
    assert words.shape == log_probabilities.shape == (3, 7)
    taught = branch(nodes, torch.cat([torch.ones(3, 1, dtype=torch.long), words[:, :-1]], dim=1))
    best = taught.max(dim=2)
    torch.testing.assert_close(best.values, log_probabilities, rtol=0, atol=1e-5)
    assert torch.equal(best.indices, words)


def test_words_in_the_future_change_no_earlier_step():
    branch, nodes = captioner(), torch.randn(1, REGIONS, WIDTH)
    one, other = torch.tensor([[1, 4, 5, 6]]), torch.tensor([[1, 4, 9, 9]])
    first, second = branch(nodes, one), branch(nodes, other)
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert (first[:, 2:] - second[:, 2:]).abs().max() > 1e-3


def test_the_caption_loss_teaches_the_image_encoder_and_can_be_learnt():
    torch.manual_seed(0)
    model = VSRN(replace(COCO, l2_epsilon=1e-6))
    branch = captioner(bidirectional=True)
    labels, mask = caption_targets(tokens(4, 7), max_length=9)
    parameters = [*model.image_encoder.parameters(), *branch.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=0.01)
    losses = []
    for _ in range(30):
        loss = branch.loss(model.image_encoder.relate(regions(2)), labels, mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert model.image_encoder.project.weight.grad.abs().max() > 0


def test_dropout_acts_in_training_only():
    branch, nodes = captioner(), torch.randn(1, REGIONS, WIDTH)
    words = torch.tensor([[1, 4, 5]])
    assert torch.equal(branch(nodes, words), branch(nodes, words))
    branch.train()
    assert not torch.equal(branch(nodes, words), branch(nodes, words))


def test_a_captioning_branch_of_other_sizes_is_refused():
    with pytest.raises(DualmatchError, match=r"captioning branch has no tensor 'decoder\.lstm\.weight'"):
        captioner_ours_from_authors("decoder.lstm.weight")
    with pytest.raises(DualmatchError, match="the captioning branch does not fit the authors'"):
        load_captioner(captioner(), {"decoder.out.bias": torch.zeros(3)})


# Configurations.


def test_a_configuration_goes_through_a_mapping():
    for config in CONFIGS.values():
        assert from_mapping(VsrnConfig, asdict(config), "recipe") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_reasoning": "lstm"}, "global_reasoning must be one of 'gru', 'mean', got 'lstm'"),
        ({"measure": "dot"}, "measure must be one of 'cosine', 'order'"),
        ({"num_relation_layers": -1}, "num_relation_layers must lie between"),
        ({"num_relations": 4}, "did you mean 'num_relation_layers'"),
        ({"feature_dim": 0}, "feature_dim must lie between"),
        ({"embed_dim": 0}, "embed_dim must lie between"),
        ({"l2_epsilon": 1e-30}, "l2_epsilon must lie between"),
        ({"final_norm": 1}, "final_norm must be of type bool"),
        ({"text": {"encoder": "bert", "word_dim": 384}}, "VSRN reads captions with a gru"),
        ({"captioning": {"max_length": 2}}, "max_length must lie between 3"),
        ({"captioning": {"weight": -1}}, "weight must lie between"),
        ({"captioning": {"dropout": 1.0}}, "dropout must lie between"),
        ({"captioning": {"hidden_dim": 0}}, "hidden_dim must lie between"),
        ({"captioning": {"word_dim": 0}}, "word_dim must lie between"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_built_is_refused_in_a_sentence(values, message):
    with pytest.raises(DualmatchError, match=message):
        from_mapping(VsrnConfig, values, "recipe")


def test_a_vocabulary_must_have_been_filled_in():
    with pytest.raises(DualmatchError, match="vocabulary_size is 0"):
        VSRN(VsrnConfig(feature_dim=CHANNELS, embed_dim=WIDTH))


def test_what_the_authors_network_has_no_place_for_is_told():
    with pytest.raises(DualmatchError, match="always has a GRU over the regions"):
        authors_states(network("mean-pool"))
    images, texts = authors_states(network("f30k"))
    assert images["Rs_GCN_4.W.0.weight"].shape == (WIDTH, WIDTH, 1)
    assert images["bn.running_var"].shape == (WIDTH,)
    assert set(texts) == {"embed.weight", *(f"rnn.{p}_{k}h_l0" for p in ("weight", "bias") for k in "ih")}


# Graphs.


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory):
    """`graph_of(name, side)`: the encoder, its float32 graph and where that and its half graph stand."""
    folder = tmp_path_factory.mktemp("vsrn")

    @cache
    def export(name, side):
        model = network(name)
        encoder = model.image_encoder if side == "image" else model.text_encoder
        single, half = (folder / f"{name}-{side}-{precision}.onnx" for precision in ("single", "half"))
        example = {key: torch.from_numpy(value) for key, value in feeds(side, 3, 7).items()}
        graph = export_encoder(encoder, example, single, output=f"{side}_embedding")
        onnx.save(to_half(graph), half)
        return encoder, graph, single, half

    return export


def feeds(side, batch, length):
    if side == "text":
        return {"token_ids": captions(batch, length, seed=batch + length).numpy()}
    return {"regions": regions(batch, seed=batch + length).numpy()}


def run(path, inputs):
    with open_session(path) as session:
        (result,) = session.run(inputs).values()
    return result


def cosines(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@each_side
@each_exported
def test_onnx_gives_torchs_embeddings_on_every_shape(name, side, graph_of):
    encoder, graph, single, _ = graph_of(name, side)
    lengths = (1, 2, 5, 17, 40) if side == "text" else (0,)
    batches = [feeds(side, batch, length) for batch in (1, 2, 7) for length in lengths]
    assert largest_difference(encoder, single, batches) < 1e-5
    got = run(single, feeds(side, 7, 17))
    told_apart = cosines(got[:, None].repeat(7, 1).reshape(49, -1), got[None].repeat(7, 0).reshape(49, -1))
    assert told_apart.reshape(7, 7)[~np.eye(7, dtype=bool)].max() < 0.999
    (output,) = specs(graph.graph.output)
    assert output == TensorSpec(name=f"{side}_embedding", dtype="float32", shape=("batch", WIDTH))
    wanted = {
        "image": ("regions", "float32", ("batch", REGIONS, CHANNELS)),
        "text": ("token_ids", "int64", ("batch", "length")),
    }
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs(graph.graph.input)] == [wanted[side]]
    grus = [node.op_type for node in graph.graph.node].count("GRU")
    assert grus == (side == "text" or CONFIGS[name].global_reasoning == "gru")


@each_side
@each_exported
def test_half_embeddings_point_where_the_float32_ones_do(name, side, graph_of):
    _, _, single, half = graph_of(name, side)
    for length in (2, 17):
        inputs = feeds(side, 7, length)
        wanted, got = run(single, inputs), run(half, inputs)
        assert got.dtype == np.float32
        assert cosines(wanted, got).min() > 0.9999
        assert np.abs(wanted - got).max() > 0
    # onnxruntime's CPU computes float16 in float32; onnx's reference rounds after every step, as a GPU does.
    (honest,) = ReferenceEvaluator(str(half)).run(None, feeds(side, 3, 9))
    assert cosines(run(single, feeds(side, 3, 9)), honest).min() > 0.9999


@rtx
@each_side
@pytest.mark.parametrize("name", ["coco", "f30k"])
def test_a_half_graph_builds_as_a_strongly_typed_engine(name, side, graph_of, tmp_path):
    _, graph, _, half = graph_of(name, side)
    inputs = specs(graph.graph.input)
    profile = profile_from_text("1:4:16", inputs, length=AxisRange(1, 12, 40) if side == "text" else None)
    record = build_engine(half, tmp_path / "e", flavour="tensorrt-rtx", inputs=inputs, profiles=[profile])
    assert record.strongly_typed
    assert record.bytes > 10_000
