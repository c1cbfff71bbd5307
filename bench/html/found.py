"""What a folder holds that a page can show: trained runs, bundles, and the JSON that benchmarks and `runtime` commands write."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dualmatch.bench.bundle_compare import SCHEMA as COMPARE_SCHEMA
from dualmatch.bench.measure import Nanoseconds
from dualmatch.bench.report import SCHEMA as LATENCY_SCHEMA
from dualmatch.runtime.bundle import MANIFEST, Bundle, load_bundle
from dualmatch.runtime.datasets.captions import CAPTIONS_FILE, IMAGES_FOLDER
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import strict_json

from . import shape

LARGEST_JSON, LARGEST_SAMPLES = 64 * 2**20, 512 * 2**20  # bytes; what is larger is data, not a report
SHAPES = {
    LATENCY_SCHEMA["name"]: (LATENCY_SCHEMA["version"], shape.LATENCY),
    COMPARE_SCHEMA["name"]: (COMPARE_SCHEMA["version"], shape.COMPARE),
    "dualmatch.bench.recall": (1, shape.BENCH_RECALL),
}
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A training run: what run.json says, and the epochs of log.jsonl."""

    name: str
    values: Values
    epochs: Sequence[Values]


@dataclass(frozen=True, kw_only=True)
class FoundBundle:
    """A bundle, every hash checked."""

    name: str
    bundle: Bundle

    @property
    def network(self) -> str:
        """`DSRAN`, `VSRN`."""
        return str(self.bundle.manifest.model.get("name", "network")).upper()

    @property
    def precision(self) -> str:
        """Of both encoders, or of each where they differ."""
        return "+".join(dict.fromkeys(entry.precision for entry in self.bundle.manifest.encoders.values()))

    @property
    def checkpoint(self) -> str:
        """What tells trained networks apart: the checkpoint's hash, of a bundle without one its own."""
        return str(self.bundle.manifest.provenance.get("checkpoint_sha256") or self.bundle.hash)


@dataclass(frozen=True, kw_only=True)
class FoundReport:
    """A JSON report that fits its schema; of a latency report also each case's latencies in ns, where their file was found."""

    name: str
    values: Values
    samples: Mapping[int, Nanoseconds] = field(default_factory=dict)

    @property
    def machine(self) -> str:
        """The processor that it was measured on."""
        cpu = self.values.get("environment", {}).get("cpu") or {}
        words = [str(cpu["model"])] if cpu.get("model") else []
        words += [f"{cpu['logical_cores']} cores"] if cpu.get("logical_cores") else []
        return ", ".join(words) or "Machine not recorded"


@dataclass(kw_only=True)
class Findings:
    """Everything found, each kind in the order of its names (paths from the folder).

    Attributes:
        recalls: of `bench recall`; `evaluations`: of `runtime evaluate --json`; `verifications`: of `runtime verify --json`.
        data: folders that are data sets.
        unreadable: (name, sentence).
    """

    runs: list[FoundRun] = field(default_factory=list)
    bundles: list[FoundBundle] = field(default_factory=list)
    latencies: list[FoundReport] = field(default_factory=list)
    comparisons: list[FoundReport] = field(default_factory=list)
    recalls: list[FoundReport] = field(default_factory=list)
    evaluations: list[FoundReport] = field(default_factory=list)
    verifications: list[FoundReport] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.runs, self.bundles, self.latencies, self.comparisons, self.recalls, self.evaluations,
                    self.verifications))  # fmt: skip


def discover(root: Path) -> Findings:
    """Look through a folder at any depth; links are followed, nothing is opened twice.

    Raises:
        DualmatchError: no such folder, or nothing in it that can be shown.
    """
    if not root.is_dir():
        raise DualmatchError(f"there is no folder {root} to report on.")
    found, samples = Findings(), list[tuple[str, list[Values]]]()
    for folder, files in _walk(root):
        name = "." if folder == root else folder.relative_to(root).as_posix()
        if MANIFEST in files:
            _bundle(folder, folder.resolve().name if name == "." else name, found)
            continue
        if CAPTIONS_FILE in files:
            found.data.append(folder)
        if "run.json" in files:
            _run(folder, folder.resolve().name if name == "." else name, found)
        for file in files:
            path = folder / file
            own = path.relative_to(root).as_posix()
            if file.endswith(".json") and file not in ("run.json", CAPTIONS_FILE, "tokenizer.json"):
                _report(path, own, found)
            elif file.endswith(".jsonl") and file != "log.jsonl":
                _samples(path, own, samples, found)
    found.latencies = [_with_samples(one, samples) for one in found.latencies]
    if not found:
        words = f"; {found.unreadable[0][0]}: {found.unreadable[0][1]}" if found.unreadable else "."
        raise DualmatchError(
            f"{root} holds nothing to report on: no run, no bundle, no JSON of `dualmatch bench … --out FILE`{words}"
        )
    return found


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders with their files, by name; hidden ones, galleries, photographs of data sets and what lies inside bundles are left out."""
    seen: set[Path] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        try:
            entries = sorted((entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda e: e.name)
        except OSError:
            continue
        files = [entry.name for entry in entries if entry.is_file()]
        if "index.json" in files:  # a gallery: millions of items, and nothing to show of it
            continue
        yield folder, files
        if MANIFEST not in files:
            photographs = IMAGES_FOLDER if CAPTIONS_FILE in files else ""
            waiting += [Path(entry.path) for entry in reversed(entries) if entry.is_dir() and entry.name != photographs]


def _bundle(folder: Path, name: str, found: Findings) -> None:
    try:
        bundle = load_bundle(folder)
        if bundle.manifest.parity.get("verdict") != "not measured":
            shape.check(shape.PARITY, bundle.manifest.parity, "parity")
        found.bundles.append(FoundBundle(name=name, bundle=bundle))
    except (DualmatchError, ValueError) as error:
        found.unreadable.append((name, _sentence(error)))


def _run(folder: Path, name: str, found: Findings) -> None:
    try:
        values = strict_json((folder / "run.json").read_bytes())
        shape.check(shape.RUN, values)
        epochs = []
        log = folder / "log.jsonl"
        for number, line in enumerate(log.read_bytes().splitlines() if log.is_file() else [], 1):
            try:
                epochs.append(strict_json(line))
                shape.check(shape.EPOCH, epochs[-1])
            except ValueError as error:
                raise ValueError(f"log.jsonl, line {number}: {error}") from None
        found.runs.append(FoundRun(name=name, values=values, epochs=epochs))
    except (OSError, ValueError) as error:
        found.unreadable.append((name, _sentence(error)))


def _report(path: Path, name: str, found: Findings) -> None:
    """Put a JSON file where it belongs; what is no report of ours is none of our business."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            return
        values = strict_json(path.read_bytes())
        kind, places = _kind_of(values, found)
        if places is None:
            return
        shape.check(kind, values)
        places.append(FoundReport(name=name, values=values))
    except (OSError, ValueError) as error:
        found.unreadable.append((name, _sentence(error)))


def _kind_of(values: Any, found: Findings) -> tuple[Any, list[FoundReport] | None]:
    """The shape that a JSON claims to have, and the list that it belongs in."""
    if not isinstance(values, dict):
        return None, None
    schema = values.get("schema")
    if isinstance(schema, dict) and str(schema.get("name")) in SHAPES:
        name = str(schema["name"])
        version, kind = SHAPES[name]
        if schema.get("version") != version:
            raise ValueError(
                f"it is version {schema.get('version')!r:.20} of {name}; this dualmatch draws version {version}"
            )
        places = {"latency": found.latencies, "compare": found.comparisons, "recall": found.recalls}
        return kind, places[name.rpartition(".")[2]]
    if {"rsum", "i2t", "t2i", "protocol"} <= values.keys():
        return shape.RECALL, found.evaluations
    if {"verdict", "comparison", "stages"} <= values.keys():
        return shape.PARITY, found.verifications
    return None, None


def _samples(path: Path, name: str, samples: list[tuple[str, list[Values]]], found: Findings) -> None:
    """The lines of `bench latency --samples`; other JSON lines are let be."""
    try:
        with path.open("rb") as file:
            first = file.readline(4096)
            if b'"latency_ns"' not in first or b'"case"' not in first or path.stat().st_size > LARGEST_SAMPLES:
                return
            lines = [json.loads(line) for line in (first, *file)]
        shape.check([{"case": int, "phase": str, "latency_ns": shape.POSITIVE}], lines)
        samples.append((name, lines))
    except (OSError, ValueError) as error:
        found.unreadable.append((name, _sentence(error)))


def _with_samples(report: FoundReport, samples: Sequence[tuple[str, list[Values]]]) -> FoundReport:
    """The report with the samples that it was made from: those with the same number and the same extremes in every case."""
    for _, lines in samples:
        steady: dict[int, list[int]] = {}
        for line in lines:
            if line["phase"] == "steady":
                steady.setdefault(line["case"], []).append(line["latency_ns"])
        cases = report.values["cases"]
        if steady.keys() == set(range(len(cases))) and all(_made_from(cases[n], own) for n, own in steady.items()):
            return FoundReport(
                name=report.name, values=report.values, samples={n: np.array(own) for n, own in sorted(steady.items())}
            )
    return report


def _made_from(case: Values, latencies: Sequence[int]) -> bool:
    block = case["request_latency"]
    extremes = np.allclose([block["min"], block["max"]], [min(latencies) / 1e6, max(latencies) / 1e6], rtol=1e-9)
    return len(latencies) == block["count"] and bool(extremes)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read: {error.strerror}."
    words = str(error)
    if isinstance(error, json.JSONDecodeError):
        words = f"it is no JSON ({words})"
    return words if words.endswith(".") else f"{words}."
