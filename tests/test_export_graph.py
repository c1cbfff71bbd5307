"""torch against ONNX on shapes off the traced one, for graphs that together cover every option; and exports that must be refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dualmatch.export.graph import export_encoder, specs
from dualmatch.runtime.backends import TensorSpec, open_session
from dualmatch.runtime.errors import DualmatchError

from .agreement import largest_difference
from .tiny_models import EXPORTED, captions, text_encoder

MASKED_TEXTS = [name for name in EXPORTED if name.startswith("text") and "authors" not in name]


def torch_and_onnx(graph, feeds):
    with torch.inference_mode():
        wanted = graph.encoder(**{name: torch.from_numpy(value) for name, value in feeds.items()}).numpy()
    with open_session(graph.path) as session:
        (got,) = session.run(feeds).values()
    return wanted, got


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_gives_torchs_embeddings_on_every_shape(name, exported):
    graph = exported(name)
    with open_session(graph.path) as session, torch.inference_mode():
        for feeds in graph.shapes():
            wanted = graph.encoder(**{key: torch.from_numpy(value) for key, value in feeds.items()}).numpy()
            (got,) = session.run(feeds).values()
            assert got.dtype == np.float32
            assert np.isfinite(wanted).all()
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5, equal_nan=False)
            np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", EXPORTED)
def test_the_embeddings_tell_inputs_apart(name, exported):
    """An encoder that ignored its input would pass any comparison."""
    graph = exported(name)
    _, got = torch_and_onnx(graph, graph.feeds(7, 17))
    cosines = got @ got.T
    assert cosines[~np.eye(7, dtype=bool)].max() < 0.999


@pytest.mark.parametrize("name", MASKED_TEXTS)
def test_padding_changes_nothing_in_a_masked_graph(name, exported):
    graph = exported(name)
    ids = captions(4, 9, seed=3).numpy()
    _, alone = torch_and_onnx(graph, {"token_ids": ids})
    _, padded = torch_and_onnx(graph, {"token_ids": np.pad(ids, ((0, 0), (0, 31)))})
    np.testing.assert_allclose(padded, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_names_its_inputs_output_and_dynamic_axes_and_nothing_of_this_machine(name, exported):
    graph = exported(name)
    (output,) = specs(graph.model.graph.output)
    side = "text" if graph.is_text else "image"
    assert output == TensorSpec(name=f"{side}_embedding", dtype="float32", shape=("batch", 16))
    inputs = specs(graph.model.graph.input)
    if graph.is_text:
        assert inputs == (TensorSpec(name="token_ids", dtype="int64", shape=("batch", "length")),)
    else:
        assert tuple(spec.name for spec in inputs) == graph.encoder.input_names
        feeds = graph.feeds(2)
        assert all(spec.shape == ("batch", *feeds[spec.name].shape[1:]) for spec in inputs)
    content = graph.path.read_bytes()
    for path in (Path(torch.__file__).parent, Path(__file__).parent.parent):
        assert str(path).encode() not in content


@pytest.mark.parametrize("name", EXPORTED)
def test_nothing_that_is_given_goes_unread(name, exported):
    graph = exported(name).model.graph
    read = {one for node in graph.node for one in node.input}
    assert [value.name for value in (*graph.input, *graph.initializer) if value.name not in read] == []


@pytest.mark.parametrize("name", ["image-both-k2", "image-lite0-k1"])
def test_batch_normalisation_behind_a_convolution_is_folded_into_it(name, exported):
    graph = exported(name)
    assert any(isinstance(module, nn.BatchNorm2d) for module in graph.encoder.trunk.modules())
    nodes = graph.model.graph.node
    maker = {output: node.op_type for node in nodes for output in node.output}
    assert "Conv" in maker.values()
    assert "Conv" not in [maker.get(node.input[0]) for node in nodes if node.op_type == "BatchNormalization"]


def test_a_gru_exports_as_one_operator_and_leaves_the_encoder_as_it_was(exported):
    graph = exported("text-gru-masked")
    assert [node.op_type for node in graph.model.graph.node].count("GRU") == 1
    assert not {"Loop", "Scan", "If"} & {node.op_type for node in graph.model.graph.node}
    assert type(graph.encoder.words.gru) is nn.GRU


class Branching(nn.Module):
    def forward(self, pixels):
        return pixels if pixels.sum() > 0 else -pixels


def test_what_torch_cannot_trace_is_refused(tmp_path):
    with pytest.raises(DualmatchError, match="torch cannot export the encoder to ONNX: "):
        export_encoder(Branching(), {"pixels": torch.rand(2, 4)}, tmp_path / "graph.onnx", output="embedding")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_another_encoder_differs(exported):
    graph = exported("text-gru-masked")
    other = text_encoder(EXPORTED["text-gru-authors"])
    assert largest_difference(other, graph.path, [graph.feeds(7, 17)]) > 1e-3
