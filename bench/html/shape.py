"""What a report's JSON must hold so that it can be drawn: checked once, before anything is drawn of it."""

from collections.abc import Mapping
from typing import Any

BLOCK = {"avg": float, "min": float, "max": float, "count": int, "p50?": float, "intervals?": {"*": [float]}}
VALUE = {"avg": float}
WAY = {"r1": float, "r5": float, "r10": float}
RECALL = {"rsum": float, "i2t": WAY, "t2i": WAY, "protocol": {"images": int, "captions": int, "split": (str, None)}}
ENVIRONMENT = {"cpu?": {"model?": (str, None), "logical_cores?": (int, None)}}

LATENCY = {
    "subject": {"bundle?": str, "bundle_hash?": str, "precision?": {"*": str}},
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
    "intensity": float,
    "achieved": {"operations_per_s": float, "bytes_per_s": float},
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
            "request_latency": {"p50": float, "intervals": {"p50": [float]}, "count": int},
            "times_as_fast": {"against": str, "value": float, "interval": [float]},
            "round_medians_ms": [float],
            "recall": ({"rsum": float, "source": str, "protocol?": {"images?": int, "captions?": int}}, None),
            "roofline?": (ROOFLINE, None),
        }
    ],
    "roofs?": ({"gemm": {"*": VALUE}, "copy": VALUE}, None),
}
INTERVALS = {"*": [float]}
BENCH_RECALL = {
    "subject": {"data": {"name": str}, "models?": [{"label": str, "bundle?": (str, None)}]},
    "rows": [{"models": [str], "kind": str, "rerank": int, **RECALL, "rsum_interval": [float]}],
    "slices": [
        {"models": [str], "group": str, "slice": str, "captions": int, **WAY, "intervals": INTERVALS}
    ],
    "comparisons?": [
        {"of": {"models": [str]}, "against": {"models": [str]}, "rsum_difference": float, "interval": [float]}
    ],
    "hard_pairs?": [
        {"models": [str], "differs": str, "pairs": int, "captions": {"value": float, "interval": [float]}}
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
    """Hold `value` against `shape`: a type, a mapping (a key that ends in `?` may be missing, `*` stands for every key), a list of one
    shape, or a tuple of alternatives with None; what the shape does not name is not looked at.

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
        for number, one in enumerate(value):
            check(shape[0], one, f"{where}[{number}]")
    else:
        fits = isinstance(value, (int, float) if shape is float else shape)
        if not fits or (isinstance(value, bool) and shape is not bool):
            raise ShapeError(f"{where} is {value!r:.40}, not {'a number' if shape in (int, float) else shape.__name__}")
