"""Bundles: read whole or refused with one sentence, whatever happened to a file or to the manifest."""

import copy
import json
import shutil

import pytest

from dualmatch.runtime import load_bundle
from dualmatch.runtime.bundle import FORMAT, MANIFEST, MAX_MANIFEST_BYTES, VERSION, file_entry
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes

from .demo_fixture import edit_manifest, seal

FILES = ["image_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "parity.safetensors", "parity.json", "README.md"]


@pytest.fixture
def bundle(small_bundle, tmp_path):
    """A copy to damage."""
    return shutil.copytree(small_bundle, tmp_path / "bundle")


def refusal(bundle):
    with pytest.raises(DualmatchError) as found:
        load_bundle(bundle)
    text = str(found.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert str(bundle) in text
    return text


def test_a_bundle_lists_every_file_with_its_hash_and_size(small_bundle):
    bundle = load_bundle(small_bundle)
    there = {path.relative_to(small_bundle).as_posix() for path in small_bundle.rglob("*") if path.is_file()}
    assert there == {*bundle.manifest.files, MANIFEST}
    assert set(FILES) == set(bundle.manifest.files)
    for name, entry in bundle.manifest.files.items():
        assert file_entry(small_bundle / name) == entry


def test_the_manifest_survives_writing_and_reading(bundle):
    first = load_bundle(bundle)
    (bundle / MANIFEST).write_text(first.manifest.to_json())
    second = load_bundle(bundle)
    assert second.manifest == first.manifest
    assert second.hash == first.hash
    assert second.manifest.to_json() == first.manifest.to_json()
    assert second.manifest.encoders["image"].inputs[0].shape == ("batch", 3, 32, 32)
    assert second.manifest.encoders["text"].inputs[0].shape == ("batch", "length")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_byte(name, where, bundle):
    data = bytearray((bundle / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (bundle / name).write_bytes(data)
    text = refusal(bundle)
    assert name in text
    assert "SHA-256" in text


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_or_grown_or_gone(name, bundle):
    data = (bundle / name).read_bytes()
    for other in (data[:-1], data + b"\0", b""):
        (bundle / name).write_bytes(other)
        text = refusal(bundle)
        assert name in text
        assert f"{len(other)} bytes" in text
    (bundle / name).unlink()
    assert f"lacks {name}" in refusal(bundle)
    (bundle / name).mkdir()
    assert f"lacks {name}" in refusal(bundle)


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_needed_file_that_is_not_listed(name, bundle):
    edit_manifest(bundle, lambda values: values["files"].pop(name))
    assert f"does not list {name}" in refusal(bundle)


def test_a_graph_that_is_there_but_not_listed_is_not_used(bundle):
    """Its hash was never checked."""
    shutil.copy(bundle / "image_encoder.onnx", bundle / "other.onnx")
    edit_manifest(bundle, lambda values: values["encoders"]["image"].update(file="other.onnx"))
    assert "does not list other.onnx" in refusal(bundle)


@pytest.mark.parametrize("name", ["../outside", "engines/../../outside", "/etc/hostname", "", ".", "a\0b"])
def test_a_path_out_of_the_bundle(name, bundle):
    outside = bundle.parent / "outside"
    outside.write_bytes(b"x")
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit_manifest(bundle, lambda values: values["files"].update({name: entry}))
    assert "outside it" in refusal(bundle)


def test_a_link_out_of_the_bundle(bundle):
    shutil.move(bundle / "tokenizer.json", bundle.parent / "elsewhere.json")
    (bundle / "tokenizer.json").symlink_to(bundle.parent / "elsewhere.json")
    assert "outside it" in refusal(bundle)


def test_a_linked_folder_out_of_the_bundle(bundle):
    (bundle.parent / "elsewhere").mkdir()
    (bundle.parent / "elsewhere" / "a.engine").write_bytes(b"x")
    (bundle / "engines").symlink_to(bundle.parent / "elsewhere")
    entry = vars(file_entry(bundle.parent / "elsewhere" / "a.engine"))
    edit_manifest(bundle, lambda values: values["files"].update({"engines/a.engine": entry}))
    assert "outside it" in refusal(bundle)


def test_a_link_to_the_bundle_itself_is_fine(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert load_bundle(tmp_path / "link").hash == load_bundle(bundle).hash


@pytest.mark.parametrize("version", [0, VERSION + 1, "1", None])
def test_another_version(version, bundle):
    edit_manifest(bundle, lambda values: values.update(version=version))
    assert f"reads version {VERSION}" in refusal(bundle)


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "{}", json.dumps({"format": "other", "version": 1})])
def test_json_that_is_no_manifest(text, bundle):
    (bundle / MANIFEST).write_text(text)
    assert "is not the manifest" in refusal(bundle)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": ' + b"1" * 5000 + b"}", b'{"format": NaN,,}'],
    ids=["empty", "cut", "not utf-8", "deep", "long number", "garbage"],
)
def test_what_is_not_json(data, bundle):
    (bundle / MANIFEST).write_bytes(data)
    assert "is not valid JSON" in refusal(bundle)


def test_a_huge_manifest_is_not_read(bundle):
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    assert "larger than" in refusal(bundle)


def test_no_bundle(bundle, tmp_path):
    (bundle / MANIFEST).unlink()
    assert "has no manifest.json" in refusal(bundle)
    assert "there is no bundle" in refusal(tmp_path / "nowhere")
    assert "there is no bundle" in refusal(bundle / "tokenizer.json")


def test_an_unknown_key_is_not_overlooked(bundle):
    edit_manifest(bundle, lambda values: values.update(pad_polcy="masked"))
    assert "pad_polcy" in refusal(bundle)


@pytest.mark.parametrize("encoders", [["image"], ["image", "text", "sound"], []])
def test_other_encoders(encoders, bundle):
    edit_manifest(bundle, lambda values: values.update(encoders=dict.fromkeys(encoders, values["encoders"]["image"])))
    assert "must describe the encoders image and text" in refusal(bundle)


def places(value, path=()):
    """The paths of all values in the manifest, outermost first; free-form parts as one."""
    yield path
    free = path in {("model",), ("provenance",), ("parity",)}
    if isinstance(value, dict) and not free:
        for key, one in value.items():
            yield from places(one, (*path, key))
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from places(one, (*path, index))


OPTIONAL = {("caption_batch",), ("engines",), ("files", "README.md"), ("preprocessing", "interpolation"),
            ("tokenizer", "max_length"), ("tokenizer", "fixed_length"), ("tokenizer", "keep_last_special")}  # fmt: skip


def spoilt(good):
    """(what was done, the manifest after it): every key left out, every value replaced by ones of other types."""
    for path in places(good):
        for replacement in (None, "text", 1.5, [], {"a": 1}, "missing") if path else ():
            values = copy.deepcopy(good)
            inner = values
            for key in path[:-1]:
                inner = inner[key]
            if replacement == "missing":
                if isinstance(inner, dict) and path not in OPTIONAL:
                    del inner[path[-1]]
                    yield (path, replacement), values
            # In a shape a text is fine: the name of a dynamic axis.
            elif type(replacement) is not type(inner[path[-1]]) and not (replacement == "text" and "shape" in path):
                inner[path[-1]] = replacement
                yield (path, replacement), values


def test_every_value_of_another_type_and_every_missing_key_is_one_sentence(bundle):
    good = json.loads((bundle / MANIFEST).read_text())
    assert good["format"] == FORMAT
    cases = list(spoilt(good))
    assert len(cases) > 200
    accepted = []
    for done, values in cases:
        (bundle / MANIFEST).write_text(json.dumps(values))
        try:
            load_bundle(bundle)
        except DualmatchError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            accepted.append(done)
    assert not accepted


def test_compiling_an_engine_leaves_the_bundles_hash(bundle):
    before = load_bundle(bundle)
    (bundle / "engines").mkdir()
    (bundle / "engines" / "image.engine").write_bytes(b"plan")
    entry = vars(file_entry(bundle / "engines" / "image.engine"))
    edit_manifest(
        bundle,
        lambda values: values.update(
            engines=[{"flavour": "tensorrt", "file": "engines/image.engine"}],
            files=values["files"] | {"engines/image.engine": entry},
        ),
    )
    after = load_bundle(bundle)
    assert after.manifest.engines
    assert after.hash == before.hash


@pytest.mark.parametrize("name", ["image_encoder.onnx", "tokenizer.json", "parity.json"])
def test_any_other_file_changes_the_bundles_hash(name, bundle):
    before = load_bundle(bundle).hash
    (bundle / name).write_bytes((bundle / name).read_bytes() + b" ")
    seal(bundle)
    assert load_bundle(bundle).hash != before


def test_what_decides_about_vectors_changes_the_bundles_hash(bundle):
    hashes = {load_bundle(bundle).hash}
    for change in (
        lambda values: values["preprocessing"].update(resize="crop"),
        lambda values: values.update(pad_policy="authors"),
        lambda values: values["tokenizer"].update(max_length=9),
    ):
        edit_manifest(bundle, change)
        hashes.add(load_bundle(bundle).hash)
    assert len(hashes) == 4


def test_the_hash_does_not_depend_on_where_the_bundle_lies_or_how_the_json_is_laid_out(bundle, small_bundle):
    edit_manifest(bundle, lambda values: None)
    assert load_bundle(bundle).hash == load_bundle(small_bundle).hash


def test_an_option_that_the_manifest_does_not_name_takes_no_part_in_the_hash(bundle):
    """Else every option that a later release adds would make every gallery foreign to its bundle."""
    edit_manifest(bundle, lambda values: values.pop("caption_batch"))
    values = json.loads((bundle / MANIFEST).read_text())
    del values["engines"]
    assert load_bundle(bundle).manifest.caption_batch == 128
    assert load_bundle(bundle).hash == sha256_of_bytes(json.dumps(values, sort_keys=True).encode())
