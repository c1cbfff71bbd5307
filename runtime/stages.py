"""The gate's stages on one graph: names, axes, shapes, then values against torch's, at shapes other than the traced one.

Each stage presumes the ones before it, so the first that fails ends the check. What a graph must be is said by a `Contract` that
was not read from the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .backends.base import NotFiniteError, Session, TensorSpec

Status = Literal["OK", "FAIL", "SKIPPED"]
Array = NDArray[Any]

GRAPH_STAGES = ("names", "axes", "shapes", "values")
RANGE, RECALL = "range", "recall"
EMBEDDING, NODES = "embedding", "nodes"  # beside a check's inputs: torch's outputs
HALF_MAX = 65504.0  # the largest float16


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the gate and how it ended.

    Attributes:
        graph: what it looked at: `image fp16`, or `both`.
        found: what was measured; where it failed, a predicate of the graph (`froze axis 0 of …`).
    """

    name: str
    graph: str
    status: Status
    found: str


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a graph must take and give; a string in a shape is a dynamic axis.

    Attributes:
        outputs: the embedding and, where the graph gives them, the nodes.
        tolerance: largest absolute difference to torch of a component of an embedding.
        nodes_tolerance: of the nodes, as a share of their largest component: nothing is averaged in them yet, so it is wider.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float
    nodes_tolerance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GraphCheck:
    """The four stages of one graph; the largest difference to torch's embeddings and nodes where the values were reached."""

    stages: tuple[Stage, ...]
    largest_difference: float | None = None
    nodes_difference: float | None = None

    @property
    def failed(self) -> Stage | None:
        """The stage that failed, if one did."""
        return next((stage for stage in self.stages if stage.status == "FAIL"), None)


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """A tensor that is float16 in a graph, and the largest magnitude that real inputs gave it in float32."""

    tensor: str
    operator: str
    largest: float

    @property
    def share(self) -> float:
        """Share of float16's range in use; above 1 the tensor overflows."""
        return self.largest / HALF_MAX


class _Fault(Exception):  # noqa: N818  (not an error of ours: what a stage found)
    """Why a stage fails, as a predicate of the graph."""


def check_session(
    session: Session, contract: Contract, checks: Sequence[Mapping[str, Array]], graph: str
) -> GraphCheck:
    """Take an opened graph through the stages.

    Args:
        checks: real inputs by name, and as `embedding`, and `nodes`, what torch gives for them.
        graph: what the stages call it.
    """
    outputs: list[dict[str, Array] | None] = []
    differences: dict[str, float] = {}
    stages: dict[str, Callable[[], str]] = {
        "names": lambda: _names(session, contract),
        "axes": lambda: _axes(session, contract),
        "shapes": lambda: _shapes(session, contract, checks, outputs),
        "values": lambda: _values(contract, checks, outputs, differences),
    }
    found = _skipped(graph)
    for index, (name, examine) in enumerate(stages.items()):
        try:
            found[index] = Stage(name=name, graph=graph, status="OK", found=examine())
        except _Fault as fault:
            found[index] = Stage(name=name, graph=graph, status="FAIL", found=str(fault))
            break
    return GraphCheck(
        stages=tuple(found), largest_difference=differences.get(EMBEDDING), nodes_difference=differences.get(NODES)
    )


def not_loaded(graph: str, reason: str) -> GraphCheck:
    """A graph that no backend opens: it fails at its first stage."""
    first, *others = _skipped(graph)
    return GraphCheck(stages=(replace(first, status="FAIL", found=f"does not load: {reason}"), *others))


class StageTable:
    """All stages of one run of the gate, in order; what was not reached is SKIPPED.

    Args:
        planned: (stage, graph) pairs.
    """

    def __init__(self, planned: Sequence[tuple[str, str]]) -> None:
        self._rows = {
            (name, graph): Stage(name=name, graph=graph, status="SKIPPED", found="not reached")
            for name, graph in planned
        }

    def record(self, *stages: Stage) -> None:
        """Enter how stages ended; one that was not planned follows the others."""
        self._rows |= {(stage.name, stage.graph): stage for stage in stages}

    @property
    def rows(self) -> tuple[Stage, ...]:
        """The table, the recall last."""
        return tuple(sorted(self._rows.values(), key=lambda stage: stage.name == RECALL))


def stage_lines(stages: Sequence[Stage]) -> list[str]:
    """The stages as a table for people."""
    rows = [("stage", "graph", "status", "found"), *((one.name, one.graph, one.status, one.found) for one in stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), " ".join(row[3].split())])
        for row in rows
    ]


def _skipped(graph: str) -> list[Stage]:
    return [Stage(name=name, graph=graph, status="SKIPPED", found="not reached") for name in GRAPH_STAGES]


def _names(session: Session, contract: Contract) -> str:
    for verb, wanted, found in (
        ("takes", contract.inputs, session.inputs),
        ("gives", contract.outputs, session.outputs),
    ):
        must, does = ({f"{one.name} {one.dtype}" for one in specs} for specs in (wanted, found))
        if must != does:
            raise _Fault(f"{verb} {', '.join(sorted(does)) or 'nothing'}; it must be {', '.join(sorted(must))}")
    inputs, outputs = (", ".join(spec.name for spec in specs) for specs in (contract.inputs, contract.outputs))
    return f"{inputs} -> {outputs}"


def _axes(session: Session, contract: Contract) -> str:
    """Each axis is dynamic or fixed as it must be; how large the fixed ones are is for the shapes."""
    for wanted, found in _pairs(session, contract):
        if len(wanted.shape) != len(found.shape):
            raise _Fault(f"has {wanted.name!r} of shape {_shape(found)}; it must be {_shape(wanted)}")
        for axis, (must, does) in enumerate(zip(wanted.shape, found.shape, strict=True)):
            if isinstance(must, str) and must != does:
                verb = "froze" if isinstance(does, int) else "named"
                raise _Fault(f"{verb} axis {axis} of {wanted.name!r} {does}; it must be dynamic ({must})")
            if isinstance(must, int) and not isinstance(does, int):
                raise _Fault(f"has axis {axis} of {wanted.name!r} dynamic ({does}); it must be {must}")
    return ", ".join(f"{spec.name} {_shape(spec)}" for spec in contract.inputs)


def _shapes(
    session: Session,
    contract: Contract,
    checks: Sequence[Mapping[str, Array]],
    outputs: list[dict[str, Array] | None],
) -> str:
    """Fixed axes have their size, in the declaration and in what comes out of every check."""
    for wanted, found in _pairs(session, contract):
        if any(isinstance(must, int) and must != does for must, does in zip(wanted.shape, found.shape, strict=True)):
            raise _Fault(f"has {wanted.name!r} of shape {_shape(found)}; it must be {_shape(wanted)}")
    for check in checks:
        feeds = _feeds(check)
        try:
            results = session.run(feeds)
        except NotFiniteError:
            outputs.append(None)  # for the values to say
            continue
        except Exception as error:  # noqa: BLE001  (each backend raises its own: a shape frozen inside the graph, say)
            raise _Fault(f"does not run on inputs {_sizes(feeds)}: {_first_line(error)}") from None
        values = {key: results[output.name] for key, output in _keyed(contract)}
        for key, value in values.items():
            if value.shape != check[key].shape:
                raise _Fault(
                    f"gives {list(value.shape)} for inputs {_sizes(feeds)}; it must be {list(check[key].shape)}"
                )
        outputs.append(values)
    return f"{', '.join(f'{output.name} {_shape(output)}' for output in contract.outputs)}, on {_extent(checks)}"


def _values(
    contract: Contract,
    checks: Sequence[Mapping[str, Array]],
    outputs: Sequence[Mapping[str, Array] | None],
    differences: dict[str, float],
) -> str:
    found = []
    for key, output in _keyed(contract):
        worst, where = 0.0, ""
        for check, values in zip(checks, outputs, strict=True):
            if values is None:
                raise _Fault(f"gives NaN or infinity for inputs {_sizes(_feeds(check))}")
            difference = float(np.abs(values[key] - check[key]).max(initial=0.0))
            # Embeddings have unit norm; nodes are as large as the network likes.
            difference /= 1.0 if key == EMBEDDING else float(np.abs(check[key]).max(initial=1e-30))
            if difference >= worst:
                worst, where = difference, _sizes(_feeds(check))
        differences[key] = worst
        smallest = f"{worst * 1.01:.2e}"
        what, unit, tolerance = (
            ("", "", contract.tolerance)
            if key == EMBEDDING
            else (f"in {output.name} ", " of the largest", contract.nodes_tolerance)
        )
        if not worst <= tolerance:
            raise _Fault(
                f"{what}differs from torch by {worst:.2e}{unit} in a component (inputs {where}), more than "
                f"{tolerance:g} is allowed; a tolerance of {smallest} would have passed"
            )
        found.append(
            f"{what}differ from torch by at most {worst:.2e}{unit} in a component (tolerance {tolerance:g}); "
            f"the smallest tolerance that would have passed is {smallest}"
        )
    return "; ".join(found)


def _keyed(contract: Contract) -> list[tuple[str, TensorSpec]]:
    """The outputs by what torch's values are called beside a check's inputs."""
    return list(zip((EMBEDDING, NODES), contract.outputs, strict=False))


def _pairs(session: Session, contract: Contract) -> list[tuple[TensorSpec, TensorSpec]]:
    found = {spec.name: spec for spec in (*session.inputs, *session.outputs)}
    return [(spec, found[spec.name]) for spec in (*contract.inputs, *contract.outputs)]


def _feeds(check: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value for name, value in check.items() if name not in (EMBEDDING, NODES)}


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"


def _sizes(feeds: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())


def _extent(checks: Sequence[Mapping[str, Array]]) -> str:
    """`batches of 1, 2, 7` and, for token ids, `lengths of 1, 5`."""
    first = [next(iter(_feeds(check).values())) for check in checks]
    text = f"batches of {', '.join(map(str, sorted({len(value) for value in first})))}"
    lengths = sorted({value.shape[1] for value in first if np.issubdtype(value.dtype, np.integer)})
    return text + (f" and lengths of {', '.join(map(str, lengths))}" if lengths else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
