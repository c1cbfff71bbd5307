"""OpenVINO on the CPU, computing in float32."""

import sys
import threading
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.onnx_files import axis_names

from .base import Array, Session, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = "CPU"


class OpenvinoSession(Session):
    """An ONNX graph compiled by OpenVINO for the CPU.

    OpenVINO computes in bfloat16 by itself where the processor has it, and quantises activations where weights are compressed. Both are
    switched off: what a graph computes in is decided at export, and passed the gate there.

    Args:
        graph: the `.onnx` file, or its bytes.
        threads: threads of one inference; 0 leaves the choice to OpenVINO.
        leave_out: outputs that are not computed.

    Raises:
        DualmatchError: OpenVINO is not installed, the graph does not load, or it is not run in float32 on the CPU.
    """

    backend = "openvino"

    def __init__(self, graph: Path | bytes, *, threads: int = 0, leave_out: Collection[str] = ()) -> None:
        openvino = _openvino()
        hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "EXECUTION_MODE_HINT": "ACCURACY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            core = openvino.Core()
            model = core.read_model(graph if isinstance(graph, bytes) else str(graph))
            for result in [one for one in model.get_results() if one.output(0).names & set(leave_out)]:
                model.remove_result(result)
            named = axis_names(graph if isinstance(graph, bytes) else graph.read_bytes())
            self._compiled = core.compile_model(model, DEVICE, hints)
            devices = ", ".join(self._compiled.get_property("EXECUTION_DEVICES"))
            precision = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        except RuntimeError as error:
            name = "the graph" if isinstance(graph, bytes) else graph
            raise DualmatchError(f"openvino {openvino.__version__} cannot load {name}: {_reason(error)}.") from None
        # Read back, because a hint is only that.
        if (devices, precision) != (DEVICE, "f32"):
            raise DualmatchError(
                f"backend 'openvino' asked for {DEVICE} and f32, but OpenVINO runs the graph on {devices} in {precision}."
            )
        self.provider = f"OpenVINO {devices} {precision}"
        self.inputs = tuple(_spec(value, named) for value in self._compiled.inputs)
        self.outputs = tuple(_spec(value, named) for value in self._compiled.outputs)
        self._local = threading.local()  # a request serves one thread at a time, a session any number

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        try:
            results = self._local.request.infer(dict(feeds), share_inputs=True)
        except RuntimeError as error:
            shapes = {name: list(value.shape) for name, value in feeds.items()}
            raise DualmatchError(f"openvino cannot run the graph on inputs {shapes}: {_reason(error)}.") from None
        return {spec.name: results[index] for index, spec in enumerate(self.outputs)}

    def _release(self) -> None:
        del self._compiled
        self._local = threading.local()


def _openvino() -> Any:
    try:
        with _without_telemetry():
            import openvino
    except ImportError:
        raise DualmatchError(
            "backend 'openvino' needs openvino, which is not installed: pip install 'dualmatch[openvino]'."
        ) from None
    return openvino


@contextmanager
def _without_telemetry() -> "Iterator[None]":
    """Importing OpenVINO reports to its makers, and writes an id for that into the home folder, where openvino_telemetry can be imported."""
    package = "openvino_telemetry"
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    try:
        yield
    finally:
        del sys.modules[package]


def _spec(value: Any, named: Mapping[str, tuple[str, ...]]) -> TensorSpec:
    """Sizes as OpenVINO has them; what dynamic axes are called it forgets, so that comes from the graph's own bytes."""
    name, axes = value.get_any_name(), list(value.get_partial_shape())
    names = named.get(name, ())
    shape = tuple(
        (names[i] if i < len(names) and names[i] else "?") if axis.is_dynamic else int(axis.get_length())
        for i, axis in enumerate(axes)
    )
    return TensorSpec(name=name, dtype=value.get_element_type().to_dtype().name, shape=shape)


def _reason(error: RuntimeError) -> str:
    """OpenVINO's message without the places in its own source."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from ", "Check '"))]
    return "; ".join(kept)[:400].rstrip(".") or "it gives no reason"
