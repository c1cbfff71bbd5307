"""Searching, evaluating and verifying with a real bundle, against the same computed by hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from dualmatch.runtime import Gallery, ImageEncoder, TextEncoder, load_bundle
from dualmatch.runtime.datasets import Dataset, open_dataset
from dualmatch.runtime.encode import encode_caption_gallery, encode_gallery
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.evaluate import evaluate_bundles, sims_info, write_sims
from dualmatch.runtime.recall import evaluate
from dualmatch.runtime.reference import read_reference
from dualmatch.runtime.rerank import i2t
from dualmatch.runtime.search import Query, bundle_of, read_queries, search, search_all
from dualmatch.runtime.similarity import load_sims
from dualmatch.runtime.verify import verify

from .demo_fixture import dualmatch, edit_manifest, seal


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return load_bundle(small_bundle)


@pytest.fixture(scope="module")
def galleries(bundle, small_run, tmp_path_factory):
    """Galleries of the small data set's images and captions."""
    folder = tmp_path_factory.mktemp("galleries")
    encode_gallery(bundle, small_run.data / "images", folder / "images", dtype="float32")
    encode_caption_gallery(bundle, small_run.data / "captions.json", folder / "captions", dtype="float32")
    return Gallery.open(folder / "images"), Gallery.open(folder / "captions")


@pytest.fixture(scope="module")
def other_bundle(small_bundle, tmp_path_factory):
    """A bundle that encodes alike under another hash."""
    folder = shutil.copytree(small_bundle, tmp_path_factory.mktemp("other") / "bundle")
    edit_manifest(folder, lambda values: values["provenance"].update(note="another"))
    return load_bundle(folder)


def test_a_text_finds_what_its_embedding_is_nearest_to(bundle, galleries, small_run):
    images, _ = galleries
    text = small_run.dataset.captions[3]
    hits = search(images, bundle, text=text, k=5)
    with TextEncoder(bundle) as texts, ImageEncoder(bundle) as encoder:
        scores = encoder.encode([images.photo_path(i) for i in range(len(images))]) @ texts.encode([text])[0]
    best = np.argsort(-scores, kind="stable")[:5]
    assert [hit.id for hit in hits] == [images.item(int(i)).id for i in best]
    np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-5)
    assert all(hit.image.is_file() and hit.image.name == hit.id for hit in hits)


def test_a_photograph_finds_itself(bundle, galleries, small_run):
    images, _ = galleries
    item = small_run.dataset.items[7]
    first = search(images, bundle, image=item.path, k=3)[0]
    assert first.id == item.id
    assert first.score == pytest.approx(1, abs=1e-5)


def test_captions_are_searched_too(bundle, galleries, small_run):
    _, captions = galleries
    text = small_run.dataset.captions[11]
    first = search(captions, bundle, text=text, k=1)[0]
    assert first.caption == text
    assert first.image is None
    assert first.score == pytest.approx(1, abs=1e-5)


def test_k_may_exceed_the_gallery(bundle, galleries):
    images, _ = galleries
    assert len(search(images, bundle, text="a ball", k=1000)) == len(images)


@pytest.mark.parametrize("query", [{}, {"text": "  "}])
def test_no_query(query, bundle, galleries):
    with pytest.raises(DualmatchError):
        search(galleries[0], bundle, **query)


def test_a_text_and_a_photograph_average_to_one_query(bundle, galleries, small_run):
    images, captions = galleries
    item, text = small_run.dataset.items[7], small_run.dataset.captions[3]
    with TextEncoder(bundle) as texts, ImageEncoder(bundle) as encoder:
        mean = texts.encode([text])[0] + encoder.encode([item.path])[0]
    for gallery in (images, captions):
        scores = gallery.vectors() @ (mean / np.linalg.norm(mean))
        best = np.argsort(-scores, kind="stable")[:5]
        hits = search(gallery, bundle, text=text, image=item.path, k=5)
        assert [hit.id for hit in hits] == [gallery.item(int(i)).id for i in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-5)


def test_many_queries_at_once_find_what_each_finds_alone(bundle, galleries, small_run):
    _, captions = galleries
    queries = [Query(texts=(text,)) for text in small_run.dataset.captions[:7]]
    queries += [Query(images=(item.path,)) for item in small_run.dataset.items[:3]]
    together = search_all(captions, bundle, queries, k=4)
    for query, hits in zip(queries, together, strict=True):
        alone = search_all(captions, bundle, [query], k=4)[0]
        assert [hit.id for hit in alone] == [hit.id for hit in hits]
        assert [hit.image_id for hit in hits] == [hit.id.partition("#")[0] for hit in hits]
    assert together[5][0].caption == small_run.dataset.captions[5]


def test_queries_from_files(tmp_path):
    (tmp_path / "q.txt").write_text("a dog\n\n a cat \n")
    assert read_queries(tmp_path / "q.txt") == [Query(texts=("a dog",)), Query(texts=("a cat",))]
    (tmp_path / "q.jsonl").write_text('{"text": "a dog"}\n{"image": "p/a.jpg"}\n{"text": "x", "image": "b.jpg"}\n')
    assert read_queries(tmp_path / "q.jsonl") == [
        Query(texts=("a dog",)),
        Query(images=(tmp_path / "p" / "a.jpg",)),
        Query(texts=("x",), images=(tmp_path / "b.jpg",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", b"a", "neither .txt"), ("q.txt", b" \n", "holds none"), ("q.txt", b"\xff", "not UTF-8"),
        ("q.jsonl", b"[]", "line 1: expected"), ("q.jsonl", b'{"text": "a"}\n{"txt": "a"}', "line 2: expected"),
        ("q.jsonl", b'{"text": ""}', "line 1: expected"), ("q.jsonl", b'{"text": 5}', "line 1: expected"),
        ("q.jsonl", b'{"text"', "line 1: not JSON"), ("q.txt", None, "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_hold_no_queries(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DualmatchError, match=message):
        read_queries(tmp_path / name)


# The command


def test_the_command_answers_one_query_with_hits_and_several_with_queries(bundle, galleries, small_run, tmp_path):
    _, captions = galleries
    path, text, photo = captions.path, small_run.dataset.captions[3], small_run.dataset.items[7].path
    one = dualmatch("runtime", "search", path, "--text", text, "--json", "--top", "2", "--bundle", bundle.path)
    assert one.code == 0, one.err
    assert [sorted(hit) for hit in one.json] == [["caption", "id", "image", "rank", "score"]] * 2
    two = dualmatch("runtime", "search", path, "--text", text, "--image", photo, "--json", "--top", "2")
    assert [entry["query"] for entry in two.json] == [
        {"texts": [text], "images": []},
        {"texts": [], "images": [str(photo)]},
    ]
    assert two.json[0]["hits"] == one.json
    both = dualmatch("runtime", "search", path, "--text", text, "--image", photo, "--combine", "--json", "--top", "2")
    assert [entry["query"] for entry in both.json] == [{"texts": [text], "images": [str(photo)]}]
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": text, "image": str(photo)}))
    file = dualmatch("runtime", "search", path, "--queries", tmp_path / "q.jsonl", "--json", "--top", "2")
    assert file.json == both.json
    filtered = dualmatch("runtime", "search", path, "--text", text, "--filter", f"image={photo.name}", "--json")
    assert {hit["image"] for hit in filtered.json} == {photo.name}
    assert len(filtered.json) == 5
    sheet = dualmatch(
        "runtime", "search", path, "--text", text, "--image", photo, "--combine", "--sheet", tmp_path / "s.html"
    )
    assert sheet.code == 0, sheet.err
    assert f"{photo.name}" in (tmp_path / "s.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a query"), (("--text", "a", "--combine"), "at least two"),
        (("--queries", "q.txt", "--combine"), "at least two"), (("--text", "a", "--metadata", "m.jsonl"), "give a condition"),
        (("--text", "a", "--top", "0"), "top"),
    ],
)  # fmt: skip
def test_wrong_usage_of_the_command(galleries, words, message):
    done = dualmatch("runtime", "search", galleries[0].path, *words)
    assert done.code == 2
    assert message in done.err


def test_a_file_name_moves_no_cursor(bundle, small_run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    name = "a\x1b[31m\r\nforged  1.0000  line.png"
    shutil.copy(small_run.dataset.items[0].path, folder / name)
    encode_gallery(bundle, folder, tmp_path / "g")
    done = dualmatch("runtime", "search", tmp_path / "g", "--text", "a ball", "--sheet", tmp_path / "s.html")
    assert done.code == 0, done.err
    assert "\\x1b[31m\\r\\nforged" in done.out
    assert not set(done.out + done.err) & {"\x1b", "\r"}
    assert "\x1b" not in (tmp_path / "s.html").read_text()
    assert dualmatch("runtime", "search", tmp_path / "g", "--text", "a", "--json").json[0]["id"] == name
    unknown = dualmatch("gallery", "remove", tmp_path / "g", "b\x1b[2J")
    assert (unknown.code, "\x1b" in unknown.err) == (1, False)
    assert dualmatch("gallery", "remove", tmp_path / "g", name).code == 0


def test_a_gallery_of_which_all_was_removed_answers_with_nothing(bundle, small_run, tmp_path):
    (tmp_path / "c.txt").write_text("a ball\n")
    encode_caption_gallery(bundle, tmp_path / "c.txt", tmp_path / "g")
    assert dualmatch("gallery", "remove", tmp_path / "g", "1").code == 0
    found = dualmatch("runtime", "search", tmp_path / "g", "--text", "a ball", "--json", "--sheet", tmp_path / "s.png")
    assert (found.code, found.json) == (0, [])


def test_a_gallery_of_another_bundle_is_refused(other_bundle, galleries):
    with pytest.raises(DualmatchError, match="was encoded by bundle"):
        search(galleries[0], other_bundle, text="a ball")
    with pytest.raises(DualmatchError, match="was encoded by bundle"):
        bundle_of(galleries[0], other_bundle.path)


def test_the_bundle_of_a_gallery_is_found_where_the_gallery_says_or_where_it_is_given(bundle, galleries, tmp_path):
    assert bundle_of(galleries[0], None).hash == bundle.hash
    moved = shutil.copytree(bundle.path, tmp_path / "moved")
    assert bundle_of(galleries[0], moved).path == moved
    gallery = Gallery.open(shutil.copytree(galleries[0].path, tmp_path / "far" / "away" / "gallery"))
    with pytest.raises(DualmatchError, match="say where it is with --bundle"):
        bundle_of(gallery, None)


def test_similarity_of_galleries(bundle, galleries, small_run, tmp_path):
    images, captions = galleries
    info = write_sims(images, captions, tmp_path / "deep" / "sims.npy")
    similarity, read = load_sims(tmp_path / "deep" / "sims.npy")
    assert read == info
    np.testing.assert_allclose(similarity, images.vectors() @ captions.vectors().T, atol=1e-6)
    assert info.bundle == bundle.hash
    assert [info.image_ids[owner] for owner in info.caption_image] == [item.image for item in captions.items]
    wanted = evaluate_bundles([bundle], small_run.dataset)
    # The gallery's order is by file name, the data set's its own; ranks change with the order only where scores tie.
    assert evaluate(similarity, caption_image=info.caption_image).rsum == pytest.approx(wanted.rsum, abs=0.01)


def test_similarity_wants_one_gallery_of_each_kind_and_one_bundle(galleries, other_bundle, small_run, tmp_path):
    images, captions = galleries
    with pytest.raises(DualmatchError, match="one of captions"):
        sims_info(captions, images)
    encode_caption_gallery(other_bundle, small_run.data / "captions.json", tmp_path / "captions")
    with pytest.raises(DualmatchError, match="was encoded by bundle"):
        sims_info(images, Gallery.open(tmp_path / "captions"))


def test_captions_of_images_that_the_gallery_lacks(bundle, galleries, small_run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for item in small_run.dataset.items[1:]:
        shutil.copy(item.path, folder)
    encode_gallery(bundle, folder, tmp_path / "gallery")
    with pytest.raises(DualmatchError, match=small_run.dataset.items[0].id):
        sims_info(Gallery.open(tmp_path / "gallery"), galleries[1])


def test_captions_without_images_have_no_owners(bundle, galleries, tmp_path):
    (tmp_path / "captions.txt").write_text("a red ball\na blue box\n")
    encode_caption_gallery(bundle, tmp_path / "captions.txt", tmp_path / "gallery")
    info = sims_info(galleries[0], Gallery.open(tmp_path / "gallery"))
    assert info.caption_image is None


def test_a_caption_of_a_missing_image_is_refused_before_anything_is_written(bundle, small_run, tmp_path):
    data = shutil.copytree(small_run.data, tmp_path / "data")
    (data / "images" / small_run.dataset.items[5].id).unlink()
    with pytest.raises(DualmatchError, match=small_run.dataset.items[5].id):
        encode_caption_gallery(bundle, data / "captions.json", tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()


def test_evaluation_is_that_of_torch(bundle, small_run):
    from dualmatch.training.evaluation import evaluate_run

    test = small_run.dataset.select(["test"])
    wanted, got = evaluate_run(small_run.folder, test), evaluate_bundles([bundle], test)
    assert got.to_json() == wanted.to_json()
    assert got.protocol.split == "test"
    assert got.protocol.images == 12


def test_evaluation_with_a_protocol_reranking_and_an_ensemble(bundle, small_run):
    dataset = small_run.dataset
    reference = read_reference(bundle.path)
    similarity = reference.images @ reference.captions.T
    owner = reference.caption_image
    plain = evaluate_bundles([bundle], dataset)
    assert plain.rsum == pytest.approx(evaluate(similarity, caption_image=owner).rsum, abs=0.5)
    reranked = evaluate_bundles([bundle], dataset, rerank_k1=15)
    wanted = evaluate(similarity, caption_image=owner, i2t=i2t(similarity, 15))
    assert reranked.i2t.r1 == pytest.approx(wanted.i2t.r1, abs=2)
    assert reranked.protocol.rerank == "i2t k1=15"
    together = evaluate_bundles([bundle, bundle], dataset)
    assert together.rsum == pytest.approx(plain.rsum, abs=0.01)
    assert together.protocol.ensemble == 2
    fifty = replace_items(dataset, 50)
    folds = evaluate_bundles([bundle], fifty, protocol="five-folds")
    assert folds.protocol.folds == 5
    assert folds.rsum > evaluate_bundles([bundle], fifty).rsum


def replace_items(dataset, count):
    return Dataset(name=dataset.name, layout=dataset.layout, items=dataset.items[:count], root=dataset.root)


def test_protocols_that_do_not_fit(bundle, small_run):
    with pytest.raises(DualmatchError, match="52 images cannot be cut into 5 equal folds"):
        evaluate_bundles([bundle], small_run.dataset, protocol="five-folds")
    with pytest.raises(DualmatchError, match="no protocol 'thirds'"):
        evaluate_bundles([bundle], small_run.dataset, protocol="thirds")


# verify


def test_verify_passes_wherever_the_photographs_are_and_whatever_they_are_called(bundle, small_run, tmp_path):
    data = tmp_path / "elsewhere"
    (data / "images" / "deep").mkdir(parents=True)
    entries = []
    for number, item in enumerate(reversed(small_run.dataset.items)):
        name = f"deep/{number}.png"
        shutil.copy(item.path, data / "images" / name)
        entries.append({"filename": name, "split": "all", "captions": ["something else"]})
    (data / "captions.json").write_text(json.dumps({"images": entries}))
    found = verify(bundle, open_dataset(data), threads=1)
    assert found.decision.verdict == "pass"
    assert found.comparison.before.protocol.images == 52
    assert found.providers == {"image": "CPUExecutionProvider", "text": "CPUExecutionProvider"}
    assert max(found.samples.values()) < 1e-5
    assert found.captions_difference < 1e-5


def test_verify_names_a_photograph_that_is_missing_or_changed(bundle, small_run, tmp_path):
    dataset = small_run.dataset
    with pytest.raises(DualmatchError, match=f"lacks 1 of the 52 .*{dataset.items[51].id}"):
        verify(bundle, replace_items(dataset, 51))
    data = shutil.copytree(small_run.data, tmp_path / "data")
    changed = data / "images" / dataset.items[3].id
    changed.write_bytes(changed.read_bytes() + b"\0")
    with pytest.raises(DualmatchError, match=f"lacks 1 of the 52 .*{dataset.items[3].id}"):
        verify(bundle, open_dataset(data))


def test_verify_without_photographs_does_not_pass(bundle):
    found = verify(bundle, None)
    assert found.decision.verdict == "too few pairs"
    assert "--data" in found.decision.reason
    assert found.comparison is None
    assert found.captions_difference < 1e-5


def test_verify_notices_other_preprocessing(bundle, small_run):
    """The graphs and their samples are intact; only what feeds them changed."""
    crop = replace(
        bundle, manifest=replace(bundle.manifest, preprocessing=replace(bundle.manifest.preprocessing, resize="crop"))
    )
    found = verify(crop, small_run.dataset)
    assert max(found.samples.values()) < 1e-5
    assert found.decision.verdict == "fail"


def test_verify_notices_a_reference_of_other_embeddings(bundle, small_run, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    reference = read_reference(folder)
    replace(reference, captions=np.roll(reference.captions, 5, axis=0)).write(folder)
    seal(folder)
    assert verify(load_bundle(folder), small_run.dataset).decision.verdict == "fail"


def test_verify_needs_the_gates_tolerances(bundle, small_run, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    edit_manifest(folder, lambda values: values.update(parity={}))
    with pytest.raises(DualmatchError, match="rsum_loss"):
        verify(load_bundle(folder), small_run.dataset)


# the reference


def test_the_reference_survives_writing_and_reading(bundle, tmp_path):
    reference = read_reference(bundle.path)
    reference.write(tmp_path)
    again = read_reference(tmp_path)
    for name in ("images", "captions", "caption_image"):
        np.testing.assert_array_equal(getattr(again, name), getattr(reference, name))
    assert again.texts == reference.texts
    assert again.image_hashes == reference.image_hashes
    assert (again.data, again.split) == (reference.data, reference.split)


@pytest.mark.parametrize(
    "damage", ["cut tensors", "no sample", "a caption less", "an image less", "not json", "no texts", "owner"]
)
def test_a_reference_that_does_not_fit_itself(damage, bundle, tmp_path):
    reference = read_reference(bundle.path)
    if damage == "a caption less":
        reference = replace(reference, captions=reference.captions[1:])
    if damage == "an image less":
        reference = replace(reference, images=reference.images[1:])
    if damage == "owner":
        reference = replace(reference, caption_image=reference.caption_image + 1)
    if damage == "no sample":
        reference = replace(reference, samples={"image": reference.samples["image"], "text": {}})
    reference.write(tmp_path)
    tensors, facts = tmp_path / "parity.safetensors", tmp_path / "parity.json"
    if damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    if damage == "not json":
        facts.write_text("{")
    if damage == "no texts":
        facts.write_text(facts.read_text().replace('"text"', '"words"'))
    with pytest.raises(DualmatchError):
        read_reference(tmp_path)
