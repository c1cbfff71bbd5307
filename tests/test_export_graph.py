"""torch against ONNX on shapes off the traced one, for graphs that together cover every option; and exports that must be refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from dualmatch.export.graph import _check_axes, export_encoder, largest_difference, specs
from dualmatch.runtime.backends import TensorSpec, open_session
from dualmatch.runtime.errors import DualmatchError

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
    assert largest_difference(graph.encoder, graph.path, graph.shapes()) < 1e-5


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


def test_a_gru_exports_as_one_operator_and_leaves_the_encoder_as_it_was(exported):
    graph = exported("text-gru-masked")
    assert [node.op_type for node in graph.model.graph.node].count("GRU") == 1
    assert not {"Loop", "Scan", "If"} & {node.op_type for node in graph.model.graph.node}
    assert type(graph.encoder.words.gru) is nn.GRU


class FrozenBatch(nn.Module):
    def forward(self, pixels):
        return pixels.reshape(2, -1)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, pixels):
        return pixels * self.factor


def test_a_frozen_batch_is_refused(tmp_path):
    with pytest.raises(DualmatchError, match=r"cannot export .*|froze axis 0"):
        export_encoder(FrozenBatch(), {"pixels": torch.rand(2, 4)}, tmp_path / "frozen.onnx", output="embedding")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("frozen", "axis"), [("token_ids", 0), ("token_ids", 1), ("embedding", 0)])
def test_a_frozen_axis_of_a_graph_is_named(frozen, axis):
    shapes = {"token_ids": ["batch", "length"], "embedding": ["batch", 4]}
    shapes[frozen][axis] = 3
    ids = helper.make_tensor_value_info("token_ids", TensorProto.INT64, shapes["token_ids"])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shapes["embedding"])
    model = helper.make_model(helper.make_graph([], "graph", [ids], [embedding]))
    with pytest.raises(DualmatchError, match=rf"froze axis {axis} of '{frozen}' at 3"):
        _check_axes(model, {"token_ids": {0: "batch", 1: "length"}}, "embedding")


def test_a_graph_of_another_encoder_differs(exported):
    graph = exported("text-gru-masked")
    other = text_encoder(EXPORTED["text-gru-authors"])
    assert largest_difference(other, graph.path, [graph.feeds(7, 17)]) > 1e-3


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_nan_and_infinity_are_no_agreement(factor, tmp_path):
    path = tmp_path / "plain.onnx"
    export_encoder(Scaled(2.0), {"pixels": torch.rand(2, 4)}, path, output="embedding")
    feeds = [{"pixels": np.ones((3, 4), np.float32)}]
    assert largest_difference(Scaled(2.0), path, feeds) == 0
    with pytest.raises(DualmatchError, match=r"torch gives NaN or infinity for inputs \{'pixels': \[3, 4\]\}"):
        largest_difference(Scaled(factor), path, feeds)


def test_another_shape_and_a_graph_that_does_not_run_are_told(tmp_path):
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 4])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", "width"])

    def graph_with(shape):
        node = helper.make_node("Reshape", ["pixels", "shape"], ["embedding"])
        constant = onnx.numpy_helper.from_array(np.array(shape), "shape")
        graph = helper.make_graph([node], "graph", [pixels], [embedding], [constant])
        path = tmp_path / "reshape.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        return path

    feeds = [{"pixels": np.ones((3, 4), np.float32)}]
    with pytest.raises(DualmatchError, match=r"gives \[6, 2\] .* torch gives \[3, 4\]"):
        largest_difference(Scaled(1.0), graph_with([-1, 2]), feeds)
    with pytest.raises(DualmatchError, match=r"reshape\.onnx does not run on inputs \{'pixels': \[3, 4\]\}"):
        largest_difference(Scaled(1.0), graph_with([2, 4]), feeds)
