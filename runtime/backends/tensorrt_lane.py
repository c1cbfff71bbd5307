"""One thread's way through a TensorRT engine: its streams, buffers, execution contexts and captured graphs.

A piece of a batch goes through a slot: pinned buffers on the host, buffers on the GPU, and events that order three streams
(upload, compute, download). Two slots take turns, so that copying a piece overlaps computing the one before.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from math import prod
from typing import Any

import numpy as np

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.flavours import tensorrt_reasons

from .base import Array, TensorSpec
from .cuda import Allocation, Cuda, CudaError
from .engine_record import EngineRecord
from .profiles import BATCH, GraphCache, Piece

Shapes = dict[str, tuple[int, ...]]
NUM_SLOTS = 2
MAX_GRAPHS = 32


class Slot:
    """Buffers for one piece at its profile's largest shapes; their addresses never change, so that graphs stay valid."""

    def __init__(self, cuda: Cuda, sizes: Mapping[str, int]) -> None:
        self.device: dict[str, Allocation] = {}
        self.host: dict[str, Allocation] = {}
        self.events: list[Any] = []
        self._cuda = cuda
        try:
            for name, num_bytes in sizes.items():
                self.device[name] = cuda.device_memory(num_bytes)
                self.host[name] = cuda.pinned_memory(num_bytes)
            self.events += [cuda.event() for _ in range(3)]
        except BaseException:
            self.free()
            raise
        self.uploaded, self.computed, self.downloaded = self.events

    def free(self) -> None:
        """Give all memory back."""
        for allocation in (*self.device.values(), *self.host.values()):
            allocation.free()
        for event in self.events:
            self._cuda.destroy_event(event)
        self.events.clear()


class Graph:
    """A captured launch, with the context that it was captured from: replaying is defined only while that stays as it was."""

    def __init__(self, context: Any, executable: Any) -> None:
        self.context, self.executable = context, executable


class NotCapturedError(DualmatchError):
    """An engine that runs cannot be captured as a CUDA graph."""


class Lane:
    """See the module. Used by one thread at a time.

    Args:
        trt: the flavour's module.
        engine: the deserialised engine; kept alive by the lane.

    Attributes:
        graphs: captured so far.
        without_graphs: why none can be captured, once that has shown; None as long as it has not.
    """

    def __init__(
        self,
        *,
        trt: Any,
        cuda: Cuda,
        engine: Any,
        record: EngineRecord,
        log: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self._trt, self._cuda, self._engine, self._record, self._log = trt, cuda, engine, record, log
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._specs = {spec.name: spec for spec in (*inputs, *outputs)}
        self._contexts: dict[int, Any] = {}
        self._slots: dict[tuple[int, int], Slot] = {}
        self._scratch: Allocation | None = None
        self._streams: list[Any] = []
        self.graphs: GraphCache[Graph] = GraphCache(MAX_GRAPHS, self._drop)
        # TensorRT-RTX captures graphs itself, per shape and after it has specialised kernels, which a capture of ours would miss.
        self._captures = record.flavour == "tensorrt"
        self.without_graphs: str | None = None
        for _ in range(3):
            self._streams.append(cuda.stream())
        self._upload, self._compute, self._download = self._streams

    def run(self, feeds: Mapping[str, Array], pieces: Sequence[Piece]) -> dict[str, Array]:
        """Run the pieces of a batch and put their outputs together.

        Raises:
            DualmatchError: TensorRT or CUDA failed; the lane can be used again unless the error is sticky.
        """
        self._log.errors.clear()
        parts: list[dict[str, Array]] = []
        pending: list[tuple[Slot, Shapes]] = []
        try:
            for number, piece in zip(count(), pieces, strict=False):
                if len(pending) == NUM_SLOTS:
                    parts.append(self._collect(*pending.pop(0)))
                pending.append(self._start(feeds, piece, number % NUM_SLOTS, alone=len(pieces) == 1))
            parts += [self._collect(slot, shapes) for slot, shapes in pending]
        except CudaError as error:
            if not error.sticky:
                self._drain()
            raise
        except BaseException:
            self._drain()
            raise
        if len(parts) == 1:
            return parts[0]
        return {
            spec.name: np.concatenate([part[spec.name] for part in parts], axis=spec.shape.index(BATCH))
            for spec in self._outputs
        }

    def _start(self, feeds: Mapping[str, Array], piece: Piece, number: int, *, alone: bool) -> tuple[Slot, Shapes]:
        """Put a piece on the streams; a single one keeps to one stream, where no events are needed."""
        cuda = self._cuda
        upload, download = (self._compute, self._compute) if alone else (self._upload, self._download)
        slot = self._slot(piece.profile, number)
        shapes: Shapes = {}
        for spec in self._inputs:
            value = feeds[spec.name]
            if BATCH in spec.shape:
                rows = [slice(None)] * value.ndim
                rows[spec.shape.index(BATCH)] = slice(piece.start, piece.stop)
                value = value[tuple(rows)]
            shapes[spec.name] = value.shape
            np.copyto(slot.host[spec.name].array(value.shape, spec.dtype), value)
            cuda.upload(slot.device[spec.name].pointer, slot.host[spec.name].pointer, value.nbytes, upload)
        if not alone:
            cuda.record(slot.uploaded, upload)
            cuda.wait(self._compute, slot.uploaded)
        output_shapes = self._enqueue(piece.profile, number, slot, shapes)
        if not alone:
            cuda.record(slot.computed, self._compute)
            cuda.wait(download, slot.computed)
        for name, shape in output_shapes.items():
            num_bytes = prod(shape) * np.dtype(self._specs[name].dtype).itemsize
            cuda.download(slot.host[name].pointer, slot.device[name].pointer, num_bytes, download)
        cuda.record(slot.downloaded, download)
        return slot, output_shapes

    def _collect(self, slot: Slot, shapes: Shapes) -> dict[str, Array]:
        """Wait for a piece and copy its outputs out of the slot."""
        self._cuda.synchronize_event(slot.downloaded)
        return {name: slot.host[name].array(shape, self._specs[name].dtype).copy() for name, shape in shapes.items()}

    def _enqueue(self, profile: int, number: int, slot: Slot, shapes: Shapes) -> Shapes:
        """Compute a piece whose inputs are (or will be, in the stream's order) in the slot; the outputs' shapes."""
        if self._captures and self.without_graphs is None:
            key = (profile, number, tuple(sorted(shapes.items())))
            try:
                graph = self.graphs.get(key, lambda: self._captured(profile, slot, shapes))
            except NotCapturedError as error:
                self.without_graphs, graph = str(error), None
            if graph is not None:
                self._cuda.launch(graph.executable, self._compute)
                return self._output_shapes(graph.context)
        context = self._context(profile)
        self._bind(context, slot, shapes)
        self._execute(context)
        return self._output_shapes(context)

    def _captured(self, profile: int, slot: Slot, shapes: Shapes) -> Graph:
        context = self._new_context(profile)
        self._bind(context, slot, shapes)
        self._execute(context)  # TensorRT does what it has put off after a change of shape, which must not be captured
        self._cuda.synchronize(self._compute)
        try:
            return Graph(context, self._cuda.capture(self._compute, lambda: self._execute(context)))
        except DualmatchError as error:
            self._cuda.stickiness.check()
            # Networks with loops (some GRUs) cannot be captured; they run as well without.
            raise NotCapturedError(str(error)) from None

    def _drop(self, graph: Graph) -> None:
        self._cuda.destroy_graph(graph.executable)

    def _execute(self, context: Any) -> None:
        self._done(context.execute_async_v3(int(self._compute)), "running the engine")

    def _bind(self, context: Any, slot: Slot, shapes: Shapes) -> None:
        for name, shape in shapes.items():
            self._done(context.set_input_shape(name, shape), f"setting the shape of {name!r}")
        for name, allocation in slot.device.items():
            self._done(context.set_tensor_address(name, allocation.pointer), f"setting the address of {name!r}")

    def _output_shapes(self, context: Any) -> Shapes:
        shapes = {spec.name: tuple(context.get_tensor_shape(spec.name)) for spec in self._outputs}
        for name, shape in shapes.items():
            if min(shape, default=0) < 0:
                raise DualmatchError(f"{self._record.file}: the shape of output {name!r} is not known: {list(shape)}.")
        return shapes

    def _context(self, profile: int) -> Any:
        """The context that runs a profile without a graph."""
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int) -> Any:
        trt, engine = self._trt, self._engine
        if self._record.flavour == "tensorrt-rtx":
            runtime_config = engine.create_runtime_config()
            runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(runtime_config)
        else:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise DualmatchError(
                f"{self._record.file}: TensorRT makes no execution context: {tensorrt_reasons(self._log)}."
            )
        chosen = context.set_optimization_profile_async(profile, int(self._compute))
        self._done(chosen, f"choosing profile {self._record.profiles[profile].name!r}")
        if self._record.flavour == "tensorrt":
            # One for all contexts of the lane: they run one after another on one stream.
            scratch = self._shared_scratch()
            context.set_device_memory(scratch.pointer, scratch.num_bytes)
        self._cuda.synchronize(self._compute)
        return context

    def _shared_scratch(self) -> Allocation:
        if self._scratch is None:
            engine = self._engine
            sizes = [engine.get_device_memory_size_for_profile_v2(index) for index in range(len(self._record.profiles))]
            self._scratch = self._cuda.device_memory(max(*sizes, 1))
        return self._scratch

    def _slot(self, profile: int, number: int) -> Slot:
        key = (profile, number)
        if key not in self._slots:
            largest = {name: shapes.max for name, shapes in self._record.profiles[profile].shapes.items()}
            context = self._context(profile)
            for name, shape in largest.items():
                self._done(context.set_input_shape(name, shape), f"setting the shape of {name!r}")
            shapes = largest | self._output_shapes(context)
            self._slots[key] = Slot(
                self._cuda,
                {
                    name: max(prod(shape) * np.dtype(self._specs[name].dtype).itemsize, 1)
                    for name, shape in shapes.items()
                },
            )
        return self._slots[key]

    def _done(self, succeeded: bool, doing: str) -> None:
        if not succeeded:
            raise DualmatchError(
                f"{self._record.file}: {doing} failed: {tensorrt_reasons(self._log) or 'TensorRT does not say why'}."
            )

    def _drain(self) -> None:
        """Wait for what is under way, so that the buffers may be used again; a lost context comes out here."""
        for stream in self._streams:
            self._cuda.synchronize(stream)

    def close(self) -> None:
        """Give back everything; contexts before the engine that they belong to."""
        for stream in self._streams if not self._cuda.stickiness.is_lost else ():
            self._cuda.cudart.cudaStreamSynchronize(stream)
        self.graphs.clear()
        self._contexts.clear()
        for slot in self._slots.values():
            slot.free()
        self._slots.clear()
        if self._scratch is not None:
            self._scratch.free()
            self._scratch = None
        for stream in self._streams:
            self._cuda.destroy_stream(stream)
        self._streams.clear()
        self._engine = None

    def __del__(self) -> None:
        if hasattr(self, "graphs"):  # else its constructor failed before there was anything to give back
            self.close()
