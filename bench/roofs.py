"""What this machine can do at most, measured: products of matrices, and copies of memory.

The products run in onnxruntime, which runs the encoders too, as a graph of one node with a constant factor, as a layer has: so packed
weights, thread pool and kernels are those of an encoder. The best of all repeats counts, for a roof is what can be reached.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualmatch.runtime.backends import open_session
from dualmatch.runtime.backends.base import Array

SIZES = (1024, 2048)
"""Of square products; the larger one need not be the faster, as caches differ."""
SECONDS = 0.7  # of each size and type
MIB = 2**20
LEAST_ARRAY, MOST_ARRAY = 64 * MIB, 512 * MIB
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6  # TensorProto.DataType


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """Rates of this machine's CPU at so many threads.

    Attributes:
        threads: as a session takes them: 0 leaves the choice to onnxruntime.
        gemm: operations per second of a product of square matrices, a multiply-add being two, by type: float32; int8 (uint8 times
            int8, summed in int32).
        copy: bytes read and written per second by a copy of an array that does not fit the last cache.
        array_bytes: the size of that array.
    """

    threads: int
    gemm: Mapping[str, float]
    copy: float
    array_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "threads": self.threads,
            "gemm": {name: {"unit": "operations/sec", "avg": rate} for name, rate in self.gemm.items()},
            "copy": {"unit": "bytes/sec", "avg": self.copy, "array_bytes": self.array_bytes},
        }


def measure_roofs(threads: int) -> Roofs:
    """Measure them, in seconds.

    Raises:
        DualmatchError: onnxruntime is not installed.
    """
    size = array_bytes()
    return Roofs(
        threads=threads,
        gemm={"float32": gemm_rate(np.float32, threads), "int8": gemm_rate(np.uint8, threads)},
        copy=copy_rate(size, threads),
        array_bytes=size,
    )


def gemm_rate(dtype: Any, threads: int, *, sizes: tuple[int, ...] = SIZES, seconds: float = SECONDS) -> float:
    """Operations per second of a product by a constant matrix: float32, or uint8 by int8."""
    generator, best = np.random.default_rng(0), 0.0
    for size in sizes:
        if dtype == np.float32:
            left, right = generator.standard_normal((2, size, size), dtype=np.float32)
        else:
            left = generator.integers(0, 256, (size, size), np.uint8)
            # 7 bits: on processors without VNNI two products of 8 bits each overflow the 16 in which they are summed.
            right = generator.integers(-64, 64, (size, size), np.int8)
        with open_session(gemm_graph(right), backend="onnxruntime", threads=threads) as session:
            engine = session._session  # type: ignore[attr-defined]  # noqa: SLF001  (without the look for NaN in 4 million numbers)
            best = max(best, 2 * size**3 / _fastest(lambda e=engine, x=left: e.run(None, {"x": x}), seconds))  # type: ignore[misc]
    return best


def copy_rate(size: int, threads: int, *, seconds: float = SECONDS) -> float:
    """Bytes read plus bytes written per second, copying an array of `size` bytes in as many parts as there are threads."""
    source, target = np.ones(size // 8), np.zeros(size // 8)
    parts = max(threads, 1) if threads else _cores()
    pairs = list(zip(np.array_split(target, parts), np.array_split(source, parts), strict=True))
    with ThreadPoolExecutor(parts) as pool:  # a copy in NumPy lets other threads run
        return 2 * source.nbytes / _fastest(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)), seconds)


def array_bytes(caches: Path = CACHES) -> int:
    """As large as the last cache, so that source and target together are twice that, within bounds; the least where it is not known."""
    sizes = []
    for file in caches.glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        unit = {"K": 2**10, "M": MIB, "G": 2**30}.get(text[-1:], 0)
        if unit and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * unit)
    return min(max([LEAST_ARRAY, *sizes]), MOST_ARRAY)


def _cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or 1


def _fastest(action: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of at least three calls."""
    action()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken)


def gemm_graph(right: Array) -> bytes:
    """An ONNX model of `x @ right` with x of the same shape: float32 times float32, or uint8 times int8 into int32.

    Written by hand in the wire format, since onnx comes with `export`; `tests/test_roofline.py` has onnx check it.
    """
    integer = right.dtype == np.int8
    kind, given, result = (INT8, UINT8, INT32) if integer else (FLOAT, FLOAT, FLOAT)
    size = len(right)
    operator = "MatMulInteger" if integer else "MatMul"
    node = _text(1, "x") + _text(1, "w") + _text(2, "y") + _text(4, operator)
    weight = 2 * _number(1, size) + _number(2, kind) + _text(8, "w") + _bytes(9, right.tobytes())
    graph = _bytes(1, node) + _text(2, "gemm") + _bytes(5, weight)
    graph += _bytes(11, _value("x", given, size)) + _bytes(12, _value("y", result, size))
    operators = _number(2, 17)  # their version
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, operators)  # version 8 of the format


def _value(name: str, kind: int, size: int) -> bytes:
    shape = 2 * _bytes(1, _number(1, size))
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))


def _text(number: int, text: str) -> bytes:
    return _bytes(number, text.encode())


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
