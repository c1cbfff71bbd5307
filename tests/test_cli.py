"""The command line: every command on a bundle that the demo trained, and one sentence for every wrong input."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dualmatch.runtime import Gallery, load_bundle
from dualmatch.runtime.recall import evaluate

from .demo_fixture import dualmatch, edit_manifest, one_sentence


def done(*arguments):
    finished = dualmatch(*arguments)
    assert finished.code == 0, finished.err
    return finished


def refused(*arguments, code=1):
    finished = dualmatch(*arguments)
    assert finished.code == code, (finished.out, finished.err)
    if code == 1:
        assert one_sentence(finished.err), finished.err
    assert "Traceback" not in finished.err
    return finished.err


def everything_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# The way through, on the demo's bundle.


@pytest.fixture(scope="module")
def galleries(demo, tmp_path_factory):
    """(images, captions), encoded by the commands."""
    folder = tmp_path_factory.mktemp("galleries")
    done("runtime", "encode-gallery", demo.bundle, demo.photos / "images", "--out", folder / "images")
    done("runtime", "encode-captions", demo.bundle, demo.photos / "captions.json", "--out", folder / "captions")
    return folder / "images", folder / "captions"


def test_evaluate_is_within_half_a_point_of_torch(demo):
    # All scenes, as in the gate: after two epochs scores lie so close that 400 alone may differ by more.
    everything = ("--data", "scenes", "--split", "train,val,test", "--json")
    torch = done("evaluate-checkpoint", demo.run, *everything).json
    served = done("runtime", "evaluate", demo.bundle, *everything).json
    assert abs(torch["rsum"] - served["rsum"]) < 0.5
    assert torch["rsum"] > 30, "two epochs taught the network nothing: the comparison says little"
    assert torch["protocol"] == served["protocol"]
    assert served["protocol"]["images"] == 2200
    for way in ("i2t", "t2i"):
        assert set(served[way]) == {"r1", "r5", "r10", "median", "mean"}


def test_evaluate_prints_its_protocol(demo):
    data = ("--data", demo.photos)
    plain = done("runtime", "evaluate", demo.bundle, *data).out
    assert "split test: 400 images, 2000 captions (5 per image), 1 fold" in plain
    other = done("runtime", "evaluate", demo.bundle, *data, "--protocol", "five-folds", "--rerank", "15", "--ensemble", demo.bundle).out  # fmt: skip
    assert "average of 5 folds" in other
    assert "re-ranking: i2t k1=15" in other
    assert "ensemble of 2 models" in other


def test_evaluate_checkpoint_saves_what_it_ranked(demo, small_run, tmp_path):
    path = tmp_path / "embeddings.npz"
    options = ("--split", "val,test", "--save-embeddings", path, "--json")
    found = done("evaluate-checkpoint", small_run.folder, "--data", small_run.data, *options).json
    assert found["protocol"]["split"] == "val, test"
    with np.load(path) as saved:
        assert saved["images"].shape == (20, 16)
        again = evaluate(saved["images"] @ saved["captions"].T, caption_image=saved["caption_image"])
    assert again.rsum == pytest.approx(found["rsum"])


def test_verify(small_bundle, small_run):
    out = done("runtime", "verify", small_bundle, "--data", small_run.data).out
    assert "PASS: " in out
    assert re.search(r"image encoder on CPUExecutionProvider: samples differ by at most \d", out)
    assert "protocol: split train, val, test: 52 images, 260 captions" in out


def test_verify_as_json(small_bundle, small_run):
    found = done("runtime", "verify", small_bundle, "--data", small_run.data, "--json").json
    assert found["verdict"] == "pass"
    assert found["providers"] == {"image": "CPUExecutionProvider", "text": "CPUExecutionProvider"}
    assert found["comparison"]["rsum_loss"] == 0


def test_encoded_galleries(demo, galleries):
    images, captions = (Gallery.open(path) for path in galleries)
    assert (len(images), images.kind, len(captions), captions.kind) == (400, "images", 2000, "captions")
    assert images.bundle_hash == load_bundle(demo.bundle).hash
    entries = json.loads((demo.photos / "captions.json").read_text())["images"]
    assert [item.caption for item in captions.items] == [c for entry in entries for c in entry["captions"]]
    assert [item.image for item in captions.items] == [e["filename"] for e in entries for _ in e["captions"]]
    for path in galleries:
        assert "all hashes match" in done("gallery", "check", path).out


def test_the_same_gallery_again_has_the_same_bytes(demo, galleries, tmp_path):
    done("runtime", "encode-gallery", demo.bundle, demo.photos / "images", "--out", tmp_path / "again", "--json")
    for path in galleries[0].glob("vectors-*.npy"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_captions_from_other_files(suffix, demo, galleries, tmp_path):
    items = Gallery.open(galleries[1]).items[:40]
    lines = {".txt": [item.caption for item in items],
             ".jsonl": [json.dumps({"caption": item.caption, "image": item.image, "extra": 1}) for item in items]}  # fmt: skip
    path = (tmp_path / "captions").with_suffix(suffix)
    path.write_text("\n".join(lines[suffix]) + "\n")
    found = done("runtime", "encode-captions", demo.bundle, path, "--out", tmp_path / "gallery", "--json").json
    assert (found["rows"], found["count"], found["quarantined"]) == (40, 40, [])
    gallery = Gallery.open(tmp_path / "gallery")
    assert [item.caption for item in gallery.items] == [item.caption for item in items]
    cosines = (gallery.vectors() * Gallery.open(galleries[1]).vectors()[:40]).sum(axis=1)
    assert cosines.min() > 0.999


def test_search_by_text(demo, galleries):
    item = Gallery.open(galleries[1]).items[0]
    hits = done("runtime", "search", galleries[0], "--text", item.caption, "--json", "--top", "7").json
    assert [hit["rank"] for hit in hits] == list(range(1, 8))
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    lines = done("runtime", "search", galleries[0], "--text", item.caption, "-k", "7").out.splitlines()
    assert [line.split()[2] for line in lines] == [hit["id"] for hit in hits]


def test_search_by_image_and_a_sheet(demo, galleries, tmp_path):
    photo = sorted((demo.photos / "images").iterdir())[9]
    for name in ("sheet.html", "sheet.png"):
        finished = done("runtime", "search", galleries[0], "--image", photo, "--top", "4", "--sheet", tmp_path / name)
        first = finished.out.splitlines()[0].split()
        assert first[2] == photo.name
        assert float(first[1]) == pytest.approx(1, abs=2e-3)
    assert photo.name in (tmp_path / "sheet.html").read_text()
    assert Image.open(tmp_path / "sheet.png").width > 200


def test_search_of_captions_shows_them(galleries):
    item = Gallery.open(galleries[1]).items[25]
    first = done("runtime", "search", galleries[1], "--text", item.caption, "--json").json[0]
    assert first["caption"] == item.caption


def test_similarity_and_rerank(demo, galleries, tmp_path):
    done("runtime", "similarity", *galleries, "--out", tmp_path / "sims.npy")
    sims = np.load(tmp_path / "sims.npy")
    assert sims.shape == (400, 2000)
    out = ("--out", tmp_path / "candidates.npy")
    found = done("runtime", "rerank", tmp_path / "sims.npy", "--direction", "i2t", "--k1", "15", *out, "--json").json
    candidates = np.load(tmp_path / "candidates.npy")
    assert candidates.shape == (400, 15)
    assert candidates.dtype == np.int64
    top = np.argsort(-sims, axis=1, kind="stable")[:, :15]
    assert all(set(one) == set(other) for one, other in zip(candidates, top, strict=True))
    wanted = done("runtime", "evaluate", demo.bundle, "--data", demo.photos, "--rerank", "15", "--json").json
    assert found["reranked"]["i2t"]["r1"] == pytest.approx(wanted["i2t"]["r1"], abs=1)
    assert found["plain"]["t2i"]["r1"] == found["reranked"]["t2i"]["r1"]
    text = done("runtime", "rerank", tmp_path / "sims.npy", "--direction", "t2i").out
    assert "re-ranking: t2i k1=15" in text


def test_bench_latency(small_bundle, tmp_path):
    options = ("--batch-sizes", "1,2", "--budget", "0.2", "--length", "7", "--threads", "1")
    files = ("--out", tmp_path / "report.json", "--samples", tmp_path / "samples.jsonl")
    found = done("bench", "latency", small_bundle, *options, *files, "--json").json
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert found["subject"]["bundle_hash"] == load_bundle(small_bundle).hash
    assert (tmp_path / "samples.jsonl").stat().st_size > 0
    assert "p99" in done("bench", "latency", small_bundle, *options).out


def test_compile(small_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    before = load_bundle(bundle)
    options = ("--flavour", "tensorrt-rtx", "--profile", "latency", "--profile", "1:4:8", "--length", "1:8:20")
    records = done("compile", bundle, *options, "--json").json
    assert [record["file"] for record in records] == [
        f"engines/{n}_encoder.tensorrt-rtx.engine" for n in ("image", "text")
    ]
    after = load_bundle(bundle)
    assert after.hash == before.hash
    assert list(after.manifest.engines) == records
    assert everything_in(bundle / "engines") == {
        f"{n}_encoder.tensorrt-rtx.{kind}" for n in ("image", "text") for kind in ("engine", "reproduce.py")
    }
    done("compile", bundle, *options)
    assert len(load_bundle(bundle).manifest.engines) == 2
    data = bytearray((bundle / records[1]["file"]).read_bytes())
    data[100] ^= 1
    (bundle / records[1]["file"]).write_bytes(data)
    assert "text_encoder.tensorrt-rtx.engine does not match the SHA-256" in refused("runtime", "verify", bundle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flavour", "tensorrt-rtx", "--profile", "9:1:1"], "1 <= MIN <= OPT <= MAX"),
        (["--flavour", "tensorrt-rtx", "--profile", "quick"], "there is no profile 'quick'"),
        (["--flavour", "tensorrt-rtx", "--length", "1:8:9999"], "cuts captions at"),
    ],
)
def test_a_compilation_that_fails_leaves_the_bundle_as_it_was(options, message, small_bundle, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    assert message in refused("compile", bundle, *options)
    assert everything_in(bundle) == everything_in(small_bundle)


def test_train_lists_its_recipes():
    assert "scenes-dsran-gru" in done("train", "--list").out


def test_train_and_resume_from_the_command_line(small_run, tmp_path):
    from .demo_fixture import SMALL

    words = (
        "train",
        "scenes-dsran-gru",
        "--data",
        small_run.data,
        "--out",
        tmp_path / "run",
        "--cache",
        tmp_path / "cache",
    )
    settings = [part for setting in SMALL for part in ("--set", setting)]
    assert "best epoch 1" in done(*words, *settings).out
    assert "exists already" in dualmatch(*words, *settings).err
    done(*words, *settings, "--set", "train.epochs=2", "--resume")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


# Wrong input. Each: exit 1 and one sentence, and nothing half-written.


@pytest.fixture
def place(tmp_path):
    """A folder in which only what a test puts there may lie afterwards."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def data(small_run, tmp_path):
    """A copy of the small data set to damage."""
    return shutil.copytree(small_run.data, tmp_path / "data")


def test_a_folder_without_images(small_bundle, place, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").write_text("no photographs here")
    message = refused("runtime", "encode-gallery", small_bundle, tmp_path / "notes", "--out", place / "gallery")
    assert "notes" in message
    assert not everything_in(place)


def test_a_caption_file_with_a_missing_image(small_bundle, small_run, data, place):
    name = small_run.dataset.items[4].id
    (data / "images" / name).unlink()
    out = ("--out", place / "out")
    assert name in refused("runtime", "encode-captions", small_bundle, data / "captions.json", *out)
    assert name in refused("runtime", "evaluate", small_bundle, "--data", data)
    assert name in refused("runtime", "verify", small_bundle, "--data", data)
    assert name in refused("train", "scenes-dsran-gru", "--data", data, *out)
    assert name in refused("export", small_run.folder, "--data", data, *out)
    assert not everything_in(place)


@pytest.mark.parametrize("file", ["image_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "parity.safetensors"])
def test_a_bundle_with_one_flipped_byte(file, small_bundle, small_run, place, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 3] ^= 4
    (bundle / file).write_bytes(content)
    for words in (
        ("runtime", "encode-gallery", bundle, small_run.data / "images", "--out", place / "gallery"),
        ("runtime", "encode-captions", bundle, small_run.data / "captions.json", "--out", place / "gallery"),
        ("runtime", "evaluate", bundle, "--data", small_run.data),
        ("runtime", "verify", bundle, "--data", small_run.data),
        ("bench", "latency", bundle),
        ("compile", bundle, "--flavour", "tensorrt-rtx"),
    ):
        assert f"{file} does not match the SHA-256" in refused(*words)
    assert not everything_in(place)
    assert everything_in(bundle) == everything_in(small_bundle)


def test_a_checkpoint_of_another_model(small_run, place, tmp_path):
    run = shutil.copytree(small_run.folder, tmp_path / "run")
    values = json.loads((run / "run.json").read_text())
    values["recipe"]["model"]["joint_graphs"] = 4
    (run / "run.json").write_text(json.dumps(values))
    assert "belongs to another network" in refused("export", run, "--out", place / "bundle")
    assert "belongs to another network" in refused("evaluate-checkpoint", run, "--data", small_run.data)
    assert not everything_in(place)


@pytest.fixture
def photos(small_run, tmp_path):
    """Good photographs, one cut JPEG and one text among them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for item in small_run.dataset.items[:6]:
        Image.open(item.path).convert("RGB").save(folder / f"{item.id}.jpg")
    good = sorted(folder.iterdir())[2]
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:800])
    (folder / "page.jpg").write_text("<html>404</html>")
    return folder


def test_an_unreadable_photograph_among_good_ones_is_quarantined(small_bundle, photos, place):
    finished = done("runtime", "encode-gallery", small_bundle, photos, "--out", place / "gallery")
    assert "quarantined: cut.jpg: " in finished.out
    assert "quarantined: page.jpg: " in finished.out
    assert "6 of 8 encoded on CPUExecutionProvider, 2 quarantined" in finished.out
    gallery = Gallery.open(place / "gallery")
    assert {one.id for one in gallery.quarantine} == {"cut.jpg", "page.jpg"}
    assert not {item.id for item in gallery.items} & {"cut.jpg", "page.jpg"}
    found = done("runtime", "encode-gallery", small_bundle, photos, "--out", place / "json", "--json").json
    assert {one["id"] for one in found["quarantined"]} == {"cut.jpg", "page.jpg"}
    assert found["count"] == 6
    done("gallery", "check", place / "gallery")


def test_or_it_stops_the_encoding(small_bundle, photos, place):
    words = ("runtime", "encode-gallery", small_bundle, photos, "--out", place / "gallery", "--on-error", "fail")
    assert "cut.jpg" in refused(*words)
    assert not everything_in(place)


def test_an_unreadable_photograph_of_a_data_set_is_named(small_bundle, small_run, data):
    path = data / "images" / small_run.dataset.items[50].id
    path.write_bytes(path.read_bytes()[:100])
    assert path.name in refused("runtime", "evaluate", small_bundle, "--data", data)


def test_a_photograph_to_search_for_that_cannot_be_read(small_bundle, photos, place):
    done("runtime", "encode-gallery", small_bundle, photos, "--out", place / "gallery")
    assert "page.jpg is not an image" in refused("runtime", "search", place / "gallery", "--image", photos / "page.jpg")


def test_a_gallery_of_another_bundle(small_bundle, small_run, photos, place, tmp_path):
    other = shutil.copytree(small_bundle, tmp_path / "other")
    edit_manifest(other, lambda values: values["provenance"].update(note="another"))
    done("runtime", "encode-gallery", small_bundle, photos, "--out", place / "images")
    done("runtime", "encode-captions", other, small_run.data / "captions.json", "--out", place / "captions")
    search = ("runtime", "search", place / "images", "--text", "a ball")
    done(*search)
    assert "was encoded by bundle" in refused(*search, "--bundle", other)
    similarity = ("runtime", "similarity", place / "images", place / "captions", "--out", place / "sims.npy")
    assert "was encoded by bundle" in refused(*similarity)
    assert "one of captions" in refused(
        "runtime", "similarity", place / "images", place / "images", "--out", place / "s"
    )
    assert everything_in(place) & {"sims.npy", "sims.json", "s.npy"} == set()


def test_a_gallery_whose_bundle_has_gone(small_bundle, photos, place, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    done("runtime", "encode-gallery", bundle, photos, "--out", place / "gallery")
    shutil.move(bundle, tmp_path / "moved")
    search = ("runtime", "search", place / "gallery", "--text", "a ball")
    assert "--bundle" in refused(*search)
    done(*search, "--bundle", tmp_path / "moved")


def test_an_unknown_backend(small_bundle, small_run, photos, place):
    done("runtime", "encode-gallery", small_bundle, photos, "--out", place / "gallery")
    before = everything_in(place)
    backend = ("--backend", "abacus")
    for words in (
        ("runtime", "encode-gallery", small_bundle, photos, "--out", place / "other"),
        ("runtime", "encode-captions", small_bundle, small_run.data / "captions.json", "--out", place / "other"),
        ("runtime", "search", place / "gallery", "--text", "a ball"),
        ("runtime", "evaluate", small_bundle, "--data", small_run.data),
        ("runtime", "verify", small_bundle, "--data", small_run.data),
        ("bench", "latency", small_bundle),
    ):
        assert "there is no backend 'abacus'; choose one of" in refused(*words, *backend)
    assert everything_in(place) == before


def test_an_unknown_split(small_bundle, small_run):
    for words in (("runtime", "evaluate", small_bundle), ("evaluate-checkpoint", small_run.folder)):
        message = refused(*words, "--data", small_run.data, "--split", "test,dev")
        assert "has no split 'dev'; it has train, val, test" in message


@pytest.mark.parametrize("split", ["", " , "])
def test_no_split(split, small_bundle, small_run):
    refused("runtime", "evaluate", small_bundle, "--data", small_run.data, "--split", split)


def test_five_folds_of_a_set_that_has_none(small_bundle, small_run):
    words = ("runtime", "evaluate", small_bundle, "--data", small_run.data, "--protocol", "five-folds")
    assert "12 images cannot be cut into 5 equal folds" in refused(*words)


def test_rerank_with_more_candidates_than_there_are(small_bundle, small_run, place):
    done("runtime", "encode-gallery", small_bundle, small_run.data / "images", "--out", place / "images")
    done("runtime", "encode-captions", small_bundle, small_run.data / "captions.json", "--out", place / "captions")
    done("runtime", "similarity", place / "images", place / "captions", "--out", place / "sims.npy")
    words = ("runtime", "rerank", place / "sims.npy", "--direction", "t2i", "--out", place / "candidates.npy")
    assert "choose 1 to 52" in refused(*words, "--k1", "53")
    assert not (place / "candidates.npy").exists()


def test_an_existing_gallery_is_kept(small_bundle, photos, place):
    done("runtime", "encode-gallery", small_bundle, photos, "--out", place / "gallery")
    before = {path: path.read_bytes() for path in (place / "gallery").iterdir()}
    refused("runtime", "encode-gallery", small_bundle, photos, "--out", place / "gallery")
    assert {path: path.read_bytes() for path in (place / "gallery").iterdir()} == before


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_search(text, small_bundle, photos, place):
    done("runtime", "encode-gallery", small_bundle, photos, "--out", place / "gallery")
    assert "is empty" in refused("runtime", "search", place / "gallery", "--text", text)


PATHS = [
    ("runtime encode-gallery {none} {photos} --out {out}", "there is no bundle"),
    ("runtime encode-gallery {bundle} {none} --out {out}", "there is no folder, list, archive"),
    ("runtime encode-gallery {bundle} {photos} --out {out} --regions {none}", "there is no region file"),
    ("runtime encode-captions {none} {captions} --out {out}", "there is no bundle"),
    ("runtime encode-captions {bundle} {none} --out {out}", "there is no file"),
    ("runtime search {none} --text ball", "no/where"),
    ("runtime search {gallery} --text ball --bundle {none}", "there is no bundle"),
    ("runtime search {gallery} --image {none}", "there is no file"),
    ("runtime search {gallery} --text ball --sheet {file}/sheet.html", "run.json"),
    ("runtime search {gallery} --text ball --sheet {file}/sheet.png", "run.json"),
    ("runtime similarity {none} {gallery} --out {out}", "no/where"),
    ("runtime similarity {gallery} {none} --out {out}", "no/where"),
    ("runtime rerank {none} --direction i2t", "no/where"),
    ("runtime evaluate {none} --data {data}", "there is no bundle"),
    ("runtime evaluate {bundle} --data {none}", "there is no such folder"),
    ("runtime evaluate {bundle} --data {data} --ensemble {none}", "there is no bundle"),
    ("runtime evaluate {bundle} --data {data} --regions {none}", "there is no region file"),
    ("runtime verify {none}", "there is no bundle"),
    ("runtime verify {bundle} --data {none}", "there is no such folder"),
    ("bench latency {none}", "there is no bundle"),
    ("gallery check {none}", "no/where"),
    ("compile {none}", "there is no bundle"),
    ("export {none} --out {out}", "there is no run folder"),
    ("export {run} --out {out} --data {none}", "there is no such folder"),
    ("export {run} --out {out} --regions {none}", "there is no region file"),
    ("evaluate-checkpoint {none} --data {data}", "there is no run folder"),
    ("evaluate-checkpoint {run} --data {none}", "there is no such folder"),
    ("evaluate-checkpoint {run} --data {data} --save-embeddings {file}/e.npz", "run.json"),
    ("train {none} --data {data} --out {out}", "there is no recipe"),
    ("train scenes-dsran-gru --data {none} --out {out}", "there is no such folder"),
    ("train scenes-dsran-gru --data {data} --out {out} --resume", "/out"),
    ("data pool-regions --data {none} --boxes b.npz --trunk efficientnet-lite0 --out {out}", "there is no such folder"),
    ("data pool-regions --data {data} --boxes {none} --trunk efficientnet-lite0 --out {out}", "no/where"),
    ("demo --out {out} --recipe {none}", "there is no recipe"),
]  # fmt: skip


@pytest.fixture(scope="module")
def small_gallery(small_bundle, small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-gallery") / "gallery"
    done("runtime", "encode-gallery", small_bundle, small_run.data / "images", "--out", folder)
    return folder


@pytest.mark.parametrize(("line", "message"), PATHS)
def test_a_path_to_nowhere(line, message, small_bundle, small_run, small_gallery, place, tmp_path):
    known = {"none": tmp_path / "no" / "where", "file": small_run.folder / "run.json", "bundle": small_bundle, "run": small_run.folder, "data": small_run.data, "out": place / "out",
             "photos": small_run.data / "images", "captions": small_run.data / "captions.json", "gallery": small_gallery}  # fmt: skip
    finished = dualmatch(*(word.format(**known) for word in line.split()))
    assert finished.code == 1
    last = finished.err.strip().splitlines()[-1]
    assert last.startswith("dualmatch: ")
    assert message in last
    assert "Traceback" not in finished.err
    assert not everything_in(place)


@pytest.mark.parametrize(
    "line",
    [
        "runtime search {gallery}",
        "runtime evaluate {bundle}",
        "runtime evaluate {bundle} --data {data} --protocol thirds",
        "runtime rerank sims.npy",
        "runtime encode-gallery {bundle} {data} --out x --batch-size 0",
        "runtime encode-gallery {bundle} {data} --out x --dtype float8",
        "bench latency {bundle} --batch-sizes one",
        "bench latency {bundle} --batch-sizes 1,,2",
        "compile {bundle} --flavour tensorflow",
        "export {run}",
        "train",
        "trian",
        "runtime serch",
        "--verbos",
    ],
)
def test_wrong_usage_is_two(line, small_bundle, small_run, small_gallery):
    known = {"bundle": small_bundle, "run": small_run.folder, "data": small_run.data, "gallery": small_gallery}
    message = refused(*(word.format(**known) for word in line.split()), code=2)
    assert "Usage: " in message
    assert "Error: " in message


def test_version():
    from importlib.metadata import version

    assert version("dualmatch") in done("--version").out
