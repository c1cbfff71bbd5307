"""Bundles: read whole or refused with one sentence, whatever happened to a file or to the manifest."""

import copy
import json
import shutil
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualmatch.runtime import load_bundle
from dualmatch.runtime.bundle import FORMAT, MANIFEST, MAX_MANIFEST_BYTES, VERSION, file_entry, write_manifest
from dualmatch.runtime.encoders import TextEncoder
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes, strict_json
from dualmatch.runtime.reference import read_reference

from .demo_fixture import edit_manifest, engine_record, seal

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


@pytest.mark.parametrize(
    "name",
    [
        "a/../b",
        "./a",
        "a//b",
        "a\\b",
        "C:a",
        "a:b",
        "a b",
        "-a",
        ".hidden",
        "a/.b",
        "a\n",
        "ä",
        "a/b/c/d/e",
        "x" * 300 + "\0",
    ],
)
def test_a_name_that_some_file_system_reads_in_another_way(name, bundle):
    edit_manifest(bundle, lambda values: values["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert "no plain file name" in refusal(bundle)


@pytest.mark.parametrize("name", ["README.MD", "Tokenizer.json"])
def test_names_that_some_disks_take_for_one(name, bundle):
    edit_manifest(bundle, lambda values: values["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert "take for one" in refusal(bundle)


@pytest.mark.parametrize("name", [MANIFEST, "manifest.sig"])
def test_a_manifest_that_lists_itself(name, bundle):
    edit_manifest(bundle, lambda values: values["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert "lists its own manifest" in refusal(bundle)


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


@pytest.mark.parametrize("version", [0, VERSION + 1, "1", True, 1.0, None])
def test_another_version(version, bundle):
    edit_manifest(bundle, lambda values: values.update(version=version))
    assert f"has format version {version!r}; this dualmatch reads version {VERSION}" in refusal(bundle)


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "{}", json.dumps({"format": "other", "version": 1})])
def test_json_that_is_no_manifest(text, bundle):
    (bundle / MANIFEST).write_text(text)
    assert "is not the manifest" in refusal(bundle)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[" * 80 + b"]" * 80,
        b'{"a":' * 70 + b"1" + b"}" * 70,
        b'{"format": ' + b"1" * 5000 + b"}",
        b'{"format": 9223372036854775808}',
        b'{"format": 1e999}',
        b'{"format": NaN}',
        b'{"format": -Infinity}',
        b'{"format": "dualmatch-bundle", "version": 1, "format": "x"}',
        b'{"format": NaN,,}',
        b"\xef\xbb\xbf{}",
    ],
    ids=[
        "empty",
        "cut",
        "not utf-8",
        "deep",
        "balanced",
        "deep objects",
        "long number",
        "65 bits",
        "overflow",
        "NaN",
        "infinity",
        "key twice",
        "garbage",
        "byte order mark",
    ],
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
            *((("encoders", name, key)) for name in ("image", "text") for key in ("engine_file", "quantisation")),
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


@pytest.fixture(scope="module")
def fuzzed(small_bundle, tmp_path_factory):
    return shutil.copytree(small_bundle, tmp_path_factory.mktemp("fuzzed") / "bundle")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_manifest_with_any_bytes_changed_opens_or_is_one_sentence(fuzzed, small_bundle, data):
    raw = bytearray((small_bundle / MANIFEST).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 6))] = data.draw(
            st.binary(max_size=6) | st.sampled_from([b"-1", b"1e9", b"null", b'"', b"{", b"[]", b"NaN"])
        )
    (fuzzed / MANIFEST).write_bytes(raw)
    try:
        load_bundle(fuzzed)
    except DualmatchError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_compiling_an_engine_leaves_the_bundles_hash(bundle):
    before = load_bundle(bundle)
    (bundle / "engines").mkdir()
    (bundle / "engines" / "image.engine").write_bytes(b"plan")
    entry = vars(file_entry(bundle / "engines" / "image.engine"))
    edit_manifest(
        bundle,
        lambda values: values.update(
            engines=[engine_record(file="engines/image.engine")],
            files=values["files"] | {"engines/image.engine": entry},
        ),
    )
    after = load_bundle(bundle)
    assert after.manifest.engines
    assert after.hash == before.hash


@pytest.mark.parametrize("name", ["image_encoder.onnx", "tokenizer.json", "parity.json"])
def test_any_other_file_changes_the_bundles_hash(name, bundle):
    before = load_bundle(bundle).hash
    # For a graph an empty doc_string, which it may have as often as it likes.
    (bundle / name).write_bytes((bundle / name).read_bytes() + (b"\x32\0" if name.endswith(".onnx") else b" "))
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


def test_rewriting_an_older_bundles_manifest_leaves_its_hash(bundle):
    """As compiling does; the galleries that name the hash would be lost."""
    for name in ("image", "text"):
        for newer in ("engine_file", "quantisation"):
            edit_manifest(bundle, lambda values, name=name, newer=newer: values["encoders"][name].pop(newer, None))
    first = load_bundle(bundle)
    write_manifest(bundle, first.manifest)
    assert load_bundle(bundle).hash == first.hash


def test_an_option_that_the_manifest_does_not_name_takes_no_part_in_the_hash(bundle):
    """Else every option that a later release adds would make every gallery foreign to its bundle."""
    edit_manifest(bundle, lambda values: values.pop("caption_batch"))
    values = json.loads((bundle / MANIFEST).read_text())
    del values["engines"]
    assert load_bundle(bundle).manifest.caption_batch == 128
    assert load_bundle(bundle).hash == sha256_of_bytes(json.dumps(values, sort_keys=True).encode())


def test_json_of_a_million_keys_and_one_twice_is_refused_at_once():
    keys = ",".join(f'"{number}":0' for number in range(300_000))
    with pytest.raises(ValueError, match="'0' stands there 2 times"):
        strict_json(f'{{{keys},"0":1}}'.encode())


# What a graph may ask for.


def with_external_data(bundle, location, listed=None):
    """The text graph's largest tensor moved into another file, hashes brought up to it."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "text_encoder.onnx")
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value=str(len(data)))
    (bundle / "text_encoder.onnx").write_bytes(model.SerializeToString())
    if listed:
        (bundle / listed).parent.mkdir(exist_ok=True)
        (bundle / listed).write_bytes(data)
        edit_manifest(bundle, lambda values: values["files"].update({listed: vars(file_entry(bundle / listed))}))
    seal(bundle)
    return data


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../outside.bin",
        "weights.bin",
        "./README.md",
        "engines/../README.md",
        "",
        "file:///etc/passwd",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_weights_in_a_file_that_the_manifest_does_not_list(location, bundle, monkeypatch):
    """Refused before a library sees the graph: none is even imported."""
    with_external_data(bundle, location)
    (bundle.parent / "outside.bin").write_bytes(b"x" * 10**6)
    if location == "weights.bin":
        (bundle / "weights.bin").write_bytes(b"x" * 10**6)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    text = refusal(bundle)
    assert "does not list as a file of the bundle" in text
    with pytest.raises(DualmatchError, match="does not list"):
        TextEncoder(bundle)


def test_weights_in_a_link(bundle):
    data = with_external_data(bundle, "weights.bin", listed="weights.bin")
    (bundle.parent / "elsewhere.bin").write_bytes(data)
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to(bundle.parent / "elsewhere.bin")
    assert "is a link" in refusal(bundle)


def test_weights_in_a_listed_file_are_checked_and_served(bundle, small_bundle):
    with_external_data(bundle, "weights.bin", listed="weights.bin")
    with TextEncoder(bundle) as moved, TextEncoder(small_bundle) as kept:
        assert (moved.encode(["a red ball"]) == kept.encode(["a red ball"])).all()
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    assert "SHA-256" in refusal(bundle)


def test_a_graph_under_another_name_escapes_no_check(bundle):
    shutil.copy(bundle / "text_encoder.onnx", bundle / "text.bin")
    entry = vars(file_entry(bundle / "text.bin"))
    edit_manifest(bundle, lambda values: values["files"].update({"text.bin": entry}))
    edit_manifest(bundle, lambda values: values["encoders"]["text"].update(file="text.bin"))
    assert "is no .onnx file" in refusal(bundle)
    edit_manifest(
        bundle, lambda values: values["encoders"]["text"].update(file="text_encoder.onnx", engine_file="text.bin")
    )
    assert "is no .onnx file" in refusal(bundle)
    edit_manifest(bundle, lambda values: values["encoders"]["text"].update(engine_file="unlisted.onnx"))
    assert "does not list unlisted.onnx" in refusal(bundle)


def test_a_graph_that_is_none(bundle):
    (bundle / "image_encoder.onnx").write_bytes(b"<html>not found</html>")
    seal(bundle)
    assert "is not an ONNX graph" in refusal(bundle)


# What is said of engines, inputs and outputs.


def shapes(*sizes):
    return {"pixels": dict.fromkeys(("min", "opt", "max"), sizes)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict, None),
        (lambda record: {}, "engines[0] lacks the option 'flavour'"),
        (lambda record: record | {"flavour": 7}, "engines[0].flavour must be of type str"),
        (lambda record: {key: record[key] for key in record if key != "profiles"}, "lacks the option 'profiles'"),
        (lambda record: record | {"profiles": [{"name": "own"}]}, "lacks the option 'shapes'"),
        (lambda record: record | {"file": "engines/none.engine"}, "does not list the file 'engines/none.engine'"),
        (lambda record: record | {"profiles": [{"name": "own", "shapes": {}}]}, "other inputs or ranks"),
        (lambda record: record | {"profiles": [{"name": "own", "shapes": shapes()}]}, "other inputs or ranks"),
        (lambda record: record | {"profiles": [{"name": "own", "shapes": shapes(1, 3, 32, 32)}]}, None),
    ],
)
def test_a_record_of_an_engine_that_is_not_complete(change, says, bundle):
    (bundle / "engines").mkdir()
    (bundle / "engines" / "image.engine").write_bytes(b"plan")
    entry = vars(file_entry(bundle / "engines" / "image.engine"))

    def add(values):
        graph = values["files"]["image_encoder.onnx"]["sha256"]
        values["engines"] = [change(engine_record(file="engines/image.engine", onnx_sha256=graph))]
        values["files"]["engines/image.engine"] = entry

    edit_manifest(bundle, add)
    if says is None:
        assert load_bundle(bundle).manifest.engines
    else:
        assert says in refusal(bundle)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float64"}, "the type 'float64'"),
        ({"dtype": "float65"}, "the type 'float65'"),
        ({"shape": []}, "the shape []"),
        ({"shape": [4, 16]}, "the shape [4, 16]"),
    ],
)
def test_a_tensor_of_another_type_or_without_a_batch(side, change, says, bundle):
    edit_manifest(bundle, lambda values: values["encoders"]["text"][side][0].update(change))
    text = refusal(bundle)
    assert says in text or (side == "outputs" and "one output of 16 components" in text)


def test_an_encoder_without_inputs(bundle):
    edit_manifest(bundle, lambda values: values["encoders"]["text"].update(inputs=[]))
    assert "gives the text encoder no inputs" in refusal(bundle)


# Sizes.


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("embedding_dimension",), 10**9),
        (("embedding_dimension",), 0),
        (("embedding_dimension",), 17),
        (("caption_batch",), 10**9),
        (("tokenizer", "max_length"), -1),
        (("tokenizer", "fixed_length"), 10**9),
        (("preprocessing", "image_size"), 10**6),
        (("preprocessing", "image_size"), 33),
        (("encoders", "image", "inputs", 0, "shape"), ["batch", 3, 10**9, 10**9]),
        (("encoders", "image", "inputs", 0, "shape"), ["batch", 3, 32, 0]),
        (("files", "tokenizer.json", "bytes"), 2**40),
        (("files", "tokenizer.json", "bytes"), -1),
        (("files", "image_encoder.onnx", "bytes"), 2**33),
        (("files", "parity.safetensors", "bytes"), 2**60),
        (("files", "README.md", "sha256"), "g" * 64),
        (("files", "README.md", "sha256"), "A" * 64),
    ],
)
def test_sizes_beyond_reason(path, value, bundle):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    edit_manifest(bundle, change)
    refusal(bundle)


def test_too_many_files(bundle):
    entry = {"sha256": "0" * 64, "bytes": 0}
    edit_manifest(bundle, lambda values: values["files"].update({f"f{i}": entry for i in range(10_001)}))
    assert "more than 10000" in refusal(bundle)


def rewritten_header(data, change):
    """A safetensors file whose header says something else about the same bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


LIES = {
    "a header longer than the file": lambda data: struct.pack("<Q", 2**62) + data[8:],
    "a header of a few bytes": lambda data: struct.pack("<Q", 3) + data[8:],
    "a tensor past the end": lambda data: rewritten_header(
        data, lambda h: h["reference.images"].update(data_offsets=[0, 2**40])
    ),
    "a shape beyond its bytes": lambda data: rewritten_header(
        data, lambda h: h["reference.images"].update(shape=[2**31, 2**31])
    ),
    "overlapping tensors": lambda data: rewritten_header(
        data, lambda h: h["reference.captions"].update(data_offsets=h["reference.images"]["data_offsets"])
    ),
    "another type": lambda data: rewritten_header(data, lambda h: h["reference.images"].update(dtype="F64")),
    "no header": lambda data: b"",
    "cut": lambda data: data[:-1],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_parity_file_whose_header_lies(lie, bundle):
    (bundle / "parity.safetensors").write_bytes(LIES[lie]((bundle / "parity.safetensors").read_bytes()))
    seal(bundle)
    with pytest.raises(DualmatchError, match=r"damaged|does not fit"):
        read_reference(load_bundle(bundle))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"images": 5}', "[" * 10_000, '{"data": null, "data": null}']
)
def test_a_parity_list_that_is_none(text, bundle):
    (bundle / "parity.json").write_text(text)
    seal(bundle)
    with pytest.raises(DualmatchError, match="damaged"):
        read_reference(load_bundle(bundle))


@pytest.mark.parametrize(
    ("part", "key"), [("captions", "text"), ("images", "id"), ("images", "sha256"), (None, "data"), (None, "split")]
)
def test_a_number_where_the_parity_list_has_a_text(part, key, bundle):
    facts = json.loads((bundle / "parity.json").read_text())
    (facts if part is None else facts[part][1])[key] = 7
    (bundle / "parity.json").write_text(json.dumps(facts))
    seal(bundle)
    with pytest.raises(DualmatchError, match="damaged \\(7 stands where a text belongs\\)"):
        read_reference(load_bundle(bundle))


# Between the check and the use.


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "text_encoder.onnx", "image_encoder.onnx", "parity.json", "parity.safetensors"]
)
def test_what_changes_after_a_bundle_was_opened_is_not_used(name, bundle):
    opened = load_bundle(bundle)
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(DualmatchError, match="SHA-256"):
        opened.read(name)
    (bundle / name).unlink()
    (bundle / name).symlink_to("/etc/hostname")
    with pytest.raises(DualmatchError, match="is a link"):
        opened.read(name)


def test_what_is_run_are_the_bytes_that_were_hashed(bundle, monkeypatch):
    """A graph swapped behind the last check changes nothing: the session got bytes, not a path."""
    import onnxruntime

    opened, seen = load_bundle(bundle), []
    create = onnxruntime.InferenceSession
    good = (bundle / "text_encoder.onnx").read_bytes()

    def swapped(graph, *arguments, **options):
        (bundle / "text_encoder.onnx").write_bytes(b"evil")
        seen.append(graph)
        return create(graph, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", swapped)
    with TextEncoder(opened) as encoder:
        assert encoder.encode(["a red ball"]).shape == (1, opened.manifest.embedding_dimension)
    assert seen == [good]


# Other kinds of folders.


def test_other_folders_are_called_by_their_name(small_run, bundle, tmp_path):
    from dualmatch.training.checkpoint import load_run

    with pytest.raises(DualmatchError, match="is a training run, not a bundle"):
        load_bundle(small_run.folder)
    with pytest.raises(DualmatchError, match="is a bundle, not a training run"):
        load_run(bundle)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DualmatchError, match="is a gallery, not a bundle"):
        load_bundle(tmp_path)
    with pytest.raises(DualmatchError, match="it is a file"):
        load_bundle(bundle / "image_encoder.onnx")
