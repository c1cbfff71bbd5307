"""A TensorRT and a CUDA runtime made of Python, for our own logic above their API: which profile, which buffer, which order, which error.

Nothing here says anything about the real API; `tests/test_tensorrt_api.py` does. Streams are queues that run as late as they may, in an
order that a seed chooses and that only events and synchronisation bound: a copy that does not wait for what it needs reads rubbish.
"""

# ruff: noqa: N802  (CUDA's own names)
import ctypes
import random
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np


class Status(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700


class FakeCudart:
    """What `runtime/backends/cuda.py` calls of `cuda.bindings.runtime`.

    Attributes:
        calls: names of the functions called.
        broken: once set, what every call answers.
        failures: function name to the status that its next call answers.
    """

    cudaError_t = Status
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaHostAllocDefault = cudaEventWaitDefault = 0
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self, seed: int = 0) -> None:
        self.chance = random.Random(seed)
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, list[Any]] = {}
        self.capturing: dict[int, list[Any]] = {}
        self.graphs: dict[int, list[Any]] = {}
        self.recorded: dict[int, int] = {}
        self.happened: dict[int, int] = {}
        self.numbers = iter(range(1, 10**9))
        self.calls: list[str] = []
        self.broken: Status | None = None
        self.failures: dict[str, Status] = {}

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value) or name == "cudaError_t":
            return value

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            empty = 1 if name in TWO_VALUES else 0
            if self.broken is not None and name != "cudaGetErrorString":
                return (self.broken, *[None] * empty)
            if name in self.failures:
                if name == "cudaStreamEndCapture":  # a capture that fails ends all the same
                    self.capturing.pop(*arguments)
                return (self.failures.pop(name), *[None] * empty)
            result = value(*arguments)
            return (Status.cudaSuccess, result) if name in TWO_VALUES else (Status.cudaSuccess,)

        return call

    def _new(self) -> int:
        return next(self.numbers)

    def _allocate(self, size: int) -> int:
        buffer = (ctypes.c_byte * size)(*([85] * min(size, 64)))
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def cudaMalloc(self, size):
        return self._allocate(size)

    def cudaHostAlloc(self, size, flags):
        return self._allocate(size)

    def cudaFree(self, pointer):
        del self.memory[pointer]

    def cudaFreeHost(self, pointer):
        del self.memory[pointer]

    def cudaStreamCreateWithFlags(self, flags):
        stream = self._new()
        self.streams[stream] = []
        return stream

    def cudaStreamDestroy(self, stream):
        del self.streams[stream]

    def cudaEventCreateWithFlags(self, flags):
        return self._new()

    def cudaEventDestroy(self, event):
        pass

    def enqueue(self, stream, operation):
        self.capturing.get(stream, self.streams[stream]).append(operation)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size))

    def cudaEventRecord(self, event, stream):
        self.recorded[event] = generation = self.recorded.get(event, 0) + 1
        self.enqueue(stream, lambda: self.happened.__setitem__(event, generation))

    def cudaStreamWaitEvent(self, stream, event, flags):
        self.enqueue(stream, ("wait", event, self.recorded.get(event, 0)))

    def _blocked(self, stream):
        operation = self.streams[stream][0]
        return isinstance(operation, tuple) and self.happened.get(operation[1], 0) < operation[2]

    def _run_until(self, done):
        while not done():
            ready = [stream for stream, queue in self.streams.items() if queue and not self._blocked(stream)]
            assert ready, "the streams wait for each other for ever"
            operation = self.streams[self.chance.choice(ready)].pop(0)
            if not isinstance(operation, tuple):
                operation()

    def cudaStreamSynchronize(self, stream):
        self._run_until(lambda: not self.streams[stream])

    def cudaEventSynchronize(self, event):
        self._run_until(lambda: self.happened.get(event, 0) >= self.recorded.get(event, 0))

    def cudaDeviceSynchronize(self):
        self._run_until(lambda: not any(self.streams.values()))

    def cudaGetErrorString(self, status):
        return b"as told"

    def cudaGetLastError(self):
        pass

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing[stream] = []

    def cudaStreamEndCapture(self, stream):
        graph = self._new()
        self.graphs[graph] = self.capturing.pop(stream)
        return graph

    def cudaGraphInstantiate(self, graph, flags):
        executable = self._new()
        self.graphs[executable] = list(self.graphs[graph])
        return executable

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]

    def cudaGraphExecDestroy(self, graph):
        del self.graphs[graph]

    def cudaGraphLaunch(self, graph, stream):
        for operation in self.graphs[graph]:
            self.enqueue(stream, operation)

    def cudaGetDevice(self):
        return 0

    def cudaGetDeviceProperties(self, device):
        return SimpleNamespace(name=b"Imaginary GPU\0\0")


TWO_VALUES = frozenset((
    "cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaStreamEndCapture",
    "cudaGraphInstantiate", "cudaGetDevice", "cudaGetDeviceProperties", "cudaGetErrorString",
))  # fmt: skip


class FakeContext:
    def __init__(self, engine) -> None:
        self.engine, self.profile, self.memory = engine, None, None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_device_memory(self, pointer, size):
        self.memory = (pointer, size)

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.profiles[self.profile][name]
        assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def get_tensor_shape(self, name):
        return (self.shapes["token_ids"][0], 2)

    def execute_async_v3(self, stream):
        if self.engine.fails:
            self.engine.log.errors.append("Error Code 1: Myelin (no more imagination)")
            return False
        shape, source, target = self.shapes["token_ids"], self.addresses["token_ids"], self.addresses["text_embedding"]
        self.engine.executed.append((self.profile, shape))

        def compute():
            count = int(np.prod(shape))
            ids = np.frombuffer((ctypes.c_int64 * count).from_address(source), np.int64).reshape(shape)
            out = np.stack([ids.sum(1), (ids * np.arange(1, shape[1] + 1)).sum(1)], 1).astype(np.float32)
            ctypes.memmove(target, out.ctypes.data, out.nbytes)

        self.engine.cudart.enqueue(stream, compute)
        return True


class FakeEngine:
    """Takes `token_ids` (batch, length) int64, gives `text_embedding` (batch, 2): the sum, and the sum weighted by place."""

    num_io_tensors = 2

    def __init__(self, profiles, cudart, log) -> None:
        self.profiles, self.cudart, self.log = profiles, cudart, log
        self.contexts: list[FakeContext] = []
        self.executed: list[tuple[int, tuple[int, ...]]] = []
        self.fails = False

    def get_tensor_name(self, index):
        return ("token_ids", "text_embedding")[index]

    def get_tensor_mode(self, name):
        return "input" if name == "token_ids" else "output"

    def get_tensor_dtype(self, name):
        return np.int64 if name == "token_ids" else np.float32

    def get_tensor_shape(self, name):
        return (-1, -1) if name == "token_ids" else (-1, 2)

    def get_tensor_profile_shape(self, name, index):
        return self.profiles[index][name]

    def get_device_memory_size_for_profile_v2(self, index):
        return 1000 * (index + 1)

    def create_runtime_config(self):
        return SimpleNamespace(cuda_graph_strategy=None)

    def create_execution_context(self, how):
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


def fake_trt(engine, version="10.13.2"):
    """The module `tensorrt` (or `tensorrt_rtx`) around an engine; `opened` counts deserialisations."""
    module = SimpleNamespace(
        __version__=version,
        opened=0,
        TensorIOMode=SimpleNamespace(INPUT="input"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="own"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        EngineValidity=SimpleNamespace(INVALID=2),
        EngineInvalidityDiagnostics=SimpleNamespace(
            VERSION_MISMATCH=1,
            UNSUPPORTED_CC=2,
            OLD_CUDA_DRIVER=4,
            OLD_CUDA_RUNTIME=8,
            INSUFFICIENT_GPU_MEMORY=16,
            MALFORMED_ENGINE=32,
            CUDA_ERROR=64,
        ),
        nptype=lambda dtype: dtype,
        validity=(0, 0),
    )

    class Runtime:
        def __init__(self, log) -> None: ...

        def get_engine_validity(self, plan):
            return module.validity

        def deserialize_cuda_engine(self, plan):
            module.opened += 1
            return engine

    module.Runtime = Runtime
    return module
