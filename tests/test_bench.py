"""The measuring core, on a clock that the tests turn by hand: nothing here waits, and no real time is asserted on."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from dualmatch.bench import environment as env
from dualmatch.bench.latency import (
    LatencyReport,
    NullSession,
    measure_session,
    random_feeds,
)
from dualmatch.bench.measure import Plan, Samples, measure, samples_needed
from dualmatch.bench.report_table import format_number
from dualmatch.runtime.backends import Session, TensorSpec, open_session
from dualmatch.runtime.errors import DualmatchError

MS = 1_000_000
TICK = 1_000


class FakeClock:
    """Every reading costs `TICK`; `spend` stands for work."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += TICK
        return self.now

    def spend(self, nanoseconds: float) -> None:
        self.now += round(nanoseconds)

    def workload(self, costs: Iterator[float]) -> Callable[[], None]:
        return lambda: self.spend(next(costs))


def constant(value: float) -> Iterator[float]:
    return (value for _ in count())


# Samples and percentiles


def test_percentiles_need_the_samples_of_loadgen() -> None:
    assert [samples_needed(q) for q in (0.5, 0.9, 0.99, 0.999)] == [11, 64, 662, 6636]
    assert samples_needed(0.1) == 64  # two below are needed there


def test_the_early_stopping_estimate_discards_as_loadgen_does() -> None:
    # A published LoadGen summary: 2048 queries, 172 of them discarded for the 90th percentile, so the 173rd largest is it.
    assert Samples(np.arange(1, 2049)).early_stopping(0.9) == 2048 - 172
    assert Samples(np.arange(64)).early_stopping(0.9) == 63
    assert Samples(np.arange(63)).early_stopping(0.9) is None


def test_the_early_stopping_estimate_is_rarely_below_the_truth() -> None:
    generator = np.random.default_rng(3)
    truth = -np.log(0.1) * 1e9
    below = [Samples(generator.exponential(1e9, 200).astype(np.int64)).early_stopping(0.9) < truth for _ in range(1500)]
    assert np.mean(below) <= 0.02  # promised: 0.01


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_a_percentile_is_withheld_until_it_is_earned(quantile) -> None:
    needed = samples_needed(quantile)
    assert Samples(np.arange(needed - 1)).percentile(quantile) is None
    assert Samples(np.arange(needed)).percentile(quantile) is not None


def test_a_percentile_is_the_nearest_rank_in_any_order() -> None:
    raw = np.random.default_rng(0).permutation(np.arange(1, 1001))
    samples = Samples(raw)
    assert [samples.percentile(q).value for q in (0.5, 0.9, 0.99)] == [500, 900, 990]


def test_the_median_interval_has_the_ranks_of_the_sign_test() -> None:
    # n = 100 at 95%: ranks 40 and 61 in every table of the binomial interval for a median.
    median = Samples(np.arange(1, 101)).percentile(0.5)
    assert (median.low, median.high) == (40, 61)


@pytest.mark.parametrize(("quantile", "n"), [(0.5, 25), (0.9, 80), (0.99, 700)])
def test_the_interval_covers_the_true_quantile_as_often_as_it_says(quantile, n) -> None:
    generator = np.random.default_rng(7)
    truth = -np.log(1 - quantile) * 1e9
    hits = []
    for _ in range(600):
        p = Samples(generator.exponential(1e9, n).astype(np.int64)).percentile(quantile)
        assert p.low <= p.value <= p.high
        hits.append(p.low <= truth <= p.high)
    assert np.mean(hits) >= 0.93  # exact intervals cover at least 95%; 0.93 is two standard errors of 600 trials below


def test_stalls_show_in_p99_and_not_in_p50() -> None:
    raw = np.full(1000, 2 * MS)
    raw[::50] = 80 * MS  # one call in fifty
    samples = Samples(raw)
    assert samples.percentile(0.5).value == 2 * MS
    assert samples.percentile(0.9).value == 2 * MS
    assert samples.percentile(0.99).value == 80 * MS


# Warm-up, windows, stability


def test_a_steady_workload_stops_as_soon_as_p99_is_earned() -> None:
    clock = FakeClock()
    result = measure(clock.workload(constant(5 * MS)), Plan(budget_s=10), clock=clock)
    assert result.stable
    assert result.warmed_up
    assert len(result.warmup) == 3
    assert len(result.samples) == 700  # a window, a twentieth of the budget, holds 100 calls
    assert clock.now < 6e9
    assert set(result.samples.raw) == {5 * MS + TICK}  # one reading of the clock lies inside the timed span


def test_a_fast_workload_is_still_measured_in_three_windows() -> None:
    clock = FakeClock()
    result = measure(clock.workload(constant(MS / 10)), Plan(budget_s=10), clock=clock)
    assert len(result.windows[0]) > 662
    assert len(result.windows) == 3


def test_warmup_is_kept_out_of_the_steady_state() -> None:
    clock = FakeClock()
    costs = (10 * MS if call < 40 else MS for call in count())
    result = measure(clock.workload(costs), Plan(budget_s=4), clock=clock)
    assert result.warmed_up
    assert result.stable
    assert result.samples.raw.max() == MS + TICK
    assert max(window.max() for window in result.warmup) == 10 * MS + TICK


@pytest.mark.parametrize("growth", [1.02, 1.0003])
def test_a_drifting_workload_is_unstable_and_stays_within_its_budget(growth) -> None:
    # At 1.0003 a call, neighbouring windows nearly agree and only the median of all samples gives the drift away.
    clock = FakeClock()
    result = measure(clock.workload(MS * growth**call for call in count()), Plan(budget_s=2), clock=clock)
    assert not result.stable
    assert clock.now < 3e9


def test_a_late_step_is_unstable_though_the_last_windows_agree() -> None:
    clock = FakeClock()
    costs = (MS if call < 5000 else 2 * MS for call in count())
    plan = Plan(budget_s=10, wanted_samples=10**9)
    result = measure(clock.workload(costs), plan, clock=clock)
    medians = [np.median(window) for window in result.windows]
    assert medians[-1] == medians[-2] == medians[-3] == 2 * MS + TICK
    assert not result.stable


def test_rare_stalls_leave_a_workload_stable_and_stay_in_the_samples() -> None:
    clock = FakeClock()
    result = measure(clock.workload(80 * MS if call % 50 == 49 else MS for call in count()), Plan(), clock=clock)
    assert result.stable
    assert result.samples.percentile(0.5).value == MS + TICK
    assert result.samples.percentile(0.99).value == 80 * MS + TICK


def test_warmup_that_never_settles_ends_at_its_share() -> None:
    clock = FakeClock()
    result = measure(clock.workload(MS * 1.02**call for call in count()), Plan(budget_s=4), clock=clock)
    assert not result.warmed_up
    assert sum(window.sum() for window in result.warmup) < 0.6 * 4e9


def test_a_call_slower_than_the_budget_still_earns_a_median() -> None:
    clock = FakeClock()
    result = measure(clock.workload(constant(5e9)), Plan(budget_s=1), clock=clock)
    assert len(result.samples) == 15
    assert result.samples.percentile(0.5).value == 5e9 + TICK
    assert result.samples.percentile(0.9) is None


@pytest.mark.parametrize(
    "values",
    [{"budget_s": 0}, {"budget_s": float("nan")}, {"tolerance": 1}, {"warmup_share": 0}, {"window_samples": 0}],
)
def test_an_impossible_plan_is_refused(values) -> None:
    with pytest.raises(DualmatchError):
        Plan(**values)


def test_the_null_workload_is_measured_on_the_real_clock() -> None:
    result = measure(lambda: None, Plan(budget_s=0.02))
    assert result.samples.percentile(0.5).value > 0


# Feeds

IMAGE_INPUTS = (TensorSpec(name="pixels", dtype="float32", shape=("batch", 3, 8, 8)),)
TEXT_INPUTS = (
    TensorSpec(name="token_ids", dtype="int64", shape=("batch", "length")),
    TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "length")),
    TensorSpec(name="lengths", dtype="int64", shape=("batch",)),
)


def test_random_feeds_fit_the_graph_and_repeat() -> None:
    feeds = random_feeds([*IMAGE_INPUTS, *TEXT_INPUTS], batch=4, length=7, vocabulary_size=11)
    NullSession([*IMAGE_INPUTS, *TEXT_INPUTS]).run(feeds)  # checks names, dtypes and shapes
    assert feeds["pixels"].shape == (4, 3, 8, 8)
    assert feeds["token_ids"].shape == (4, 7)
    assert feeds["token_ids"].min() >= 1
    assert feeds["token_ids"].max() <= 10
    assert len(np.unique(feeds["token_ids"])) > 5
    assert feeds["attention_mask"].tolist() == [[1] * 7] * 4
    assert feeds["lengths"].tolist() == [7] * 4
    again = random_feeds([*IMAGE_INPUTS, *TEXT_INPUTS], batch=4, length=7, vocabulary_size=11)
    other = random_feeds([*IMAGE_INPUTS, *TEXT_INPUTS], batch=4, length=7, vocabulary_size=11, seed=1)
    for name in feeds:
        np.testing.assert_array_equal(feeds[name], again[name])
    assert not np.array_equal(feeds["pixels"], other["pixels"])


def test_random_half_precision_pixels_keep_their_type() -> None:
    half = TensorSpec(name="pixels", dtype="float16", shape=("batch", 3, 2, 2))
    assert random_feeds([half], batch=2)["pixels"].dtype == np.float16


@pytest.mark.parametrize(
    ("spec", "sizes", "words"),
    [
        (TensorSpec(name="x", dtype="float32", shape=("regions", 2)), {}, "regions"),
        (TEXT_INPUTS[0], {"vocabulary_size": 9}, "no length was given"),
        (TEXT_INPUTS[0], {"length": 5}, "vocabulary"),
        (TensorSpec(name="x", dtype="int64", shape=(2, 2, 2)), {"length": 5}, "no rule"),
        (IMAGE_INPUTS[0], {"batch": 0}, "at least 1"),
    ],
)
def test_feeds_that_cannot_be_made_are_refused_by_name(spec, sizes, words) -> None:
    with pytest.raises(DualmatchError, match=words):
        random_feeds([spec], **({"batch": 1} | sizes))


# Cases and reports


class SlowSession(NullSession):
    """Spends the fake clock's time: 5 ms to load (by `open_slow`), 50 ms on the first call, then 2 ms an item."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(IMAGE_INPUTS)
        self.clock, self.calls, self.closed = clock, 0, False

    def _run(self, feeds):
        self.calls += 1
        self.clock.spend((50 if self.calls == 1 else 2 * len(feeds["pixels"])) * MS)
        return {}

    def _release(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def slow_report() -> LatencyReport:
    clock, opened = FakeClock(), []

    def open_slow() -> Session:
        clock.spend(5 * MS)
        opened.append(SlowSession(clock))
        return opened[-1]

    cases = measure_session(
        open_slow,
        lambda batch: random_feeds(IMAGE_INPUTS, batch=batch),
        encoder="image",
        batches=(1, 8),
        plan=Plan(budget_s=2),
        clock=clock,
    )
    assert len(opened) == 3  # one untimed, then a fresh one per case
    assert all(session.closed for session in opened)
    return LatencyReport(environment={"os": "test"}, cases=cases, plan=Plan(budget_s=2), subject={"bundle": "b"})


def test_load_first_run_and_steady_state_are_three_numbers(slow_report) -> None:
    one, eight = slow_report.to_json()["cases"]
    for case in (one, eight):
        assert case["load_time"] == {"unit": "ms", "avg": pytest.approx(5, abs=0.01)}
        assert case["first_request_latency"]["avg"] == pytest.approx(50, abs=0.01)
        assert case["peak_resident_memory"]["avg"] > 1e6
    assert one["request_latency"]["p50"] == pytest.approx(2, abs=0.01)
    assert eight["request_latency"]["p50"] == pytest.approx(16, abs=0.01)
    assert one["request_latency"]["max"] == pytest.approx(2, abs=0.01)  # the first run is not among the samples
    for case, batch in ((one, 1), (eight, 8)):
        assert case["item_throughput"]["avg"] == pytest.approx(500, rel=0.01)
        assert case["request_throughput"] == {"unit": "requests/sec", "avg": pytest.approx(500 / batch, rel=0.01)}
    assert one["input_shapes"] == {"pixels": [1, 3, 8, 8]}


def test_the_null_backend_tells_the_harness_from_the_graph(slow_report) -> None:
    # On this clock the harness costs one reading, whatever the graph takes.
    overheads = [case["harness_overhead"] for case in slow_report.to_json()["cases"]]
    assert overheads == [{"unit": "us", "avg": 1.0}] * 2


def test_the_report_says_what_it_withholds(slow_report) -> None:
    latency = slow_report.to_json()["cases"][1]["request_latency"]
    assert "p99" not in latency
    assert "p99" not in latency["intervals"]
    assert latency["withheld"]["p99"] == f"needs 662 samples, has {latency['count']}"
    low, high = latency["intervals"]["p50"]
    assert low <= latency["p50"] <= high


def test_report_and_samples_survive_the_files(slow_report, tmp_path) -> None:
    path, samples_path = tmp_path / "latency.json", tmp_path / "latency.samples.jsonl"
    slow_report.write(path, samples=samples_path)
    written = json.loads(path.read_text())
    assert written == slow_report.to_json()
    assert written["schema"] == {"name": "dualmatch.bench.latency", "version": 2}
    assert written["plan"]["budget_s"] == 2
    lines = [json.loads(line) for line in samples_path.read_text().splitlines()]
    for index, case in enumerate(written["cases"]):
        steady = [x["latency_ns"] for x in lines if x["case"] == index and x["phase"] == "steady"]
        assert len(steady) == case["request_latency"]["count"]
        assert Samples(np.array(steady)).percentile(0.5).value / 1e6 == case["request_latency"]["p50"]
        assert sum(x["case"] == index and x["phase"] == "warmup" for x in lines) == case["warmup"]["count"]


def render(report: LatencyReport) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(report.table())
    return console.file.getvalue()


def test_the_table_fits_a_terminal_and_shows_what_was_not_earned(slow_report) -> None:
    text = render(slow_report)
    assert "…" not in text
    rows = {tuple(line.split()[:2]): line.split() for line in text.splitlines() if line.startswith("image")}
    assert rows["image", "1"][2:4] == ["5.00", "50.0"]
    assert rows["image", "8"][7] == "n<662"
    assert rows["image", "1"][-1] == "yes"
    assert "p99 from 662" in " ".join(text.split())
    assert "UNSTABLE" not in text


def test_an_unstable_case_is_marked_in_table_and_report() -> None:
    clock = FakeClock()

    class Drifting(SlowSession):
        def _run(self, feeds):
            self.calls += 1
            self.clock.spend(MS * 1.01**self.calls)
            return {}

    cases = measure_session(
        lambda: Drifting(clock),
        lambda batch: random_feeds(IMAGE_INPUTS, batch=batch),
        encoder="image encoder",
        plan=Plan(budget_s=2),
        clock=clock,
    )
    report = LatencyReport(environment={}, cases=cases)
    assert not report.stable
    assert report.to_json()["cases"][0]["stable"] is False
    assert "UNSTABLE" in render(report)
    assert "…" not in render(report)


def test_numbers_keep_three_digits() -> None:
    assert [format_number(x) for x in (1234.5, 99.96, 12.345, 1.2345, 0.01234)] == [
        "1234",
        "100",
        "12.3",
        "1.23",
        "0.0123",
    ]


def test_batch_sizes_below_one_are_refused_before_anything_is_opened() -> None:
    def never() -> Session:
        raise AssertionError

    for batches in ((), (0,), (1, -2)):
        with pytest.raises(DualmatchError, match="batch sizes"):
            measure_session(never, lambda _: {}, encoder="image", batches=batches)


def test_a_real_graph_is_measured_on_the_backend_it_ran_on(tmp_path) -> None:
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [12, 4], np.ones(48, dtype=np.float32))
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["embeddings"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    path = tmp_path / "image_encoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    inputs = (TensorSpec(name="pixels", dtype="float32", shape=("batch", 3, 2, 2)),)
    cases = measure_session(
        lambda: open_session(path, threads=1),
        lambda batch: random_feeds(inputs, batch=batch),
        encoder="image",
        batches=(1, 3),
        plan=Plan(budget_s=0.2),
    )
    report = LatencyReport(environment=env.environment(), cases=cases)
    for case, batch in zip(json.loads(json.dumps(report.to_json()))["cases"], (1, 3), strict=True):
        assert case["provider"] == "CPUExecutionProvider"
        assert case["batch"] == batch
        assert case["input_shapes"] == {"pixels": [batch, 3, 2, 2]}
        assert case["request_latency"]["count"] >= 15
        assert case["load_time"]["avg"] > 0
        assert (
            0 < case["harness_overhead"]["avg"] < 50_000
        )  # three decimal orders above what it takes: only a fault fails
    assert "image" in render(report)


# Environment


def test_the_environment_is_json_and_true() -> None:
    block = env.environment()
    assert json.loads(json.dumps(block)) == block
    assert block["packages"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert block["packages"]["numpy"] == np.__version__
    assert block["cpu"]["logical_cores"] == os.cpu_count()
    assert block["memory"]["total_bytes"] > block["memory"]["available_bytes"] > 0
    if hasattr(os, "sched_getaffinity"):
        assert set(block["cpu"]["affinity"]) == os.sched_getaffinity(0)


def test_the_environment_imports_no_engine() -> None:
    code = (
        "import sys; from dualmatch.bench.environment import environment; import dualmatch.bench.bundle_latency; environment();"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_missing_psutil_is_one_sentence_with_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(DualmatchError, match=r"dualmatch\[bench\]"):
        env.environment()


def test_cpu_flags_are_read_for_x86_and_arm(tmp_path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 amx_int8 sse\n\nprocessor\t: 1\n")
    assert env.cpu_model_and_flags(cpuinfo) == ("Some CPU", ["avx2", "amx_int8"])
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert env.cpu_model_and_flags(cpuinfo)[1] == ["asimd", "asimddp", "i8mm"]
    assert env.cpu_model_and_flags(tmp_path / "none")[1] is None


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "150000 100000"}, 1.5),
        ("0::/on/the/host\n", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/pod\n", {"pod/cpu.max": "max 100000"}, None),
        (
            "4:memory:/m\n1:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "200000", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"},
            2.0,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_tightest_cpu_quota_is_found(tmp_path, membership, files, cores) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    assert env.cgroup_cpu_quota(tmp_path / "cgroup", tmp_path / "membership") == cores


def test_gpus_come_from_nvidia_smi_or_are_null(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.nvidia_gpus() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 580.95.05, 9.0'\n")
    program.chmod(0o755)
    assert env.nvidia_gpus() == [
        {"name": "NVIDIA H100 80GB HBM3", "memory.total": "81559", "driver_version": "580.95.05", "compute_cap": "9.0"}
    ]
    assert env.nvidia_state() is None  # an answer of another width is no answer
    program.write_text("#!/bin/sh\necho '1755, 1980, 2619, 61, 412.7, P0, 1024, 98, 0x0000000000000024'\n")
    (state,) = env.nvidia_state()
    assert (state["clocks.sm"], state["pstate"]) == ("1755", "P0")
    assert state["throttle_reasons"] == ["software power cap", "software thermal"]
    program.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert env.nvidia_gpus() is None


def test_throttle_reasons_that_the_driver_does_not_tell() -> None:
    assert env.throttle_reasons("[N/A]") is None
    assert env.throttle_reasons("0x0") == []


def test_the_seconds_lost_to_a_quota_are_read(tmp_path) -> None:
    assert env.cgroup_throttled_s(tmp_path) is None
    (tmp_path / "cpu.stat").write_text("usage_usec 9\nnr_throttled 3\nthrottled_usec 2500000\n")
    assert env.cgroup_throttled_s(tmp_path) == 2.5


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_peak_memory_rises_with_an_allocation() -> None:
    before = env.peak_memory_bytes()
    block = np.ones(8_000_000)  # 64 MB, touched
    assert env.peak_memory_bytes() >= before
    assert env.peak_memory_bytes() > block.nbytes
