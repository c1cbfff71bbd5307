"""TensorRT engines of a bundle, of both flavours: one execution context per thread, double-buffered copies, CUDA graphs per shape."""

import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.flavours import (
    cuda_runtime,
    gpu_compute_capability,
    load_flavour,
    tensorrt_logger,
    tensorrt_reasons,
)

from .base import Array, Session
from .cuda import PROCESS, Cuda
from .engine_record import check_engine, find_engine
from .profiles import plan_pieces
from .tensorrt_lane import Lane

if TYPE_CHECKING:
    from dualmatch.runtime.bundle import Bundle, EncoderName


class TensorrtSession(Session):
    """An engine that was compiled into a bundle.

    A batch that no profile takes whole is run in pieces: a piece is uploaded while the one before is computed.

    Args:
        bundle: an opened bundle.
        encoder: `image` or `text`.
        flavour: `tensorrt` or `tensorrt-rtx`; also the backend's name.

    Raises:
        DualmatchError: the bundle has no engine of this flavour or one of another graph, TensorRT or cuda-bindings is not installed,
            there is no GPU, the engine was made for another GPU, TensorRT or platform (all found before anything of it is read), its
            bytes are not those of the manifest, or it does not load.
    """

    def __init__(self, bundle: "Bundle", encoder: "EncoderName", *, flavour: str) -> None:
        PROCESS.check()
        entry, files = bundle.manifest.encoders[encoder], bundle.manifest.files
        record = find_engine(
            bundle.manifest.engines,
            bundle=bundle.path,
            encoder=encoder,
            flavour=flavour,
            graph_sha256=files[entry.engine_graph].sha256,
        )
        trt = load_flavour(flavour)
        self._cuda = Cuda(cuda_runtime())
        check_engine(
            record, bundle=bundle.path, tensorrt_version=trt.__version__, compute_capability=gpu_compute_capability()
        )
        if record.file not in files or files[record.file].sha256 != record.sha256:
            raise DualmatchError(
                f"the manifest of {bundle.path} lists no file with the hash of its engine {record.file}; compile it again."
            )
        self._trt, self._record = trt, record
        self.backend = flavour
        self.inputs, self.outputs = entry.inputs, entry.outputs
        self._log = tensorrt_logger(flavour)
        self._log.errors.clear()
        # `read` hashes these very bytes: the file may have changed since the bundle was opened, and an engine is executable code.
        self._engine = self._deserialized(bundle.read(record.file))
        self._check_tensors(self._engine)
        name = "TensorRT-RTX" if flavour == "tensorrt-rtx" else "TensorRT"
        self.provider = f"{name} {trt.__version__} on {self._cuda.device_name()}"
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._own = threading.local()
        self._lock = threading.Lock()

    def _deserialized(self, plan: bytes) -> Any:
        trt, name = self._trt, self._record.file
        try:
            runtime = trt.Runtime(self._log)
        except (TypeError, RuntimeError) as error:  # pybind11 says so when TensorRT's factory returns nothing
            raise DualmatchError(f"{self.backend} cannot start: {tensorrt_reasons(self._log) or error}.") from None
        if self.backend == "tensorrt-rtx":
            validity, diagnostics = runtime.get_engine_validity(plan)
            if validity == trt.EngineValidity.INVALID:
                raise DualmatchError(
                    f"{self.backend} {trt.__version__} refuses {name} on this machine: {_diagnoses(trt, diagnostics)}"
                    f"{tensorrt_reasons(self._log) or 'it says no more'}."
                )
        if self._record.version_compatible:
            runtime.engine_host_code_allowed = True  # such a plan carries its own runtime; its hash was checked above
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise DualmatchError(f"{self.backend} cannot load {name}: {tensorrt_reasons(self._log)}.")
        return engine

    def _check_tensors(self, engine: Any) -> None:
        """The engine's tensors and profiles must be those that the manifest promises."""
        trt = self._trt
        found: dict[str, tuple[bool, str, list[int]]] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
            found[name] = (is_input, dtype, list(engine.get_tensor_shape(name)))
        promised = {
            spec.name: (spec in self.inputs, spec.dtype, [-1 if isinstance(axis, str) else axis for axis in spec.shape])
            for spec in (*self.inputs, *self.outputs)
        }
        if found != promised:
            raise DualmatchError(
                f"{self._record.file} takes and gives {found}, the manifest promises {promised}; compile it again."
            )
        for index, profile in enumerate(self._record.profiles):
            for spec in self.inputs:
                has = [tuple(shape) for shape in engine.get_tensor_profile_shape(spec.name, index)]
                if has != list(profile.shapes[spec.name]):
                    raise DualmatchError(
                        f"{self._record.file}: profile {profile.name!r} takes {spec.name!r} as {has}, "
                        f"the manifest says {list(profile.shapes[spec.name])}; compile it again."
                    )

    def _lane(self) -> Lane:
        """This thread's lane: a TensorRT context serves one thread at a time."""
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is None:
            with self._lock:
                lane = Lane(
                    trt=self._trt,
                    cuda=self._cuda,
                    engine=self._engine,
                    record=self._record,
                    log=self._log,
                    inputs=self.inputs,
                    outputs=self.outputs,
                )
                self._lanes.add(lane)
            self._own.lane = lane  # the only strong reference: a thread that ends gives its memory back
        return lane

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        PROCESS.check()
        shapes = {name: tuple(value.shape) for name, value in feeds.items()}
        pieces = plan_pieces(self._record.profiles, self.inputs, shapes, engine=self._record.file)
        lane = self._lane()
        results = lane.run(feeds, pieces)
        if lane.without_graphs is not None and "CUDA graphs" not in self.provider:
            self.provider += f", without CUDA graphs ({lane.without_graphs.rstrip('.')})"
        return results

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that this thread has captured so far (`tensorrt-rtx` keeps its own and does not tell)."""
        lane: Lane | None = getattr(self._own, "lane", None)
        return 0 if lane is None else len(lane.graphs)

    def _release(self) -> None:
        for lane in list(self._lanes):
            lane.close()
        self._own = threading.local()
        self._engine = None


def _diagnoses(trt: Any, diagnostics: int) -> str:
    """The bits of TensorRT-RTX's diagnosis as words."""
    bits = trt.EngineInvalidityDiagnostics
    words = {
        bits.VERSION_MISMATCH: "another TensorRT-RTX version built it",
        bits.UNSUPPORTED_CC: "it was not built for a GPU of this compute capability, or TensorRT-RTX does not support one",
        bits.OLD_CUDA_DRIVER: "the CUDA driver is too old",
        bits.OLD_CUDA_RUNTIME: "the CUDA runtime is too old",
        bits.INSUFFICIENT_GPU_MEMORY: "the GPU has too little memory",
        bits.MALFORMED_ENGINE: "it is malformed",
        bits.CUDA_ERROR: "CUDA is not installed correctly",
    }
    return "".join(f"{text}; " for bit, text in words.items() if int(diagnostics) & int(bit))
