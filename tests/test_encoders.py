"""The encoders of a bundle: equal to torch, the same however items are batched, and clear about what they cannot take."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dualmatch.runtime import ImageEncoder, TextEncoder, load_bundle
from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.bundle import EncoderEntry, file_entry
from dualmatch.runtime.datasets import ImageItem
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.tokenizer import CaptionTokenizer, TokenizerOptions


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return load_bundle(small_bundle)


@pytest.fixture(scope="module")
def run(small_run):
    from dualmatch.training.checkpoint import load_run

    return load_run(small_run.folder)


def with_encoder(bundle, name, **changes):
    """The bundle with another entry for one encoder."""
    entry = replace(bundle.manifest.encoders[name], **changes)
    return replace(bundle, manifest=replace(bundle.manifest, encoders={**bundle.manifest.encoders, name: entry}))


def test_images_are_encoded_as_in_torch(bundle, run, small_run):
    from dualmatch.training.encode import encode_images

    items = small_run.dataset.items
    wanted = encode_images(run.model, run.preprocess, items)
    with ImageEncoder(bundle, threads=1) as encoder:
        assert encoder.provider == "CPUExecutionProvider"
        assert encoder.dimension == 16
        got = encoder.encode([item.path for item in items])
        by_items = encoder.encode_items(items)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got, by_items)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    assert (got @ got.T)[~np.eye(len(got), dtype=bool)].max() < 0.99999, "all images look alike: nothing was tested"


def test_captions_are_encoded_as_in_torch(bundle, run, small_run):
    from dualmatch.training.encode import encode_captions

    captions = small_run.dataset.captions
    wanted = encode_captions(run.model, run.tokenizer, captions)
    with TextEncoder(bundle, threads=1) as encoder:
        got = encoder.encode(captions)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
def test_an_embedding_does_not_depend_on_its_batch(batch_size, bundle, small_run):
    items, captions = small_run.dataset.items[:9], small_run.dataset.captions[:23]
    with ImageEncoder(bundle, threads=1) as images, TextEncoder(bundle, threads=1) as texts:
        wanted = images.encode_items(items), texts.encode(captions)
    with (
        ImageEncoder(bundle, threads=1, batch_size=batch_size) as images,
        TextEncoder(bundle, threads=1, batch_size=batch_size) as texts,
    ):
        got = images.encode_items(items), texts.encode(captions)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_embeddings_come_in_the_given_order(bundle, small_run):
    captions = small_run.dataset.captions[:20]
    lengths = [len(caption.split()) for caption in captions]
    assert lengths != sorted(lengths)
    order = np.random.default_rng(0).permutation(20)
    with TextEncoder(bundle, threads=1, batch_size=3) as encoder:
        straight, mixed = encoder.encode(captions), encoder.encode([captions[i] for i in order])
    np.testing.assert_allclose(mixed, straight[order], atol=2e-6)
    images = [item.path for item in small_run.dataset.items[:5]]
    with ImageEncoder(bundle, threads=1, batch_size=2) as encoder:
        np.testing.assert_allclose(encoder.encode(images[::-1]), encoder.encode(images)[::-1], atol=2e-6)


def test_under_the_authors_policy_batches_keep_the_order(bundle, small_run, monkeypatch):
    """There an embedding depends on the longest caption beside it, so the batches must be those of the reference."""
    authors = replace(bundle, manifest=replace(bundle.manifest, pad_policy="authors"))
    captions = small_run.dataset.captions[:10]
    seen = []
    with TextEncoder(authors, threads=1, batch_size=4) as encoder:
        real = encoder.run
        monkeypatch.setattr(encoder, "run", lambda feeds: seen.append(feeds["token_ids"]) or real(feeds))
        encoder.encode(captions)
        wanted = [encoder.tokenizer(captions[start : start + 4]) for start in (0, 4, 8)]
    assert len(seen) == 3
    for got, ids in zip(seen, wanted, strict=True):
        np.testing.assert_array_equal(got, ids)


def test_nothing_encodes_to_nothing(bundle):
    with ImageEncoder(bundle) as images, TextEncoder(bundle) as texts:
        assert images.encode([]).shape == texts.encode([]).shape == images.encode_items([]).shape == (0, 16)


def test_a_path_its_bytes_and_the_open_image_are_the_same(bundle, small_run):
    path = small_run.dataset.items[0].path
    with ImageEncoder(bundle, threads=1) as encoder:
        one, two, three, four = encoder.encode([path, str(path), path.read_bytes(), Image.open(path)])
    for other in (two, three, four):
        np.testing.assert_allclose(other, one, atol=2e-6)


def test_a_bundles_path_is_as_good_as_the_bundle(small_bundle):
    with ImageEncoder(small_bundle) as images, TextEncoder(str(small_bundle)) as texts:
        assert images.bundle.hash == texts.bundle.hash


def test_a_damaged_bundle_opens_no_encoder(small_bundle, tmp_path):
    folder = shutil.copytree(small_bundle, tmp_path / "bundle")
    (folder / "text_encoder.onnx").write_bytes(b"x")
    for kind in (ImageEncoder, TextEncoder):
        with pytest.raises(DualmatchError, match=r"text_encoder\.onnx"):
            kind(folder)


def test_progress_counts_images(bundle, small_run):
    reports = []
    with ImageEncoder(bundle, batch_size=4) as encoder:
        encoder.encode_items(small_run.dataset.items[:10], lambda *report: reports.append(report))
    assert reports == [("encoding images", done, 10) for done in (4, 8, 10)]


def test_an_unreadable_image_of_a_data_set_is_named(bundle):
    item = ImageItem(id="holiday/7.jpg", split="test", captions=("a beach",), encoded=b"not an image")
    with ImageEncoder(bundle) as encoder, pytest.raises(DualmatchError, match=r"holiday/7\.jpg.*not an image"):
        encoder.encode_items([item])


@pytest.mark.parametrize("kind", [ImageEncoder, TextEncoder])
def test_wrong_use_is_one_sentence(kind, bundle):
    with pytest.raises(DualmatchError, match="batch size must be at least 1"):
        kind(bundle, batch_size=0)
    with pytest.raises(DualmatchError, match="there is no backend 'abacus'"):
        kind(bundle, backend="abacus")


@pytest.mark.parametrize("kind", [ImageEncoder, TextEncoder])
def test_a_graph_with_other_inputs_than_promised(kind, bundle):
    name = "image" if kind is ImageEncoder else "text"
    other = with_encoder(bundle, name, inputs=(TensorSpec(name="sound", dtype="float32", shape=("batch",)),))
    with pytest.raises(DualmatchError, match=r"the manifest promises \['sound'\]"):
        kind(other)


def test_a_closed_encoder_does_not_run(bundle):
    encoder = TextEncoder(bundle)
    encoder.close()
    encoder.close()
    with pytest.raises(RuntimeError, match="session is closed"):
        encoder.encode(["a dog"])


# Precomputed regions: a bundle whose image graph takes them, and their file.


@pytest.fixture
def region_bundle(bundle, exported, tmp_path):
    from .tiny_models import image_encoder  # noqa: F401  (needs torch, as the fixture does)

    graph = exported("image-files-k2")
    shutil.copytree(bundle.path, tmp_path / "bundle")
    shutil.copy(graph.path, tmp_path / "bundle" / "image_encoder.onnx")
    from dualmatch.export.graph import specs

    inputs, outputs = specs(graph.model.graph.input), specs(graph.model.graph.output)
    entry = EncoderEntry(
        file="image_encoder.onnx",
        precision="fp32",
        opset=20,
        inputs=inputs,
        outputs=outputs,
        tolerance=1e-5,
        measured=0.0,
    )
    manifest = replace(
        bundle.manifest,
        preprocessing=None,
        encoders={"image": entry, "text": bundle.manifest.encoders["text"]},
        files={**bundle.manifest.files, entry.file: file_entry(tmp_path / "bundle" / entry.file)},
    )
    return replace(bundle, path=tmp_path / "bundle", manifest=manifest)


@pytest.fixture
def region_file(tmp_path):
    chance = np.random.default_rng(0)
    names = ["a.jpg", "b.jpg", "c.jpg"]
    arrays = {"features": chance.normal(size=(3, 5, 20)), "positions": chance.normal(size=(3, 5, 9))}
    np.savez(tmp_path / "regions.npz", filenames=names, **{k: v.astype(np.float16) for k, v in arrays.items()})
    return tmp_path / "regions.npz"


def test_regions_are_looked_up_by_id(region_bundle, region_file):
    regions = RegionFile(region_file)
    with ImageEncoder(region_bundle, regions=regions) as encoder:
        got = encoder.encode([b"", b""], ["c.jpg", "a.jpg"])
        by_path = encoder.encode(["photos/c.jpg", "photos/a.jpg"])
        arrays = np.load(region_file)
        wanted = encoder.run(
            {
                "regions": arrays["features"][[2, 0]].astype(np.float32),
                "region_positions": arrays["positions"][[2, 0]].astype(np.float32),
            }
        )
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(by_path, wanted)
        with pytest.raises(DualmatchError, match=r"no features for image 'd\.jpg'"):
            encoder.encode([b""], ["d.jpg"])
        with pytest.raises(DualmatchError, match="needs its id"):
            encoder.encode([b""])


def test_a_network_with_regions_says_that_it_needs_them(region_bundle):
    with pytest.raises(DualmatchError, match="--regions FILE"):
        ImageEncoder(region_bundle)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"filenames": ["a"]}, "lacks the array 'features"),
        ({"filenames": ["a"], "features": np.zeros((2, 5, 20))}, "for each filename"),
        ({"filenames": ["a"], "features": np.zeros((1, 20))}, "for each filename"),
    ],
)
def test_region_files_that_do_not_fit(arrays, message, tmp_path):
    np.savez(tmp_path / "regions.npz", **arrays)
    with pytest.raises(DualmatchError, match=message):
        RegionFile(tmp_path / "regions.npz")


def test_region_files_that_are_none(tmp_path):
    with pytest.raises(DualmatchError, match="there is no region file"):
        RegionFile(tmp_path / "regions.npz")
    (tmp_path / "regions.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DualmatchError, match="cannot be read"):
        RegionFile(tmp_path / "regions.npz")
    np.save(tmp_path / "regions.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DualmatchError):
        RegionFile(tmp_path / "regions.npy")


# Tokenising.


def tokenizer(small_bundle, **options):
    return CaptionTokenizer(small_bundle / "tokenizer.json", TokenizerOptions(**options))


def test_captions_become_padded_ids(small_bundle):
    tokens = tokenizer(small_bundle)
    one, two = tokens.ids(["a red ball", "a red ball on a beach"])
    assert one[0] == two[0] == 1, "the opening token"
    assert one[-1] == two[-1] == 2, "the closing token"
    assert one[1:-1] == two[1:4]
    padded = tokens(["a red ball", "a red ball on a beach"])
    assert padded.dtype == np.int64
    assert padded.shape == (2, len(two))
    assert padded[0].tolist() == one + [0] * (len(two) - len(one))
    assert padded.max() < tokens.vocabulary_size


def test_long_captions_are_cut(small_bundle):
    long = "a red ball " * 40
    whole = tokenizer(small_bundle, max_length=0).ids([long])[0]
    assert len(whole) == 122
    kept = tokenizer(small_bundle, max_length=10).ids([long])[0]
    assert kept == [*whole[:9], whole[-1]]
    lost = tokenizer(small_bundle, max_length=10, keep_last_special=False).ids([long])[0]
    assert lost == whole[:10]
    exact = tokenizer(small_bundle, max_length=5).ids(["a red ball"])[0]
    assert exact == whole[:4] + whole[-1:]


def test_a_fixed_length_is_padded_to_whatever_the_batch_holds(small_bundle):
    tokens = tokenizer(small_bundle, max_length=12, fixed_length=12)
    assert tokens(["a red ball"]).shape == (1, 12)
    assert tokens(["a red ball " * 9, "a"]).shape == (2, 12)


@pytest.mark.parametrize("spelt", ["<pad>", "<start>", "<end>", "<unk>"])
def test_special_tokens_spelt_in_a_caption_are_text(spelt, small_bundle):
    ids = tokenizer(small_bundle).ids([f"a {spelt} ball"])[0]
    assert 0 not in ids
    assert ids.count(1) == 1
    assert ids.count(2) == 1


@pytest.mark.parametrize("caption", ["", " ", "\n\t"])
def test_empty_captions_are_refused(caption, small_bundle):
    with pytest.raises(DualmatchError, match="caption 1 is empty"):
        tokenizer(small_bundle).ids(["a dog", caption])


@pytest.mark.parametrize("caption", ["ein Hund im Schnee ❄", "犬", "a\x00b", "é", "\u202ebackwards", "🙂" * 500])
def test_any_text_has_an_embedding(caption, bundle):
    with TextEncoder(bundle, threads=1) as encoder:
        (got,) = encoder.encode([caption])
    assert np.linalg.norm(got) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json"])
def test_a_tokenizer_that_cannot_be_read(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DualmatchError, match="tokenizer"):
        CaptionTokenizer(path, TokenizerOptions())
