"""What a report's JSON must hold so that it can be drawn: checked once, before anything is drawn of it."""

from collections.abc import Mapping
from typing import Any

LARGEST = 1e18  # operations a second of a whole rack; beyond, axes have no ticks
POSITIVE = "positive"
PAIR = [float, float]
BLOCK = {
    **dict.fromkeys(("avg", "min", "max"), POSITIVE),
    **dict.fromkeys(("p25?", "p50?", "p75?", "p90?", "p99?"), POSITIVE),
    "count": int,
    "intervals?": {"*": PAIR},
}
VALUE = {"avg": float}
RATE = {"avg": POSITIVE}
WAY = {"r1": float, "r5": float, "r10": float}
RECALL = {"rsum": float, "i2t": WAY, "t2i": WAY, "protocol": {"images": int, "captions": int, "split": (str, None)}}
ENVIRONMENT = {"cpu?": {"model?": (str, None), "logical_cores?": (int, None)}}

LATENCY = {
    "subject": {"bundle?": str, "bundle_hash?": str, "precision?": {"*": str}, "threads?": int},
    "environment": ENVIRONMENT,
    "cases": [
        {
            "encoder": str,
            "batch": int,
            "backend": str,
            "scenario": str,
            "stable": bool,
            "request_latency": BLOCK,
            **dict.fromkeys(("item_throughput", "load_time", "first_request_latency", "harness_overhead"), VALUE),
            "peak_resident_memory": VALUE,
        }
    ],
}
ROOFLINE = {
    "intensity": POSITIVE,
    "achieved": {"operations_per_s": POSITIVE, "bytes_per_s": float},
    "percent": {"gemm": float, "copy": float},
    "bound": str,
}
COMPARE = {
    "environment": ENVIRONMENT,
    "cases": [
        {
            "label": str,
            "encoder": str,
            "batch": int,
            "stable": bool,
            "pareto": (bool, None),
            "request_latency": {"p50": POSITIVE, "intervals": {"p50": [POSITIVE, POSITIVE]}, "count": int},
            "times_as_fast": {"against": str, "value": float, "interval": PAIR},
            "round_medians_ms": [float],
            "recall": ({"rsum": float, "source": str, "protocol?": {"images?": int, "captions?": int}}, None),
            "roofline?": (ROOFLINE, None),
        }
    ],
    "roofs?": ({"gemm": {"float32": RATE, "*": RATE}, "copy": RATE}, None),
}
INTERVALS = {"r1": PAIR}
BENCH_RECALL = {
    "subject": {"data": {"name": str}, "models?": [{"label": str, "bundle?": (str, None)}]},
    "rows": [{"models": [str], "rerank": int, **RECALL, "rsum_interval": PAIR}],
    "slices": [
        {"models": [str], "group": str, "slice": str, "captions": int, **WAY, "intervals": INTERVALS}
    ],
    "comparisons?": [
        {"of": {"models": [str]}, "against": {"models": [str]}, "rsum_difference": float, "interval": PAIR}
    ],
    "hard_pairs?": [
        {"models": [str], "differs": str, "pairs": int, "captions": {"value": float, "interval": PAIR}}
    ],
}  # fmt: skip
PARITY = {
    "verdict": str,
    "reason": str,
    "comparison": ({"before": RECALL, "after": RECALL, "rsum_loss": float, "bound": float}, None),
}
EPOCH = {"epoch": int, "val_rsum": float, "loss": float, "learning_rate": float, "val": {"i2t": WAY, "t2i": WAY}}
RUN = {"recipe": {"name": str, "network?": str}, "dataset": {"name": str}}


class ShapeError(ValueError):
    """JSON that does not hold what its kind must."""


def check(shape: Any, value: Any, where: str = "") -> None:
    """Hold `value` against `shape`: a type, POSITIVE, a mapping (a key that ends in `?` may be missing, `*` stands for every key), a list
    of one shape for any number or of several for so many, or a tuple of a shape and None; what the shape does not name is not looked at.

    Raises:
        ShapeError: it does not fit; the words say where.
    """
    if isinstance(shape, tuple):
        if value is not None:
            check(shape[0], value, where)
    elif isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            raise ShapeError(f"{where or 'it'} is no object")
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if key == "*":
                for own, one in value.items():
                    check(inner, one, f"{where}.{own}")
            elif name in value:
                check(inner, value[name], f"{where}.{name}".lstrip("."))
            elif not key.endswith("?"):
                raise ShapeError(f"it lacks {f'{where}.{name}'.lstrip('.')}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ShapeError(f"{where} is no list")
        if len(shape) > 1 and len(value) != len(shape):
            raise ShapeError(f"{where} has {len(value)} entries, not {len(shape)}")
        for number, one in enumerate(value):
            check(shape[0], one, f"{where}[{number}]")
    elif shape == POSITIVE:
        check(float, value, where)
        if value < 1 / LARGEST:
            raise ShapeError(f"{where} is {value!r:.40}, not above 0")
    else:
        fits = isinstance(value, (int, float) if shape is float else shape)
        if fits and shape in (int, float) and abs(value) > LARGEST:
            raise ShapeError(f"{where} is {value!r:.40}, which was never measured")
        if not fits or (isinstance(value, bool) and shape is not bool):
            raise ShapeError(f"{where} is {value!r:.40}, not {'a number' if shape in (int, float) else shape.__name__}")
