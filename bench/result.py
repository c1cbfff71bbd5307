"""What one case measured, and the metrics that follow from it: load, first run and steady state are three numbers, never one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .aiperf import Block, record_metric, value_metric
from .measure import QUANTILES, Measurement, Nanoseconds, Samples
from .offline import OfflineMeasurement
from .operations import Work
from .server import ServerMeasurement

Scenario = Literal["single-stream", "server", "offline"]


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One encoder at one batch size on one backend in one scenario, in a session of its own.

    Attributes:
        load_ns: opening the session, its package imported and its file read once before.
        first_ns: the first call after loading, where engines allocate and choose kernels.
        measurement: single stream: the samples; other scenarios: the closed loop that warmed the session up.
        server, offline: what those scenarios saw.
        stages: samples of each stage of the whole way; empty where they were not asked for.
        overhead_ns: median of the same loop around the null backend; never subtracted.
        peak_memory_bytes: largest resident set of the process up to the end of this case.
        device_memory_bytes: memory of the GPUs in use at the end, less what was in use before loading; None without a GPU.
        ended_ns: when the case was over, ns since 1970.
        work: of one call; None where it was not counted.
    """

    encoder: str
    batch: int
    backend: str
    provider: str
    input_shapes: dict[str, tuple[int, ...]]
    load_ns: int
    first_ns: int
    measurement: Measurement
    overhead_ns: int
    peak_memory_bytes: int
    scenario: Scenario = "single-stream"
    server: ServerMeasurement | None = None
    offline: OfflineMeasurement | None = None
    stages: Mapping[str, Samples] = field(default_factory=dict)
    device_memory_bytes: int | None = None
    ended_ns: int = 0
    work: Work | None = None

    @property
    def name(self) -> str:
        """What tells the case from the report's others."""
        return f"{self.encoder} {self.backend} batch {self.batch} {self.scenario}"

    @property
    def stable(self) -> bool:
        """Whether the windows of the scenario agreed."""
        return (self.server or self.offline or self.measurement).stable

    @property
    def raw(self) -> Nanoseconds:
        """Every latency of the scenario's steady state, in order, ns."""
        if self.server is not None:
            return self.server.latencies
        return (self.offline or self.measurement).samples.raw

    @property
    def distribution(self) -> Samples | ServerMeasurement:
        """What the percentiles come from."""
        return self.server if self.server is not None else Samples(self.raw)

    @property
    def items_per_s(self) -> float:
        """Items per second: offline over all streams; else of one stream of calls, from the mean, so that stalls count."""
        if self.offline is not None:
            return self.offline.items_per_s
        if self.server is not None:
            return self.batch * self.server.achieved_rate
        return self.batch * 1e9 / float(self.raw.mean())

    def metrics(self) -> dict[str, Block]:
        """Everything measured, as AIPerf's metric blocks."""
        raw = self.raw
        early = (
            None if self.server else {name: Samples(raw).early_stopping(q) for name, q in QUANTILES.items() if q > 0.5}
        )
        latency = record_metric(raw, self.distribution, early)
        items = value_metric(self.items_per_s, "items/sec")
        if self.offline is not None and (interval := self.offline.interval()) is not None:
            items |= {"interval_confidence": 0.95, "interval": list(interval)}
        blocks = {
            "request_latency": latency,
            "request_throughput": value_metric(self.items_per_s / self.batch, "requests/sec"),
            "request_count": value_metric(len(raw), "requests"),
            "benchmark_duration": value_metric(self.duration_s, "sec"),
            "item_throughput": items,
            "load_time": value_metric(self.load_ns / 1e6, "ms"),
            "first_request_latency": value_metric(self.first_ns / 1e6, "ms"),
            "harness_overhead": value_metric(self.overhead_ns / 1e3, "us"),
            "peak_resident_memory": value_metric(self.peak_memory_bytes, "bytes"),
        }
        if self.device_memory_bytes is not None:
            blocks["device_memory"] = value_metric(self.device_memory_bytes, "bytes")
        if self.server is not None:
            blocks |= {
                "queue_time": record_metric(self.server.queued, Samples(self.server.queued)),
                "service_time": record_metric(self.server.service, Samples(self.server.service)),
                "offered_rate": value_metric(self.server.rate, "requests/sec"),
                "worker_utilisation": value_metric(100 * self.server.busy, "%"),
            }
            for name in ("queue_time", "service_time"):
                del blocks[name]["intervals"]  # of independent samples, which requests in a queue are not
        return blocks | {f"{name}_time": record_metric(s.raw, s) for name, s in self.stages.items()}

    @property
    def duration_s(self) -> float:
        """Seconds that the steady state took."""
        if self.server is not None:
            return float(self.server.finished.max() - self.server.scheduled[self.server.window]) / 1e9
        if self.offline is not None:
            return float(self.offline.finished[-1] - self.offline.origin) / 1e9
        return float(self.raw.sum()) / 1e9

    def to_json(self) -> dict[str, Any]:
        """The case without its raw samples."""
        return {
            "encoder": self.encoder,
            "batch": self.batch,
            "backend": self.backend,
            "provider": self.provider,
            "scenario": self.scenario,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "stable": self.stable,
            "overloaded": self.server is not None and self.server.overloaded,
            "warmup": {
                "count": sum(map(len, self.measurement.warmup)),
                "settled": self.measurement.warmed_up,
            },
            **self.metrics(),
        }
