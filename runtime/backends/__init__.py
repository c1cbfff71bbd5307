"""Backends: what runs a graph. Each file imports its engine's package when a session is opened, never before.

`open_session` is the only door: it knows the names that `--backend` takes.
"""

from pathlib import Path

from dualmatch.runtime.errors import DualmatchError

from .base import Session, TensorSpec

__all__ = ["BACKENDS", "Session", "TensorSpec", "open_session"]

BACKENDS = ("onnxruntime", "onnxruntime-cuda")


def open_session(path: Path, *, backend: str = "onnxruntime", threads: int = 0) -> Session:
    """Load the graph at `path` with the named backend.

    Raises:
        DualmatchError: an unknown backend, a package that is not installed, or a graph that does not load.
    """
    if backend in ("onnxruntime", "onnxruntime-cuda"):
        from .onnxruntime import OnnxruntimeSession

        return OnnxruntimeSession(path, backend=backend, threads=threads)
    raise DualmatchError(f"there is no backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
