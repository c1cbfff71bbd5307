"""Memory of NVIDIA GPUs, through NVML (`nvidia-ml-py`, of the `bench` extra); None where there is none."""

from typing import Any


def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def device_memory_bytes() -> int | None:
    """Memory in use on all visible GPUs together, by every process: inside a container NVML does not know one's own."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return sum(int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()
