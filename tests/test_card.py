"""The model card and the graphs' metadata: what a hub reads, what was measured, and no licence that nobody knows."""

import json
import shutil
from dataclasses import replace

import pytest

from dualmatch.export.card import model_card
from dualmatch.export.metadata import graph_metadata, origins
from dualmatch.runtime import load_bundle
from dualmatch.runtime.files import sha256_of_file
from dualmatch.training.recipe import ForeignRecipe, load_recipe

onnx = pytest.importorskip("onnx")


def front_matter(text):
    yaml = pytest.importorskip("yaml")
    start, matter, body = text.split("---\n", 2)
    assert not start
    return yaml.safe_load(matter), body


def test_the_card_of_a_bundle(small_bundle):
    manifest = load_bundle(small_bundle).manifest
    matter, body = front_matter((small_bundle / "README.md").read_text())
    assert matter["license"] == "other"
    assert matter["library_name"] == "dualmatch"
    assert "image-text-retrieval" in matter["tags"]
    assert matter["model-index"][0]["results"][0]["metrics"][0]["value"] == manifest.provenance["val_rsum"]
    after = manifest.parity["comparison"]["after"]
    assert f"| this bundle | {after['i2t']['r1']:.1f} |" in body
    protocol = manifest.parity["comparison"]["before"]["protocol"]
    assert f"images {protocol['images']}, captions {protocol['captions']}" in body
    for heading in ("Intended use", "Training data", "Recall before", "Limitations", "How to use", "Licence", "Files"):
        assert f"\n## {heading}" in body
    for name in ("image_encoder.onnx", "text_encoder.onnx", "tokenizer.json"):
        assert f"| `{name}` | `{sha256_of_file(small_bundle / name)}` |" in body
    assert manifest.provenance["checkpoint_sha256"] in body
    assert str(small_bundle.parent) not in body


def test_the_card_has_the_hash_of_the_graph_for_tensorrt(small_bundle, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    (bundle / "image_encoder.engine.onnx").write_bytes(b"the graph for TensorRT")
    manifest = load_bundle(small_bundle).manifest
    image = replace(manifest.encoders["image"], engine_file="image_encoder.engine.onnx")
    manifest = replace(manifest, encoders={**manifest.encoders, "image": image})
    body = front_matter(model_card(manifest, load_recipe("scenes-dsran-gru"), bundle))[1]
    files = ("image_encoder.onnx", "image_encoder.engine.onnx", "text_encoder.onnx", "tokenizer.json")
    assert [line for line in body.splitlines() if line.startswith("| `") and line.endswith("` |")] == [
        f"| `{name}` | `{sha256_of_file(bundle / name)}` |" for name in files
    ]


def test_a_hub_reads_the_card(small_bundle):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard((small_bundle / "README.md").read_text())
    assert card.data.license == "other"
    assert card.data.eval_results[0].metric_type == "rsum"


def variant(small_bundle, **changes):
    """The small bundle's manifest with another network's configuration or provenance."""
    manifest = load_bundle(small_bundle).manifest
    config = manifest.model["config"]
    for path, value in changes.items():
        if path == "provenance":
            manifest = replace(manifest, provenance={**manifest.provenance, **value})
        else:
            part, key = path.split("__")
            config = {**config, part: {**config[part], key: value}}
    return replace(manifest, model={**manifest.model, "config": config})


def test_licences_are_those_of_the_parts_and_unknown_ones_are_called_so(small_bundle):
    (own,) = origins(variant(small_bundle))
    assert own.part == "all weights"
    assert "not known to dualmatch" in own.licence, "these scenes lie in a folder like anybody's photographs"
    trunk, words, rest = origins(variant(small_bundle, trunk__name="resnet152", text__pretrained="minilm"))
    assert "non-commercial" in trunk.licence
    assert "not known" in trunk.licence
    assert words.licence.startswith("Apache-2.0")
    assert rest.part == "everything else"
    assert origins(variant(small_bundle, trunk__name="efficientnet-lite0"))[0].licence.startswith("Apache-2.0")
    scenes = {"data": {"name": "scenes", "layout": "scenes", "splits": ["train"]}}
    assert "no photographs" in origins(variant(small_bundle, provenance=scenes))[-1].licence
    (foreign,) = origins(variant(small_bundle, provenance={"vocabulary_sha256": "0" * 64}))
    assert "ask its authors" in foreign.licence


def test_the_card_of_an_authors_checkpoint(small_bundle):
    manifest = variant(small_bundle, provenance={"vocabulary_sha256": "0" * 64, "val_rsum": None})
    recipe = ForeignRecipe(name='odd "name": {yaml}', description="As published.")
    matter, body = front_matter(model_card(manifest, recipe, small_bundle))
    assert "model-index" not in matter
    assert "the checkpoint itself does not say" in body
    assert "may include pairs" in body
    manifest = variant(small_bundle, provenance={"vocabulary_sha256": "0" * 64, "val_rsum": 500.5})
    matter, _ = front_matter(model_card(manifest, recipe, small_bundle))
    assert matter["model-index"][0]["name"] == recipe.name


def test_the_card_names_the_training_data_and_what_was_pretrained(small_bundle):
    manifest = variant(small_bundle, trunk__name="resnet152")
    card = model_card(manifest, load_recipe("scenes-dsran-gru"), small_bundle, trained_on="my-photos")
    assert "Splits train of `my-photos`; the epoch was chosen on val." in card
    assert "Its image trunk resnet152 is pretrained" in card


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_a_graph_says_what_it_is(encoder, small_bundle):
    bundle = load_bundle(small_bundle)
    model = onnx.load(bundle.encoder_path(encoder))
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found == graph_metadata(bundle.manifest, encoder)
    assert model.producer_name == "dualmatch"
    assert model.producer_version == found["dualmatch.version"]
    assert found["dualmatch.encoder"] == encoder
    assert found["dualmatch.precision"] == bundle.manifest.encoders[encoder].precision
    assert found["dualmatch.pad_policy"] == bundle.manifest.pad_policy
    assert found["dualmatch.checkpoint_sha256"] == bundle.manifest.provenance["checkpoint_sha256"]
    assert found["dualmatch.licence"]
    if encoder == "image":
        assert json.loads(found["dualmatch.preprocessing"])["image_size"] == bundle.manifest.preprocessing.image_size
    else:
        assert json.loads(found["dualmatch.tokenizer"])["max_length"] == bundle.manifest.tokenizer.max_length


def test_onnxruntime_reads_the_metadata_without_onnx(small_bundle):
    import onnxruntime

    session = onnxruntime.InferenceSession(small_bundle / "image_encoder.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().producer_name == "dualmatch"
    assert session.get_modelmeta().custom_metadata_map["dualmatch.network"] == "dsran"
