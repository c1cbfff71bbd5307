"""Export and its gate: what a bundle holds, and that a damaged graph leaves nothing behind, wherever the damage is."""

import json
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx
from onnx import helper, numpy_helper

from dualmatch.export import bundle as export
from dualmatch.export.bundle import export_run
from dualmatch.export.gate import GateRefusedError
from dualmatch.runtime import load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_file
from dualmatch.runtime.parity import Tolerances
from dualmatch.runtime.reference import read_reference
from dualmatch.training.checkpoint import load_run

from .demo_fixture import dualmatch, one_sentence

# What the small run's dozens of images can show.
WIDE = Tolerances(rsum_loss=50.0, worst_cosine=0.99)


@pytest.fixture
def run(small_run):
    return load_run(small_run.folder)


@pytest.fixture
def exports_of(monkeypatch, small_bundle):
    """`exports_of(change)`: from now on torch's exporter gives the small bundle's graphs after `change(model)`.

    Tracing takes seconds and is tested elsewhere; everything after it is the real thing.
    """

    def plant(change=lambda model: None):
        def export_encoder(encoder, examples, path, *, output):
            model = onnx.load(small_bundle / path.name)
            assert [value.name for value in model.graph.output] == [output]
            change(model)
            onnx.save(model, path)
            return model

        monkeypatch.setattr(export, "export_encoder", export_encoder)

    return plant


@pytest.fixture
def out(tmp_path):
    """Where to export to; afterwards nothing may lie there or beside it unless the test says so."""
    return tmp_path / "place" / "bundle"


def nothing_left(out):
    return not out.parent.exists() or not list(out.parent.iterdir())


def changed_weight(model, change):
    """Change the largest convolution, or the GRU's largest weight: what every input passes through."""
    weights = [weight for weight in model.graph.initializer if len(weight.dims) in (3, 4)]
    weight = max(weights, key=lambda one: np.prod(one.dims))
    values = np.ascontiguousarray(change(numpy_helper.to_array(weight).copy()), dtype=np.float32)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


def turned_round(model):
    changed_weight(model, lambda values: values[..., ::-1])


def perturbed(model):
    def shift(values):
        values[0, 0] += 0.1
        return values

    changed_weight(model, shift)


def only_in(file, change):
    """`change`, for one of the two graphs."""

    def chosen(model):
        is_text = model.graph.input[0].name == "token_ids"
        if is_text == (file == "text"):
            change(model)

    return chosen


def through_large_numbers(model):
    """Scale the pixels up by a million and down again: the same embeddings, but not in float16."""
    graph = model.graph
    name = graph.input[0].name
    if name != "pixels":
        return
    for node in graph.node:
        node.input[:] = ["restored" if one == name else one for one in node.input]
    for scale, values in (("up", 1e3), ("down", 1e-3)):
        graph.initializer.append(numpy_helper.from_array(np.float32(values), scale))
    chain = [
        ("up", name, "large"),
        ("up", "large", "larger"),
        ("down", "larger", "smaller"),
        ("down", "smaller", "restored"),
    ]
    nodes = [helper.make_node("Mul", [source, scale], [target]) for scale, source, target in chain]
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])


def test_what_a_bundle_holds(small_bundle, small_run, run):
    bundle = load_bundle(small_bundle)
    manifest = bundle.manifest
    assert manifest.embedding_dimension == 16
    assert manifest.preprocessing == run.preprocess
    assert manifest.tokenizer == run.tokenizer.options
    assert manifest.pad_policy == "masked"
    assert manifest.provenance["checkpoint_sha256"] == sha256_of_file(small_run.folder / "best.safetensors")
    assert manifest.provenance["data"]["splits"] == ["train", "val", "test"]
    assert {entry.precision for entry in manifest.encoders.values()} == {"fp32"}
    for entry in manifest.encoders.values():
        assert 0 < entry.measured <= entry.tolerance == 1e-5
        graph = onnx.load(small_bundle / entry.file).graph
        assert [spec.name for spec in entry.inputs] == [value.name for value in graph.input]
        assert entry.outputs[0].shape == ("batch", 16)
    assert (small_bundle / "tokenizer.json").read_bytes() == run.tokenizer_path.read_bytes()
    assert manifest.parity["verdict"] == "pass"
    assert manifest.parity["comparison"]["before"]["protocol"]["images"] == 52
    card = (small_bundle / "README.md").read_text()
    assert f"{manifest.parity['comparison']['after']['rsum']:.1f}" in card
    assert "includes the pairs that the network was trained on" in card


def test_the_reference_in_a_bundle_is_torchs(small_bundle, small_run, run):
    from dualmatch.training.encode import encode_captions, encode_images

    reference, dataset = read_reference(small_bundle), small_run.dataset
    np.testing.assert_array_equal(reference.images, encode_images(run.model, run.preprocess, dataset.items))
    np.testing.assert_array_equal(reference.captions, encode_captions(run.model, run.tokenizer, dataset.captions))
    assert reference.image_ids == [item.id for item in dataset.items]
    assert reference.image_hashes == [sha256_of_file(item.path) for item in dataset.items]
    assert reference.texts == dataset.captions
    assert reference.caption_image.tolist() == dataset.caption_image
    assert reference.data is None
    for name in ("image", "text"):
        assert len(reference.samples[name]["embedding"]) == export.NUM_SAMPLES


def test_a_bundle_names_no_folder_of_the_machine_that_made_it(small_bundle, small_run):
    for path in small_bundle.iterdir():
        data = path.read_bytes()
        for folder in (small_bundle.parent, small_run.folder.parent):
            assert str(folder).encode() not in data, path.name


def test_the_checks_are_on_shapes_other_than_the_traced_one(run, small_run):
    for checks in (export._image_checks(run, small_run.dataset, None), export._text_checks(run, small_run.dataset)):
        traced = {name: value.shape for name, value in export._traced(checks).items()}
        shapes = [{name: value.shape for name, value in batch.items()} for batch in checks]
        assert traced not in shapes
        assert {next(iter(shape.values()))[0] for shape in shapes} == {1, 2, 7}
    lengths = {batch["token_ids"].shape[1] for batch in checks}
    assert lengths == {1, 2, 5, 17, 40}
    assert any((batch["token_ids"] == 0).any() for batch in checks), "no padding was checked"


@pytest.mark.parametrize(("damage", "file"), [(turned_round, "image"), (perturbed, "text")])
def test_a_damaged_weight_is_refused(damage, file, run, small_run, exports_of, out):
    exports_of(only_in(file, damage))
    with pytest.raises(
        DualmatchError, match=rf"{file}_encoder\.onnx at fp32 differs from torch by .* would have passed"
    ):
        export_run(run, small_run.dataset, out)
    assert nothing_left(out)


@pytest.mark.parametrize(("precision", "unverified"), [("fp32", False), ("fp16", True)])
def test_the_gate_alone_refuses_it_too(precision, unverified, run, small_run, exports_of, out, monkeypatch):
    """With the first check out of the way: damage that its few inputs do not show must fail on retrieval."""
    exports_of(only_in("text", turned_round))
    monkeypatch.setitem(export.COMPONENT_TOLERANCE, precision, 10.0)
    monkeypatch.setitem(export.COMPONENT_TOLERANCE, "fp32", 10.0)
    with pytest.raises(GateRefusedError, match="gate refused the export: the worst cosine is") as found:
        export_run(run, small_run.dataset, out, precision=precision, unverified=unverified)
    assert found.value.verification.decision.verdict == "fail"
    assert found.value.verification.comparison is not None
    assert nothing_left(out)


def test_another_tokenizer_is_refused(run, small_run, exports_of, out, monkeypatch, tmp_path):
    """The graphs are right; what feeds them is not."""
    exports_of()
    other = json.loads(run.tokenizer_path.read_text())
    words = other["model"]["vocab"]
    ordinary = sorted(word for word in words if words[word] > 3)
    other["model"]["vocab"] |= {word: words[ordinary[i - 1]] for i, word in enumerate(ordinary)}
    folder = shutil.copytree(small_run.folder, tmp_path / "run")
    changed = load_run(folder)
    (folder / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(GateRefusedError):
        export_run(changed, small_run.dataset, out)
    assert nothing_left(out)


def test_fp16_is_exported_and_recorded(run, small_run, exports_of, out):
    exports_of()
    result = export_run(run, small_run.dataset, out, precision="fp16", tolerances=WIDE)
    manifest = load_bundle(out).manifest
    assert {entry.precision for entry in manifest.encoders.values()} == {"fp16"}
    for entry in manifest.encoders.values():
        assert 1e-6 < entry.measured <= entry.tolerance
        elements = {weight.data_type for weight in onnx.load(out / entry.file).graph.initializer}
        assert onnx.TensorProto.FLOAT16 in elements
        assert {spec.dtype for spec in (*entry.inputs, *entry.outputs)} <= {"float32", "int64"}
    assert manifest.parity["tolerances"]["rsum_loss"] == 50.0
    assert (
        manifest.parity["largest_magnitudes"]["image"][0]["largest"]
        == result.verification.magnitudes["image"][0].largest
        > 0
    )
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_an_overflow_in_float16_is_refused(run, small_run, exports_of, out):
    exports_of(through_large_numbers)
    with pytest.raises(DualmatchError, match=r"float16 would overflow: tensor 'larger' \(Mul\) reaches .* --fp32"):
        export_run(run, small_run.dataset, out, precision="fp16", tolerances=WIDE, unverified=True)
    assert nothing_left(out)


def test_the_same_graph_passes_at_fp32(run, small_run, exports_of, out):
    exports_of(through_large_numbers)
    export_run(run, small_run.dataset, out)
    assert load_bundle(out).manifest.parity["verdict"] == "pass"


def test_what_is_there_already_is_kept(run, small_run, exports_of, out):
    exports_of()
    out.mkdir(parents=True)
    (out / "precious").write_text("keep me")
    with pytest.raises(DualmatchError, match="exists already"):
        export_run(run, small_run.dataset, out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_a_failure_half_way_leaves_nothing(run, small_run, exports_of, out, monkeypatch):
    exports_of()

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, small_run.dataset, out)
    assert nothing_left(out)


def test_exporting_twice_gives_the_same_bundle(run, small_run, exports_of, out, small_bundle):
    exports_of()
    export_run(run, small_run.dataset, out)
    assert load_bundle(out).hash == load_bundle(small_bundle).hash


# The command.


def test_the_command_exports(small_run, exports_of, out):
    exports_of()
    done = dualmatch("export", small_run.folder, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["verdict"] == "pass"
    assert done.json["hash"] == load_bundle(out).hash


def test_too_few_pairs_are_refused_unless_unverified(small_run, exports_of, out):
    exports_of()
    refused = dualmatch("export", small_run.folder, "--out", out, "--fp16")
    assert refused.code == 1
    assert "TOO FEW PAIRS" in refused.err
    said = refused.err.splitlines()[-1]
    assert said.startswith("dualmatch: the fp16 gate refused the export: ")
    # Nothing flipped: the rule of three, 300 / 0.5.
    (needed,) = re.findall(r"about (\d+) images with captions are needed .*--unverified", said)
    assert int(needed) == pytest.approx(600, rel=0.05)
    assert "Traceback" not in refused.err
    assert nothing_left(out)
    assert dualmatch("export", small_run.folder, "--out", out, "--fp16", "--unverified").code == 0
    assert load_bundle(out).manifest.parity["verdict"] == "too few pairs"
    assert "too few pairs" in (out / "README.md").read_text()


def test_the_command_refuses_a_damaged_export_in_one_sentence(small_run, exports_of, out):
    exports_of(perturbed)
    refused = dualmatch("export", small_run.folder, "--out", out)
    assert refused.code == 1
    assert refused.err.splitlines()[-1].startswith("dualmatch: image_encoder.onnx at fp32 differs from torch by ")
    assert nothing_left(out)


def test_a_checkpoint_of_another_network(small_run, out, tmp_path):
    folder = shutil.copytree(small_run.folder, tmp_path / "run")
    values = json.loads((folder / "run.json").read_text())
    values["recipe"]["model"]["embed_dim"] = 32
    (folder / "run.json").write_text(json.dumps(values))
    refused = dualmatch("export", folder, "--out", out)
    assert refused.code == 1
    assert one_sentence(refused.err)
    assert "belongs to another network" in refused.err
    assert nothing_left(out)


def test_a_checkpoint_that_was_cut(small_run, out, tmp_path):
    folder = shutil.copytree(small_run.folder, tmp_path / "run")
    data = (folder / "best.safetensors").read_bytes()
    (folder / "best.safetensors").write_bytes(data[: len(data) // 2])
    refused = dualmatch("export", folder, "--out", out)
    assert refused.code == 1
    assert one_sentence(refused.err)
    assert "is damaged" in refused.err
    assert nothing_left(out)
