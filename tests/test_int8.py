"""int8 graphs: what is quantised and how, real integer kernels, independence of the batch, ranges, sensitivity, the search, engines."""

import collections
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from functools import cache
from html import unescape
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from dualmatch.export import bundle as export
from dualmatch.export.engine import build_engine
from dualmatch.export.engine_profiles import AxisRange, profile_from_text
from dualmatch.export.graph import specs
from dualmatch.export.int8 import layers_of, quantised_weight, to_int8, unsigned_tensors
from dualmatch.export.int8_export import calibration_feeds
from dualmatch.export.int8_ranges import Histogram, histograms
from dualmatch.export.int8_search import Quantised, SearchFailedError, quantise
from dualmatch.export.int8_sensitivity import cosines, sensitivities
from dualmatch.runtime import load_bundle
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.parity import Decision
from dualmatch.runtime.regions import RegionFile
from dualmatch.training.checkpoint import load_run
from dualmatch.training.loop import train
from dualmatch.training.recipe import load_recipe

from .data_layouts import write_scan
from .demo_fixture import dualmatch, write_captions_folder
from .test_data_layouts import REGION_VSRN

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed, so no int8 graph was built as an engine: pip install 'dualmatch[tensorrt-rtx]'",
)
# Every kind of layer that is quantised: a small trunk and a deep one with residual sums, words by BERT and by GRU; test_export_head has regions.
QUANTISED = ["image-both-k2", "image-lite0-k1", "text-bert-masked", "text-gru-masked"]


@pytest.fixture(scope="module")
def int8_of(exported, tmp_path_factory):
    """`int8_of(name)`: the exported graph, thresholds from random inputs, and the int8 model with its file."""
    folder = tmp_path_factory.mktemp("int8")

    @cache
    def make(name):
        graph = exported(name)
        tensors = sorted({one for layer in layers_of(graph.model) for one in layer.activations})
        found = histograms(graph.model, tensors, [graph.feeds(4, 17, seed=seed) for seed in range(4)], folder)
        thresholds = {tensor: one.threshold(100) for tensor, one in found.items()}
        model = to_int8(graph.model, thresholds)
        path = folder / f"{name}.onnx"
        onnx.save(model, path)
        return graph, thresholds, model, path

    return make


def run(path, feeds):
    with open_session(path) as session:
        (result,) = session.run(feeds).values()
    return result


def optimised(path, tmp_path):
    """Operators of the graph that onnxruntime's CPU provider really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)


@pytest.mark.parametrize("name", QUANTISED)
def test_every_product_with_weights_has_symmetric_int8_operands(name, int8_of):
    graph, _, model, _ = int8_of(name)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    maker = {output: node for node in model.graph.node for output in node.output}
    original = {node.name: node for node in graph.model.graph.node}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.model.graph.initializer}
    counted = 0
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]] in ((0, 128) if constants[node.input[2]].dtype == np.uint8 else (0,))
            assert constants[node.input[1]] > 0
        if node.op_type not in ("Conv", "Gemm", "MatMul") or original[node.name].input[1] not in weights:
            continue
        operands = [maker[node.input[0]], maker[node.input[1]]]
        assert [one.op_type for one in operands] == ["DequantizeLinear"] * 2
        codes, scales, zeros = (constants[one] for one in operands[1].input)
        axis = next(a.i for a in operands[1].attribute if a.name == "axis")
        values = weights[original[node.name].input[1]]
        assert codes.dtype == zeros.dtype == np.int8
        assert not zeros.any()
        assert len(scales) == values.shape[axis]
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        assert np.abs(codes * scales.reshape(shape) - values).max() <= scales.max() / 2 * 1.001
        assert (np.abs(codes).max(axis=tuple(i for i in range(values.ndim) if i != axis)) >= 126).all()
        counted += 1
    assert counted == sum(layer.weight is not None for layer in layers_of(graph.model)) > 0
    assert specs(model.graph.input) == specs(graph.model.graph.input)
    assert specs(model.graph.output) == specs(graph.model.graph.output)


@pytest.mark.parametrize("name", QUANTISED)
def test_int8_embeddings_point_where_the_float32_ones_do(name, int8_of):
    graph, _, _, path = int8_of(name)
    feeds = graph.feeds(7, 17, seed=2)
    single, quantised = run(graph.path, feeds), run(path, feeds)
    # Sixteen blocks of random convolutions lose more than trained ones; embeddings of other inputs are further off still.
    least = 0.7 if "lite0" in name else 0.99
    assert cosines(single, quantised).min() > least > cosines(single, np.roll(quantised, 1, axis=0)).min()
    assert np.abs(single - quantised).max() > 1e-5


@pytest.mark.parametrize("name", QUANTISED)
def test_an_embedding_does_not_depend_on_its_neighbours(name, int8_of):
    """What dynamic quantisation breaks: a loud neighbour would take the codes away from the others."""
    graph, _, _, path = int8_of(name)
    feeds = graph.feeds(7, 17, seed=2)
    together = run(path, feeds)
    loud = {
        key: np.concatenate([value[:1], value[1:] * 50]) if value.dtype == np.float32 else value
        for key, value in feeds.items()
    }
    for others in (feeds, loud):
        alone = run(path, {key: value[:1] for key, value in others.items()})
        np.testing.assert_allclose(run(path, others)[:1], alone, rtol=0, atol=2e-6)
    np.testing.assert_allclose(run(path, loud)[:1], together[:1], rtol=0, atol=2e-6)


def test_onnxruntime_runs_integer_kernels(int8_of, tmp_path):
    graph, _, _, path = int8_of("image-lite0-k1")
    convolutions = sum(node.op_type == "Conv" for node in graph.model.graph.node)
    found = optimised(path, tmp_path)
    assert convolutions > 40
    assert found["QLinearConv"] == convolutions
    assert found["Conv"] == found["FusedConv"] == 0
    assert found["QLinearAdd"] > 0
    products = sum(layer.operator == "MatMul" for layer in layers_of(graph.model))
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] >= products > 0


@pytest.mark.parametrize("name", ["text-bert-masked", "text-gru-masked"])
def test_onnxruntime_multiplies_words_in_integers(name, int8_of, tmp_path):
    graph, _, _, path = int8_of(name)
    products = sum(layer.operator == "MatMul" for layer in layers_of(graph.model))
    found = optimised(path, tmp_path)
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == products > 0


def test_an_engines_graph_has_int8_codes_only(int8_of):
    graph, thresholds, model, _ = int8_of("image-lite0-k1")
    engine = to_int8(graph.model, thresholds, for_engine=True)

    def zero_points(one):
        return {t.data_type for t in one.graph.initializer if t.name.endswith(".zero")}

    assert unsigned_tensors(graph.model)
    assert zero_points(model) == {TensorProto.UINT8, TensorProto.INT8}
    assert zero_points(engine) == {TensorProto.INT8}


@rtx
@pytest.mark.parametrize("name", QUANTISED)
def test_every_int8_graph_builds_as_a_strongly_typed_engine(name, int8_of, tmp_path):
    graph, thresholds, _, _ = int8_of(name)
    path = tmp_path / "engine.onnx"
    onnx.save(to_int8(graph.model, thresholds, for_engine=True), path)
    inputs = specs(graph.model.graph.input)
    profile = profile_from_text("1:4:16", inputs, length=AxisRange(1, 12, 40) if graph.is_text else None)
    record = build_engine(path, tmp_path / "e", flavour="tensorrt-rtx", inputs=inputs, profiles=[profile])
    assert record.strongly_typed
    assert record.bytes > 10_000


@rtx
def test_the_graph_for_onnxruntime_is_why_engines_need_their_own(int8_of, tmp_path):
    graph, _, _, path = int8_of("image-both-k2")
    inputs = specs(graph.model.graph.input)
    with pytest.raises(DualmatchError):
        build_engine(
            path, tmp_path / "e", flavour="tensorrt-rtx", inputs=inputs, profiles=[profile_from_text("1:4:16", inputs)]
        )


def test_excluded_layers_stay_as_they_were(int8_of):
    graph, thresholds, _, _ = int8_of("image-both-k2")
    layers = layers_of(graph.model)
    left_out = [layers[0].name, layers[-1].name]
    model = to_int8(graph.model, thresholds, excluded=left_out)
    original = {node.name: node for node in graph.model.graph.node}
    for node in model.graph.node:
        if node.name in left_out:
            assert node.input == original[node.name].input
    everything = to_int8(graph.model, thresholds, excluded=[layer.name for layer in layers])
    assert [node.op_type for node in everything.graph.node] == [node.op_type for node in graph.model.graph.node]


def test_a_weight_of_zeros_and_one_that_is_not_finite():
    codes, scales = quantised_weight(np.zeros((3, 4), np.float32), 1)
    assert not codes.any()
    assert (scales > 0).all()
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    weight = numpy_helper.from_array(np.array([[1, np.nan], [0, 1]], np.float32), "the_bad_one")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "the_bad_one"], ["y"], name="n")], "g", [x], [y], [weight]
    )
    with pytest.raises(DualmatchError, match="weight 'the_bad_one' holds NaN"):
        to_int8(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), {"x": 1.0})


# Ranges.


def test_a_histogram_does_not_care_how_its_values_arrive():
    values = np.abs(np.random.default_rng(0).normal(size=20_000).astype(np.float32)) * np.repeat(
        [1, 100], 10_000
    ).astype(np.float32)
    whole, parts, other_way = Histogram(), Histogram(), Histogram()
    whole.add(values)
    for part in np.split(values, 10):
        parts.add(part)
    for part in np.split(-values[::-1], 10):
        other_way.add(part)
    for percentile in (50, 99, 99.9, 100):
        exact = np.quantile(values, percentile / 100)
        for one in (whole, parts, other_way):
            assert one.threshold(percentile) == pytest.approx(exact, abs=2 * one.top / 4096)
    assert whole.threshold(100) >= values.max() * 0.999


def test_zeros_behind_a_relu_do_not_count():
    histogram = Histogram()
    histogram.add(np.concatenate([np.zeros(99_000), np.linspace(0, 10, 1000)]).astype(np.float32))
    assert histogram.threshold(90) == pytest.approx(9, abs=0.1)
    empty = Histogram()
    empty.add(np.zeros(5, np.float32))
    assert empty.threshold(99.9) == 0


# Sensitivity and search.


def test_the_layer_that_is_hurt_most_comes_first(int8_of, tmp_path):
    graph, thresholds, _, _ = int8_of("image-both-k2")
    victim = layers_of(graph.model)[5]
    clipped = {**thresholds, victim.activations[0]: thresholds[victim.activations[0]] / 200}
    order = sensitivities(graph.model, clipped, [graph.feeds(2, seed=seed) for seed in range(3)], tmp_path)
    users = {layer.name for layer in layers_of(graph.model) if victim.activations[0] in layer.activations}
    assert {one.layer for one in order[: len(users)]} == users
    assert order[0].noise > 0.5 > order[len(users)].noise
    assert len(order) == len(layers_of(graph.model))
    assert list(tmp_path.iterdir()) == []


def search(graph, tmp_path, verdicts, **options):
    given = iter(verdicts)
    calls = []

    def decide(model):
        calls.append(model)
        return Decision(verdict=next(given), reason="as told")

    feeds = [graph.feeds(1, 9, seed=seed) for seed in range(8)]
    quiet = lambda what, done, total: None  # noqa: E731
    found = quantise(graph.model, feeds, tmp_path, name="text", decide=decide, progress=quiet, **options)
    return found, calls


def test_layers_are_left_out_until_it_passes(exported, tmp_path):
    graph = exported("text-bert-masked")
    found, calls = search(graph, tmp_path, ["fail", "too few pairs", "fail", "pass"])
    assert [trial["excluded"] for trial in found.facts["trials"]] == [0, 1, 2, 4]
    noises = [one["noise"] for one in found.facts["excluded"]]
    assert len(noises) == 4
    assert noises == sorted(noises, reverse=True)
    assert found.model is calls[-1]
    assert found.engine_model is None
    assert found.facts["cosine_by_percentile"][f"{found.facts['percentile']:g}"] == max(
        found.facts["cosine_by_percentile"].values()
    )
    assert list(tmp_path.iterdir()) == []


def test_each_graph_leaves_out_what_it_needs(exported, tmp_path):
    """TensorRT's graph is settled behind onnxruntime's and does not make that one leave out more."""
    graph = exported("text-bert-masked")
    feeds = [graph.feeds(1, 9, seed=seed) for seed in range(8)]
    quiet = lambda what, done, total: None  # noqa: E731
    with mock.patch("dualmatch.export.int8_search.engines_differ", return_value=True):
        verdicts = iter(["fail", "fail", "pass", "fail", "fail", "pass"])
        found = quantise(
            graph.model, feeds, tmp_path, name="text", progress=quiet,
            decide=lambda model: Decision(verdict=next(verdicts), reason="as told"),
        )  # fmt: skip
        tried = [(trial["graph"], trial["excluded"]) for trial in found.facts["trials"]]
        assert tried == [("onnxruntime", n) for n in (0, 1, 2)] + [("engine", n) for n in (2, 4, 8)]
        assert (len(found.facts["excluded"]), len(found.facts["engine_excluded"])) == (2, 8)
        assert found.facts["engine_excluded"][:2] == found.facts["excluded"]
        found, calls = search(graph, tmp_path, ["pass", *["fail"] * 6, "pass"])
        assert len(found.facts["engine_excluded"]) == found.facts["layers"]
        assert found.engine_model is calls[-1]
        assert not any("QuantizeLinear" in node.op_type for node in found.engine_model.graph.node)
        with pytest.raises(
            DualmatchError, match="graph for TensorRT does not pass with all layers in float32: as told"
        ):
            search(graph, tmp_path, ["pass", *["fail"] * 7])


def test_too_few_pairs_end_the_search_where_that_is_accepted(exported, tmp_path):
    found, _ = search(exported("text-bert-masked"), tmp_path, ["too few pairs"], accepts=("pass", "too few pairs"))
    assert found.facts["excluded"] == []


def test_an_encoder_without_products_is_left_alone(exported, tmp_path):
    """A GRU over word embeddings and nothing else; here the words' part of a whole encoder."""
    graph = exported("text-gru-masked")
    recurrent = onnx.ModelProto()
    recurrent.CopyFrom(graph.model)
    del recurrent.graph.node[:]
    recurrent.graph.node.extend(node for node in graph.model.graph.node if node.op_type not in ("MatMul", "Gemm"))
    found, calls = search(replace(graph, model=recurrent), tmp_path, [])
    assert found is None
    assert calls == []


def test_a_network_that_int8_cannot_carry_is_refused(exported, tmp_path):
    with pytest.raises(
        DualmatchError, match=r"with 9 of the text encoder's 19 layers in float32, still as told; export with --fp16"
    ):
        search(exported("text-bert-masked"), tmp_path, ["fail"] * 20)


# The command. Tracing takes seconds and is tested elsewhere; everything after it is the real thing.


@pytest.fixture(scope="module")
def traced(small_bundle):
    """torch's exporter gives the small bundle's graphs."""

    def export_encoder(encoder, examples, path, *, output):
        shutil.copy(small_bundle / path.name, path)
        return onnx.load(path)

    with mock.patch.object(export, "export_encoder", export_encoder):
        yield


@pytest.fixture(scope="module")
def bundle(small_run, traced, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8-bundle") / "bundle"
    done = dualmatch("export", small_run.folder, "--out", out, "--int8", "--max-rsum-loss", "60")
    assert done.code == 0, done.err
    return out


def test_a_bundle_says_how_it_was_quantised(bundle, small_run):
    manifest = load_bundle(bundle).manifest
    for name, entry in manifest.encoders.items():
        assert entry.precision == "int8"
        assert entry.quantisation["layers"] >= len(entry.quantisation["excluded"])
        assert entry.quantisation["calibration"] == {"name": small_run.dataset.name, "splits": ["train", "val", "test"]}
        assert entry.engine_graph == (f"{name}_encoder.engine.onnx" if name == "image" else "text_encoder.onnx")
        assert entry.engine_graph in manifest.files
        assert entry.opset == 20
    assert manifest.parity["verdict"] == "pass"
    card = (bundle / "README.md").read_text()
    assert "int8" in card
    assert f"{manifest.encoders['image'].quantisation['layers']} layers" in card


def test_an_int8_bundle_verifies_and_encodes(bundle, small_run):
    done = dualmatch("runtime", "verify", bundle, "--data", small_run.data)
    assert done.code == 0, done.err
    assert "PASS: " in done.out


@rtx
def test_an_int8_bundle_compiles(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    done = dualmatch("compile", copy, "--flavour", "tensorrt-rtx")
    assert done.code == 0, done.err
    assert len(load_bundle(copy).manifest.engines) == 2


def refused(small_run, out, *options):
    done = dualmatch("export", small_run.folder, "--out", out, *options)
    assert done.code in (1, 2)
    assert "Traceback" not in done.err
    assert not out.exists()
    return done.err.strip().splitlines()[-1]


def test_what_is_refused(small_run, traced, tmp_path):
    out = tmp_path / "bundle"
    assert "exclude each other" in refused(small_run, out, "--int8", "--fp16")
    assert "--calibration is for --int8" in refused(small_run, out, "--fp16", "--calibration", small_run.data)
    assert "there is no such folder" in refused(small_run, out, "--int8", "--calibration", tmp_path / "none")
    few = write_captions_folder(tmp_path / "few", small_run.dataset.items[:5])
    assert "at least 8, and data set 'small scenes' has 5" in refused(small_run, out, "--int8", "--calibration", few)
    damaged = shutil.copytree(small_run.data, tmp_path / "damaged")
    first = json.loads((damaged / "captions.json").read_text())["images"][0]["filename"]
    (damaged / "images" / first).write_bytes(b"no photograph")
    assert first in refused(small_run, out, "--int8", "--max-rsum-loss", "60", "--calibration", damaged)
    assert list(tmp_path.glob(".bundle*")) == []


def test_a_search_that_fails_leaves_nothing(small_run, traced, tmp_path):
    """52 images that do not flip have a bound of 300 / 52; the floor of the cosine ends each trial at its first batch."""
    said = refused(small_run, tmp_path / "bundle", "--int8", "--max-rsum-loss", "6", "--min-cosine", "1")
    assert "int8 does not keep retrieval: with" in said
    assert re.search(r"still the worst cosine is 0\.\d+, below the floor of 1\.0; a floor of 0\.\d+ would have", said)
    assert list(tmp_path.iterdir()) == []


def test_too_few_pairs_are_told_before_any_search(small_run, traced, tmp_path):
    said = refused(small_run, tmp_path / "bundle", "--int8")
    assert "cannot be decided on these pairs even if nothing were lost" in said
    assert re.search(
        r"on 52 images the 95% bound of its loss is 5\.77, above the tolerance of 3\.0; about 100 images .* --unverified",
        said,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_refused_search_has_the_gates_report(small_run, traced, tmp_path):
    """The last trial is compared on all pairs, although the floor ended it at its first batch."""
    page = tmp_path / "gate.html"
    options = ("--int8", "--max-rsum-loss", "6", "--min-cosine", "1", "--gate-report", page, "--json")
    done = dualmatch("export", small_run.folder, "--out", tmp_path / "bundle", *options)
    assert done.code == 1
    found = done.json
    assert found["verdict"] == "fail"
    protocol = found["comparison"]["before"]["protocol"]
    assert (protocol["images"], protocol["split"]) == (52, "train, val, test")
    assert found["smallest_tolerances"]["worst_cosine"] <= found["comparison"]["image_cosine"][0] < 1
    assert (
        f"a floor of {found['smallest_tolerances']['worst_cosine']} would have passed; export with --fp16" in done.err
    )
    assert len(found["flipped"]) == found["comparison"]["flips"]
    trials = [stage for stage in found["stages"] if stage["name"] == "trial"]
    assert len(trials) > 2
    assert all("the worst cosine of 16 of 52 images is" in stage["found"] for stage in trials)
    assert trials[0]["graph"].startswith("image int8, onnxruntime, 0 layers")
    assert {stage["status"] for stage in trials} == {"FAIL"}
    assert found["stages"][-1] == {"name": "recall", "graph": "both", "status": "FAIL", "found": found["reason"]}
    assert found["reason"] in unescape(page.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["gate.html"]


def test_captions_that_int8_cannot_carry_are_compared_beside_the_settled_images(small_run, traced, tmp_path):
    """The search is played: the image encoder's graph is what torch gives, the text encoder's is another network's."""
    weights = {"image": lambda values: values, "text": lambda values: values[..., ::-1].copy()}

    def search(single, feeds, scratch, *, name, decide, **options):
        model = onnx.ModelProto()
        model.CopyFrom(single)
        weight = max((one for one in model.graph.initializer if len(one.dims) >= 3), key=lambda one: np.prod(one.dims))
        weight.CopyFrom(numpy_helper.from_array(weights[name](numpy_helper.to_array(weight)), weight.name))
        decision = decide(model)
        if name == "image":
            assert decision.verdict == "pass"
            return Quantised(model=model, engine_model=None, facts={})
        trial = {"excluded": 3, "graph": "onnxruntime", "verdict": "fail", "reason": decision.reason}
        raise SearchFailedError("text does not pass:", decision.reason, model, [trial])

    page = tmp_path / "gate.html"
    options = ("--int8", "--max-rsum-loss", "6", "--gate-report", page, "--json")
    with mock.patch("dualmatch.export.int8_export.quantise", search):
        done = dualmatch("export", small_run.folder, "--out", tmp_path / "bundle", *options)
    assert done.code == 1
    found = done.json
    assert found["comparison"]["image_cosine"][0] == pytest.approx(1)
    assert found["comparison"]["caption_cosine"][0] < 0.95
    assert found["stages"][0]["graph"] == "text int8, onnxruntime, 3 layers in float32"
    flips, names = found["flipped"], {item.id: item.captions for item in small_run.dataset.items}
    assert len(flips) == found["comparison"]["flips"] > 10
    for flip in flips:
        assert any((flip["rank_before"] <= k) != (flip["rank_after"] <= k) for k in (1, 5, 10))
        assert flip["query"] == flip["image"] if flip["direction"] == "i2t" else flip["query"] in names[flip["image"]]
        assert (flip["first_before"] in names) == (flip["direction"] == "t2i")
        assert flip["query"] in unescape(page.read_text())
    assert "data:image/jpeg;base64," in page.read_text()
    assert done.err.splitlines()[-1].startswith("dualmatch: text does not pass: the worst cosine is ")


def test_too_few_pairs_for_int8_have_a_report_too(small_run, traced, tmp_path):
    page = tmp_path / "gate.html"
    done = dualmatch(
        "export", small_run.folder, "--out", tmp_path / "bundle", "--int8", "--gate-report", page, "--json"
    )
    assert done.code == 1
    assert done.json["verdict"] == "too few pairs"
    assert done.json["smallest_tolerances"]["rsum_loss"] == pytest.approx(5.77)
    assert done.json["pairs_needed"] == 100
    assert done.json["comparison"] is None
    assert page.exists()


# Calibration data of a network with precomputed regions.


@pytest.fixture(scope="module")
def region_run(tmp_path_factory):
    """A VSRN trained for an epoch on SCAN's layout, and the data."""
    root = tmp_path_factory.mktemp("regions")
    data = write_scan(root / "data")
    recipe = load_recipe("flickr8k-vsrn", REGION_VSRN)
    train(recipe, open_dataset(data), root / "run", data_name=str(data), cache=root / "cache", workers=0)
    return root / "run", data


@pytest.fixture
def no_encoding(monkeypatch):
    def encode_images(*arguments, **options):
        raise AssertionError("images are being encoded")

    monkeypatch.setattr(export, "encode_images", encode_images)


@pytest.mark.usefixtures("no_encoding")
def test_images_without_regions_are_told_before_any_encoding(region_run, small_run, tmp_path):
    run, data = region_run
    words = ("export", run, "--out", tmp_path / "bundle", "--unverified")
    done = dualmatch(*words, "--int8", "--calibration", small_run.data)
    assert done.code == 1
    assert re.search(
        r"int8 cannot find its ranges on data set 'small scenes': the region file .*/data has no features for image .* and 31 others of 32; "
        "name data that come with their regions with --calibration DATA",
        done.err,
    )
    few = np.load(data / "test_ims.npy")[:1]
    np.savez(tmp_path / "few.npz", filenames=np.array(["test/0"]), features=few)
    done = dualmatch(*words, "--regions", tmp_path / "few.npz")
    assert done.code == 1
    assert re.search(r"few\.npz has no features for image .* others of 11\.", done.err)
    assert [path.name for path in tmp_path.iterdir()] == ["few.npz"]


def test_calibration_data_have_their_own_regions(region_run, tmp_path):
    """In SCAN's layout images of two data sets have the same ids: the gate's features would be taken for the others'."""
    run, data = region_run
    other = shutil.copytree(data, tmp_path / "other")
    for path in other.glob("*_ims.npy"):
        np.save(path, 3 * np.load(path))
    opened, pairs = load_run(run), open_dataset(data)
    gates = calibration_feeds(opened, pairs, pairs, RegionFile(data))["image"]
    own = calibration_feeds(opened, open_dataset(other), pairs, RegionFile(data))["image"]
    assert len(own) == len(gates) == 11
    for one, gate in zip(own, gates, strict=True):
        np.testing.assert_array_equal(one["regions"], 3 * gate["regions"])
    for path in other.glob("*_ims.npy"):
        np.save(path, np.load(path)[..., :4])
    with pytest.raises(DualmatchError, match=r"takes regions of 8 channels, .*other has 4"):
        calibration_feeds(opened, open_dataset(other), pairs, RegionFile(data))
