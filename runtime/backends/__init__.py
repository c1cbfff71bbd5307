"""Backends: what runs a graph. Each file imports its engine's package when a session is opened, never before.

`open_encoder` (of a bundle) and `open_session` (of a graph) are the only doors: they know the names that `--backend` takes.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from dualmatch.runtime.errors import DualmatchError

from .base import Session, TensorSpec

if TYPE_CHECKING:
    from dualmatch.runtime.bundle import Bundle, EncoderName

__all__ = ["BACKENDS", "Session", "TensorSpec", "open_encoder", "open_session"]

ENGINE_BACKENDS = ("tensorrt", "tensorrt-rtx")
"""Run engines that were compiled into a bundle; the others load its graphs."""

TENSORRT_PROVIDERS = ("onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")
"""Compile a graph themselves, and so load the one that engines are compiled from: TensorRT takes no other coding of int8."""

BACKENDS = (
    "onnxruntime",
    "onnxruntime-cuda",
    *TENSORRT_PROVIDERS,
    "openvino",
    *ENGINE_BACKENDS,
)


def open_encoder(
    bundle: "Bundle", encoder: "EncoderName", *, backend: str, threads: int = 0, nodes: bool = False
) -> Session:
    """Load one encoder of a bundle with the named backend: its graph, or its engine where the backend runs engines.

    Args:
        nodes: fetch the graph's nodes too, where it gives them; engines never do.

    Raises:
        DualmatchError: as `open_session`, and an engine that is missing or not for this machine.
    """
    if backend not in ENGINE_BACKENDS:
        extra = bundle.manifest.encoders[encoder].nodes
        left_out = () if nodes or extra is None else (extra.output.name,)
        graph = bundle.graph(encoder, for_tensorrt=backend in TENSORRT_PROVIDERS)
        return open_session(graph, backend=backend, threads=threads, leave_out=left_out)
    if threads:
        raise DualmatchError(f"backend {backend!r} computes on the GPU and takes no number of threads.")
    from .tensorrt import TensorrtSession

    return TensorrtSession(bundle, encoder, flavour=backend)


def open_session(
    graph: Path | bytes, *, backend: str = "onnxruntime", threads: int = 0, leave_out: Collection[str] = ()
) -> Session:
    """Load a graph, given by its file or its bytes, with the named backend.

    Args:
        leave_out: outputs that are not fetched.

    Raises:
        DualmatchError: an unknown backend, a package that is not installed, or a graph that does not load.
    """
    if backend.startswith("onnxruntime") and backend in BACKENDS:
        from .onnxruntime import OnnxruntimeSession

        return OnnxruntimeSession(graph, backend=backend, threads=threads, leave_out=leave_out)
    if backend == "openvino":
        from .openvino import OpenvinoSession

        return OpenvinoSession(graph, threads=threads, leave_out=leave_out)
    if backend in ENGINE_BACKENDS:
        raise DualmatchError(f"backend {backend!r} runs engines that were compiled into a bundle, not an ONNX graph.")
    raise DualmatchError(f"there is no backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
