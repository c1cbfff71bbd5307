"""`dualmatch report`: what it finds in a folder, what it says of the rest, and that a page holds what its sources say."""

import base64
import json
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualmatch.bench.html.found import discover
from dualmatch.bench.html.models import Model
from dualmatch.bench.html.pictures import Show
from dualmatch.bench.html.report import write_report
from dualmatch.bench.report_table import format_number
from dualmatch.runtime import streaming
from dualmatch.runtime.attention import attention_maps, overlay
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.encoders import ImageEncoder, TextEncoder
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.page import thumbnail

from .demo_fixture import dualmatch, edit_manifest, one_sentence

NASTY = '<script>alert("1")</script> & <b>"dogs"'


class Page(HTMLParser):
    """A page's text, its tags, and whether each element was closed."""

    VOID = ("meta", "img", "rect", "line", "circle", "polyline", "polygon")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def block(values, **more):
    """A latency block as `bench latency` writes it, of milliseconds."""
    found = {"unit": "ms", "avg": float(np.mean(values)), "min": min(values), "max": max(values), "count": len(values)}
    found |= {"p25": float(np.quantile(values, 0.25)), "p75": float(np.quantile(values, 0.75))}
    return found | {"p50": float(np.median(values)), "intervals": {"p50": [min(values), max(values)]}} | more


def latency_case(values, encoder="image", batch=1):
    return {
        "encoder": encoder, "batch": batch, "backend": "onnxruntime", "scenario": "single-stream", "stable": True, "request_latency": block(values),
        **{name: {"unit": "", "avg": 7.0} for name in ("item_throughput", "load_time", "first_request_latency", "harness_overhead")},
        "peak_resident_memory": {"unit": "bytes", "avg": 2.0**20},
    }  # fmt: skip


def latency_report(*cases):
    return {
        "schema": {"name": "dualmatch.bench.latency", "version": 2}, "subject": {"bundle": "b", "backend": "onnxruntime", "precision": {"image": "fp16"}},
        "environment": {"cpu": {"model": "Some CPU", "logical_cores": 2}}, "cases": list(cases),
    }  # fmt: skip


def compare_report(*rows):
    """Of (label, p50, rsum or None)."""
    cases = [
        {
            "label": label, "encoder": "image", "batch": 1, "stable": True, "pareto": None if rsum is None else True,
            "request_latency": {"p50": p50, "intervals": {"p50": [p50, p50]}, "count": 9}, "round_medians_ms": [p50],
            "times_as_fast": {"against": rows[0][0], "value": rows[0][1] / p50, "interval": [0.9, 1.1]},
            "recall": None if rsum is None else {"rsum": rsum, "source": "the gate"},
        }
        for label, p50, rsum in rows
    ]  # fmt: skip
    return {"schema": {"name": "dualmatch.bench.compare", "version": 1}, "environment": {}, "cases": cases}


def epoch(number, rsum):
    way = {"r1": 10.0 + number, "r5": 20.0, "r10": 30.0}
    return {
        "epoch": number,
        "val_rsum": rsum,
        "loss": 5.0 - number,
        "learning_rate": 0.001,
        "val": {"i2t": way, "t2i": way},
    }


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def a_run(folder, *, name="recipe", epochs=((1, 100.5), (2, 120.25), (3, 110.0))):
    write(folder / "run.json", {"recipe": {"name": name, "network": "dsran"}, "dataset": {"name": "some photos"}})
    write(folder / "log.jsonl", "".join(json.dumps(epoch(*one)) + "\n" for one in epochs))


def test_every_kind_is_found_at_any_depth_and_named_by_its_path(tmp_path, small_bundle, small_run):
    shutil.copytree(small_bundle, tmp_path / "deep/er/bundle")
    shutil.copytree(small_run.folder, tmp_path / "runs/first")
    a_run(tmp_path / "runs/second")
    write(tmp_path / "json/fast.json", latency_report(latency_case([1.0, 2.0, 4.0])))
    write(tmp_path / "json/both.json", compare_report(("fp32", 2.0, 400.0), ("fp16", 1.0, 399.0)))
    recall = dualmatch("runtime", "evaluate", small_bundle, "--data", small_run.data, "--json")
    write(tmp_path / "evaluated.json", recall.out)
    verified = dualmatch("runtime", "verify", small_bundle, "--data", small_run.data, "--json")
    write(tmp_path / "verified.json", verified.out)
    (tmp_path / "linked").symlink_to(tmp_path / "runs")  # seen once, and no loop
    found = discover(tmp_path)
    assert [one.name for one in found.bundles] == ["deep/er/bundle"]
    assert [one.name for one in found.runs] == ["linked/first", "linked/second"] or [
        one.name for one in found.runs
    ] == ["runs/first", "runs/second"]
    assert [one.name for one in found.latencies] == ["json/fast.json"]
    assert [one.name for one in found.comparisons] == ["json/both.json"]
    assert [one.name for one in found.evaluations] == ["evaluated.json"]
    assert [one.name for one in found.verifications] == ["verified.json"]
    assert found.unreadable == []
    page = Page(write_report(tmp_path).path)
    assert page.open == []
    for number in (recall.json["rsum"], verified.json["comparison"]["after"]["rsum"]):
        assert f"{number:.1f}" in page.text
    for words in (
        "deep/er/bundle",
        "json/fast.json",
        "json/both.json",
        "Some CPU, 2 cores",
        "best validation Rsum 120.2",
    ):
        assert words in page.text


def test_what_the_benchmarks_write_is_found_and_drawn(tmp_path, small_bundle, small_run):
    short = ("--budget", "0.2", "--batch-sizes", "1", "--threads", "1")
    here = ("--data", small_run.data, "--split", "test")
    for command in (
        (
            "latency",
            small_bundle,
            *short,
            "--no-stages",
            "--out",
            tmp_path / "l.json",
            "--samples",
            tmp_path / "l.jsonl",
        ),
        ("throughput", small_bundle, *short, "--out", tmp_path / "t.json", "--samples", tmp_path / "t.jsonl"),
        (
            "compare",
            small_bundle,
            *short,
            "--backends",
            "onnxruntime,onnxruntime+throttled",
            "--out",
            tmp_path / "c.json",
        ),
        ("recall", small_bundle, *here, "--rerank", "5", "--out", tmp_path / "r.json"),
    ):
        done = dualmatch("bench", *command)
        assert done.code == 0, done.err
    found = discover(tmp_path)
    assert found.unreadable == []
    assert [one.name for one in found.latencies] == ["l.json", "t.json"]
    for one in found.latencies:
        assert [len(one.samples[n]) for n in sorted(one.samples)] == [
            c["request_latency"]["count"] for c in one.values["cases"]
        ]
    assert [one.name for one in found.comparisons] == ["c.json"]
    assert [one.name for one in found.recalls] == ["r.json"]
    page = Page(write_report(tmp_path).path)
    for slice_ in found.recalls[0].values["slices"]:
        assert slice_["slice"] in page.text
    for row in found.recalls[0].values["rows"]:
        assert f"{row['rsum_interval'][0]:.1f} to {row['rsum_interval'][1]:.1f}" in page.text
    for case in found.comparisons[0].values["cases"]:
        assert case["label"] in page.text
    shutil.copytree(small_bundle, tmp_path / "bundle")  # now the first table knows whose the numbers are
    glance = write_report(tmp_path).path.read_text().partition('<section id="overview">')[2].partition("</section>")[0]
    assert f"<td>{found.recalls[0].values['rows'][0]['rsum']:.1f}</td>" in glance.replace(' class="number short"', "")
    for case in found.latencies[0].values["cases"]:
        assert format_number(case["request_latency"]["p50"]) in glance


def test_recalls_on_different_pairs_are_not_drawn_beside_each_other(tmp_path):
    report = compare_report(("fp32", 2.0, 500.0), ("fp16", 1.0, 400.0))
    write(tmp_path / "both.json", report)
    assert "do not compare" not in Page(write_report(tmp_path).path).text
    for number, case in enumerate(report["cases"]):
        case["recall"]["protocol"] = {"images": 100 + number, "captions": 500}
    write(tmp_path / "both.json", report)
    page = Page(write_report(tmp_path).path)
    assert "do not compare" in page.text
    assert "Median latency" in page.all("svg")[0]["aria-label"]


def test_a_bundle_by_itself_is_reported_beside_it(small_bundle, tmp_path):
    with pytest.raises(DualmatchError, match="say where to write it with --out"):
        write_report(small_bundle)
    write_report(small_bundle, tmp_path / "page.html")
    assert "bundle" in Page(tmp_path / "page.html").text
    assert not (small_bundle / "report.html").exists()


def test_the_same_folder_gives_the_same_bytes(tmp_path, small_bundle, small_run):
    shutil.copytree(small_bundle, tmp_path / "bundle")
    a_run(tmp_path / "run")
    data = open_dataset(small_run.data).select(["test"])
    pages = [
        write_report(tmp_path, dataset=data).path.read_bytes() for _ in range(2)
    ]  # the second time beside its own page
    assert pages[0] == pages[1]


def test_pictures_mark_the_right_answers(tmp_path, small_bundle, small_run):
    shutil.copytree(small_bundle, tmp_path / "bundle")
    data = open_dataset(small_run.data).select(["test"])
    written = write_report(tmp_path, dataset=data, num_queries=4)
    page = Page(written.path)
    assert {"Retrieval: the first 5 answers", "Failures worth looking at"} <= set(written.sections)
    images = page.all("img")
    assert images
    captions = set(data.captions)
    for image in images:
        assert image["src"].startswith("data:image/jpeg;base64,")
        assert image["alt"] in captions
    # Every sheet's row says the rank of the right answer, and marks it exactly where that is among the five.
    text = written.path.read_text()
    sheets = text[text.index('<section id="sheets">') : text.index('<section id="failures">')]
    rows = sheets.split('<div class="answers">')[1:]
    assert len(rows) == 8
    for row in rows:
        rank = int(row.split("first right answer: rank ")[1].split("<")[0])
        assert ("✓ right" in row) == (rank <= 5)
    failures = text[text.index('<section id="failures">') :].split('<div class="answers">')[1:]
    assert failures
    assert all("✓ right" in row for row in failures)  # the right answer always stands there too


def test_a_network_is_shown_where_it_looks(tmp_path, small_bundle, small_run, attentive):
    shutil.copytree(small_bundle, tmp_path / "a-bundle")
    data = open_dataset(small_run.data).select(["test"])
    written = write_report(tmp_path, dataset=data)
    assert "What the networks look at" not in written.sections
    assert "--attention" in dict(written.missing)["attention pictures"]
    shutil.copytree(attentive, tmp_path / "looks")
    written = write_report(tmp_path, dataset=data)
    assert "attention pictures" not in dict(written.missing)
    text = written.path.read_text()
    assert "a-bundle, run for this report" not in text  # one bundle of a network, the one that can show more
    section = text[text.index('<section id="attention">') :].partition("</section>")[0]
    (tmp_path / "section.html").write_text(section)
    images = Page(tmp_path / "section.html").all("img")
    kinds = ("global", "regional")
    assert len(images) == 4 * (1 + 2 * len(kinds))  # four photographs, each kind against two embeddings
    first = data.items[0]
    with ImageEncoder(attentive, attention=True) as encoder, TextEncoder(attentive) as texts:
        (maps,) = attention_maps(encoder, [first.read_bytes()], [first.id])
        caption = texts.encode([first.captions[0]])[0]
    small = thumbnail(first.read_bytes(), 240)
    wanted = [small] + [
        overlay(small, maps.heat(kind, vector=v, size=small.size)) for kind in kinds for v in (None, caption)
    ]
    for image, expected in zip(images, wanted, strict=False):
        drawn = Image.open(BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        assert np.abs(np.asarray(drawn, float) - np.asarray(expected, float)).mean() < 6  # JPEG
        assert first.captions[0] in image["alt"]
    assert np.abs(np.asarray(wanted[1], float) - np.asarray(wanted[2], float)).mean() > 0.5


def test_the_measured_recall_is_that_of_evaluate(tmp_path, small_bundle, small_run):
    shutil.copytree(small_bundle, tmp_path / "bundle")
    wanted = dualmatch("runtime", "evaluate", small_bundle, "--data", small_run.data, "--json").json["rsum"]
    done = dualmatch("report", tmp_path, "--data", small_run.data, "--split", "test", "--json")
    assert done.code == 0
    assert f"{wanted:.1f}" in Page(tmp_path / "report.html").text
    assert done.json["report"] == str(tmp_path / "report.html")
    assert [one["what"] for one in done.json["missing"]][:2] == ["training curves", "latency distributions"]


def test_samples_are_found_by_what_they_hold(tmp_path):
    values = [1.0, 2.0, 4.0] * 40
    write(tmp_path / "a.json", latency_report(latency_case(values)))
    lines = [{"case": 0, "phase": "steady", "latency_ns": int(v * 1e6)} for v in values]
    lines.append({"case": 0, "phase": "warmup", "latency_ns": 10**12})
    write(tmp_path / "other/name.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(tmp_path / "stranger.jsonl", "".join(json.dumps(line | {"latency_ns": 5}) + "\n" for line in lines))
    (report,) = discover(tmp_path).latencies
    assert report.samples[0].tolist() == [int(v * 1e6) for v in values]
    page = Page(write_report(tmp_path).path)
    assert len(page.all("polygon")) == 1
    (tmp_path / "other/name.jsonl").unlink()
    page = Page(write_report(tmp_path).path)
    assert page.all("polygon") == []
    assert "Box: middle half" in page.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "it is no JSON"),
        ('{"rsum": NaN}', "no number"),
        ('{"a": 1, "a": 2}', "stands there 2 times"),
        ({"schema": {"name": "dualmatch.bench.latency", "version": 9}}, "version 9"),
        (latency_report({}), "it lacks cases[0].encoder"),
        (latency_report(latency_case([1.0]) | {"batch": "one"}), "cases[0].batch is 'one', not a number"),
        (compare_report(("a", 1.0, None)) | {"cases": 3}, "cases is no list"),
        ({"rsum": 3, "i2t": {}, "t2i": {}, "protocol": {}}, "it lacks i2t.r1"),
        (b"\xff\xfe", "it is no"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(content, words, tmp_path):
    a_run(tmp_path / "run")
    bad = tmp_path / "bad.json"
    bad.write_bytes(content) if isinstance(content, bytes) else write(bad, content)
    done = dualmatch("report", tmp_path)
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert line.startswith("could not be read: bad.json: ")
    if not isinstance(content, bytes):
        assert words in line
    page = Page(tmp_path / "report.html")
    assert "Could not be read" in page.text
    assert "bad.json" in page.text
    assert "best validation Rsum 120.2" in page.text


def test_damaged_runs_and_bundles_are_named(tmp_path, small_bundle):
    a_run(tmp_path / "good")
    a_run(tmp_path / "cut")
    (tmp_path / "cut/log.jsonl").write_text('{"epoch": 1, "val')
    shutil.copytree(small_bundle, tmp_path / "bundle")
    (tmp_path / "bundle/text_encoder.onnx").write_bytes(b"changed")
    written = write_report(tmp_path)
    assert [name for name, _ in written.unreadable] == ["bundle", "cut"]
    assert "log.jsonl, line 1" in written.unreadable[1][1]
    assert "good" in Page(written.path).text


def test_a_manifest_with_an_odd_gate_does_not_stop_the_page(tmp_path, small_bundle):
    a_run(tmp_path / "run")
    shutil.copytree(small_bundle, tmp_path / "bundle")
    edit_manifest(tmp_path / "bundle", lambda values: values["parity"].update(comparison=7))
    assert [name for name, _ in write_report(tmp_path).unreadable] == ["bundle"]


def test_what_is_no_report_is_let_be(tmp_path):
    a_run(tmp_path / "run")
    write(tmp_path / "package.json", {"name": "something"})
    write(tmp_path / "list.json", [1, 2])
    write(tmp_path / "lines.jsonl", "not json\n")
    write(tmp_path / ".hidden/bad.json", "{")
    write(tmp_path / "gallery/index.json", "{")
    write(tmp_path / "gallery/items-00000.jsonl", '{"id": "x", "latency_ns": 1, "case": 2}')
    assert discover(tmp_path).unreadable == []


def test_an_unfinished_run_says_so(tmp_path):
    a_run(tmp_path / "run", epochs=())
    assert "no epoch finished yet" in Page(write_report(tmp_path).path).text
    a_run(tmp_path / "run", epochs=((1, 99.0),))
    assert "1 epoch, best validation Rsum 99.0 in epoch 1" in Page(write_report(tmp_path).path).text


def test_text_from_users_is_escaped_everywhere(tmp_path, small_bundle, small_run):
    place = tmp_path / "<b>dir & 'co'"
    data = shutil.copytree(small_run.data, tmp_path / "data")
    listing = json.loads((data / "captions.json").read_text())
    for entry in listing["images"]:
        entry["captions"] = [f"{NASTY} {entry['filename']}"] * 2
        (data / "images" / entry["filename"]).rename(data / "images" / f"<i>{entry['filename']}")
        entry["filename"] = f"<i>{entry['filename']}"
    (data / "captions.json").write_text(json.dumps(listing))
    shutil.copytree(small_bundle, place / "<script>bundle")
    a_run(place / "<script>run", name=NASTY)
    report = latency_report(latency_case([1.0, 2.0], encoder=NASTY))
    report["environment"]["cpu"]["model"] = NASTY
    write(place / "<script>fast.json", report)
    write(place / "both.json", compare_report((NASTY, 1.0, 300.0), ("other", 2.0, 301.0)))
    write(place / "<script>bad.json", "{")
    write_report(place, dataset=open_dataset(data).select(["test"]))
    page = Page(place / "report.html")
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag in ("script", "i", "iframe")]
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert NASTY in page.text


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("report {empty}", 1, "holds nothing to report on"),
        ("report {none}", 1, "there is no folder"),
        ("report {file}", 1, "there is no folder"),
        ("report {run} --out {run}/page.pdf", 1, "one .html file"),
        ("report {run} --out {none}/page.html", 1, "there is no folder"),
        ("report {run} --data {none}", 1, "no such folder"),
        ("report {run} --data {data} --split nosuch", 1, "no split 'nosuch'"),
        ("report {run} --data {data}", 1, "the folder holds none"),
        ("report {run} --queries 0", 2, "--queries"),
    ],
)
def test_what_cannot_be_reported_is_refused(line, code, words, tmp_path, small_run):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "file.json", "{}")
    a_run(tmp_path / "run")
    places = {name: tmp_path / name for name in ("empty", "none", "run")} | {
        "file": tmp_path / "file.json",
        "data": small_run.data,
    }
    done = dualmatch(*(part.format(**places) for part in line.split()))
    assert done.code == code
    assert words in done.err
    assert code == 2 or one_sentence(done.err)
    assert not list(tmp_path.rglob("*.html"))


def test_two_networks_stand_side_by_side_and_where_they_differ_most(small_bundle, small_run):
    """One that knows every caption, and one that takes each for the next image's."""
    data = open_dataset(small_run.data).select(["test"])
    image_of = np.array(data.caption_image)
    count = len(data.items)
    models = []
    for label, shift in (("knows", 0), ("mistakes", 1)):
        images = np.eye(count, dtype=np.float32)
        captions = (
            np.roll(images, shift, axis=1)[image_of]
            + 0.01 * images[::-1][image_of]
            + np.linspace(0, 1e-3, count, dtype=np.float32)
        )
        of_images, of_captions, _ = streaming.ranks([(images, captions)], image_of)
        models.append(
            Model(
                label=label, bundle=load_bundle(small_bundle), images=images, captions=captions, image_ranks=of_images, caption_ranks=of_captions,
                recall=streaming.evaluate([(images, captions)], caption_image=image_of),
            )
        )  # fmt: skip
    assert models[0].caption_ranks.max() == 0
    assert models[1].caption_ranks.max() >= 5
    show = Show(data, models)
    for article in "".join(show.sheet(2).body).split("<article")[1:]:
        knows, mistakes = article.split('<div class="answers">')[1:]
        assert "<b>knows</b>" in knows
        assert "rank 1<" in knows
        assert "<b>mistakes</b>" in mistakes
        assert "rank 1<" not in mistakes
    failures = "".join(show.failures().body)
    assert "farthest from right, mistakes" in failures
    assert "farthest from right, knows" not in failures
    assert "knows is right at once, mistakes is not" in failures
    assert "mistakes is right at once" not in failures
    for row in failures.split('<div class="answers">')[1:]:
        rank = row.split("first right answer: rank ")[1].split("<")[0]
        assert "✓ right" in row
        assert f">{rank}</span>" in row  # the right answer stands with its rank, first or last


def leaves(values, path=()):
    """The path of everything in a JSON value, itself included."""
    yield path
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, one in entries:
        yield from leaves(one, (*path, key))


def exchanged(values, path, junk):
    if not path:
        return junk
    copy = dict(values) if isinstance(values, dict) else list(values)
    copy[path[0]] = exchanged(values[path[0]], path[1:], junk)
    return copy


def recall_report():
    way = {"r1": 1.0, "r5": 2.0, "r10": 3.0}
    protocol = {"images": 5, "captions": 25, "split": "test"}
    slice_ = {"models": ["m"], "group": "g", "slice": "s", "captions": 9, **way, "intervals": {"r1": [0.5, 1.5]}}
    pair = {"models": ["m"], "differs": "relation", "pairs": 9, "captions": {"value": 60.0, "interval": [50.0, 70.0]}}
    row = {
        "models": ["m"],
        "rerank": 0,
        "rsum": 12.0,
        "i2t": way,
        "t2i": way,
        "protocol": protocol,
        "rsum_interval": [1.0, 20.0],
    }
    compared = {"of": {"models": ["m"]}, "against": {"models": ["n"]}, "rsum_difference": 1.0, "interval": [-1.0, 2.0]}
    return {
        "schema": {"name": "dualmatch.bench.recall", "version": 1}, "subject": {"data": {"name": "d"}, "models": [{"label": "m", "bundle": "h"}]},
        "rows": [row], "slices": [slice_], "comparisons": [compared], "hard_pairs": [pair],
    }  # fmt: skip


def compare_with_roofs():
    report = compare_report(("a", 1.0, 300.0))
    report["cases"][0]["roofline"] = {
        "intensity": 12.5, "achieved": {"operations_per_s": 3e10, "bytes_per_s": 2e9}, "percent": {"gemm": 30.0, "copy": 9.0}, "bound": "gemm",
    }  # fmt: skip
    return report | {"roofs": {"gemm": {"float32": {"avg": 1e11}}, "copy": {"avg": 1.2e10}}}


def latency_with_stages():
    case = latency_case([1.0, 2.0, 4.0]) | {"decode_time": block([1.0, 2.0])}
    return latency_report(case, latency_case([3.0, 5.0], batch=8))


@pytest.mark.parametrize("valid", [latency_with_stages, compare_with_roofs, recall_report, lambda: epoch(1, 99.0)])
def test_no_damage_to_a_file_stops_the_page(valid, tmp_path):
    """Each value in turn, objects and lists too, is exchanged for something else: the page is drawn, or the file is named."""
    a_run(tmp_path / "run")
    a_run(tmp_path / "other")
    good = valid()
    place = tmp_path / ("other/log.jsonl" if "epoch" in good else "file.json")
    write(place, good)
    assert write_report(tmp_path).unreadable == ()
    named = 0
    for path in leaves(good):
        for junk in ("x", None, -1, 0, [], {}, [1], True, 1e300):
            write(place, exchanged(good, path, junk))
            written = write_report(tmp_path)
            Page(written.path)
            named += bool(written.unreadable)
    assert named > 50
