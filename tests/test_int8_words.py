"""What int8 does for words: tables as codes with a scale for each word, and loud channels moved into the weights that read them."""

import importlib.util

import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper

from dualmatch.export.engine import build_engine
from dualmatch.export.engine_profiles import AxisRange, profile_from_text
from dualmatch.export.graph import specs
from dualmatch.export.int8 import engines_differ, layers_of, to_int8
from dualmatch.export.int8_ranges import histograms
from dualmatch.export.int8_search import quantise
from dualmatch.export.int8_sensitivity import cosines, sensitivities
from dualmatch.export.int8_smooth import smoothed
from dualmatch.export.int8_tables import LEAST_VALUES
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.parity import Decision

WORDS, WIDTH = 1200, 64


def words_graph(*, words=WORDS, loud=1.0):
    """Token ids to unit vectors: a table, one linear layer, their mean; the table's words differ in length, a channel in loudness."""
    chance = np.random.default_rng(0)
    table = chance.normal(size=(words, WIDTH)) * np.geomspace(0.01, 10, words)[chance.permutation(words), None]
    table[:, 7] *= loud
    constants = {
        "table": table.astype(np.float32),
        "weight": chance.normal(size=(WIDTH, 16)).astype(np.float32),
        "axes": np.array([1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "token_ids"], ["words"], name="lookup"),
        helper.make_node("MatMul", ["words", "weight"], ["nodes"], name="linear"),
        helper.make_node("ReduceMean", ["nodes", "axes"], ["mean"], name="mean", keepdims=0),
        helper.make_node("LpNormalization", ["mean"], ["text_embedding"], name="norm", axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "words",
        [helper.make_tensor_value_info("token_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("text_embedding", TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def ids(count, length=6, seed=1):
    return {"token_ids": np.random.default_rng(seed).integers(0, WORDS, size=(count, length))}


def outputs(model, feeds, *names):
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    declared = {value.name for value in probed.graph.output}
    probed.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in declared
    )
    with open_session(probed.SerializeToString()) as session:
        found = session.run(feeds)
    return [found[name] for name in names]


def calibrated(model, folder):
    tensors = sorted({tensor for layer in layers_of(model) for tensor in layer.activations})
    found = histograms(model, tensors, [ids(4, seed=seed) for seed in range(20, 30)], folder)
    return {name: one.threshold(100) for name, one in found.items()}


@pytest.mark.parametrize("for_engine", [False, True])
def test_a_word_keeps_its_vector_to_half_a_step_of_its_own_scale(for_engine):
    model = words_graph()
    changed = to_int8(model, {}, excluded=["linear"], for_engine=for_engine)
    every = {"token_ids": np.arange(WORDS).reshape(-1, 8)}
    (before,), (after,) = outputs(model, every, "words"), outputs(changed, every, "words")
    step = np.abs(before).max(axis=-1, keepdims=True) / 127
    assert (np.abs(before - after) <= step * 0.501).all()
    assert np.abs(before - after).max() > 0
    assert len(changed.SerializeToString()) < len(model.SerializeToString()) / 3


def test_a_lookup_reads_its_own_rows_and_no_more():
    """Dequantised as a whole, a table of 30 000 words would cost more than the encoder."""
    changed = to_int8(words_graph(), {}, excluded=["linear"])
    maker = {name: node for node in changed.graph.node for name in node.output}
    (dequantised,) = [node for node in changed.graph.node if node.op_type == "DequantizeLinear"]
    assert maker[dequantised.input[0]].op_type == "Gather"


def test_small_tables_stay_as_they_are():
    few = LEAST_VALUES // WIDTH - 1
    assert [layer.operator for layer in layers_of(words_graph(words=few))] == ["MatMul"]
    assert [layer.operator for layer in layers_of(words_graph(words=few + 1))] == ["Gather", "MatMul"]
    assert engines_differ(words_graph())
    assert not engines_differ(words_graph(words=few))


def test_a_table_is_ordered_among_the_layers_by_its_noise(tmp_path):
    model = words_graph()
    order = sensitivities(model, calibrated(model, tmp_path), [ids(4)], tmp_path)
    assert {one.layer for one in order} == {"lookup", "linear"}
    assert all(0 < one.noise < 0.1 for one in order)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed, so no table was built into an engine: pip install 'dualmatch[tensorrt-rtx]'",
)
def test_tables_and_smoothing_build_as_a_strongly_typed_engine(tmp_path):
    model = smoothed(words_graph(), [ids(4)], tmp_path)
    onnx.save(to_int8(model, calibrated(model, tmp_path), for_engine=True), tmp_path / "words.onnx")
    inputs = specs(model.graph.input)
    profile = profile_from_text("1:4:16", inputs, length=AxisRange(1, 12, 40))
    record = build_engine(
        tmp_path / "words.onnx", tmp_path / "e", flavour="tensorrt-rtx", inputs=inputs, profiles=[profile]
    )
    assert record.strongly_typed


def test_smoothing_changes_no_embedding_and_spares_the_quiet_channels(tmp_path):
    model, feeds = words_graph(loud=200.0), ids(200)
    smooth = smoothed(model, [ids(4, seed=seed) for seed in range(20, 30)], tmp_path)
    (exact,), (same,) = outputs(model, feeds, "text_embedding"), outputs(smooth, feeds, "text_embedding")
    np.testing.assert_allclose(exact, same, rtol=0, atol=2e-6)

    def noise(one):
        """The error that the product's 8 bits add, as a share; the table stays float32."""
        changed = to_int8(one, calibrated(one, tmp_path), excluded=["lookup"])
        (nodes,), (other,) = outputs(model, feeds, "nodes"), outputs(changed, feeds, "nodes")
        # Without the loud channel's own share, which drowns everything.
        weight = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "weight")
        (words,) = outputs(model, feeds, "words")
        quiet = nodes - words[..., 7:8] * weight[7]
        return np.linalg.norm(nodes - other) / np.linalg.norm(quiet)

    assert noise(smooth) < 0.5 * noise(model)
    assert list(tmp_path.iterdir()) == []


def test_products_behind_a_smoothing_run_on_integers(exported, tmp_path):
    graph = exported("text-bert-masked")
    smooth = smoothed(graph.model, [graph.feeds(1, 9, seed=seed) for seed in range(4)], tmp_path)
    tensors = sorted({tensor for layer in layers_of(smooth) for tensor in layer.activations})
    found = histograms(smooth, tensors, [graph.feeds(4, 17, seed=seed) for seed in range(4)], tmp_path)
    path, written = tmp_path / "smooth.onnx", tmp_path / "optimised.onnx"
    onnx.save(to_int8(smooth, {name: one.threshold(100) for name, one in found.items()}), path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(written)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(written).graph.node]
    products = sum(layer.operator == "MatMul" for layer in layers_of(smooth))
    assert operators.count("MatMulIntegerToFloat") + operators.count("QLinearMatMul") == products > 0
    feeds = graph.feeds(7, 17, seed=9)
    with open_session(graph.path) as before, open_session(path) as after:
        (first,), (second,) = before.run(feeds).values(), after.run(feeds).values()
    # Random weights have no loud channels, and smoothing is no gain there: the search would not choose it.
    assert cosines(first, second).min() > 0.9


def test_the_search_smooths_where_that_helps(tmp_path):
    def passes(model):
        return Decision(verdict="pass", reason="as told")

    for loud, helps in ((200.0, True), (1.0, None)):
        found = quantise(
            words_graph(loud=loud), [ids(1, seed=seed) for seed in range(16)], tmp_path,
            name="text", decide=passes, progress=lambda what, done, total: None,
        )  # fmt: skip
        assert found.facts["layers"] == 2
        assert found.engine_model is not None
        assert helps is None or found.facts["smoothed"] is helps


def test_a_table_alone_that_does_not_pass_leaves_the_encoder_in_float32(tmp_path):
    model = words_graph()
    recurrent = next(node for node in model.graph.node if node.name == "linear")
    recurrent.op_type, recurrent.input[1] = "Mul", "factor"  # no product with weights is left
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "factor"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = WIDTH
    assert [layer.operator for layer in layers_of(model)] == ["Gather"]

    def decided(verdict):
        return quantise(
            model, [ids(1, seed=seed) for seed in range(8)], tmp_path, name="text",
            decide=lambda one: Decision(verdict=verdict[len(one.graph.initializer) > 4], reason="as told"),
            progress=lambda what, done, total: None,
        )  # fmt: skip

    assert decided({True: "pass", False: "pass"}).facts["excluded"] == []
    assert decided({True: "fail", False: "pass"}) is None
