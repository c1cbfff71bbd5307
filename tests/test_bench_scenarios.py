"""Offline mode, the stages, the fresh process of a case, and the two commands with every file they write."""

import csv
import io
import json
import os
import threading
from datetime import datetime

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from dualmatch.bench import bundle_latency, device
from dualmatch.bench.aiperf import record_metric
from dualmatch.bench.case import Bench, Case
from dualmatch.bench.feeds import random_feeds
from dualmatch.bench.measure import Plan, Samples
from dualmatch.bench.offline import offline
from dualmatch.bench.stages import bound_stages, graph_stages, measure_stages, preparing_stages, sample_items
from dualmatch.bench.worker import Worker, measure_in_process
from dualmatch.runtime.backends import open_encoder
from dualmatch.runtime.backends.onnxruntime import BoundRun
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.encoders import ImageEncoder, TextEncoder
from dualmatch.runtime.errors import DualmatchError

from .demo_fixture import dualmatch

MS = 1_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now

    def spend(self, nanoseconds: float) -> None:
        self.now += round(nanoseconds)


# Offline


def test_offline_rate_is_items_over_time() -> None:
    clock = Clock()
    result = offline(lambda _: clock.spend(20 * MS), Plan(budget_s=10), batch=8, clock=clock)
    assert result.stable
    assert result.items_per_s == pytest.approx(400)
    assert result.interval() == pytest.approx((400, 400))
    assert set(result.samples.raw) == {20 * MS}
    assert clock.now < 8e9  # it stopped when the windows agreed
    # Windows close at the end of a call, so no call is counted in two of them or in none.
    assert result.window_rates == pytest.approx(np.full(len(result.edges), 400.0))


def test_a_pause_between_calls_counts_offline() -> None:
    # The latency of a call does not see what lies between two calls; the rate must.
    clock = Clock()

    def workload(_: int) -> None:
        clock.spend(10 * MS)

    def paused() -> int:
        clock.spend(5 * MS)  # every reading of the clock, of which each call has two
        return clock.now

    result = offline(workload, Plan(budget_s=10), batch=1, clock=paused)
    assert np.median(result.samples.raw) == 15 * MS
    assert result.items_per_s == pytest.approx(1000 / 20)


def test_an_offline_run_that_slows_down_is_unstable() -> None:
    clock = Clock()
    result = offline(lambda call: clock.spend(MS * 1.002**call), Plan(budget_s=5), batch=1, clock=clock)
    assert not result.stable
    assert clock.now < 8e9


def test_the_rates_interval_covers_the_truth() -> None:
    generator, hits = np.random.default_rng(5), []
    for _ in range(100):
        clock = Clock()
        plan = Plan(budget_s=20, tolerance=0.001)
        result = offline(lambda _: clock.spend(generator.exponential(10 * MS)), plan, batch=1, clock=clock)  # noqa: B023
        low, high = result.interval()
        hits.append(low <= 100 <= high)
    assert np.mean(hits) >= 0.85


def test_streams_run_side_by_side_and_give_every_call_its_number() -> None:
    seen, together, lock = [], threading.Barrier(2, timeout=20), threading.Lock()

    def workload(number: int) -> None:
        if number < 2:
            together.wait()  # passes only when two calls are in work at once
        with lock:
            seen.append(number)

    result = offline(workload, Plan(budget_s=0.05), batch=1, streams=2)
    assert sorted(seen) == list(range(len(seen)))
    assert (np.diff(result.finished) >= 0).all()


def test_an_error_in_a_stream_reaches_the_caller() -> None:
    def fail(number: int) -> None:
        if number == 7:
            raise DualmatchError("broken graph")

    with pytest.raises(DualmatchError, match="broken graph"):
        offline(fail, Plan(budget_s=1), batch=1, streams=3)
    with pytest.raises(DualmatchError, match="at least one stream"):
        offline(fail, Plan(), batch=1, streams=0)


# Stages


def test_stages_are_told_apart_and_add_up() -> None:
    clock = Clock()
    costs = {"decode": 3, "pre_process": 2, "compute": 7}
    stages = [(name, lambda value, cost=cost: clock.spend(cost * MS) or value) for name, cost in costs.items()]
    found = measure_stages(stages, [[0], [1]], budget_s=1, clock=clock)
    assert {name: set(samples.raw) for name, samples in found.items()} == {
        **{name: {cost * MS} for name, cost in costs.items()},
        "end_to_end": {12 * MS},
    }
    assert len(found["compute"]) == pytest.approx(1000 / 12, abs=2)


def test_slow_stages_still_earn_a_median() -> None:
    clock = Clock()
    found = measure_stages([("compute", lambda _: clock.spend(9e9))], [[0]], budget_s=0.1, clock=clock)
    assert found["compute"].percentile(0.5).value == 9e9


@pytest.mark.parametrize("side", ["image", "text"])
def test_the_stages_end_in_the_encoders_own_embeddings(side, demo) -> None:
    bundle = load_bundle(demo.bundle)
    items = sample_items("scenes", side, 3)
    with open_encoder(bundle, side, backend="onnxruntime", threads=1) as session:
        feeds = random_feeds(session.inputs, batch=3, length=5, vocabulary_size=20)
        value = items
        for _, stage in [*preparing_stages(bundle, side, feeds), *graph_stages(session)]:
            value = stage(value)
    with (ImageEncoder if side == "image" else TextEncoder)(bundle, threads=1) as encoder:
        np.testing.assert_array_equal(next(iter(value.values())), encoder.encode(items))


def test_a_bound_run_is_copied_in_computed_and_copied_out() -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    bound = BoundRun(session, "cpu")
    bound.run({"x": np.zeros((2, 4), np.float32)})
    stages = bound_stages(bound)
    assert [name for name, _ in stages] == ["copy_in", "compute", "copy_out"]
    value = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    for _, stage in stages:
        value = stage(value)
    np.testing.assert_array_equal(value[0], 2 * np.arange(8).reshape(2, 4))
    assert onnx.checker.check_model(model) is None


def test_items_of_a_small_data_set_are_used_again() -> None:
    items = sample_items("scenes", "text", 12_000)
    assert len(items) == 12_000
    assert items[0] == items[11_000]  # 2200 scenes of five captions


# A fresh process


def test_a_case_has_a_process_of_its_own(demo) -> None:
    case = Case(bundle=demo.bundle, encoder="text", threads=1, plan=Plan(budget_s=0.1))
    block = np.ones(40_000_000)  # 320 MB here must not be seen there
    result = measure_in_process(case)
    assert 2**25 < result.peak_memory_bytes < 2**28 < block.nbytes
    assert result.provider == "CPUExecutionProvider"
    assert result.load_ns > 0


def test_refusals_cross_the_process_as_one_sentence(demo, tmp_path) -> None:
    for case, words in (
        (Case(bundle=tmp_path, encoder="text"), "there is no bundle|manifest"),
        (Case(bundle=demo.bundle, encoder="text", backend="tensorrt-of-course"), "there is no backend"),
        (Case(bundle=demo.bundle, encoder="text", backend="torch-eager"), "--run"),
    ):
        with pytest.raises(DualmatchError, match=words):
            measure_in_process(case)


def test_a_process_that_dies_is_told(demo) -> None:
    with Worker(Case(bundle=demo.bundle, encoder="text", backend="null")) as worker:
        os.kill(worker._process.pid, 9)
        with pytest.raises(DualmatchError, match="ended by itself: signal 9"):
            worker.call("facts")


def test_an_unforeseen_error_over_there_is_not_swallowed(demo) -> None:
    with (
        Worker(Case(bundle=demo.bundle, encoder="text", backend="null")) as worker,
        pytest.raises(RuntimeError, match="AttributeError"),
    ):
        worker.call("no_such_method")


def test_the_null_backend_measures_the_harness_in_every_scenario(demo) -> None:
    for scenario in ("single-stream", "server", "offline"):
        plan = Plan(budget_s=0.3)
        bench = Bench(Case(bundle=demo.bundle, encoder="image", backend="null", scenario=scenario, rate=300, plan=plan))
        result = bench.result()
        assert result.provider == "null"
        assert np.median(result.raw) < 50 * MS  # loose by three orders: only a fault of the harness reaches it


# AIPerf's schema

AIPERF_STATS = {
    "unit",
    "avg",
    "p1",
    "p5",
    "p10",
    "p25",
    "p50",
    "p75",
    "p90",
    "p95",
    "p99",
    "min",
    "max",
    "std",
    "count",
    "sum",
}
OWN_STATS = {"p99.9", "intervals", "interval", "interval_confidence", "withheld", "early_stopping"}


def test_a_record_metric_has_aiperfs_statistics() -> None:
    raw = np.arange(1, 1001) * MS
    block = record_metric(raw, Samples(raw))
    assert set(block) >= AIPERF_STATS
    assert block["count"] == 1000
    assert (block["min"], block["p1"], block["p50"], block["p99"], block["max"]) == (1, 10, 500, 990, 1000)
    assert block["sum"] == pytest.approx(500_500)
    assert block["std"] == pytest.approx(np.std(np.arange(1000), ddof=1))
    assert "p99.9" not in block
    assert block["withheld"] == {"p99.9": "needs 6636 samples, has 1000"}
    assert all(low <= block[name] <= high for name, (low, high) in block["intervals"].items())


def test_bench_latency_leaves_aiperfs_files(demo, tmp_path) -> None:
    files = {"--out": "report.json", "--samples": "samples.jsonl", "--csv": "metrics.csv", "--aiperf": "aiperf"}
    options = [word for option, name in files.items() for word in (option, tmp_path / name)]
    finished = dualmatch(
        "bench", "latency", demo.bundle, "--batch-sizes", "2", "--budget", "0.3", "--threads", "1", *options
    )
    assert finished.code == 0
    for words in ("95 % intervals", "decode", "tokenise", "end to end", "The harness itself"):
        assert words in " ".join(finished.out.split())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["environment"]["after"]["load_average"]
    assert report["subject"]["bundle_hash"] == load_bundle(demo.bundle).hash
    exports = sorted((tmp_path / "aiperf").iterdir())
    assert [folder.name.split("-")[0] for folder in exports] == ["image", "text"]
    for folder, case in zip(exports, report["cases"], strict=True):
        export = json.loads((folder / "profile_export_aiperf.json").read_text())
        assert export["schema_version"] == "1.5"
        for name in ("request_latency", "request_throughput", "request_count", "benchmark_duration", "compute_time"):
            assert set(export[name]) <= AIPERF_STATS | OWN_STATS
            assert export[name] == case[name]
        assert set(export["request_throughput"]) == {"unit", "avg"}  # a derived metric: no count, no percentiles
        assert datetime.fromisoformat(export["start_time"]) < datetime.fromisoformat(export["end_time"])
        records = [json.loads(line) for line in (folder / "profile_export.jsonl").read_text().splitlines()]
        assert len(records) == export["request_count"]["avg"] == export["request_latency"]["count"]
        first = records[0]
        assert first["metadata"]["benchmark_phase"] == "profiling"
        took = first["metadata"]["request_end_ns"] - first["metadata"]["request_start_ns"]
        assert first["metrics"]["request_latency"] == {"value": took / 1e6, "unit": "ms"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "metrics.csv").read_text())))
    latency = next(row for row in rows if row["metric"] == "request_latency" and row["case"].startswith("text"))
    assert float(latency["p50"]) == report["cases"][1]["request_latency"]["p50"]
    phases = {json.loads(line)["phase"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()}
    assert phases == {"warmup", "steady", "decode", "pre_process", "tokenise", "compute", "end_to_end"}


def test_the_open_loop_from_the_command_line(demo, tmp_path) -> None:
    options = ("--batch-sizes", "1", "--budget", "0.6", "--rate", "200", "--no-stages", "--backend", "null", "--json")
    finished = dualmatch("bench", "latency", demo.bundle, *options, "--samples", tmp_path / "s.jsonl")
    case = finished.json["cases"][0]
    assert case["scenario"] == "server"
    assert case["offered_rate"]["avg"] == 200
    assert case["request_throughput"]["avg"] == pytest.approx(200, rel=0.5)
    assert case["queue_time"]["max"] >= 0
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    steady = [line for line in lines if line["case"] == 0 and line["phase"] == "steady"]
    assert len(steady) == case["request_latency"]["count"]
    assert all(line["started_ns"] >= line["scheduled_ns"] for line in steady)


def test_strict_fails_where_a_load_is_too_much(demo) -> None:
    options = ("--batch-sizes", "8", "--budget", "0.2", "--rate", "20000", "--no-stages", "--threads", "1")
    finished = dualmatch("bench", "latency", demo.bundle, *options, "--strict")
    assert finished.code == 1
    assert "OVERLOADED" in finished.out
    assert "UNSTABLE, and --strict" in finished.err
    assert "Traceback" not in finished.err


def test_bench_throughput_from_photographs(demo) -> None:
    options = ("--batch-sizes", "4", "--budget", "0.4", "--streams", "2", "--end-to-end", "--threads", "1")
    found = dualmatch("bench", "throughput", demo.bundle, *options, "--json").json
    for case in found["cases"]:
        assert case["scenario"] == "offline"
        assert case["item_throughput"]["unit"] == "items/sec"
        assert case["item_throughput"]["avg"] == pytest.approx(4 * case["request_throughput"]["avg"])
    assert found["subject"]["end_to_end"] is True
    assert found["subject"]["workers"] == 2


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("latency {none}", 1, "there is no bundle"),
        ("latency {bundle} --rate 0", 2, "--rate"),
        ("latency {bundle} --workers 2", 2, "--rate"),
        ("latency {bundle} --budget 0", 2, "--budget"),
        ("latency {bundle} --batch-sizes 1 --data {none}", 1, "there is no such folder"),
        ("latency {bundle} --batch-sizes 0", 1, "at least 1"),
        ("latency {bundle} --length 4000", 1, "cuts them at"),
        ("throughput {none}", 1, "there is no bundle"),
        ("throughput {bundle} --streams 0", 2, "--streams"),
        ("throughput {bundle} --batch-sizes x", 2, "whole numbers"),
        ("throughput {bundle} --batch-sizes 1 --backend null+sleepy", 1, "there is no behaviour"),
    ],
)
def test_what_cannot_be_measured_is_refused(line, code, words, demo, tmp_path) -> None:
    finished = dualmatch("bench", *line.format(bundle=demo.bundle, none=tmp_path / "none").split())
    assert finished.code == code
    assert words in finished.err
    assert "Traceback" not in finished.err


# Device memory


def test_device_memory_is_summed_over_gpus_or_none(monkeypatch) -> None:
    class Nvml:
        class NVMLError(Exception): ...

        nvmlInit = nvmlShutdown = staticmethod(lambda: None)
        nvmlDeviceGetCount = staticmethod(lambda: 2)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
        nvmlDeviceGetMemoryInfo = staticmethod(lambda index: type("Memory", (), {"used": 1000 * (index + 1)}))

    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml)
    assert device.device_memory_bytes() == 3000

    def no_driver() -> None:
        raise Nvml.NVMLError

    monkeypatch.setattr(Nvml, "nvmlInit", no_driver)
    assert device.device_memory_bytes() is None


@pytest.mark.parametrize(("rate", "whole"), [(None, False), (150.0, True)])
def test_only_the_open_loop_spends_its_whole_budget(rate, whole, small_bundle, monkeypatch) -> None:
    plans = []

    def measured(case):
        plans.append(case.plan)
        raise DualmatchError("seen")

    monkeypatch.setattr(bundle_latency, "measure_in_process", measured)
    with pytest.raises(DualmatchError, match="seen"):
        bundle_latency.bench_latency(small_bundle, rate=rate, plan=Plan(budget_s=12))
    requests = 150 * 12  # the most that such a run can have: a stall in a thousand is among them
    assert (plans[0].wanted_samples > requests) is whole
    assert plans[0].budget_s == 12
