"""Export's gate: what each graph must be, said by torch; the stages that it goes through, each in a fresh process; the refusal.

The last stage, retrieval, is `runtime.verify` on the bundle's own files, so that what decides here is what decides anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.fresh import check_in_fresh_process
from dualmatch.runtime.nodes import NODES_OUTPUT
from dualmatch.runtime.parity import TOLERANCES, Decision, Tolerances
from dualmatch.runtime.stages import (
    EMBEDDING,
    GRAPH_STAGES,
    HALF_MAX,
    NODES,
    RANGE,
    RECALL,
    Contract,
    GraphCheck,
    Magnitude,
    Stage,
    StageTable,
)
from dualmatch.runtime.verify import Verification
from dualmatch.training.checkpoint import Run

from .graph import BATCH, LENGTH
from .nodes import WithNodes

Name = Literal["image", "text"]
Inputs = Mapping[str, NDArray[Any]]
Check = dict[str, NDArray[Any]]


# Captions padded in another way than in training have other embeddings, on purpose: what that costs is decided by recall alone.
CHANGED_PADDING = Tolerances(rsum_loss=0.5, worst_cosine=-1.0)


def tolerances_for(
    run: Run, precision: str, *, max_rsum_loss: float | None = None, min_cosine: float | None = None
) -> Tolerances:
    """What the gate allows: the precision's own, or what the caller asks for.

    Raises:
        DualmatchError: a loss of Rsum is given where components decide.
    """
    tolerances = TOLERANCES[precision]
    if run.reference:
        tolerances = replace(CHANGED_PADDING, rsum_loss=max(CHANGED_PADDING.rsum_loss, tolerances.rsum_loss))
    if max_rsum_loss is not None:
        if tolerances.component is not None:
            raise DualmatchError(
                f"{precision} must give torch's numbers within {tolerances.component:g} in every component, not only its Rsum; "
                "leave --max-rsum-loss out."
            )
        tolerances = replace(tolerances, rsum_loss=max_rsum_loss)
    return tolerances if min_cosine is None else replace(tolerances, worst_cosine=min_cosine)


class GateRefusedError(DualmatchError):
    """The gate did not pass; `verification` has what it measured."""

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(message)
        self.verification = verification


class Gate:
    """One export's way through the gate: its table of stages, and what was measured on the way.

    Args:
        precision: what is exported; anything but fp32 is checked at fp32 first, so that a refusal says which step broke the graph.
        tolerances: what retrieval may lose.
    """

    def __init__(self, precision: str, tolerances: Tolerances) -> None:
        graphs = ("fp32",) if precision == "fp32" else ("fp32", precision)
        planned = [
            (stage, f"{name} {one}")
            for name in ("image", "text")
            for one in graphs
            for stage in ((RANGE,) if one == "fp16" else ()) + GRAPH_STAGES
        ]
        self.precision = precision
        self.tolerances = tolerances
        self.table = StageTable([*planned, (RECALL, "both")])
        self.magnitudes: dict[str, Sequence[Magnitude]] = {"image": (), "text": ()}
        self.checks: dict[str, list[Check]] = {}

    def ask_torch(self, name: Name, encoder: nn.Module, batches: Sequence[Inputs]) -> None:
        """Run torch on each batch; `checks[name]`, inputs with their `embedding`, and `nodes` of an encoder that is to give them, is
        what the encoder's graphs are compared with.

        Raises:
            DualmatchError: torch itself gives NaN or infinity.
        """
        self.checks[name] = _checks(encoder, batches)

    def check(
        self, name: Name, path: Path, precision: str, tolerance: float, nodes_tolerance: float = 0.0
    ) -> GraphCheck:
        """Take a graph's file through names, axes, shapes and values.

        Args:
            precision: of this graph; the stages call it `image fp16`.
            tolerance: largest absolute difference of a component to torch.
            nodes_tolerance: the same of the nodes, where the graph gives them, as a share of their largest component.

        Returns:
            What was found, with the largest differences that were seen.

        Raises:
            GateRefusedError: a stage failed.
        """
        checks = self.checks[name]
        contract = _contract(name, checks, tolerance, nodes_tolerance)
        found = check_in_fresh_process(path, contract, checks, f"{name} {precision}")
        self.table.record(*found.stages)
        if failed := found.failed:
            self._refuse(f"{path.name} at {precision} {failed.found} (stage {failed.name})")
        return found

    def check_range(self, name: Name, magnitudes: Sequence[Magnitude]) -> None:
        """Refuse tensors that float16 cannot hold: a CPU computes float16 graphs in float32 and would hide it.

        Args:
            magnitudes: of every tensor that will be float16, largest first.

        Raises:
            GateRefusedError: one overflows.
        """
        self.magnitudes[name] = magnitudes
        stage = range_stage(magnitudes, f"{name} fp16")
        self.table.record(stage)
        if stage.status == "FAIL":
            self._refuse(f"float16 would overflow: {_reached(magnitudes[0])}; export with --fp32")

    def decide(self, verification: Verification, *, unverified: bool) -> Verification:
        """Enter what `verify` found on the bundle's files; the whole gate's findings.

        Raises:
            GateRefusedError: it did not pass, or too few pairs were at hand and that was not allowed by `unverified`.
        """
        decision = verification.decision
        status: Literal["OK", "FAIL"] = "OK" if decision.verdict == "pass" else "FAIL"
        self.table.record(Stage(name=RECALL, graph="both", status=status, found=decision.reason))
        verification = replace(verification, stages=self.table.rows, magnitudes=self.magnitudes)
        too_few = decision.verdict == "too few pairs"
        if decision.verdict != "pass" and not (unverified and too_few):
            advice = " (or --unverified to write the bundle all the same)" if too_few else ""
            raise GateRefusedError(
                f"the {self.precision} gate refused the export: {decision.reason}{advice}.", verification
            )
        return verification

    def _refuse(self, reason: str) -> None:
        verification = Verification(
            decision=Decision(verdict="fail", reason=reason),
            stages=self.table.rows,
            tolerances=self.tolerances,
            magnitudes=self.magnitudes,
        )
        raise GateRefusedError(f"{reason}.", verification)


def range_stage(magnitudes: Sequence[Magnitude], graph: str) -> Stage:
    """Whether float16 can hold every tensor: FAIL where one overflows.

    Args:
        magnitudes: of every tensor that will be float16, largest first.
        graph: what the stage calls it.
    """
    if not magnitudes:
        return Stage(name=RANGE, graph=graph, status="OK", found="no tensor is float16")
    top = magnitudes[0]
    found = f"{100 * top.share:.1f} % of float16's range: {_reached(top)}"
    return Stage(name=RANGE, graph=graph, status="OK" if top.share < 1 else "FAIL", found=found)


def _reached(top: Magnitude) -> str:
    return f"tensor {top.tensor!r} ({top.operator}) reaches {top.largest:.4g} on real inputs, float16 ends at {HALF_MAX:.0f}"


def check_graph(
    name: Name, module: nn.Module, batches: Sequence[Inputs], path: Path, *, tolerance: float, graph: str
) -> GraphCheck:
    """Take one graph, in a fresh process, through names, axes, shapes and values against what torch gives on `batches`.

    Args:
        name: its output is `NAME_embedding`.
        tolerance: largest absolute difference of a component to torch.
        graph: what the stages call it.

    Raises:
        DualmatchError: torch itself gives NaN or infinity.
    """
    checks = _checks(module, batches)
    return check_in_fresh_process(path, _contract(name, checks, tolerance, 0.0), checks, graph)  # it gives no nodes


def _checks(module: nn.Module, batches: Sequence[Inputs]) -> list[Check]:
    """Each batch with what torch gives for it."""
    checks: list[Check] = []
    for feeds in batches:
        with torch.inference_mode():
            found = module(**{key: torch.from_numpy(value) for key, value in feeds.items()})
        outputs = found if isinstance(module, WithNodes) else (found,)
        wanted = {key: value.numpy() for key, value in zip((EMBEDDING, NODES), outputs, strict=False)}
        if not all(np.isfinite(value).all() for value in wanted.values()):
            shapes = {key: list(value.shape) for key, value in feeds.items()}
            raise DualmatchError(f"torch gives NaN or infinity for inputs {shapes}.")
        checks.append({**feeds, **wanted})
    return checks


def _contract(name: Name, checks: Sequence[Check], tolerance: float, nodes_tolerance: float) -> Contract:
    """By the inputs that torch took and the embeddings that it gave."""
    inputs = [
        TensorSpec(
            name=key,
            dtype=value.dtype.name,
            shape=(BATCH, LENGTH) if np.issubdtype(value.dtype, np.integer) else (BATCH, *value.shape[1:]),
        )
        for key, value in checks[0].items()
        if key not in (EMBEDDING, NODES)
    ]
    outputs = [
        TensorSpec(name=output, dtype="float32", shape=(BATCH, *checks[0][key].shape[1:]))
        for key, output in ((EMBEDDING, f"{name}_embedding"), (NODES, NODES_OUTPUT))
        if key in checks[0]
    ]
    return Contract(inputs=tuple(inputs), outputs=tuple(outputs), tolerance=tolerance, nodes_tolerance=nodes_tolerance)
