"""onnxruntime, on the CPU or on CUDA."""

from collections.abc import Mapping
from pathlib import Path

from dualmatch.runtime.errors import DualmatchError

from .base import Array, Session, TensorSpec

PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}

_DTYPE_FROM_ONNX = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxruntimeSession(Session):
    """An ONNX graph in an onnxruntime session.

    Args:
        path: the `.onnx` file.
        backend: `onnxruntime` (CPU) or `onnxruntime-cuda`.
        threads: intra-operator threads; 0 leaves the choice to onnxruntime.

    Raises:
        DualmatchError: onnxruntime is not installed, the provider is not available or fell back to another one, or the graph does not load.
    """

    def __init__(self, path: Path, *, backend: str = "onnxruntime", threads: int = 0) -> None:
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
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
        except Exception as error:  # noqa: BLE001  (onnxruntime raises exception types that it does not document)
            raise DualmatchError(f"onnxruntime cannot load {path}: {error}") from None
        # onnxruntime falls back to the CPU with a log line only; a latency measured on the wrong device is worse than an error.
        self.provider = self._session.get_providers()[0]
        if self.provider != wanted:
            raise DualmatchError(
                f"backend {backend!r} asked for {wanted}, but onnxruntime runs the graph on {self.provider}."
            )
        self.backend = backend
        self.inputs = tuple(
            TensorSpec(name=i.name, dtype=_DTYPE_FROM_ONNX[i.type], shape=tuple(i.shape))
            for i in self._session.get_inputs()
        )
        self.outputs = tuple(
            TensorSpec(name=o.name, dtype=_DTYPE_FROM_ONNX[o.type], shape=tuple(o.shape))
            for o in self._session.get_outputs()
        )

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def _release(self) -> None:
        del self._session
