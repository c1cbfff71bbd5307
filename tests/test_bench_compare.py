"""Interleaving, ratios with intervals, recall beside speed, and the check against a baseline."""

import json
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest

from dualmatch.bench import compare as compare_module
from dualmatch.bench.baseline import against_baseline
from dualmatch.bench.bundle_compare import Comparison, _on_front
from dualmatch.bench.case import Bench, Case
from dualmatch.bench.compare import Variant, compare, ratio
from dualmatch.bench.pareto import front, picture
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.evaluate import evaluate_bundles

from .demo_fixture import dualmatch

MS = 1_000_000


# Ratios


def test_a_drift_of_the_machine_drops_out_of_the_ratio() -> None:
    generator = np.random.default_rng(0)
    drift = np.linspace(1, 2, 10)  # the machine slows down to half
    reference = 10 * MS * drift * generator.normal(1, 0.01, 10)
    variant = 8 * MS * drift * generator.normal(1, 0.01, 10)
    found = ratio(variant, reference)
    assert found.value == pytest.approx(1.25, rel=0.02)
    assert found.low <= 1.25 <= found.high
    assert found.high - found.low < 0.05  # unpaired rounds would differ by the drift


def test_the_ratios_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(1)
    hits, same = [], []
    for _ in range(300):
        noise = generator.lognormal(0, 0.05, (3, 10))
        found = ratio(5 * MS * noise[0], 10 * MS * noise[1], seed=1)
        hits.append(found.low <= 2 <= found.high)
        again = ratio(5 * MS * noise[2], 5 * MS * noise[0], seed=1)
        same.append(again.low <= 1 <= again.high)
    assert np.mean(hits) >= 0.88
    assert np.mean(same) >= 0.88


def test_two_runs_agree_although_something_else_took_a_third_of_the_rounds() -> None:
    generator = np.random.default_rng(2)

    def run():
        noise = generator.lognormal(0, 0.02, (2, 10)) + (generator.random((2, 10)) < 0.3) * generator.exponential(
            1, (2, 10)
        )
        return ratio(5 * MS * noise[0], 10 * MS * noise[1])

    pairs = [(run(), run()) for _ in range(200)]
    assert np.mean([a.low <= b.high and b.low <= a.high for a, b in pairs]) >= 0.97
    assert np.mean([a.low <= 2 <= a.high for a, _ in pairs]) >= 0.88
    # Half of all pairs of means would lie more than 15 % apart.
    assert np.median([abs(np.log(a.value / b.value)) for a, b in pairs]) < 0.05


def test_variants_take_turns_that_read_the_same_backwards(monkeypatch) -> None:
    order = []

    class FakeWorker:
        def __init__(self, case) -> None:
            self.name = case.backend

        def call(self, method, *arguments):
            if method == "warm_up":
                return True
            if method == "facts":
                return {"provider": self.name, "load_ns": 1}
            order.append(self.name)
            return np.full(5, MS)

        def close(self) -> None:
            order.append(f"close {self.name}")

    monkeypatch.setattr(compare_module, "Worker", FakeWorker)
    variants = [Variant(label=name, case=Case(bundle=None, encoder="text", backend=name)) for name in "abc"]
    results = compare(variants, budget_s=1)
    assert order == [*"abccba" * 10, "close a", "close b", "close c"]
    assert [len(result.blocks) for result in results] == [20, 20, 20]
    assert results[0].round_medians.tolist() == [MS] * 10
    with pytest.raises(DualmatchError, match="at least two variants"):
        compare(variants[:1], budget_s=1)


# Pareto


def test_the_front_is_what_no_other_beats_in_both() -> None:
    points = [(1.0, 300.0), (2.0, 310.0), (2.5, 305.0), (2.0, 310.0), (3.0, 320.0), (3.0, 319.0)]
    assert front(points) == [True, True, False, True, True, False]


def test_the_picture_is_well_formed_and_says_its_numbers() -> None:
    svg = picture("image <encoder>", [("fp32 a&b", 12.5, 350.0), ("int8", 3.25, 348.5), ("slow", 20.0, 340.0)])
    root = ET.fromstring(svg)
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert root.find("svg:title", space).text == "image <encoder>"
    assert "int8: 3.25 ms, Rsum 348.5" in root.find("svg:desc", space).text
    circles = root.findall(".//svg:circle", space)
    circles = [circle for circle in circles if float(circle.get("cy")) < 250]  # those below are the legend's
    assert ["hollow" in circle.get("class") for circle in circles] == [False, False, True]
    x = [float(circle.get("cx")) for circle in circles]
    y = [float(circle.get("cy")) for circle in circles]
    assert x[1] < x[0] < x[2]  # faster is further left
    assert y[0] < y[1] < y[2]  # higher recall is further up
    assert all(46 < value < 346 for value in x)


def test_one_variant_alone_can_be_drawn() -> None:
    assert "<circle" in picture("one", [("only", 1.0, 100.0)])


# Baseline


def report(medians, *, cpu="Some CPU", label="fp32 onnxruntime"):
    return {
        "schema": {"name": "dualmatch.bench.compare", "version": 1},
        "environment": {"cpu": {"model": cpu, "logical_cores": 2}, "gpus": None},
        "cases": [{"label": label, "encoder": "image", "batch": 1, "round_medians_ms": list(medians)}],
    }


@pytest.fixture
def baseline(tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(report(np.random.default_rng(0).normal(10, 0.1, 10))))
    return path


@pytest.mark.parametrize(("factor", "failed"), [(1.0, False), (1.05, False), (1.2, True), (0.5, False)])
def test_a_slowdown_beyond_the_limit_fails(factor, failed, baseline) -> None:
    now = report(factor * np.random.default_rng(1).normal(10, 0.1, 10))
    (slowdown,) = against_baseline(now, baseline, 0.1)
    assert slowdown.failed is failed
    assert slowdown.value == pytest.approx(factor, rel=0.03)
    assert slowdown.low <= factor <= slowdown.high or slowdown.value == pytest.approx(factor, rel=0.02)
    assert ("SLOWER" in str(slowdown)) is failed


def test_a_noisy_slowdown_that_may_be_none_does_not_fail(baseline) -> None:
    noisy = [5, 20, 6, 18, 12, 11.5, 7, 25, 30, 6]
    (slowdown,) = against_baseline(report(noisy), baseline, 0.1)
    assert slowdown.value > 1.1
    assert not slowdown.failed


def test_a_baseline_that_cannot_be_compared_is_refused(baseline, tmp_path) -> None:
    with pytest.raises(DualmatchError, match="measured on Some CPU, 2 cores, this is Other CPU"):
        against_baseline(report([1.0] * 4, cpu="Other CPU"), baseline, 0.1)
    with pytest.raises(DualmatchError, match="has cases that this run has not: fp32 onnxruntime, image, batch 1"):
        against_baseline(report([1.0] * 4, label="fp16 onnxruntime"), baseline, 0.1)
    for text in ("{}", "[1]", '{"schema": {"name": "dualmatch.bench.latency", "version": 2}}'):
        other = tmp_path / "other.json"
        other.write_text(text)
        with pytest.raises(DualmatchError, match="not a report"):
            against_baseline(report([1.0] * 4), other, 0.1)


# The command


@pytest.fixture(scope="module")
def compared(demo, tmp_path_factory):
    """Half the bundle's backends deliberately slowed down, recall measured here."""
    folder = tmp_path_factory.mktemp("compared")
    options = ("--backends", "onnxruntime,onnxruntime+throttled", "--threads", "1")
    finished = dualmatch(
        *("bench", "compare", demo.bundle, *options, "--encoders", "image", "--batch-sizes", "4", "--budget", "0.5"),
        *("--data", demo.photos, "--out", folder / "report.json", "--pictures", folder / "pictures"),
        *("--samples", folder / "samples.jsonl"),
    )
    assert finished.code == 0, finished.err
    return SimpleNamespace(folder=folder, out=finished.out, report=json.loads((folder / "report.json").read_text()))


def test_a_throttled_backend_is_ranked_slower(compared) -> None:
    plain, throttled = compared.report["cases"]
    assert throttled["label"].endswith("onnxruntime+throttled")
    assert throttled["times_as_fast"]["interval"][1] < 1
    assert plain["times_as_fast"]["value"] == 1
    assert plain["pareto"] is True
    assert throttled["pareto"] is False  # the same recall, slower


def test_recalls_of_other_pairs_make_no_front() -> None:
    def result(label, latency, rsum, images):
        return compare_module.VariantResult(
            label=label, encoder="image", batch=1, provider="x", blocks=(np.full(5, latency),) * 8, warmed_up=True, load_ns=1,
            recall={"rsum": rsum, "protocol": {"images": images}, "source": "recorded by the gate at export"},
        )  # fmt: skip

    slow, quick, elsewhere = (
        result("slow", 2e6, 300.0, 100),
        result("quick", 1e6, 301.0, 100),
        result("x", 3e6, 500.0, 9),
    )
    assert _on_front([slow, quick]) == [False, True]
    assert _on_front([slow, quick, elsewhere]) == [None, None, None]
    report = Comparison(results=(slow, quick, elsewhere), subject={}, environment={})
    assert report.pictures() == {}
    assert "recall is of different pairs" in " ".join(map(str, report.tables().renderables))


def test_recall_stands_beside_speed(compared, demo) -> None:
    wanted = evaluate_bundles([load_bundle(demo.bundle)], open_dataset(demo.photos).select(["test"])).rsum
    plain, throttled = compared.report["cases"]
    assert plain["recall"]["rsum"] == throttled["recall"]["rsum"] == pytest.approx(wanted, abs=1e-6)
    assert f"measured on {demo.photos}" in compared.out.replace("\n", "")


def test_torch_is_a_variant_with_a_recall_of_its_own(compared, demo) -> None:
    bench = Bench(Case(bundle=demo.bundle, encoder="image", backend="torch-eager", run=demo.run, threads=1))
    assert "torch" in bench.facts()["provider"]
    assert len(bench.block(0.01, 5)) >= 5
    found = bench.recall(str(demo.photos), ["test"])
    assert found["rsum"] == pytest.approx(compared.report["cases"][0]["recall"]["rsum"], abs=3)


def test_the_commands_files(compared) -> None:
    drawn = {path.name for path in (compared.folder / "pictures").iterdir()}
    assert drawn == {"pareto-image-4.svg", "roofline-image.svg"}
    lines = [json.loads(line) for line in (compared.folder / "samples.jsonl").read_text().splitlines()]
    for case in compared.report["cases"]:
        own = [line["latency_ns"] for line in lines if line["label"] == case["label"]]
        assert len(own) == case["request_latency"]["count"]
        low, high = case["request_latency"]["intervals"]["p50"]
        assert low <= case["request_latency"]["p50"] <= high


def test_a_baseline_far_faster_fails_the_command(compared, demo, tmp_path) -> None:
    faster = json.loads((compared.folder / "report.json").read_text())
    faster["cases"] = faster["cases"][:1]
    faster["cases"][0]["round_medians_ms"] = [median / 100 for median in faster["cases"][0]["round_medians_ms"]]
    (tmp_path / "baseline.json").write_text(json.dumps(faster))
    options = ("--backends", "onnxruntime,null", "--threads", "1", "--encoders", "image", "--batch-sizes", "4")
    finished = dualmatch(
        *("bench", "compare", demo.bundle, *options, "--budget", "0.2", "--baseline", tmp_path / "baseline.json"),
        *("--fail-if-slower", "50%"),
    )
    assert finished.code == 1
    assert "slower than the baseline by more than 50%" in finished.err
    assert "SLOWER" in finished.out


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("{bundle}", 1, "at least two variants"),
        ("{bundle} --backends onnxruntime,onnxruntime", 1, "given twice"),
        ("{bundle} --backends onnxruntime,openvein", 1, "there is no backend"),
        ("{bundle} --backends onnxruntime,torch-eager", 1, "--run"),
        ("{bundle} {none}", 1, "there is no bundle"),
        ("{bundle} --baseline {none}", 1, "there is no baseline"),
        ("{bundle} --fail-if-slower much", 2, "percentage"),
        ("{bundle} --encoders audio", 2, "image, text, or both"),
        ("", 2, "BUNDLE"),
    ],
)
def test_what_cannot_be_compared_is_refused(line, code, words, demo, tmp_path) -> None:
    finished = dualmatch("bench", "compare", *line.format(bundle=demo.bundle, none=tmp_path / "none").split())
    assert finished.code == code
    assert words in finished.err
    assert "Traceback" not in finished.err
