"""ONNX graph to TensorRT engine, for both flavours of TensorRT by the same lines; needs neither torch nor onnx."""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.backends.engine_record import EngineRecord, HardwareCompatibility, Profile, this_platform
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes, sha256_of_file, write_atomically
from dualmatch.runtime.flavours import (
    gpu_compute_capability,
    load_flavour,
    tensorrt_logger,
    tensorrt_reasons,
    without_source_lines,
)

from .engine_profiles import check_profile
from .peak_memory import PeakMemory

Progress = Callable[[str, int, int], None]
"""Called with a phase of the build as TensorRT names it, its steps done, and its steps in all; phases nest."""

# The logger, and with it the errors that belong to a build, is one for the process.
_one_build_at_a_time = threading.Lock()


def build_engine(
    onnx_path: Path,
    out: Path,
    *,
    flavour: str,
    inputs: Sequence[TensorSpec],
    profiles: Sequence[Profile],
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatibility: HardwareCompatibility = "none",
    leave_out: Collection[str] = (),
    progress: Progress | None = None,
) -> EngineRecord:
    """Compile the graph at `onnx_path` into a strongly typed engine at `out`, which appears only when it is complete.

    Ctrl-C cancels the build at TensorRT's next step.

    Args:
        onnx_path: the graph; weights kept in other files are found beside it.
        out: the engine file; an older one is replaced.
        flavour: `tensorrt` (needs the GPU that the engine is for) or `tensorrt-rtx` (needs none).
        inputs: the graph's inputs as the manifest has them; the graph is refused where it differs.
        profiles: one or more; they share the engine's weights.
        compute_capabilities: GPUs to build for, as in `8.6`; `tensorrt-rtx` only.
        workspace_bytes: the most scratch memory on the GPU that a layer may take; None leaves the limit to TensorRT.
        timing_cache: kernel timings, read if there and written after the build; `tensorrt` only.
        version_compatible: make an engine that later releases of the same major TensorRT load too; `tensorrt` only.
        hardware_compatibility: make an engine that other GPUs run too, at some cost in speed; `tensorrt` only.
        leave_out: outputs of the graph that the engine does not give.
        progress: called from another thread as the build goes on.

    Raises:
        DualmatchError: a flavour that is unknown or not installed, an option that the flavour does not have, a graph that cannot
            be read or is not what `inputs` says, an operator or a type that TensorRT refuses, or a profile that does not fit.
    """
    trt = load_flavour(flavour)
    if not onnx_path.is_file():
        raise DualmatchError(f"there is no ONNX file {onnx_path}.")
    if not profiles:
        raise DualmatchError("an engine needs at least one profile.")
    for profile in profiles:
        check_profile(profile, inputs)
    _check_options(
        flavour,
        compute_capabilities=compute_capabilities,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
    )
    targets = tuple(compute_capabilities) if flavour == "tensorrt-rtx" else (gpu_compute_capability(),)

    stopped = threading.Event()
    monitor = _progress_monitor(trt, stopped, progress)
    memory = PeakMemory()
    started = time.perf_counter()

    def work() -> tuple[bytes, bool]:
        log = tensorrt_logger(flavour)
        log.errors.clear()
        builder = _builder(trt, log, flavour)
        network = _parsed(trt, log, builder, onnx_path, flavour)
        _check_inputs(trt, network, inputs, onnx_path)
        for tensor in [network.get_output(index) for index in range(network.num_outputs)]:
            if tensor.name in leave_out:
                network.unmark_output(tensor)
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and then float32 products keep 10 bits
        for profile in profiles:
            config.add_optimization_profile(_optimization_profile(builder, profile))
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        if compute_capabilities:
            _set_targets(trt, config, compute_capabilities)
        if version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if hardware_compatibility != "none":
            config.hardware_compatibility_level = {
                "same-compute-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
                "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
            }[hardware_compatibility]
        if timing_cache is not None:
            _read_timing_cache(config, timing_cache)
        plan = builder.build_serialized_network(network, config)
        if monitor.failure is not None:
            raise monitor.failure
        if plan is None:
            raise DualmatchError(f"{flavour} cannot build an engine from {onnx_path}: {tensorrt_reasons(log)}.")
        if timing_cache is not None:
            cache = config.get_timing_cache()
            write_atomically(timing_cache, bytes(cache.serialize()))
        return bytes(plan), network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    # In a thread of its own: an exception raised in TensorRT's callbacks, as Ctrl-C would be, cannot pass through its C++ frames.
    with _one_build_at_a_time, ThreadPoolExecutor(max_workers=1) as pool:
        building = pool.submit(work)
        try:
            while not wait([building], timeout=0.1).done:
                pass
        except BaseException:
            stopped.set()
            raise
        plan, strongly_typed = building.result()
    seconds, peak = time.perf_counter() - started, memory.peak_bytes()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, plan)
    return EngineRecord(
        flavour=flavour,
        tensorrt_version=trt.__version__,
        compute_capabilities=targets,
        profiles=tuple(profiles),
        file=out.name,
        sha256=sha256_of_bytes(plan),
        bytes=len(plan),
        onnx_sha256=sha256_of_file(onnx_path),
        seconds=round(seconds, 3),
        strongly_typed=strongly_typed,
        platform=this_platform(),
        peak_memory_bytes=peak,
        workspace_bytes=workspace_bytes,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
    )


def _check_options(
    flavour: str,
    *,
    compute_capabilities: Sequence[str],
    timing_cache: Path | None,
    version_compatible: bool,
    hardware_compatibility: HardwareCompatibility,
) -> None:
    """Refuse what a flavour does not have, where TensorRT would ignore it or fail in its own words."""
    if flavour != "tensorrt-rtx":
        if compute_capabilities:
            raise DualmatchError(
                f"flavour {flavour!r} builds for the GPU at hand only: leave compute capabilities out, "
                "or ask for hardware compatibility."
            )
        return
    if timing_cache is not None:
        raise DualmatchError("flavour 'tensorrt-rtx' times no kernels when it builds: leave the timing cache out.")
    if version_compatible:
        raise DualmatchError(
            "flavour 'tensorrt-rtx' cannot build version-compatible engines: its engines are bound to its release."
        )
    if hardware_compatibility != "none":
        raise DualmatchError(
            "flavour 'tensorrt-rtx' has no hardware compatibility levels: say which GPUs by their compute capabilities, "
            "or none for Ampere and later."
        )


def _progress_monitor(trt: Any, stopped: threading.Event, progress: Progress | None) -> Any:
    """TensorRT's progress monitor: reports steps, and ends the build once `stopped` is set or `progress` has raised."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self._steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return not stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if not stopped.is_set():
                self._report(phase_name, self._steps[phase_name])

        def _report(self, phase: str, done: int) -> None:
            if progress is None or self.failure is not None:
                return
            try:
                progress(phase, done, self._steps[phase])
            except BaseException as error:  # noqa: BLE001  (must not reach TensorRT; raised again once the build has ended)
                self.failure = error
                stopped.set()

    return Monitor()


def _builder(trt: Any, log: Any, flavour: str) -> Any:
    try:
        return trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # pybind11 says so when TensorRT's factory returns nothing
        raise DualmatchError(f"{flavour} cannot start: {tensorrt_reasons(log) or error}.") from None


def _parsed(trt: Any, log: Any, builder: Any, onnx_path: Path, flavour: str) -> Any:
    # The flag is needed before TensorRT 11 and ignored from there on, where every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        parser_error = parser.get_error(0)
        operator = parser_error.node_operator()
        node = f"node {parser_error.node_name()!r} ({operator}): " if operator else ""
        raise DualmatchError(f"{flavour} cannot read {onnx_path}: {node}{without_source_lines(parser_error.desc())}.")
    if network.num_inputs == 0:  # the parser reads an empty file, and some that are no graph, without an error
        raise DualmatchError(f"{flavour} cannot read {onnx_path}: it is not an ONNX graph, or one without inputs.")
    return network


def _check_inputs(trt: Any, network: Any, inputs: Sequence[TensorSpec], onnx_path: Path) -> None:
    expected = {
        spec.name: (spec.dtype, [-1 if isinstance(axis, str) else axis for axis in spec.shape]) for spec in inputs
    }
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    found = {tensor.name: (np.dtype(trt.nptype(tensor.dtype)).name, list(tensor.shape)) for tensor in tensors}
    if found != expected:
        difference = "; ".join(
            f"{name!r} is {_described(found.get(name))} instead of {_described(expected.get(name))}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        )
        raise DualmatchError(f"the inputs of {onnx_path} are not those given (-1 is a dynamic axis): {difference}.")


def _described(tensor: tuple[str, list[int]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {tensor[1]}"


def _optimization_profile(builder: Any, profile: Profile) -> Any:
    result = builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        result.set_shape(name, *shapes)
    return result


def _set_targets(trt: Any, config: Any, compute_capabilities: Sequence[str]) -> None:
    offered = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    config.num_compute_capabilities = len(compute_capabilities)
    for index, capability in enumerate(compute_capabilities):
        if capability not in offered or not config.set_compute_capability(offered[capability], index):
            raise DualmatchError(
                f"tensorrt-rtx {trt.__version__} cannot build for compute capability {capability}; it offers {', '.join(offered)}."
            )


def _read_timing_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise DualmatchError(
            f"the timing cache {path} is from another GPU or TensorRT; remove it or give another path."
        )
