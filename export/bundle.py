"""A trained run as a bundle: graphs, reference, gate, manifest; built aside and renamed only when the gate has passed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from dualmatch.models import VSRN
from dualmatch.models.text import PAD_ID
from dualmatch.runtime.bundle import Bundle, EncoderEntry, FileEntry, Manifest, file_entry, load_bundle, write_manifest
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import directory_built_aside, refuse_existing
from dualmatch.runtime.parity import TOLERANCES, Tolerances
from dualmatch.runtime.reference import Reference
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.verify import Verification, verify
from dualmatch.training.checkpoint import Run, versions
from dualmatch.training.encode import encode_captions, encode_images, image_inputs
from dualmatch.training.features import Progress, no_progress

from .card import model_card
from .graph import OPSET, export_encoder, largest_difference, specs
from .half import HALF_MAX, Magnitude, magnitudes, to_half

Precision = Literal["fp32", "fp16"]
NUM_SAMPLES = 4
# Largest difference of a component of a unit vector between torch and the graph, on the shapes below.
COMPONENT_TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3}
# Captions padded in another way than in training have other embeddings, on purpose: what that costs is decided by recall alone.
CHANGED_PADDING = Tolerances(rsum_loss=0.5, worst_cosine=-1.0)
CHECKED_BATCHES = (1, 2, 7)
CHECKED_LENGTHS = (1, 2, 5, 17, 40)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What export made and measured."""

    bundle: Bundle
    verification: Verification
    magnitudes: dict[str, list[Magnitude]]


class GateRefusedError(DualmatchError):
    """The gate did not pass; `verification` has what it measured."""

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(message)
        self.verification = verification


def export_run(
    run: Run,
    dataset: Dataset,
    out: Path,
    *,
    precision: Precision = "fp32",
    regions: RegionFile | None = None,
    unverified: bool = False,
    tolerances: Tolerances | None = None,
    generated_data: str | None = None,
    progress: Progress = no_progress,
) -> ExportResult:
    """Export a run's best checkpoint as a bundle.

    Where the run pads captions in another way than it was trained with, the gate's reference is the run as it was trained, so that
    the gate, and `verify` afterwards, measure what the change costs.

    Args:
        dataset: the pairs that the gate compares retrieval on; all of them.
        out: the bundle's directory; must not exist.
        unverified: write the bundle although the pairs are too few to tell; the manifest records it. A failed gate stays a failure.
        generated_data: name of the data set, if every machine can generate it.

    Raises:
        DualmatchError: `out` exists, the graph cannot be exported, a check or the gate failed; nothing is left behind.
    """
    refuse_existing(out, "the bundle")
    trained = run.reference or run
    tolerances = tolerances or (CHANGED_PADDING if run.reference else TOLERANCES[precision])
    model = run.model.eval()
    images = encode_images(model, run.preprocess, dataset.items, regions=regions, progress=progress)
    captions = encode_captions(
        trained.model, trained.tokenizer, dataset.captions, batch_size=trained.caption_batch, progress=progress
    )
    samples = _samples(run, dataset, regions)
    with directory_built_aside(out) as folder:
        progress("exporting the image encoder", 0, 0)
        image_entry, image_magnitudes = _graph(run, "image", _image_checks(run, dataset, regions), folder, precision)
        progress("exporting the text encoder", 0, 0)
        text_entry, text_magnitudes = _graph(run, "text", _text_checks(run, dataset), folder, precision)
        (folder / "tokenizer.json").write_bytes(run.tokenizer_path.read_bytes())
        Reference(
            images=images,
            captions=captions,
            image_ids=[item.id for item in dataset.items],
            image_hashes=[item.content_hash() for item in dataset.items],
            texts=dataset.captions,
            caption_image=np.asarray(dataset.caption_image, dtype=np.int64),
            samples=samples,
            data=generated_data,
            split=", ".join(dataset.splits),
        ).write(folder)
        manifest = Manifest(
            model={
                "name": "vsrn" if isinstance(model, VSRN) else "dsran",
                "recipe": run.recipe.name,
                "config": asdict(model.config),
            },
            embedding_dimension=images.shape[1],
            encoders={"image": image_entry, "text": text_entry},
            tokenizer=run.tokenizer.options,
            preprocessing=run.preprocess if "pixels" in model.image_encoder.input_names else None,
            pad_policy=run.pad_policy,
            caption_batch=run.caption_batch,
            provenance={
                "checkpoint_sha256": run.checkpoint_hash,
                "epoch": run.facts.get("epoch"),
                "val_rsum": run.facts.get("val_rsum"),
                "data": {"name": dataset.name, "layout": dataset.layout, "splits": list(dataset.splits)},
                "versions": {**versions(), "onnx": onnx.__version__},
                **run.provenance,
            },
            parity={"tolerances": asdict(tolerances), "verdict": "not measured"},
        )
        _seal(folder, manifest)
        verification = verify(load_bundle(folder), dataset, regions=regions, progress=progress)
        decision = verification.decision
        if decision.verdict != "pass" and not (unverified and decision.verdict == "too few pairs"):
            advice = (
                " (or --unverified to write the bundle all the same)" if decision.verdict == "too few pairs" else ""
            )
            raise GateRefusedError(f"the {precision} gate refused the export: {decision.reason}{advice}.", verification)
        found = {"image": image_magnitudes[:5], "text": text_magnitudes[:5]}
        parity = {
            "tolerances": asdict(tolerances),
            **verification.to_json(),
            "largest_magnitudes": {name: [asdict(one) for one in top] for name, top in found.items()},
        }
        manifest = replace(manifest, parity=json.loads(json.dumps(parity)))
        (folder / "README.md").write_text(model_card(manifest, run.recipe), encoding="utf-8")
        _seal(folder, manifest)
    return ExportResult(
        bundle=load_bundle(out),
        verification=verification,
        magnitudes={"image": image_magnitudes, "text": text_magnitudes},
    )


def _seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest over all files that are there now."""
    files: dict[str, FileEntry] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            files[path.name] = file_entry(path)
    write_manifest(folder, replace(manifest, files=files))


def _graph(
    run: Run,
    name: Literal["image", "text"],
    batches: Sequence[Mapping[str, NDArray[Any]]],
    folder: Path,
    precision: Precision,
) -> tuple[EncoderEntry, list[Magnitude]]:
    """Export one encoder, check it against torch on shapes other than the traced one, and rewrite it to the wanted precision."""
    encoder = run.model.image_encoder if name == "image" else run.model.text_encoder
    path = folder / f"{name}_encoder.onnx"
    traced = {key: torch.from_numpy(value) for key, value in _traced(batches).items()}
    single = export_encoder(encoder, traced, path, output=f"{name}_embedding")
    measured = _checked(encoder, path, batches, "fp32")
    found: list[Magnitude] = []
    if precision == "fp16":
        half = to_half(single)
        found = magnitudes(single, half, [dict(batch) for batch in batches], folder)
        # Before anything runs in half precision: an overflow is named here, later it would only be an infinity somewhere.
        if found and found[0].share >= 1:
            raise DualmatchError(
                f"float16 would overflow: tensor {found[0].tensor!r} ({found[0].operator}) reaches {found[0].largest:.4g} on real inputs, "
                f"float16 ends at {HALF_MAX:.0f}; export with --fp32."
            )
        onnx.save(half, path)
        measured = _checked(encoder, path, batches, "fp16")
    model = onnx.load(path)
    entry = EncoderEntry(
        file=path.name,
        precision=precision,
        opset=OPSET,
        inputs=specs(model.graph.input),
        outputs=specs(model.graph.output),
        tolerance=COMPONENT_TOLERANCE[precision],
        measured=measured,
    )
    return entry, found


def _checked(
    encoder: torch.nn.Module, path: Path, batches: Sequence[Mapping[str, NDArray[Any]]], precision: Precision
) -> float:
    difference = largest_difference(encoder, path, batches)
    tolerance = COMPONENT_TOLERANCE[precision]
    if not difference <= tolerance:
        raise DualmatchError(
            f"{path.name} at {precision} differs from torch by {difference:.2e} in a component, more than {tolerance:.0e} is allowed; "
            f"a tolerance of {difference * 1.01:.2e} would have passed."
        )
    return difference


def _traced(batches: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """An example of a shape that no check uses: three rows, nine tokens."""
    first = max(batches, key=lambda batch: max(value.size for value in batch.values()))
    example = {}
    for name, value in first.items():
        rows = np.resize(value, (3, *value.shape[1:]))
        example[name] = np.ascontiguousarray(rows[:, :9]) if value.dtype == np.int64 else rows
    return example


def _image_checks(run: Run, dataset: Dataset, regions: RegionFile | None) -> list[dict[str, NDArray[Any]]]:
    """Real images at batch sizes other than the traced one."""
    items = dataset.items[: max(CHECKED_BATCHES)]
    inputs = image_inputs(run.model, run.preprocess, items, regions)
    return [{name: value[:batch] for name, value in inputs.items()} for batch in CHECKED_BATCHES]


def _text_checks(run: Run, dataset: Dataset) -> list[dict[str, NDArray[Any]]]:
    """Real captions at several batch sizes and lengths: repeated to reach a length, cut to keep it, with a padded row in each batch."""
    ids = run.tokenizer.ids(dataset.captions[: max(CHECKED_BATCHES)])
    fixed = run.tokenizer.options.fixed_length
    lengths = (
        [fixed]
        if fixed
        else [
            length
            for length in CHECKED_LENGTHS
            if not run.tokenizer.options.max_length or length <= run.tokenizer.options.max_length
        ]
    )
    checks = []
    for batch in CHECKED_BATCHES:
        for length in lengths:
            rows = np.stack([np.resize(np.asarray(ids[i % len(ids)], dtype=np.int64), length) for i in range(batch)])
            rows[batch // 2, max(1, length // 2) :] = PAD_ID
            checks.append({"token_ids": rows})
    return checks


def _samples(run: Run, dataset: Dataset, regions: RegionFile | None) -> dict[str, dict[str, NDArray[Any]]]:
    """A few raw inputs with torch's outputs, for a first comparison on any machine."""
    image_sample = image_inputs(run.model, run.preprocess, dataset.items[:NUM_SAMPLES], regions)
    text_sample = {"token_ids": run.tokenizer(dataset.captions[:NUM_SAMPLES])}
    with torch.inference_mode():
        image_out = run.model.image_encoder(
            **{name: torch.from_numpy(value) for name, value in image_sample.items()}
        ).numpy()
        text_out = run.model.text_encoder(torch.from_numpy(text_sample["token_ids"])).numpy()
    return {"image": {**image_sample, "embedding": image_out}, "text": {**text_sample, "embedding": text_out}}
