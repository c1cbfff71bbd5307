"""What a manifest says of a TensorRT engine, and whether that engine may be loaded here: decided before a byte of it is parsed."""

import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dualmatch.runtime.configs import from_mapping
from dualmatch.runtime.errors import DualmatchError

Shape = tuple[int, ...]
HardwareCompatibility = Literal["none", "same-compute-capability", "ampere-plus"]


@dataclass(frozen=True)
class ShapeRange:
    """The smallest, the tuned-for and the largest shape of an input."""

    min: Shape
    opt: Shape
    max: Shape

    def __iter__(self) -> Iterator[Shape]:
        return iter((self.min, self.opt, self.max))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One optimisation profile: for every input of the graph, by name, the shapes it may take."""

    name: str
    shapes: Mapping[str, ShapeRange]


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What the manifest says of an engine.

    Attributes:
        flavour, tensorrt_version: an engine loads only with the TensorRT that built it, unless it is `version_compatible`.
        compute_capabilities: the GPUs it is for. With `tensorrt` the one GPU it was built on; with `tensorrt-rtx` those asked
            for, or none: such an engine was built without asking a GPU and runs on Ampere and later, compiled there on loading.
        profiles: in the engine's order, so the index is the one that an execution context takes.
        file, sha256, bytes: the engine file.
        onnx_sha256: the graph it was built from.
        seconds: the build's duration.
        strongly_typed: every tensor has the type that the graph gives it, read back from TensorRT.
        platform: system and processor, as in `linux-x86_64`; None in records of before it was kept.
        peak_memory_bytes: largest resident set of the process during the build; None where the system does not tell.
        workspace_bytes: the limit of scratch memory on the GPU; None for TensorRT's own.
        version_compatible: later releases of the same major TensorRT load it too (`tensorrt` only).
        hardware_compatibility: other GPUs that it runs on (`tensorrt` only).
    """

    flavour: str
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    file: str
    sha256: str
    bytes: int
    onnx_sha256: str
    seconds: float
    strongly_typed: bool
    platform: str | None = None
    peak_memory_bytes: int | None = None
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return asdict(self)


def engine_file(encoder: str, flavour: str) -> str:
    """Where a bundle keeps the engine of an encoder."""
    return f"engines/{encoder}_encoder.{flavour}.engine"


def this_platform() -> str:
    """System and processor, as in `linux-x86_64`."""
    return f"{sys.platform}-{platform.machine().lower()}"


def find_engine(
    engines: tuple[Mapping[str, Any], ...], *, bundle: Path, encoder: str, flavour: str, graph_sha256: str
) -> EngineRecord:
    """The record of an encoder's engine, if the bundle has one and it was built from the bundle's graph.

    Raises:
        DualmatchError: no such engine, a damaged record, or an engine of another graph.
    """
    compile_it = f"`dualmatch compile {bundle} --flavour {flavour}` makes one"
    for values in engines:
        if values.get("file") == engine_file(encoder, flavour):
            record = from_mapping(EngineRecord, values, f"{bundle}: the manifest's engine of the {encoder} encoder")
            break
    else:
        there = sorted({str(values.get("flavour")) for values in engines})
        has = f"only of {', '.join(there)}" if there else "none"
        raise DualmatchError(
            f"{bundle} has no {flavour} engine of the {encoder} encoder ({has}); {compile_it} for this machine."
        )
    if record.onnx_sha256 != graph_sha256:
        raise DualmatchError(
            f"{bundle}: {record.file} was built from another graph than this bundle's {encoder} encoder; {compile_it} anew."
        )
    return record


def check_engine(
    record: EngineRecord, *, bundle: Path, tensorrt_version: str, compute_capability: str, here: str | None = None
) -> None:
    """Refuse an engine that was not made for this machine.

    Args:
        tensorrt_version: of the installed package of the record's flavour.
        compute_capability: of the GPU here, as in `8.9`.
        here: the platform; this one's by default.

    Raises:
        DualmatchError: another platform, TensorRT version or GPU.
    """
    here = here or this_platform()
    again = f"; compile it again here: `dualmatch compile {bundle} --flavour {record.flavour}`."
    if record.platform not in (None, here):
        raise DualmatchError(f"{record.file} was built for {record.platform}, this machine is {here}{again}")
    built, installed = _version(record.tensorrt_version), _version(tensorrt_version)
    # A newer TensorRT loads a version-compatible engine of its own major version; an older one never does.
    if built != installed and not (record.version_compatible and built[:1] == installed[:1] and built <= installed):
        raise DualmatchError(
            f"{record.file} was built by {record.flavour} {record.tensorrt_version}, and {tensorrt_version} is installed: "
            f"an engine {'of a later or another major version' if record.version_compatible else 'of another version'} does not load{again}"
        )
    if not _runs_on(record, compute_capability):
        made_for = ", ".join(record.compute_capabilities) or "8.0 and later"
        if record.hardware_compatibility == "ampere-plus":
            made_for = "8.0 and later"
        raise DualmatchError(
            f"{record.file} was built for GPUs of compute capability {made_for}, the GPU here has {compute_capability}{again}"
        )


def _runs_on(record: EngineRecord, compute_capability: str) -> bool:
    ampere_or_later = _version(compute_capability) >= (8, 0)
    if record.hardware_compatibility == "ampere-plus" or not record.compute_capabilities:
        return ampere_or_later
    return compute_capability in record.compute_capabilities


def _version(text: str) -> tuple[int, ...]:
    """`10.13.2.6` as numbers; what is no number (a suffix such as `post1`) ends it."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
