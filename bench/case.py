"""One case, described so that a fresh process can measure it."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dualmatch.runtime.backends import BACKENDS, Session, open_encoder
from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.bundle import Bundle, EncoderName, load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .device import device_memory_bytes
from .diagnostic import BEHAVIOURS, NULL, NullSession, split_behaviour, with_behaviour
from .environment import peak_memory_bytes
from .feeds import random_feeds
from .latency import null_overhead
from .measure import WINDOWS_PER_BUDGET, Clock, Measurement, Nanoseconds, Plan, Samples, measure, run_window, timed
from .offline import offline
from .operations import Work, count_work
from .result import CaseResult, Scenario
from .roofs import Roofs, measure_roofs
from .server import serve
from .stages import LEAST_ITEMS, graph_stages, measure_stages, preparing_stages, sample_items

TORCH = {"torch-eager": False, "torch-compile": True}
"""Backends that run a trained run's own modules: whether they are compiled."""
ON_CPU = frozenset(("onnxruntime", "openvino", *TORCH))
"""Backends that the roofs of the CPU hold for."""
LIBRARY = 8  # different batches that offline mode takes in turn
STAGES_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to measure.

    Attributes:
        backend: a name of `runtime.backends`, `null`, or one of `TORCH`; `+throttled` or `+stalling` behind it builds a fault in.
        run: the folder of the trained run, for `TORCH`.
        length: tokens of every caption.
        rate: requests per second, of the server scenario.
        workers: requests in work at the same time (server), or streams (offline).
        data: where photographs and captions for the stages come from; None leaves the stages out.
        end_to_end: offline calls take photographs and captions, not tensors.
        counted: count the work of a call too, where the backend runs on the CPU.
        seed: of random inputs and of the Poisson schedule.
    """

    bundle: Path
    encoder: EncoderName
    backend: str = "onnxruntime"
    run: Path | None = None
    threads: int = 0
    batch: int = 1
    length: int = 16
    scenario: Scenario = "single-stream"
    plan: Plan = field(default_factory=Plan)
    rate: float = 0.0
    workers: int = 1
    data: str | None = None
    end_to_end: bool = False
    counted: bool = False
    seed: int = 0


def checked_backend(case: Case) -> None:
    """Refuse a backend that is not known, or torch without a run, before any process is started for it."""
    name, _ = split_behaviour(case.backend)
    if name not in (NULL, *TORCH, *BACKENDS):
        raise DualmatchError(
            f"there is no backend {name!r}; choose one of {', '.join((*BACKENDS, *TORCH, NULL))}, "
            f"with {' or '.join(f'+{behaviour}' for behaviour in BEHAVIOURS)} behind it to build a fault in."
        )
    if name in TORCH and case.run is None:
        raise DualmatchError(f"backend {case.backend!r} runs a trained run in torch: give its folder with --run RUN.")


def work_of_backend(backend: str, work: Work) -> Work | None:
    """What a backend does of a graph's work: torch computes in float32 whatever the bundle's precision; None off the CPU."""
    name = split_behaviour(backend)[0]
    if name not in ON_CPU:
        return None
    return work.in_float32() if name in TORCH else work


def open_case(case: Case, bundle: Bundle) -> Session:
    """The case's session.

    Raises:
        DualmatchError: as `open_encoder` and `checked_backend`.
    """
    checked_backend(case)
    name, behaviour = split_behaviour(case.backend)
    if name == NULL:
        return with_behaviour(NullSession(bundle.manifest.encoders[case.encoder].inputs), behaviour)
    if name in TORCH:
        return with_behaviour(_torch_session(case, bundle, compiled=TORCH[name]), behaviour)
    return with_behaviour(open_encoder(bundle, case.encoder, backend=name, threads=case.threads), behaviour)


def _torch_session(case: Case, bundle: Bundle, *, compiled: bool) -> Session:
    from .torch_baseline import TorchSession, torch_encoders

    assert case.run is not None, "checked_backend refuses it"
    module = torch_encoders(case.run)[case.encoder]
    if compiled:
        module.compile(dynamic=False)
    entry = bundle.manifest.encoders[case.encoder]
    session = TorchSession(module, entry, threads=case.threads or 1)
    if compiled:
        session.backend = session.backend + "-compile"
        session.provider = session.provider.replace("eager", "compiled")
    return session


def case_feeds(case: Case, bundle: Bundle, *, seed: int | None = None) -> dict[str, Array]:
    """Random inputs of the case's batch size and caption length."""
    tokenizer = CaptionTokenizer(bundle.read("tokenizer.json"), bundle.manifest.tokenizer)
    return random_feeds(
        bundle.manifest.encoders[case.encoder].inputs,
        batch=case.batch,
        length=case.length,
        vocabulary_size=tokenizer.vocabulary_size,
        seed=case.seed if seed is None else seed,
    )


class Bench:
    """One case, opened in this process: what the worker does for its parent."""

    def __init__(self, case: Case, *, clock: Clock = time.perf_counter_ns) -> None:
        self.case, self.clock = case, clock
        self.bundle = load_bundle(case.bundle)
        self.feeds = case_feeds(case, self.bundle)
        # Before anything is timed: a data set that cannot be read is no news for the end.
        self.batches = self._batches() if case.data is not None else []
        open_case(case, self.bundle).close()  # untimed: it imports the engine and warms the file cache
        self.device_before = device_memory_bytes()
        self.session, self.load_ns = timed(lambda: open_case(case, self.bundle), clock=clock)
        self.first_ns = self._first_call()

    def _first_call(self) -> int:
        if self.case.backend.partition("+")[0] != "torch-compile":
            return timed(self.call, clock=self.clock)[1]
        try:
            return timed(self.call, clock=self.clock)[1]
        except Exception as error:  # noqa: BLE001  (the compiler raises what it likes: no C++ compiler, an operator it lacks)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DualmatchError(f"torch cannot compile the {self.case.encoder} encoder here: {reason}") from None

    def call(self) -> None:
        """Run the graph once."""
        self.session.run(self.feeds)

    def facts(self) -> dict[str, Any]:
        """The session as it really runs, and how long it took to load."""
        return {"backend": self.session.backend, "provider": self.session.provider, "load_ns": self.load_ns}

    def warm_up(self, budget_s: float) -> bool:
        """Call until the windows agree; whether they did."""
        return measure(self.call, Plan(budget_s=budget_s, wanted_samples=1), clock=self.clock).warmed_up

    def block(self, seconds: float, least: int) -> Nanoseconds:
        """Latencies of calls, one after another, for so many seconds and at least so many calls."""
        plan = Plan(budget_s=seconds * WINDOWS_PER_BUDGET, window_samples=least)
        return run_window(self.call, plan, self.clock)

    def recall(self, data: str, splits: list[str]) -> dict[str, Any] | None:
        """Recall of the case's variant, both encoders on its backend."""
        from .variant_recall import measured_recall

        return measured_recall(self.case, self.bundle, data, splits)

    def work(self) -> Work:
        """The work of one call, counted from the bundle's graph.

        Raises:
            DualmatchError: as `count_work`.
        """
        return count_work(self.bundle.graph(self.case.encoder), self.feeds, threads=self.case.threads)

    def roofs(self) -> Roofs:
        """What the CPU can do at the case's threads."""
        return measure_roofs(self.case.threads)

    def result(self) -> CaseResult:
        """Measure the case's scenario."""
        case, plan = self.case, self.case.plan
        server = opened = None
        if case.scenario == "single-stream":
            measurement = measure(self.call, plan, clock=self.clock)
        else:
            measurement = self._warmed(plan)
        if case.scenario == "server":
            server = serve(self.call, plan, rate=case.rate, seed=case.seed, workers=case.workers, clock=self.clock)
        elif case.scenario == "offline":
            opened = offline(self._offline_workload(), plan, batch=case.batch, streams=case.workers, clock=self.clock)
        stages = self._stages() if case.data is not None and not case.end_to_end else {}
        device = device_memory_bytes()
        return CaseResult(
            encoder=case.encoder,
            batch=case.batch,
            backend=self.session.backend,
            provider=self.session.provider,
            input_shapes={name: value.shape for name, value in self.feeds.items()},
            load_ns=self.load_ns,
            first_ns=self.first_ns,
            measurement=measurement,
            overhead_ns=null_overhead(self.session, self.feeds, clock=self.clock),
            peak_memory_bytes=peak_memory_bytes(),
            scenario=case.scenario,
            server=server,
            offline=opened,
            stages=stages,
            device_memory_bytes=None if device is None else device - (self.device_before or 0),
            ended_ns=time.time_ns(),
            work=work_of_backend(case.backend, self.work()) if case.counted else None,
        )

    def _warmed(self, plan: Plan) -> Measurement:
        return measure(self.call, replace(plan, budget_s=plan.budget_s * plan.warmup_share, wanted_samples=1))

    def _batches(self) -> list[list[Any]]:
        assert self.case.data is not None
        items = sample_items(self.case.data, self.case.encoder, max(LEAST_ITEMS, 2 * self.case.batch))
        size = self.case.batch
        return [items[start : start + size] for start in range(0, len(items) - size + 1, size)]

    def _offline_workload(self) -> Any:
        if self.case.end_to_end:
            batches = self.batches
            stages = preparing_stages(self.bundle, self.case.encoder, self.feeds)

            def whole_way(number: int) -> None:
                value: Any = batches[number % len(batches)]
                for _, stage in stages:
                    value = stage(value)
                self.session.run(value)

            return whole_way
        library = [case_feeds(self.case, self.bundle, seed=self.case.seed + number) for number in range(LIBRARY)]
        return lambda number: self.session.run(library[number % LIBRARY])

    def _stages(self) -> dict[str, Samples]:
        prepare = preparing_stages(self.bundle, self.case.encoder, self.feeds)
        return measure_stages(
            [*prepare, *graph_stages(self.session)],
            self.batches,
            budget_s=STAGES_SHARE * self.case.plan.budget_s,
            clock=self.clock,
        )

    def close(self) -> None:
        """Release the session."""
        self.session.close()
