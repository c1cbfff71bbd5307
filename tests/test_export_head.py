"""The head alone: grid maps and regions in, the whole encoder's embeddings out, at every precision and as an engine; checked or refused."""

import importlib.util
from unittest import mock

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import torch

from dualmatch.export import half
from dualmatch.export import head as export
from dualmatch.export.engine import build_engine
from dualmatch.export.engine_profiles import profile_from_text
from dualmatch.export.graph import export_encoder, specs
from dualmatch.export.half import to_half
from dualmatch.export.head import ImageHead, export_head, head_inputs
from dualmatch.export.int8 import layers_of, to_int8
from dualmatch.export.int8_ranges import histograms
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError

from .tiny_models import image_config, image_encoder, images, louder_before_the_norm

CASES = {
    "both": (image_config("grid-and-pyramid-previous", "k2", "ssr", "batch"), ("final_map", "previous_map")),
    "files": (image_config("grid-and-files", "k1", "ssr", "layer"), ("final_map", "regions")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_head_gives_the_whole_encoders_embeddings(name):
    config, names = CASES[name]
    encoder = image_encoder(config)
    trunk, head = encoder.trunk, ImageHead(encoder)
    assert head.input_names == names
    assert encoder.trunk is trunk is not None
    assert not any(isinstance(module, torch.nn.Conv2d) for module in head.modules())
    inputs = images(encoder, 3)
    with torch.inference_mode():
        torch.testing.assert_close(head(**head_inputs(encoder, inputs)), encoder(**inputs), rtol=0, atol=0)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The head on grid and region features, and its graph."""
    encoder = image_encoder(CASES["files"][0])
    path = tmp_path_factory.mktemp("head") / "head.onnx"
    model = export_encoder(ImageHead(encoder), head_inputs(encoder, images(encoder, 3)), path, output="image_embedding")
    return encoder, model, path


def feeds(encoder, batch, seed=1):
    inputs = images(encoder, batch, seed)
    return inputs, {name: value.numpy() for name, value in head_inputs(encoder, inputs).items()}


def embedded(path, given):
    with open_session(path) as session:
        (result,) = session.run(given).values()
    return result


def test_the_heads_graph_gives_the_whole_encoders_embeddings(head):
    encoder, model, path = head
    assert tuple(spec.name for spec in specs(model.graph.input)) == ("final_map", "regions")
    for batch in (1, 2, 7):
        inputs, given = feeds(encoder, batch)
        with torch.inference_mode():
            wanted = encoder(**inputs).numpy()
        np.testing.assert_allclose(embedded(path, given), wanted, rtol=0, atol=1e-5)


def test_it_goes_to_every_precision_and_engine(head, tmp_path):
    encoder, model, path = head
    given = feeds(encoder, 7)[1]
    tensors = sorted({tensor for layer in layers_of(model) for tensor in layer.activations})
    found = histograms(model, tensors, [feeds(encoder, 4, seed)[1] for seed in range(3)], tmp_path)
    thresholds = {name: one.threshold(100) for name, one in found.items()}
    single = embedded(path, given)
    for name, changed in (("half", to_half(model)), ("int8", to_int8(model, thresholds))):
        onnx.save(changed, tmp_path / f"{name}.onnx")
        assert (single * embedded(tmp_path / f"{name}.onnx", given)).sum(axis=1).min() > 0.99
        if importlib.util.find_spec("tensorrt_rtx") is not None:
            inputs = specs(changed.graph.input)
            record = build_engine(
                tmp_path / f"{name}.onnx", tmp_path / "e", flavour="tensorrt-rtx", inputs=inputs,
                profiles=[profile_from_text("1:4:16", inputs)],
            )  # fmt: skip
            assert record.strongly_typed


def test_a_network_without_a_trunk_has_no_head_to_cut_off():
    with pytest.raises(DualmatchError, match="has no trunk to leave out"):
        ImageHead(image_encoder(image_config("files", "k1")))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_head_leaves_with_its_stages_passed(head, tmp_path, precision):
    encoder, model, _ = head
    path = tmp_path / "head.onnx"
    with mock.patch.object(export, "export_encoder", retraced(model)):
        found = export_head(encoder, images(encoder, 7), path, precision=precision)
    assert [(stage.name, stage.graph, stage.status) for stage in found.stages] == [
        (name, f"head {precision}", "OK")
        for name in ("range",) * (precision == "fp16") + ("names", "axes", "shapes", "values")
    ]
    assert "batches of 1, 2, 7" in found.stages[-2].found
    assert found.largest_difference < export.TOLERANCE[precision]
    inputs, given = feeds(encoder, 5, seed=3)
    with torch.inference_mode():
        wanted = encoder(**inputs).numpy()
    np.testing.assert_allclose(embedded(path, given), wanted, rtol=0, atol=export.TOLERANCE[precision])
    assert list(tmp_path.iterdir()) == [path]


def retraced(model, change=lambda model: None):
    """torch's exporter gives this graph, changed."""

    def export_encoder(encoder, examples, path, *, output):
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        change(copied)
        onnx.save(copied, path)
        return copied

    return export_encoder


def transposed(model):
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] == t.dims[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).T.copy(), weight.name))


def frozen(model):
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    del model.graph.value_info[:]


@pytest.mark.parametrize(
    ("change", "said"),
    [(transposed, r"differs from torch by .*\(stage values\)"), (frozen, r"froze axis 0 of 'final_map'")],
)
def test_a_broken_head_is_refused_and_leaves_no_file(head, tmp_path, change, said):
    encoder, model, _ = head
    with (
        mock.patch.object(export, "export_encoder", retraced(model, change)),
        pytest.raises(DualmatchError, match=f"the head's graph {said}"),
    ):
        export_head(encoder, images(encoder, 7), tmp_path / "head.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_head_whose_squares_leave_float16_is_refused(head, tmp_path, monkeypatch):
    """A CPU computes float16 in float32 and would hide it; with the squares in float32 the same head passes."""
    encoder, model, _ = head
    path = tmp_path / "head.onnx"
    with mock.patch.object(export, "export_encoder", retraced(model, louder_before_the_norm)):
        with monkeypatch.context() as squares_in_float16:
            islands = half.ISLAND_OPERATORS - {"Pow", "ReduceSum", "Sqrt"}
            squares_in_float16.setattr(half, "ISLAND_OPERATORS", islands)
            with pytest.raises(DualmatchError, match=r"would overflow at fp16: .* ends at 65504 \(stage range\)"):
                export_head(encoder, images(encoder, 7), path, precision="fp16")
        assert list(tmp_path.iterdir()) == []
        found = export_head(encoder, images(encoder, 7), path, precision="fp16")
    assert found.stages[0].found.endswith("float16 ends at 65504")
    assert path.exists()


def test_what_export_head_asks_for(head, tmp_path):
    encoder = head[0]
    with pytest.raises(DualmatchError, match="at least 4 images are needed, 2 are given"):
        export_head(encoder, images(encoder, 2), tmp_path / "head.onnx")
    with pytest.raises(DualmatchError, match="at fp32 or fp16, not 'int8'"):
        export_head(encoder, images(encoder, 7), tmp_path / "head.onnx", precision="int8")
    (tmp_path / "head.onnx").touch()
    with pytest.raises(DualmatchError, match="exists"):
        export_head(encoder, images(encoder, 7), tmp_path / "head.onnx")
