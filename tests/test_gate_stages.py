"""The gate's stages, each against a fault planted for it: what an export may do wrong, refused where it shows first, nothing left behind."""

import functools
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx
import torch
from onnx import helper, numpy_helper

from dualmatch.export import bundle as export
from dualmatch.export import half
from dualmatch.export.bundle import export_run
from dualmatch.export.gate import Gate, GateRefusedError, tolerances_for
from dualmatch.runtime import fresh, load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.fresh import check_in_fresh_process
from dualmatch.runtime.gate_report import write_gate_report
from dualmatch.runtime.parity import Tolerances, compare
from dualmatch.runtime.recall import evaluate
from dualmatch.runtime.reference import read_reference
from dualmatch.runtime.stages import Contract
from dualmatch.runtime.verify import NamedFlip, verify
from dualmatch.training.checkpoint import load_run

from .demo_fixture import dualmatch, edit_manifest, seal
from .tiny_models import louder_before_the_norm

# 52 images of which none flips have a bound of 300 / 52 points: this much and hardly more is allowed.
NARROW = Tolerances(rsum_loss=6.0, worst_cosine=0.99)


@pytest.fixture
def run(small_run):
    return load_run(small_run.folder)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "bundle"


@pytest.fixture
def exports_of(monkeypatch, small_bundle):
    """`exports_of(change)`: from now on torch's exporter writes the small bundle's graphs after `change(model)`."""

    def plant(change=lambda model: None, write=onnx.save):
        def export_encoder(encoder, examples, path, *, output):
            model = onnx.load(small_bundle / path.name)
            change(model)
            write(model, path)
            return model

        monkeypatch.setattr(export, "export_encoder", export_encoder)

    return plant


def nothing_left(out):
    return not out.parent.exists() or not list(out.parent.iterdir())


def only(encoder):
    """Decorate a fault: it is planted in this encoder's graph alone."""

    def decorate(change):
        @functools.wraps(change)
        def chosen(model):
            if (model.graph.input[0].name == "token_ids") == (encoder == "text"):
                change(model)

        return chosen

    return decorate


def put_first(model, nodes, *, made, initializers=()):
    """Nodes before all others, which then read `made` in the place of the graph's first input."""
    graph = model.graph
    taken = graph.input[0].name
    for node in graph.node:
        node.input[:] = [made if name == taken else name for name in node.input]
    kept = list(graph.node)
    del graph.node[:]
    graph.initializer.extend(initializers)
    graph.node.extend([*nodes, *kept])


def put_last(model, nodes, *, initializers=()):
    """Nodes after all others, which read `raw` and write the graph's output."""
    graph = model.graph
    name = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["raw" if one == name else one for one in node.output]
    graph.initializer.extend(initializers)
    graph.node.extend(nodes)


def constant(name, values, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


@only("image")
def another_output_name(model):
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["embedding" if one == name else one for one in node.output]
    model.graph.output[0].name = "embedding"


@only("image")
def a_frozen_batch_axis(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3


@only("image")
def a_batch_frozen_inside(model):
    """The axis is declared dynamic, and all but the traced three images are cut off within."""
    bounds = [constant(name, [value], np.int64) for name, value in (("from", 0), ("to", 3), ("axis", 0))]
    node = helper.make_node("Slice", ["pixels", "from", "to", "axis"], ["cut"])
    put_first(model, [node], made="cut", initializers=bounds)


@only("image")
def a_batch_in_a_reshape(model):
    """The traced batch as a number in a reshape; onnxruntime already sees from it that the output has three rows."""
    shape = [3, *(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:])]
    node = helper.make_node("Reshape", ["pixels", "traced"], ["reshaped"])
    put_first(model, [node], made="reshaped", initializers=[constant("traced", shape, np.int64)])


@only("text")
def a_frozen_length_axis(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9


@only("text")
def a_length_frozen_inside(model):
    """All but the traced nine tokens cut off, as an exporter that unrolled its loop would."""
    bounds = [constant(name, [value], np.int64) for name, value in (("from", 0), ("to", 9), ("axis", 1))]
    node = helper.make_node("Slice", ["token_ids", "from", "to", "axis"], ["cut"])
    put_first(model, [node], made="cut", initializers=bounds)


@only("image")
def another_dimension(model):
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 15
    bounds = [constant(name, [value], np.int64) for name, value in (("from", 0), ("to", 15), ("axis", 1))]
    put_last(
        model,
        [helper.make_node("Slice", ["raw", "from", "to", "axis"], [model.graph.output[0].name])],
        initializers=bounds,
    )


@only("image")
def a_transposed_weight(model):
    read = {name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input[1:2]}
    weight = next(
        one for one in model.graph.initializer if one.name in read and len(one.dims) == 2 and one.dims[0] == one.dims[1]
    )
    values = np.ascontiguousarray(numpy_helper.to_array(weight).T)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


@only("text")
def a_dropped_padding_mask(model):
    """Padding taken for an ordinary word."""
    node = helper.make_node("Max", ["token_ids", "word"], ["unpadded"])
    put_first(model, [node], made="unpadded", initializers=[constant("word", 4, np.int64)])


@only("image")
def not_a_number(model):
    put_last(
        model,
        [helper.make_node("Mul", ["raw", "nan"], [model.graph.output[0].name])],
        initializers=[constant("nan", np.nan)],
    )


def coarse_rounding(reference):
    """Components rounded to a grid that is finer than float16's tolerance: of many such grids the one that costs most."""

    def rsum(steps):
        images = (np.round(reference.images * steps) / steps).astype(np.float32)
        return evaluate(images @ reference.captions.T, caption_image=reference.caption_image).rsum

    steps = min(range(112, 260), key=rsum)

    @only("image")
    def rounded(model):
        nodes = [
            helper.make_node("Mul", ["raw", "steps"], ["scaled"]),
            helper.make_node("Round", ["scaled"], ["rounded"]),
            helper.make_node("Div", ["rounded", "steps"], [model.graph.output[0].name]),
        ]
        put_last(model, nodes, initializers=[constant("steps", float(steps))])

    return rounded


def a_subtle_scale_error(reference):
    """The last layer's channels 0.6 % too large or too small: of many such errors the one that costs most."""
    chance = np.random.default_rng(0)
    size = 4.5e-3 / np.abs(reference.images).max()
    scales = [(1 + size * chance.integers(-1, 2, size=(1, 16))).astype(np.float32) for _ in range(150)]

    def rsum(scale):
        return evaluate((reference.images * scale) @ reference.captions.T, caption_image=reference.caption_image).rsum

    worst = min(scales, key=rsum)

    @only("image")
    def scaled(model):
        node = helper.make_node("Mul", ["raw", "scale"], [model.graph.output[0].name])
        put_last(model, [node], initializers=[constant("scale", worst)])

    return scaled


STAGE_OF_FAULT = [
    (another_output_name, "names", "image fp32", r"gives embedding float32; it must be image_embedding float32"),
    (a_frozen_batch_axis, "axes", "image fp32", r"froze axis 0 of 'pixels' 3; it must be dynamic \(batch\)"),
    (a_batch_frozen_inside, "shapes", "image fp32", r"gives \[3, 16\] for inputs pixels \[7, 3, 32, 32\]; it must be \[7, 16\]"),
    (a_batch_in_a_reshape, "axes", "image fp32", r"froze axis 0 of 'image_embedding' 3; it must be dynamic \(batch\)"),
    (a_frozen_length_axis, "axes", "text fp32", r"froze axis 1 of 'token_ids' 9; it must be dynamic \(length\)"),
    (a_length_frozen_inside, "values", "text fp32", r"inputs token_ids \[\d, (17|40)\]"),
    (another_dimension, "shapes", "image fp32", r"'image_embedding' of shape \[batch, 15\]; it must be \[batch, 16\]"),
    (a_transposed_weight, "values", "image fp32", r"differs from torch by .* a tolerance of .* would have passed"),
    (a_dropped_padding_mask, "values", "text fp32", r"differs from torch by .* a tolerance of .* would have passed"),
    (not_a_number, "values", "image fp32", r"gives NaN or infinity for inputs pixels \[1, 3, 32, 32\]"),
]  # fmt: skip


def statuses(verification):
    return {(stage.name, stage.graph): stage.status for stage in verification.stages}


@pytest.mark.parametrize(("fault", "stage", "graph", "said"), STAGE_OF_FAULT, ids=lambda one: getattr(one, "__name__", None))  # fmt: skip
def test_a_fault_is_refused_at_the_first_stage_that_shows_it(
    fault, stage, graph, said, run, small_run, exports_of, out
):
    exports_of(fault)
    with pytest.raises(GateRefusedError, match=said) as refusal:
        export_run(run, small_run.dataset, out)
    assert nothing_left(out)
    assert f"(stage {stage})" in str(refusal.value)
    found = statuses(refusal.value.verification)
    order = [*found]
    at = order.index((stage, graph))
    assert [found[one] for one in order[:at]] == ["OK"] * at
    assert found[stage, graph] == "FAIL"
    assert [found[one] for one in order[at + 1 :]] == ["SKIPPED"] * (len(order) - at - 1)
    assert order[-1] == ("recall", "both")
    assert refusal.value.verification.comparison is None


louder_image = only("image")(louder_before_the_norm)


def test_an_overflow_in_an_l2norm_is_refused_by_its_range(run, small_run, exports_of, out, monkeypatch):
    """An l2norm that squares in float16. A CPU computes float16 in float32: only the magnitudes show it."""
    exports_of(louder_image)
    monkeypatch.setattr(half, "ISLAND_OPERATORS", half.ISLAND_OPERATORS - {"Pow", "ReduceSum", "Sqrt"})
    with pytest.raises(GateRefusedError, match=r"float16 would overflow: .*\((ReduceSum|Pow|Clip)\) reaches .* ends at 65504") as refusal:  # fmt: skip
        export_run(run, small_run.dataset, out, precision="fp16", tolerances=NARROW)
    assert nothing_left(out)
    found = statuses(refusal.value.verification)
    assert found["values", "image fp32"] == "OK"
    assert found["range", "image fp16"] == "FAIL"
    assert found["names", "image fp16"] == found["recall", "both"] == "SKIPPED"
    top = refusal.value.verification.magnitudes["image"][0]
    assert top.largest > 65504
    assert top.share > 1


def test_the_same_l2norm_passes_with_its_squares_in_float32(run, small_run, exports_of, out):
    exports_of(louder_image)
    found = export_run(run, small_run.dataset, out, precision="fp16", tolerances=NARROW).verification
    assert set(statuses(found).values()) == {"OK"}
    assert 500 < found.magnitudes["image"][0].largest < 65504
    stages = load_bundle(out).manifest.parity["stages"]
    assert [(one["name"], one["graph"], one["status"]) for one in stages] == [
        (stage, graph, "OK")
        for encoder in ("image", "text")
        for graph in (f"{encoder} fp32", f"{encoder} fp16")
        for stage in (("range",) if graph.endswith("fp16") else ()) + ("names", "axes", "shapes", "values")
    ] + [("recall", "both", "OK")]


@pytest.mark.parametrize("fault", [a_subtle_scale_error, coarse_rounding])
def test_what_each_component_hides_is_refused_by_recall(
    fault, run, small_run, small_bundle, exports_of, out, monkeypatch
):
    """Within what float16 may do to a component, on every check; only ranking all pairs shows it."""
    exports_of(fault(read_reference(small_bundle)))
    monkeypatch.setitem(export.COMPONENT_TOLERANCE, "fp32", export.COMPONENT_TOLERANCE["fp16"])
    with pytest.raises(GateRefusedError, match=r"the fp16 gate refused the export: Rsum (fell|changed)") as refusal:
        export_run(run, small_run.dataset, out, precision="fp16", tolerances=NARROW)
    assert nothing_left(out)
    found = statuses(refusal.value.verification)
    assert found.pop(("recall", "both")) == "FAIL"
    assert set(found.values()) == {"OK"}
    verification = refusal.value.verification
    assert verification.comparison.bound > NARROW.rsum_loss
    assert verification.flips
    ids = {item.id for item in small_run.dataset.items}
    for flip in verification.flips:
        assert flip.image in ids
        assert flip.query in (ids if flip.direction == "i2t" else set(small_run.dataset.captions))
        assert {flip.first_before, flip.first_after} <= (ids if flip.direction == "t2i" else set(small_run.dataset.captions))  # fmt: skip
        assert any((flip.rank_before <= k) != (flip.rank_after <= k) for k in (1, 5, 10))


# What only a fresh process sees: the file, not what its maker holds in memory.


def weights_elsewhere(model, path):
    """External data that does not come along."""
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    onnx.load_external_data_for_model(model, str(path.parent))  # the object in memory stays complete
    (path.parent / "weights.bin").unlink()


def an_older_file(model, path):
    """The object in memory is right, what was written is not."""
    written = onnx.ModelProto()
    written.CopyFrom(model)
    a_transposed_weight(written)
    onnx.save(written, path)


@pytest.mark.parametrize(("write", "stage"), [(weights_elsewhere, "names"), (an_older_file, "values")])
def test_what_is_wrong_with_the_file_alone(write, stage, run, small_run, exports_of, out):
    exports_of(write=write)
    with pytest.raises(GateRefusedError) as refusal:
        export_run(run, small_run.dataset, out)
    assert statuses(refusal.value.verification)[stage, "image fp32"] == "FAIL"
    assert nothing_left(out)


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_a_network_that_gives_no_numbers_is_not_a_reference(factor):
    gate = Gate("fp32", NARROW)
    encoder = torch.nn.Threshold(-1e9, factor)
    given = {"input": np.ones((3, 4), np.float32)}
    gate.ask_torch("image", encoder, [given])
    assert gate.checks["image"][0]["embedding"].tolist() == given["input"].tolist()
    with pytest.raises(DualmatchError, match=r"torch gives NaN or infinity for inputs \{'input': \[3, 4\]\}"):
        gate.ask_torch("image", encoder, [given, {"input": np.full((3, 4), -2e9, np.float32)}])


def contract_and_checks(bundle):
    entry = bundle.manifest.encoders["text"]
    return Contract(inputs=entry.inputs, outputs=entry.outputs, tolerance=1e-5), read_reference(bundle).checks("text")


def test_the_fresh_process_needs_no_torch(small_bundle, tmp_path, monkeypatch):
    blocked, here = tmp_path / "blocked", tmp_path / "here"
    for folder, names in ((blocked, ("torch", "onnx", "transformers")), (here, ("numpy", "json"))):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.py").write_text("raise ImportError('blocked')")
    monkeypatch.setenv("PYTHONPATH", str(blocked))
    monkeypatch.chdir(here)  # what lies where the user stands is not imported
    bundle = load_bundle(small_bundle)
    contract, checks = contract_and_checks(bundle)
    found = check_in_fresh_process(bundle.encoder_path("text"), contract, checks, "text")
    assert [stage.status for stage in found.stages] == ["OK"] * 4
    assert found.largest_difference < 1e-5
    assert {len(check["token_ids"]) for check in checks} == {1, 2, 4, 7}
    assert {1, 2, 5, 17, 40} <= {check["token_ids"].shape[1] for check in checks}


@pytest.mark.parametrize(("script", "said"), [("kill -SEGV $$", "was ended by SIGSEGV"), ("echo no memory >&2; exit 3", "failed: no memory")])  # fmt: skip
def test_a_process_that_dies_is_a_failed_stage(script, said, small_bundle, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(fresh.sys, "executable", str(python))
    bundle = load_bundle(small_bundle)
    found = check_in_fresh_process(bundle.encoder_path("text"), *contract_and_checks(bundle), "text")
    assert [stage.status for stage in found.stages] == ["FAIL", "SKIPPED", "SKIPPED", "SKIPPED"]
    assert found.failed.found == f"does not load: the process that opened it {said}"


# verify: the same stages on a bundle whose hashes were brought up to a change.


def test_verify_goes_through_the_same_stages(small_bundle, small_run):
    found = verify(load_bundle(small_bundle), small_run.dataset)
    names = ["names", "axes", "shapes", "values", "range", "recall"]
    assert list(dict.fromkeys(stage.name for stage in found.stages)) == names
    assert {stage.status for stage in found.stages if stage.name != "range"} == {"OK"}
    assert found.decision.smallest.component >= found.comparison.largest_difference
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["smallest_tolerances"]["component"] == found.decision.smallest.component
    assert values["tolerances"]["component"] == 1e-5


def test_the_change_of_rsum_has_an_interval_in_json_and_manifest(small_bundle, small_run):
    found = verify(load_bundle(small_bundle), small_run.dataset)
    # Nothing flipped: 52 images, with one that lost a hit more and one that lost a hit less.
    low, high = json.loads(json.dumps(found.to_json()))["comparison"]["rsum_change_interval"]
    assert -10 < low == -high < 0
    assert load_bundle(small_bundle).manifest.parity["comparison"]["rsum_change_interval"] == [low, high]
    right = np.eye(40, dtype=np.float32)
    wrong = np.concatenate([np.roll(right[:10], 1, axis=0), right[10:]])
    shifted = compare((right, right), (wrong, right), np.arange(40))
    least, most = shifted.rsum_change_interval
    assert least < -shifted.rsum_loss < most < 0
    assert -least > shifted.bound > -most


def test_a_bundle_from_before_the_interval_is_read(small_bundle, small_run, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    edit_manifest(bundle, lambda values: values["parity"]["comparison"].pop("rsum_change_interval"))
    assert dualmatch("runtime", "verify", bundle, "--data", small_run.data).code == 0


@pytest.mark.parametrize(("fault", "stage"), [(a_transposed_weight, "values"), (another_dimension, "shapes"), (a_dropped_padding_mask, "values")])  # fmt: skip
def test_verify_refuses_a_changed_graph_without_photographs(fault, stage, small_bundle, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    for name in ("image_encoder.onnx", "text_encoder.onnx"):
        model = onnx.load(bundle / name)
        fault(model)
        onnx.save(model, bundle / name)
    seal(bundle)
    found = verify(load_bundle(bundle), None)
    assert found.decision.verdict == "fail"
    assert f"(stage {stage})" in found.decision.reason
    assert statuses(found)["recall", "both"] == "SKIPPED"
    refused = dualmatch("runtime", "verify", bundle)
    assert refused.code == 1
    assert re.search(rf"{stage} +(image|text) fp32 +FAIL ", refused.out)
    assert refused.err.splitlines()[-1].startswith(f"dualmatch: parity of {bundle} is not shown: the ")


def test_verify_needs_samples_that_fit(small_bundle, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    reference = read_reference(bundle)
    damaged = [{"token_ids": one["token_ids"]} for one in reference.text_checks]
    replace(reference, text_checks=damaged).write(bundle)
    with pytest.raises(DualmatchError, match="does not fit"):
        read_reference(bundle)


# The commands and the report.


class Page(HTMLParser):
    """Its text, its links to anything outside, and the alternatives of its images."""

    def __init__(self, html):
        super().__init__()
        self.text, self.outside, self.images = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "link"):
            self.outside.append(tag)
        if tag == "img":
            self.images.append(given["alt"])
            assert given["src"].startswith("data:image/jpeg;base64,")
        self.outside += [
            value for name, value in attributes if name in ("src", "href") and "data:" not in (value or "")
        ]

    def handle_data(self, data):
        self.text += data


def test_the_report_names_and_shows_the_flipped(small_bundle, small_run, tmp_path):
    """A reference with two captions exchanged stands for a change that flips queries."""
    folder = shutil.copytree(small_bundle, tmp_path / "bundle")
    reference = read_reference(folder)
    captions = reference.captions.copy()
    captions[:20] = reference.captions[100:120]
    replace(reference, captions=captions).write(folder)
    seal(folder)
    page = tmp_path / "reports" / "gate.html"
    refused = dualmatch("runtime", "verify", folder, "--data", small_run.data, "--gate-report", page, "--json")
    assert refused.code == 1
    assert refused.json["verdict"] == "fail"
    flips = refused.json["flipped"]
    assert len(flips) == refused.json["comparison"]["flips"] >= 5
    shown = Page(page.read_text())
    assert shown.outside == []
    assert {flip["image"] for flip in flips[:60]} <= set(shown.images)
    for flip in flips:
        assert flip["query"] in shown.text
    for number in (refused.json["comparison"]["bound"], refused.json["comparison"]["before"]["rsum"]):
        assert f"{number:.2f}" in shown.text
    assert "FAIL: " in shown.text
    assert [path.name for path in page.parent.iterdir()] == ["gate.html"]


def test_the_report_escapes_what_it_shows(small_bundle, small_run, tmp_path):
    found = verify(load_bundle(small_bundle), small_run.dataset)
    flip = NamedFlip(
        direction="t2i", query="<script>alert(1)</script>", image=small_run.dataset.items[0].id,
        rank_before=1, rank_after=12, first_before="a&b", first_after="gone.png",
    )  # fmt: skip
    write_gate_report(replace(found, flips=(flip,)), tmp_path / "gate.html", title="<b>")
    html = (tmp_path / "gate.html").read_text()
    assert "<script" not in html
    assert "<h1><b>" not in html
    assert Page(html).images == [small_run.dataset.items[0].id]  # of the other two there is no photograph


def test_a_report_that_cannot_be_written_is_refused_before_the_work(small_run, out, tmp_path):
    for words in (("export", small_run.folder, "--out", out), ("runtime", "verify", tmp_path / "none")):
        refused = dualmatch(*words, "--gate-report", tmp_path / "gate.txt")
        assert refused.code == 1
        assert "one .html file" in refused.err
        (tmp_path / "file").write_text("a file in a folder's place")
        refused = dualmatch(*words, "--gate-report", tmp_path / "file" / "new" / "gate.html")
        assert refused.code == 1
        assert "file is a file, not a folder" in refused.err
        refused = dualmatch(*words, "--gate-report", "/proc/none/gate.html")
        assert refused.code == 1
        assert "the gate's report /proc/none/gate.html cannot be written" in refused.err
    assert nothing_left(out)


def test_a_bundle_that_cannot_be_written_is_refused_before_the_work(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("dualmatch.export.bundle.encode_images", None)
    (tmp_path / "file").write_text("a file in a folder's place")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, sentence in (
        (tmp_path / "link", "link is a link to nothing"),
        (tmp_path / "link" / "o", "link is a link to nothing, not a folder"),
        (tmp_path / "file" / "o", "file is a file, not a folder"),
        ("/proc/none/o", "the bundle /proc/none/o cannot be written"),
    ):
        refused = dualmatch("export", small_run.folder, "--out", out)
        assert refused.code == 1
        assert sentence in refused.err
    assert len(list(tmp_path.iterdir())) == 2


def test_export_refuses_with_a_report_and_no_bundle(small_run, exports_of, out, tmp_path):
    exports_of(a_transposed_weight)
    page = tmp_path / "gate.html"
    refused = dualmatch("export", small_run.folder, "--out", out, "--gate-report", page, "--json")
    assert refused.code == 1
    assert refused.json["verdict"] == "fail"
    assert [one["status"] for one in refused.json["stages"]][:5] == ["OK", "OK", "OK", "FAIL", "SKIPPED"]
    assert refused.json["reason"] in Page(page.read_text()).text
    assert nothing_left(out)


def test_tolerances_given_on_the_command_line_decide_and_are_recorded(small_run, exports_of, out):
    exports_of()
    words = ("export", small_run.folder, "--out", out, "--fp16")
    refused = dualmatch(*words, "--max-rsum-loss", 6, "--min-cosine", 1)
    assert refused.code == 1
    assert re.search(
        r"the worst cosine is .* below the floor of 1.0; a floor of 0\.99\d+ would have passed", refused.err
    )
    assert nothing_left(out)
    assert dualmatch(*words, "--max-rsum-loss", 6).code == 0
    assert load_bundle(out).manifest.parity["tolerances"] == {
        "rsum_loss": 6.0,
        "worst_cosine": 0.999,
        "component": None,
    }
    assert "smallest tolerances that would have passed: Rsum " in dualmatch("runtime", "verify", out, "--data", small_run.data).out  # fmt: skip


def test_float32_takes_no_tolerance_of_rsum(run):
    with pytest.raises(DualmatchError, match="fp32 must give torch's numbers within 1e-05 in every component"):
        tolerances_for(run, "fp32", max_rsum_loss=1.0)
    assert tolerances_for(run, "fp32", min_cosine=0.9).component == 1e-5
