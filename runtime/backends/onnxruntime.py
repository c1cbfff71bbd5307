"""onnxruntime: on the CPU, on CUDA, and through its TensorRT and TensorRT-RTX execution providers."""

import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualmatch.runtime.errors import DualmatchError

from .base import Array, Session, TensorSpec
from .cuda import Stickiness

PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
ARITHMETIC = frozenset((
    *("Attention", "BatchNormalization", "Conv", "ConvInteger", "Einsum", "FusedConv", "FusedMatMul", "GRU", "Gemm"),
    *("LSTM", "LayerNormalization", "MatMul", "MatMulInteger", "MatMulNBits", "MultiHeadAttention", "QLinearConv"),
    *("QLinearMatMul", "RNN", "Softmax"),
))  # fmt: skip
"""Operators that carry an encoder's work. One of these on another provider is a fallback; shapes and indices on the CPU are not."""

_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}  # on by default, and then float32 products keep 10 bits

_DTYPE_FROM_ONNX = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}

_PLACE = re.compile(
    r"/\S+\.(?:cc|cpp|cu|cuh|h|hpp):\d+ [^()\n]*\([^()\n]*\)(?: const)?(?: \[with [^]\n]*\])? "  # with the function's signature
    r"|/\S+\.(?:cc|cpp|cu|cuh|h|hpp):\d+ |\b\w+\.(?:cc|h):\d+ \w+ | ; file=\S+ ; line=\d+"
)


class OnnxruntimeSession(Session):
    """An ONNX graph in an onnxruntime session; on a GPU with IO binding, so that inputs and outputs are copied once.

    Args:
        graph: the `.onnx` file, or its bytes.
        backend: a key of `PROVIDERS`.
        threads: intra-operator threads; 0 leaves the choice to onnxruntime.
        leave_out: outputs that are not fetched.

    Raises:
        DualmatchError: onnxruntime is not installed, the provider is not available or fell back to another one for any of
            `ARITHMETIC`, or the graph does not load.
    """

    def __init__(
        self,
        graph: Path | bytes,
        *,
        backend: str = "onnxruntime",
        threads: int = 0,
        leave_out: Collection[str] = (),
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise DualmatchError(
                f"backend {backend!r} needs onnxruntime, which is not installed: pip install 'dualmatch[cpu]' (or [gpu])."
            ) from None
        wanted = PROVIDERS[backend]
        available = onnxruntime.get_available_providers()
        if wanted not in available:
            raise DualmatchError(
                f"backend {backend!r} needs {wanted}; this onnxruntime {onnxruntime.__version__} offers {', '.join(available)}."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what it calls errors it raises too
        on_gpu = wanted != "CPUExecutionProvider"
        if on_gpu:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            # CUDA and cuDNN where pip has put them. It prints, and standard output belongs to the caller.
            with contextlib.redirect_stdout(sys.stderr):
                onnxruntime.preload_dlls()
        named = "the graph" if isinstance(graph, bytes) else graph
        try:
            self._session = onnxruntime.InferenceSession(
                graph if isinstance(graph, bytes) else str(graph),
                options,
                providers=[(wanted, _OPTIONS.get(wanted, {}))],
            )
        except Exception as error:  # noqa: BLE001  (onnxruntime raises exception types that it does not document)
            raise DualmatchError(f"onnxruntime cannot load {named}: {_reason(error)}.") from None
        # onnxruntime falls back to the CPU with a log line only; a latency measured on the wrong device is worse than an error.
        self.provider = self._session.get_providers()[0]
        if self.provider != wanted:
            raise DualmatchError(
                f"backend {backend!r} asked for {wanted}, but onnxruntime runs the graph on {self.provider}."
            )
        if on_gpu:
            self.provider = placement(self._session, wanted)
        self.backend = backend
        self.inputs = tuple(_spec(value, named) for value in self._session.get_inputs())
        self.outputs = tuple(
            _spec(value, named) for value in self._session.get_outputs() if value.name not in leave_out
        )
        self._names = [spec.name for spec in self.outputs]
        self._device = "cuda" if on_gpu else None
        self._own = threading.local()
        self._stickiness = Stickiness()

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._stickiness.check()
        try:
            if self._device is not None:
                return dict(zip(self._names, self._bound(self._device).run(feeds), strict=True))
            return dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))
        except Exception as error:  # noqa: BLE001  (see above)
            reason = f"onnxruntime cannot run the graph on {self.provider}: {_reason(error)}."
            # Its CUDA errors come as text. All but too little memory leave the process without a working CUDA context.
            if "CUDA failure" in str(error) and "out of memory" not in str(error):
                self._stickiness.lost(reason)
                self._stickiness.check()
            raise DualmatchError(reason) from None

    def _bound(self, device: str) -> "BoundRun":
        """This thread's binding: a binding serves one thread at a time."""
        bound: BoundRun | None = getattr(self._own, "bound", None)
        if bound is None:
            bound = BoundRun(self._session, device, [spec.name for spec in self.outputs])
            self._own.bound = bound
        return bound

    def _release(self) -> None:
        self._own = threading.local()
        del self._session


def _spec(value: Any, graph: Path | str) -> TensorSpec:
    """An input or output as onnxruntime describes it.

    Raises:
        DualmatchError: a type that no encoder has.
    """
    if value.type not in _DTYPE_FROM_ONNX:
        raise DualmatchError(
            f"onnxruntime cannot serve {graph}: {value.name!r} is a {value.type}, and an encoder takes and gives "
            f"{', '.join(_DTYPE_FROM_ONNX)}; export it again."
        )
    return TensorSpec(name=value.name, dtype=_DTYPE_FROM_ONNX[value.type], shape=tuple(value.shape))


def _reason(error: Exception) -> str:
    """What onnxruntime says went wrong, on one line and without the places in its own source."""
    return " ".join(_PLACE.sub(" ", str(error)).split()).rstrip(".")


class BoundRun:
    """IO binding: inputs are copied into buffers on the device that are kept while their shapes stay the same.

    Args:
        session: an `onnxruntime.InferenceSession`.
        device: onnxruntime's name of the device: `cuda` or `cpu`.
        outputs: names of those to fetch; None fetches all.
    """

    def __init__(self, session: Any, device: str, outputs: Sequence[str] | None = None) -> None:
        self._session, self._device = session, device
        self._outputs = [output.name for output in session.get_outputs()] if outputs is None else outputs
        self._binding: Any = None
        self._values: dict[str, Any] = {}

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in order, on the host."""
        if {name: tuple(value.shape()) for name, value in self._values.items()} != {
            name: feed.shape for name, feed in feeds.items()
        }:
            self._bind(feeds)
        for name, feed in feeds.items():
            self._values[name].update_inplace(np.ascontiguousarray(feed))
        self._session.run_with_iobinding(self._binding)
        return [np.array(value.numpy()) for value in self._binding.get_outputs()]

    def _bind(self, feeds: Mapping[str, Array]) -> None:
        import onnxruntime

        self._binding = self._session.io_binding()
        self._values = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(feed.shape), feed.dtype, self._device, 0)
            for name, feed in feeds.items()
        }
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        for output in self._outputs:
            self._binding.bind_output(output, self._device)


def placement(session: Any, wanted: str) -> str:
    """Which provider the graph's nodes were really given to, for people.

    Raises:
        DualmatchError: one of `ARITHMETIC` is on another provider than `wanted`, or onnxruntime does not tell.
    """
    import onnxruntime

    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise DualmatchError(
            f"onnxruntime {onnxruntime.__version__} does not tell which provider runs which node, so a fallback to the CPU "
            "would go unnoticed: install a later release."
        )
    nodes = Counter(
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )
    strays = sorted(
        {f"{operator} on {provider}" for provider, operator in nodes if provider != wanted and operator in ARITHMETIC}
    )
    if strays:
        raise DualmatchError(
            f"onnxruntime was asked for {wanted}, but runs part of the graph elsewhere: {', '.join(strays)}."
        )
    elsewhere = sum(number for (provider, _), number in nodes.items() if provider != wanted)
    return wanted if not elsewhere else f"{wanted} ({elsewhere} of {nodes.total()} nodes, of shapes only, elsewhere)"
