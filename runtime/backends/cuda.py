"""The CUDA runtime as the TensorRT backend needs it: checked calls, pinned and device memory, streams, events, captured graphs.

Every call goes through `Cuda`, so that an error has one way out: a `DualmatchError` that says what failed, and, if the error is
sticky (the process's CUDA context is lost), that nothing on this GPU can run in this process any more.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError


class CudaError(DualmatchError):
    """A CUDA call failed; `sticky` if the process's CUDA context is lost with it."""

    def __init__(self, message: str, *, sticky: bool) -> None:
        super().__init__(message)
        self.sticky = sticky


class Stickiness:
    """Remembers the first error that cost a CUDA context; from then on every use is refused with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: str | None = None

    def lost(self, reason: str) -> None:
        """The context is lost."""
        with self._lock:
            self._reason = self._reason or reason

    @property
    def is_lost(self) -> bool:
        """Whether it is."""
        return self._reason is not None

    def check(self) -> None:
        """Go on only with a context that works.

        Raises:
            CudaError: it was lost.
        """
        if self._reason is not None:
            raise CudaError(
                f"the GPU cannot be used by this process any more, because {self._reason}; start the process again.",
                sticky=True,
            )


_capturing = threading.Lock()

PROCESS = Stickiness()
"""A context is lost for the whole process, whichever session lost it."""


class Cuda:
    """Checked calls of the CUDA runtime on the current device.

    Args:
        cudart: `cuda.bindings.runtime`.
        stickiness: where a lost context is remembered.
    """

    def __init__(self, cudart: Any, stickiness: Stickiness = PROCESS) -> None:
        self.cudart = cudart
        self.stickiness = stickiness

    def call(self, doing: str, answer: tuple[Any, ...]) -> Any:
        """The value of a call's answer `(status, value …)`.

        Raises:
            CudaError: the status is an error.
        """
        status, *values = answer
        if status != self.cudart.cudaError_t.cudaSuccess:
            self.fail(doing, status)
        return values[0] if values else None

    def fail(self, doing: str, status: Any) -> None:
        """Raise the error that a status stands for, after finding out whether it is sticky.

        An error that clears (too little memory, say) is gone once it was read; a sticky one comes back from the next call.

        Raises:
            CudaError: always.
        """
        reason = f"{doing} failed with {status.name} ({self._text(status)})"
        with _capturing:  # a device must not be synchronised while any of its streams is being captured
            self.cudart.cudaGetLastError()
            (after,) = self.cudart.cudaDeviceSynchronize()
        if after != self.cudart.cudaError_t.cudaSuccess:
            self.stickiness.lost(reason)
            self.stickiness.check()
        advice = ""
        if status == self.cudart.cudaError_t.cudaErrorMemoryAllocation:
            advice = "; use smaller batches, or compile with smaller profiles"
        raise CudaError(f"{reason}{advice}.", sticky=False)

    def _text(self, status: Any) -> str:
        _, text = self.cudart.cudaGetErrorString(status)
        return text.decode() if isinstance(text, bytes) else str(text)

    # Memory.

    def device_memory(self, num_bytes: int) -> "Allocation":
        """Memory on the GPU, aligned as CUDA aligns (256 bytes)."""
        pointer = int(self.call(f"allocating {num_bytes} bytes on the GPU", self.cudart.cudaMalloc(num_bytes)))
        return Allocation(pointer, num_bytes, lambda: self.cudart.cudaFree(pointer))

    def pinned_memory(self, num_bytes: int) -> "Allocation":
        """Page-locked memory of the host: the only kind that is copied while the processor goes on."""
        answer = self.cudart.cudaHostAlloc(num_bytes, self.cudart.cudaHostAllocDefault)
        pointer = int(self.call(f"allocating {num_bytes} bytes of pinned memory", answer))
        return Allocation(pointer, num_bytes, lambda: self.cudart.cudaFreeHost(pointer))

    def upload(self, device: int, host: int, num_bytes: int, stream: Any) -> None:
        """Copy to the GPU in a stream's order."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("copying to the GPU", self.cudart.cudaMemcpyAsync(device, host, num_bytes, kind, stream))

    def download(self, host: int, device: int, num_bytes: int, stream: Any) -> None:
        """Copy from the GPU in a stream's order."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("copying from the GPU", self.cudart.cudaMemcpyAsync(host, device, num_bytes, kind, stream))

    # Order.

    def stream(self) -> Any:
        """A stream that does not wait for the default stream."""
        return self.call(
            "making a CUDA stream", self.cudart.cudaStreamCreateWithFlags(self.cudart.cudaStreamNonBlocking)
        )

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream."""
        self.cudart.cudaStreamDestroy(stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until a stream is done; errors of its kernels come out here."""
        self.call("running the engine", self.cudart.cudaStreamSynchronize(stream))

    def event(self) -> Any:
        """An event without a clock, which is the cheap kind."""
        return self.call(
            "making a CUDA event", self.cudart.cudaEventCreateWithFlags(self.cudart.cudaEventDisableTiming)
        )

    def destroy_event(self, event: Any) -> None:
        """Destroy an event."""
        self.cudart.cudaEventDestroy(event)

    def record(self, event: Any, stream: Any) -> None:
        """Mark the point that a stream has been given work up to."""
        self.call("recording a CUDA event", self.cudart.cudaEventRecord(event, stream))

    def wait(self, stream: Any, event: Any) -> None:
        """Let a stream's later work wait for an event; the processor does not wait."""
        self.call(
            "waiting for a CUDA event",
            self.cudart.cudaStreamWaitEvent(stream, event, self.cudart.cudaEventWaitDefault),
        )

    def synchronize_event(self, event: Any) -> None:
        """Wait until an event has happened; errors of the kernels before it come out here."""
        self.call("running the engine", self.cudart.cudaEventSynchronize(event))

    # Graphs.

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """Record what `enqueue` puts on `stream` as an executable graph, without running it.

        Only this thread's calls are watched meanwhile, so that other threads' sessions go on. `enqueue` must not synchronise.

        Raises:
            DualmatchError: what `enqueue` raises, or the capture failed.
        """
        mode = self.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with _capturing:
            began = self.cudart.cudaStreamBeginCapture(stream, mode)
            failed = None
            try:
                enqueue()
            except DualmatchError as error:
                failed = error
            finally:
                ended = self.cudart.cudaStreamEndCapture(stream)
        self.call("starting to capture a CUDA graph", began)
        if failed is not None:
            self.cudart.cudaGetLastError()  # the capture's own error, which `failed` explains, must not meet the next call
            raise failed
        graph = self.call("capturing a CUDA graph", ended)
        try:
            return self.call("instantiating a CUDA graph", self.cudart.cudaGraphInstantiate(graph, 0))
        finally:
            self.cudart.cudaGraphDestroy(graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Run a captured graph in a stream's order."""
        self.call("launching a CUDA graph", self.cudart.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a captured graph."""
        self.cudart.cudaGraphExecDestroy(graph)

    # The device.

    def device_name(self) -> str:
        """The current GPU's name."""
        device = self.call("asking for the current GPU", self.cudart.cudaGetDevice())
        properties = self.call("asking for the GPU's name", self.cudart.cudaGetDeviceProperties(device))
        name = properties.name
        return name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)


class Allocation:
    """A stretch of memory of the host or the GPU.

    Attributes:
        pointer: its address.
        num_bytes: its size.
    """

    def __init__(self, pointer: int, num_bytes: int, free: Callable[[], object]) -> None:
        self.pointer = pointer
        self.num_bytes = num_bytes
        self._free: Callable[[], object] | None = free

    def free(self) -> None:
        """Give it back, once."""
        if self._free is not None:
            self._free()
            self._free = None

    def array(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The beginning of a host allocation as an array that shares its memory; valid until `free`."""
        wanted = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        assert count * wanted.itemsize <= self.num_bytes
        raw = (ctypes.c_byte * (count * wanted.itemsize)).from_address(self.pointer)
        return np.frombuffer(memoryview(raw), dtype=wanted, count=count).reshape(shape)
