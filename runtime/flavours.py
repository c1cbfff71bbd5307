"""TensorRT comes in two packages with one API; this file knows their names, their logger, and the GPU they find."""

import importlib
import logging
import re
from collections import deque
from functools import cache
from typing import Any

from .errors import DualmatchError

FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The Python module of each flavour; a flavour's name is also the extra that installs it."""

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())


def load_flavour(flavour: str) -> Any:
    """The imported module of a flavour.

    Raises:
        DualmatchError: an unknown flavour, or a package that is not installed or does not load.
    """
    if flavour not in FLAVOURS:
        raise DualmatchError(f"there is no TensorRT flavour {flavour!r}; choose one of {', '.join(FLAVOURS)}.")
    try:
        return importlib.import_module(FLAVOURS[flavour])
    except ModuleNotFoundError:
        raise DualmatchError(
            f"flavour {flavour!r} needs the package {FLAVOURS[flavour]}, which is not installed: "
            f"pip install 'dualmatch[{flavour}]'."
        ) from None
    except (ImportError, OSError) as error:
        raise DualmatchError(f"the package {FLAVOURS[flavour]} is installed but does not load: {error}.") from None


@cache
def tensorrt_logger(flavour: str) -> Any:
    """The logger of a flavour, one for the life of the process, with its latest `errors`; all goes to `logging` as well.

    TensorRT keeps the first logger that any builder or runtime hands it and ignores later ones, and uses it until the last
    of its objects is gone: so builders and runtimes must share this one.
    """
    trt: Any = load_flavour(flavour)
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.INFO,
        severity.VERBOSE: logging.DEBUG,
    }

    class TensorrtLogger(trt.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=100)

        def log(self, severity: Any, message: str) -> None:
            level = levels[severity]
            if level >= logging.ERROR:
                self.errors.append(message)
            _log.log(level, "%s: %s", flavour, message)

    return TensorrtLogger()


def tensorrt_reasons(log: Any) -> str:
    """What TensorRT last said was wrong, for a sentence; `log` is a `tensorrt_logger`."""
    return "; ".join(without_source_lines(message) for message in list(log.errors)[:3])


def without_source_lines(message: str) -> str:
    """TensorRT's first two lines (what, and why), without the places in its own source."""
    lines = [re.sub(r"\s*\bIn \S+ at /\S+:\d+", "", line).strip().rstrip(".") for line in message.splitlines()]
    return "; ".join(lines[:2])


def cuda_runtime() -> Any:
    """The imported `cuda.bindings.runtime`.

    Raises:
        DualmatchError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise DualmatchError(
            "using the GPU needs cuda-bindings, which is not installed: pip install 'dualmatch[tensorrt]' (or [tensorrt-rtx])."
        ) from None
    return runtime


def gpu_compute_capability() -> str:
    """The compute capability of the current CUDA device, as in `8.9`.

    Raises:
        DualmatchError: cuda-bindings is not installed, or there is no GPU or driver to ask.
    """
    cudart = cuda_runtime()

    def checked(call: tuple[Any, int | None]) -> int:
        status, value = call
        if status != cudart.cudaError_t.cudaSuccess or value is None:
            raise DualmatchError(f"there is no CUDA GPU that can be used here ({status.name}).")
        return value

    device = checked(cudart.cudaGetDevice())
    attribute = cudart.cudaDeviceAttr
    major = checked(cudart.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, device))
    minor = checked(cudart.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, device))
    return f"{major}.{minor}"
