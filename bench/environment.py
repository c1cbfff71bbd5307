"""The environment block: what a reader must know about the machine to judge a latency measured on it."""

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dualmatch.runtime.errors import DualmatchError

# The instruction sets that decide which matrix kernels a CPU backend picks, x86 then Arm, as Linux names them.
CPU_FLAGS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
PACKAGES = (
    *("dualmatch", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu", "openvino", "torch"),
    *("tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-bindings"),
)
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
GPU_FIELDS = ("name", "memory.total", "driver_version", "compute_cap")
GPU_STATE_FIELDS = (
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate", "memory.used"),
    *("utilization.gpu", "clocks_throttle_reasons.active"),
)
# NVML's bits, of which several may be set; 0 is a GPU at the clocks that were asked for.
THROTTLE_REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal", 0x40: "hardware thermal", 0x80: "hardware power brake", 0x100: "display clocks",
}  # fmt: skip


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        raise DualmatchError("bench needs psutil, which is not installed: pip install 'dualmatch[bench]'.") from None
    return psutil


def cpu_model_and_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, list[str] | None]:
    """The processor's name, and those of `CPU_FLAGS` that it has; None where the system does not list them."""
    fallback = platform.processor() or platform.machine()
    if not cpuinfo.is_file():
        return fallback, None
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    listed = fields.get("flags", fields.get("Features"))
    flags = None if listed is None else [flag for flag in CPU_FLAGS if flag in listed.split()]
    return fields.get("model name", fallback), flags


def _quota_of(folder: Path) -> float | None:
    """Cores that one control group grants (v2 `cpu.max`, else v1 `cfs_quota`); None for no limit or no such file."""
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    elif (folder / "cpu.cfs_quota_us").is_file():
        quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
        period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def cgroup_cpu_quota(
    mounted: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Cores that the control groups let this process use; None without a limit (or without control groups).

    A container's cores are often a quota, which no core count shows; the tightest of the group and its parents binds.
    """
    if not membership.is_file():
        return None
    quotas = []
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = [controllers, *controllers.split(",")] if controllers else ["", "unified"]
        for root in {mounted / name for name in names}:
            # Inside a container the path may be the host's, with only the mount's root visible: missing folders are skipped.
            own = root / path.lstrip("/")
            quotas += [_quota_of(folder) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _ask_nvidia_smi(fields: tuple[str, ...]) -> list[dict[str, str]] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    if any(len(row) != len(fields) for row in rows):
        return None
    return [dict(zip(fields, row, strict=True)) for row in rows] or None


def nvidia_gpus() -> list[dict[str, str]] | None:
    """Name, memory (MiB), driver and compute capability of each NVIDIA GPU, or None where `nvidia-smi` finds none."""
    return _ask_nvidia_smi(GPU_FIELDS)


def nvidia_state() -> list[dict[str, Any]] | None:
    """Clocks (MHz), temperature, power (W), memory in use (MiB) and throttle reasons in words of each NVIDIA GPU, as of now."""
    gpus = _ask_nvidia_smi(GPU_STATE_FIELDS)
    if gpus is None:
        return None
    return [{**gpu, "throttle_reasons": throttle_reasons(gpu["clocks_throttle_reasons.active"])} for gpu in gpus]


def throttle_reasons(bits: str) -> list[str] | None:
    """NVML's reasons for lower clocks, from `0x0000000000000004`; None where the driver does not tell."""
    try:
        value = int(bits, 16)
    except ValueError:
        return None
    return [reason for bit, reason in THROTTLE_REASONS.items() if value & bit]


def cgroup_throttled_s(mounted: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Seconds for which the control group's quota has held this container's threads back so far; None where it does not tell."""
    for file, unit in ((mounted / "cpu.stat", 1e-6), (mounted / "cpu" / "cpu.stat", 1e-9)):
        if not file.is_file():
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            if name in ("throttled_usec", "throttled_time"):
                return int(value) * unit
    return None


def changing_state() -> dict[str, Any]:
    """What changes while a benchmark runs: taken before and after, it shows a machine that others used or that slowed down."""
    psutil = _psutil()
    frequency = psutil.cpu_freq()
    return {
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
        "cpu_mhz": None if frequency is None else round(frequency.current),
        "cgroup_throttled_s": cgroup_throttled_s(),
        "gpus": nvidia_state(),
    }


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far. It never falls, so it belongs to everything that ran before too."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: on Linux its figure survives fork and exec, so a child would report its parent's peak.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(_psutil().Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """The machine and the software, ready for JSON; null where the system does not tell. Imports no engine.

    Raises:
        DualmatchError: psutil, which the `bench` extra brings, is not installed.
    """
    psutil = _psutil()
    model, flags = cpu_model_and_flags()
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    memory = psutil.virtual_memory()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": {
            "model": model,
            "architecture": platform.machine(),
            "flags": flags,
            "logical_cores": psutil.cpu_count(),
            "physical_cores": psutil.cpu_count(logical=False),
            "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "cgroup_quota_cores": cgroup_cpu_quota(),
            "governor": governor.read_text(encoding="utf-8").strip() if governor.is_file() else None,
        },
        "before": changing_state(),
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "gpus": nvidia_gpus(),
        "os": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {package: version for package in PACKAGES if (version := _version(package)) is not None},
        "variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }
