"""Triton model repositories: their configurations parse with Triton's own protobuf and agree with the graphs, and the tokenizer's model
gives the ids that the runtime gives.

Triton itself does not run here: what stands in for it is its configuration's protobuf, and containers for its tensors.
"""

import importlib.util
import json
import shutil
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualmatch.export.triton import _text_format, write_triton_repository
from dualmatch.runtime import ImageEncoder, TextEncoder, load_bundle
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.tokenizer import CaptionTokenizer, TokenizerOptions

from .demo_fixture import dualmatch, edit_manifest, engine_record, one_sentence

MODELS = ["dualmatch_image", "dualmatch_text", "dualmatch_tokenizer", "dualmatch_caption"]


@pytest.fixture(scope="module")
def repository(small_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "models"
    assert write_triton_repository(load_bundle(small_bundle), out) == MODELS
    return out


def configuration(folder):
    """config.pbtxt by Triton's own protobuf, which refuses unknown fields, words that are no value, and texts for numbers."""
    protobuf = pytest.importorskip("google.protobuf.text_format")
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return protobuf.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())


def test_the_repository_holds_four_models_with_a_version_each(repository, small_bundle):
    there = sorted(path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file())
    assert there == [
        "dualmatch_caption/1/README",
        "dualmatch_caption/config.pbtxt",
        "dualmatch_image/1/model.onnx",
        "dualmatch_image/config.pbtxt",
        "dualmatch_text/1/model.onnx",
        "dualmatch_text/config.pbtxt",
        "dualmatch_tokenizer/1/model.py",
        "dualmatch_tokenizer/1/tokenizer.json",
        "dualmatch_tokenizer/config.pbtxt",
    ]
    assert (repository / "dualmatch_image/1/model.onnx").read_bytes() == (
        small_bundle / "image_encoder.onnx"
    ).read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_a_configuration_parses_and_is_named_like_its_folder(model, repository, small_bundle):
    config = configuration(repository / model)
    assert config.name == model
    assert config.max_batch_size == 64
    assert config.parameters["bundle_hash"].string_value == load_bundle(small_bundle).hash
    assert bool(config.backend) != bool(config.platform)


@pytest.mark.parametrize("model", MODELS[:2])
def test_names_types_and_dims_are_the_graphs(model, repository):
    """Read from the graph by onnxruntime, not from the manifest that the configuration was written from."""
    config = configuration(repository / model)
    assert config.backend == "onnxruntime"
    assert config.HasField("dynamic_batching")
    types_of = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
    from tritonclient.grpc.model_config_pb2 import DataType

    with open_session(repository / model / "1" / "model.onnx") as session:
        for told, specs in ((config.input, session.inputs), (config.output, session.outputs)):
            assert [tensor.name for tensor in told] == [spec.name for spec in specs]
            for tensor, spec in zip(told, specs, strict=True):
                assert DataType.Name(tensor.data_type) == types_of[spec.dtype]
                assert isinstance(spec.shape[0], str), "the batch axis, which Triton adds"
                assert list(tensor.dims) == [-1 if isinstance(axis, str) else axis for axis in spec.shape[1:]]


def test_the_ensembles_steps_fit_each_other(repository):
    """As Triton checks them: every step's tensors exist with the types and dims of the models, and lead from caption to embedding."""
    configs = {model: configuration(repository / model) for model in MODELS}
    ensemble = configs["dualmatch_caption"]
    known = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        assert step.model_version == -1
        assert set(step.input_map) == {tensor.name for tensor in model.input}
        assert set(step.output_map) == {tensor.name for tensor in model.output}
        assert model.max_batch_size >= ensemble.max_batch_size
        for tensor in model.input:
            assert known[step.input_map[tensor.name]] == (tensor.data_type, list(tensor.dims))
        known |= {step.output_map[tensor.name]: (tensor.data_type, list(tensor.dims)) for tensor in model.output}
    assert [known[tensor.name] for tensor in ensemble.output] == [(t.data_type, list(t.dims)) for t in ensemble.output]
    assert {tensor.name for tensor in ensemble.input} == {"caption"}


# The tokenizer's model as plain Python; only Triton's containers are stood in for.


class Tensor:
    def __init__(self, name, array):
        self.name_, self.array = name, array

    def as_numpy(self):
        return self.array


class TritonError:
    def __init__(self, message):
        self.text = message

    def message(self):
        return self.text


class InferenceResponse:
    def __init__(self, output_tensors, error=None):
        self.outputs, self.error = {tensor.name_: tensor.array for tensor in output_tensors}, error


class TritonModelException(Exception):  # noqa: N818  (Triton's name)
    pass


def tokenizer_model(folder):
    """`TritonPythonModel` as Triton's stub makes it: the file imported from its version's folder, the configuration as JSON."""
    from google.protobuf.json_format import MessageToJson

    utils = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.TritonError, utils.InferenceResponse = Tensor, TritonError, InferenceResponse
    utils.TritonModelException = TritonModelException
    utils.get_input_tensor_by_name = lambda request, name: request[name]
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_python_backend_utils"] = utils
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["triton_python_backend_utils"]
    model = module.TritonPythonModel()
    config = MessageToJson(configuration(folder), preserving_proto_field_name=True)
    model.initialize({"model_config": config, "model_name": folder.name, "model_version": "1"})
    return model


def request(*captions):
    return {
        "caption": Tensor("caption", np.array([[c.encode() if isinstance(c, str) else c] for c in captions], object))
    }


def test_captions_through_the_repositorys_two_steps_have_the_runtimes_embeddings(repository, small_bundle, small_run):
    """Tokenizer model, then text graph, as the ensemble runs them; padding to a multiple of eight costs nothing under `masked`."""
    captions = small_run.dataset.captions[:12]
    (response,) = tokenizer_model(repository / "dualmatch_tokenizer").execute([request(*captions)])
    assert response.error is None
    ids = response.outputs["token_ids"]
    assert ids.dtype == np.int64
    assert ids.shape[1] % 8 == 0
    with open_session(repository / "dualmatch_text" / "1" / "model.onnx") as session:
        got = session.run({"token_ids": ids})["text_embedding"]
    with TextEncoder(small_bundle) as encoder:
        np.testing.assert_allclose(got, encoder.encode(captions), rtol=0, atol=2e-6)


def test_one_bad_request_of_several_fails_alone(repository):
    model = tokenizer_model(repository / "dualmatch_tokenizer")
    good, empty, cut, other = model.execute(
        [request("a ball"), request("a ball", "  "), request(b"\xff\xfe"), request("a")]
    )
    assert good.error is None
    assert "is empty" in empty.error.message()
    assert "UTF-8" in cut.error.message()
    assert not empty.outputs
    assert other.outputs["token_ids"].shape[0] == 1


def test_a_changed_tokenizer_is_not_parsed(repository, tmp_path):
    folder = shutil.copytree(repository / "dualmatch_tokenizer", tmp_path / "dualmatch_tokenizer")
    (folder / "1" / "tokenizer.json").write_bytes((folder / "1" / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(TritonModelException, match="SHA-256"):
        tokenizer_model(folder)


OPTIONS = [
    {"max_length": 64},
    {"max_length": 5},
    {"max_length": 5, "keep_last_special": False},
    {"max_length": 0},
    {"max_length": 12, "fixed_length": 12},
]


@pytest.fixture(scope="module")
def tokenizers(repository, small_bundle):
    """The runtime's tokenizer and the repository's model, with the same options."""
    pairs = []
    for options in OPTIONS:
        model = tokenizer_model(repository / "dualmatch_tokenizer")
        ours = CaptionTokenizer(small_bundle / "tokenizer.json", TokenizerOptions(**options))
        model.max_length, model.fixed_length = ours.options.max_length, ours.options.fixed_length
        model.keep_last_special, model.pad_limit = ours.options.keep_last_special, ours.options.max_length
        pairs.append((ours, model))
    return pairs


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=5))
def test_any_captions_have_the_runtimes_ids(tokenizers, captions):
    for ours, model in tokenizers:
        (response,) = model.execute([request(*captions)])
        try:
            wanted = ours(captions)
        except DualmatchError:
            assert response.error is not None
            continue
        got = response.outputs["token_ids"]
        np.testing.assert_array_equal(got[:, : wanted.shape[1]], wanted)
        assert not got[:, wanted.shape[1] :].any()
        if ours.options.fixed_length:
            assert got.shape == wanted.shape
        if ours.options.max_length:
            assert got.shape[1] <= ours.options.max_length


def test_where_padding_counts_nothing_is_padded_further(small_bundle, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    edit_manifest(bundle, lambda values: values.update(pad_policy="authors"))
    write_triton_repository(load_bundle(bundle), tmp_path / "models")
    (response,) = tokenizer_model(tmp_path / "models" / "dualmatch_tokenizer").execute([request("a red ball")])
    wanted = CaptionTokenizer(bundle / "tokenizer.json", TokenizerOptions())(["a red ball"])
    np.testing.assert_array_equal(response.outputs["token_ids"], wanted)


# Engines.


def with_engines(bundle, flavour="tensorrt", profiles=(("latency", 1, 1), ("throughput", 1, 48)), longest=20):
    """A bundle that lists engines, as compiling leaves it; their bytes are nobody's business here."""
    from dualmatch.runtime.bundle import file_entry

    (bundle / "engines").mkdir(exist_ok=True)
    engines, files = [], {}
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in ("image", "text"):
        entry = manifest["encoders"][name]
        file = f"engines/{name}_encoder.{flavour}.engine"
        (bundle / file).write_bytes(f"plan of {name}".encode())
        spec = entry["inputs"][0]

        def shape(batch, length, spec=spec):
            return [{"batch": batch, "length": length}.get(axis, axis) for axis in spec["shape"]]

        made = [
            {
                "name": n,
                "shapes": {spec["name"]: {"min": shape(low, 1), "opt": shape(high, 8), "max": shape(high, longest)}},
            }
            for n, low, high in profiles
        ]
        graph = manifest["files"][entry["file"]]["sha256"]
        engines.append(engine_record(flavour=flavour, file=file, onnx_sha256=graph, profiles=made))
        files[file] = vars(file_entry(bundle / file))
    edit_manifest(bundle, lambda values: values.update(engines=engines, files=values["files"] | files))
    return load_bundle(bundle)


def test_engines_are_served_with_the_profile_that_takes_batches(small_bundle, tmp_path):
    bundle = with_engines(shutil.copytree(small_bundle, tmp_path / "bundle"))
    write_triton_repository(bundle, tmp_path / "models", engines="tensorrt", name="fast")
    for encoder in ("image", "text"):
        config = configuration(tmp_path / "models" / f"fast_{encoder}")
        assert config.platform == "tensorrt_plan"
        assert config.max_batch_size == 48, "the profile's, below the 64 that were asked for"
        assert list(config.instance_group[0].profile) == ["1"]
        plan = (tmp_path / "models" / f"fast_{encoder}" / "1" / "model.plan").read_bytes()
        assert plan == f"plan of {encoder}".encode()
    assert configuration(tmp_path / "models" / "fast_caption").max_batch_size == 48
    model = tokenizer_model(tmp_path / "models" / "fast_tokenizer")
    for words in range(1, 19):
        (response,) = model.execute([request("a " * words)])
        assert response.outputs["token_ids"].shape[1] <= 20, "the engine's longest caption"


def test_engines_that_triton_could_not_load(small_bundle, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    with pytest.raises(DualmatchError, match="no tensorrt engine of its image encoder"):
        write_triton_repository(load_bundle(bundle), tmp_path / "models", engines="tensorrt")
    opened = with_engines(bundle, flavour="tensorrt-rtx")
    with pytest.raises(DualmatchError, match="'tensorrt-rtx'"):
        write_triton_repository(opened, tmp_path / "models", engines="tensorrt-rtx")
    opened = with_engines(bundle, profiles=(("8:16:32", 8, 32),))
    with pytest.raises(DualmatchError, match="takes a batch of 1"):
        write_triton_repository(opened, tmp_path / "models", engines="tensorrt")
    assert not (tmp_path / "models").exists()


# The folder.


def test_models_of_others_stay_and_ours_are_not_overwritten(small_bundle, tmp_path):
    out = tmp_path / "models"
    (out / "resnet" / "1").mkdir(parents=True)
    bundle = load_bundle(small_bundle)
    write_triton_repository(bundle, out, name="a")
    write_triton_repository(bundle, out, name="b")
    assert {path.name for path in out.iterdir()} == {"resnet", *(f"{n}{m[9:]}" for n in "ab" for m in MODELS)}
    with pytest.raises(DualmatchError, match="has a model a_image already"):
        write_triton_repository(bundle, out, name="a")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_is_left_of_a_repository_that_could_not_be_written(small_bundle, tmp_path, monkeypatch):
    from pathlib import Path

    rename, calls = Path.rename, []

    def fail(self, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        write_triton_repository(load_bundle(small_bundle), tmp_path / "models")
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "x" * 101])
def test_names_that_are_no_folder(name, small_bundle, tmp_path):
    with pytest.raises(DualmatchError, match="cannot name models"):
        write_triton_repository(load_bundle(small_bundle), tmp_path / "models", name=name)


def test_texts_in_a_configuration_are_quoted():
    protobuf = pytest.importorskip("google.protobuf.text_format")
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text = 'a "quoted" \\ back\nslash'
    assert protobuf.Parse(_text_format({"name": text}), messages.ModelConfig()).name == text


def test_from_the_command_line(small_bundle, small_run, tmp_path):
    done = dualmatch(
        "triton", small_bundle, "--out", tmp_path / "models", "--max-batch", 7, "--queue-delay-us", 0, "--json"
    )
    assert done.code == 0, done.err
    assert done.json["models"] == MODELS
    config = configuration(tmp_path / "models" / "dualmatch_text")
    assert config.max_batch_size == 7
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    shutil.copytree(small_bundle, tmp_path / "bundle")
    for words, sentence in (
        (("triton", small_bundle, "--out", tmp_path / "models"), "has a model dualmatch_image already"),
        (("triton", small_run.folder, "--out", tmp_path / "m"), "is a training run, not a bundle"),
        (("triton", small_bundle, "--out", tmp_path / "bundle"), "is a bundle; give the model repository a folder"),
        (("triton", small_bundle, "--out", small_bundle / "README.md"), "is a file"),
        (("triton", tmp_path / "none", "--out", tmp_path / "m"), "there is no bundle"),
    ):
        done = dualmatch(*words)
        assert done.code == 1
        assert one_sentence(done.err)
        assert sentence in done.err


def test_a_repository_that_is_a_link_to_nothing_is_refused_before_any_work(small_bundle, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "dualmatch_text").symlink_to(tmp_path / "nowhere")
    for out, sentence in (("link", "link is a link to nothing"), ("models", "has a model dualmatch_text already")):
        with pytest.raises(DualmatchError, match=sentence):
            write_triton_repository(load_bundle(small_bundle), tmp_path / out)
    assert len(list(tmp_path.iterdir())) == 2


def test_export_refuses_a_repository_that_holds_such_models_before_it_exports(small_run, repository, tmp_path):
    done = dualmatch("export", small_run.folder, "--out", tmp_path / "b", "--triton", repository)
    assert done.code == 1
    assert "has a model dualmatch_image already" in done.err
    assert not (tmp_path / "b").exists()


def test_photographs_a_client_prepares_give_the_runtimes_embeddings(repository, small_bundle, small_run):
    """The client's step that docs/serving.md describes."""
    photo = small_run.dataset.items[0].read_bytes()
    pixels = load_bundle(small_bundle).manifest.preprocessing(photo)
    with open_session(repository / "dualmatch_image" / "1" / "model.onnx") as session:
        got = session.run({"pixels": pixels[None]})["image_embedding"]
    with ImageEncoder(small_bundle) as encoder:
        np.testing.assert_allclose(got, encoder.encode([photo]), rtol=0, atol=1e-6)
