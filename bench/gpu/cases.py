"""Every backend on the same inputs in one run: latency, throughput, parity with torch float32, share of the roof."""

import importlib.util
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dualmatch.bench.environment import environment
from dualmatch.bench.latency import measure_case, random_feeds
from dualmatch.bench.measure import Plan
from dualmatch.runtime.backends import Session, open_encoder, open_session
from dualmatch.runtime.backends.onnxruntime import PROVIDERS
from dualmatch.runtime.bundle import Bundle, EncoderEntry, EncoderName, Manifest, file_entry
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.flavours import FLAVOURS
from dualmatch.runtime.tokenizer import TokenizerOptions

LENGTH = 16
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999}
Progress = Callable[[str], None]


def run_all(
    *, device: str, trunk: str, batches: Sequence[int], plan: Plan, progress: Progress = print
) -> dict[str, Any]:
    """Measure everything that can be, and record why the rest could not.

    Args:
        device: `cuda`; `cpu` tries the benchmark out without what needs a GPU.
        trunk: see `networks.network`.
        batches: batch sizes; latency is read at the smallest, throughput at the largest.

    Returns:
        Ready for JSON; `failed` lists cases that broke or whose embeddings are not torch's.
    """
    from . import networks

    networks.strict_float32()
    model = networks.network("resnet152" if trunk == "resnet152" else "tiny")
    size = 8192 if device == "cuda" else 256
    report: dict[str, Any] = {"schema": {"name": "dualmatch.bench.gpu", "version": 1}, "environment": environment()}
    report |= {
        "device": device,
        "trunk": trunk,
        "caption_length": LENGTH,
        "cases": [],
        "engines": [],
        "not_run": [],
        "failed": [],
    }
    report["gemm_roof_tflops"] = {
        precision: networks.gemm_roof(precision, device, size) / 1e12
        for precision in (("fp32", "fp16") if device == "cuda" else ("fp32",))
    }
    with tempfile.TemporaryDirectory() as scratch:
        for precision in ("fp32", "fp16"):
            folder = Path(scratch) / precision
            (folder / "engines").mkdir(parents=True)
            names: tuple[EncoderName, ...] = ("image", "text")
            encoders = {name: networks.export_graph(model, name, precision, folder) for name in names}
            bundle = _bundle(folder, encoders)
            for name, entry in encoders.items():
                openers = _openers(
                    model=model,
                    bundle=bundle,
                    name=name,
                    entry=entry,
                    precision=precision,
                    device=device,
                    report=report,
                    progress=progress,
                )
                for backend, opened in openers.items():
                    _measure(
                        report=report,
                        model=model,
                        name=name,
                        entry=entry,
                        precision=precision,
                        backend=backend,
                        opened=opened,
                        batches=batches,
                        device=device,
                        plan=plan,
                        progress=progress,
                        flops=networks.flops(model, name, LENGTH),
                    )
    _ratios(report)
    return report


def _bundle(folder: Path, encoders: dict[EncoderName, EncoderEntry]) -> Bundle:
    """As much of a bundle as opening its encoders takes."""
    manifest = Manifest(
        model={},
        embedding_dimension=int(encoders["image"].outputs[0].shape[-1]),
        encoders=encoders,
        tokenizer=TokenizerOptions(),
        preprocessing=None,
        pad_policy="masked",
        provenance={},
        parity={},
        files={entry.file: file_entry(folder / entry.file) for entry in encoders.values()},
    )
    return Bundle(path=folder, manifest=manifest, hash="")


def _openers(
    *,
    model: Any,
    bundle: Bundle,
    name: EncoderName,
    entry: EncoderEntry,
    precision: Any,
    device: str,
    report: dict[str, Any],
    progress: Progress,
) -> dict[str, Callable[[], Session]]:
    from . import networks

    def torch_session(mode: Any) -> Callable[[], Session]:
        return lambda: networks.TorchSession(
            networks.encoder_of(model, name),
            inputs=entry.inputs,
            outputs=entry.outputs,
            precision=precision,
            mode=mode,
            device=device,
        )

    openers: dict[str, Callable[[], Session]] = {"torch-eager": torch_session("eager")}
    if device == "cuda":
        openers["torch-compile"] = torch_session("compile")
    graph = bundle.path / entry.file
    for backend in PROVIDERS:
        if (backend == "onnxruntime") == (device == "cpu"):
            openers[backend] = lambda backend=backend: open_session(graph, backend=backend)  # type: ignore[misc]
    for flavour, module in FLAVOURS.items():
        if importlib.util.find_spec(module) is None:
            _not_run(
                report, progress, backend=flavour, name=name, precision=precision, reason=f"{module} is not installed"
            )
            continue
        try:
            compiled = _compiled(bundle, name, entry, flavour, report)
        except DualmatchError as error:
            _not_run(report, progress, backend=flavour, name=name, precision=precision, reason=str(error))
            continue
        openers[flavour] = lambda compiled=compiled, flavour=flavour: open_encoder(compiled, name, backend=flavour)  # type: ignore[misc]
    return openers


def _compiled(bundle: Bundle, name: EncoderName, entry: EncoderEntry, flavour: str, report: dict[str, Any]) -> Bundle:
    from dualmatch.export.engine import build_engine
    from dualmatch.export.engine_profiles import AxisRange, profile_from_text
    from dualmatch.runtime.backends.engine_record import engine_file

    length = AxisRange(1, LENGTH, 64)
    profiles = [profile_from_text(text, entry.inputs, length=length) for text in ("latency", "throughput")]
    file = engine_file(name, flavour)
    record = build_engine(
        bundle.path / entry.file, bundle.path / file, flavour=flavour, inputs=entry.inputs, profiles=profiles
    )
    record = replace(record, file=file)
    report["engines"].append(record.to_json() | {"encoder": name, "precision": entry.precision})
    files = {**bundle.manifest.files, file: file_entry(bundle.path / file)}
    return replace(bundle, manifest=replace(bundle.manifest, engines=(record.to_json(),), files=files))


def _measure(
    *,
    report: dict[str, Any],
    model: Any,
    name: EncoderName,
    entry: EncoderEntry,
    precision: str,
    backend: str,
    opened: Callable[[], Session],
    batches: Sequence[int],
    device: str,
    plan: Plan,
    progress: Progress,
    flops: int,
) -> None:
    from . import networks

    def feeds(batch: int) -> Any:
        return random_feeds(entry.inputs, batch=batch, length=LENGTH, vocabulary_size=networks.VOCABULARY)

    case: dict[str, Any] = {}
    try:
        for batch in batches:
            reference = networks.TorchSession(
                networks.encoder_of(model, name),
                inputs=entry.inputs,
                outputs=entry.outputs,
                precision="fp32",
                mode="eager",
                device=device,
            )
            wanted = next(iter(reference.run(feeds(batch)).values()))
            with opened() as session:
                for _ in range(3):  # the third is a replayed graph
                    got = next(iter(session.run(feeds(batch)).values()))
                cosine = float(
                    ((got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)).min()
                )
            result = measure_case(opened, feeds, encoder=name, batch=batch, plan=plan)
            rate = flops * result.items_per_s
            roof = report["gemm_roof_tflops"].get(precision)
            case = result.to_json() | {
                "precision": precision,
                "backend": backend,
                "worst_cosine_to_torch_fp32": cosine,
                "tflops": rate / 1e12,
                "share_of_gemm_roof": None if roof is None else rate / 1e12 / roof,
            }
            report["cases"].append(case)
            progress(
                f"{name} {precision} batch {batch:3d} {backend}: {1e3 * batch / result.items_per_s:.3f} ms, "
                f"{result.items_per_s:.0f}/s, worst cosine {cosine:.6f}, {result.provider}"
            )
            if not cosine >= MIN_COSINE[precision]:
                report["failed"].append(f"{name} {precision} {backend} batch {batch}: worst cosine {cosine:.6f}")
    except DualmatchError as error:
        _not_run(report, progress, backend=backend, name=name, precision=precision, reason=str(error))
    except Exception as error:  # noqa: BLE001  (torch.compile and the engines raise what they like; the others still count)
        report["failed"].append(f"{name} {precision} {backend}: {type(error).__name__}: {error}")
        report.setdefault("tracebacks", []).append(traceback.format_exc(limit=8))
        progress(f"{name} {precision} {backend}: FAILED: {type(error).__name__}: {error}")


def _not_run(
    report: dict[str, Any], progress: Progress, *, backend: str, name: str, precision: str, reason: str
) -> None:
    report["not_run"].append({"backend": backend, "encoder": name, "precision": precision, "reason": reason})
    progress(f"{name} {precision} {backend}: NOT RUN: {reason}")


def _ratios(report: dict[str, Any]) -> None:
    """How many times as fast as torch eager at the same precision, and as onnxruntime CUDA, in this run."""
    rate = {
        (c["encoder"], c["precision"], c["batch"], c["backend"]): c["item_throughput"]["avg"] for c in report["cases"]
    }
    for case in report["cases"]:
        key = (case["encoder"], case["precision"], case["batch"])
        for against in ("torch-eager", "torch-compile", "onnxruntime-cuda"):
            base = rate.get((*key, against))
            case[f"times_{against.replace('-', '_')}"] = None if base is None else case["item_throughput"]["avg"] / base
