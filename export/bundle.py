"""A trained run as a bundle: graphs, reference, gate, manifest; built aside and renamed only when the gate has passed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from dualmatch.models import VSRN
from dualmatch.models.text import PAD_ID
from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.bundle import Bundle, EncoderEntry, FileEntry, Manifest, file_entry, load_bundle, write_manifest
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import directory_built_aside, refuse_existing
from dualmatch.runtime.nodes import NodesOutput
from dualmatch.runtime.parity import Tolerances
from dualmatch.runtime.reference import Reference
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.stages import EMBEDDING, NODES, GraphCheck
from dualmatch.runtime.verify import Verification, verify
from dualmatch.training.about import changes
from dualmatch.training.checkpoint import Run, versions
from dualmatch.training.encode import encode_captions, encode_images, image_inputs
from dualmatch.training.features import Progress, no_progress

from .card import model_card
from .gate import Gate, tolerances_for
from .graph import OPSET, export_encoder, specs
from .half import magnitudes, to_half
from .int8_export import Int8Export, calibration_feeds, require_enough_pairs
from .metadata import describe_graphs
from .nodes import WithNodes

T = TypeVar("T")
Precision = Literal["fp32", "fp16", "int8"]
NUM_SAMPLES = 4
# Largest difference of a component of a unit vector between torch and the graph, on the shapes below.
COMPONENT_TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.25}
# Of the nodes, as a share of their largest component.
NODES_TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "int8": 0.25}
CHECKED_BATCHES = (1, 2, 7)
# For magnitudes alone, which a handful of inputs would understate.
NUM_PROBED_IMAGES, NUM_PROBED_CAPTIONS = 32, 512
NUM_MAGNITUDES = 5  # of each encoder, in the manifest
CHECKED_LENGTHS = (1, 2, 5, 17, 40)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What export made and measured."""

    bundle: Bundle
    verification: Verification


def export_run(
    run: Run,
    dataset: Dataset,
    out: Path,
    *,
    precision: Precision = "fp32",
    calibration: Dataset | None = None,
    regions: RegionFile | None = None,
    unverified: bool = False,
    tolerances: Tolerances | None = None,
    attention: bool = False,
    generated_data: str | None = None,
    progress: Progress = no_progress,
) -> ExportResult:
    """Export a run's best checkpoint as a bundle.

    Where the run pads captions in another way than it was trained with, the gate's reference is the run as it was trained, so that
    the gate, and `verify` afterwards, measure what the change costs.

    Args:
        dataset: the pairs that the gate compares retrieval on; all of them.
        out: the bundle's directory; must not exist.
        calibration: for int8, where the activations' ranges are found; None takes `dataset`.
        tolerances: what the gate allows; None takes `gate.tolerances_for`.
        unverified: write the bundle although the pairs are too few to tell; the manifest records it. A failed gate stays a failure.
        attention: give the image encoder's graph its nodes as a second output, for pictures of what the network looks at.
        generated_data: name of the data set, if every machine can generate it.

    Raises:
        DualmatchError: `out` exists, regions or calibration data are missing, the graph cannot be exported, a check or the gate failed;
            nothing is left behind.
    """
    refuse_existing(out, "the bundle")
    trained = run.reference or run
    tolerances = tolerances or tolerances_for(run, precision)
    if calibration is not None and precision != "int8":
        raise DualmatchError(f"calibration data are for int8; {precision} needs none.")
    model = run.model.eval()
    # What is missing is known before all pairs are encoded.
    if regions is not None and "regions" in model.image_encoder.input_names:
        regions.require([item.id for item in dataset.items])
    calibration, feeds = calibration or dataset, {}
    if precision == "int8":
        feeds = calibration_feeds(run, calibration, dataset, regions)
        if not unverified:
            require_enough_pairs(dataset, tolerances)
    images = encode_images(model, run.preprocess, dataset.items, regions=regions, progress=progress)
    captions = encode_captions(
        trained.model, trained.tokenizer, dataset.captions, batch_size=trained.caption_batch, progress=progress
    )
    encoder = WithNodes(model.image_encoder).eval() if attention else model.image_encoder
    samples = _samples(run, encoder, dataset, regions)
    int8 = None
    if precision == "int8":
        int8 = Int8Export(
            run, dataset, images, captions, calibration=calibration, feeds=feeds,
            regions=regions, tolerances=tolerances, unverified=unverified, progress=progress,
        )  # fmt: skip
    gate = Gate(precision, tolerances)
    with directory_built_aside(out) as folder:
        progress("exporting the image encoder", 0, 0)
        probes = _image_probes(run, dataset, regions) if precision == "fp16" else []
        image_entry = _graph(
            encoder,
            "image",
            _image_checks(run, dataset, regions),
            folder,
            precision,
            gate=gate,
            probes=probes,
            int8=int8,
        )
        progress("exporting the text encoder", 0, 0)
        probes = _text_probes(run, dataset) if precision == "fp16" else []
        text_entry = _graph(
            model.text_encoder,
            "text",
            _text_checks(run, dataset),
            folder,
            precision,
            gate=gate,
            probes=probes,
            int8=int8,
        )
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
            text_checks=gate.checks["text"],
        ).write(folder)
        manifest = Manifest(
            model={
                "name": "vsrn" if isinstance(model, VSRN) else "dsran",
                "recipe": run.recipe.name,
                "changed": changes(run.recipe),
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
        describe_graphs(folder, manifest)
        _seal(folder, manifest)
        verification = gate.decide(
            verify(load_bundle(folder, require_signature=False), dataset, regions=regions, progress=progress),
            unverified=unverified,
        )
        parity = verification.to_json(flips=20)
        for top in parity["largest_magnitudes"].values():
            del top[NUM_MAGNITUDES:]
        manifest = replace(manifest, parity=json.loads(json.dumps(parity)))
        card = model_card(manifest, run.recipe, folder, trained_on=Path(run.data).name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        _seal(folder, manifest)
    return ExportResult(
        bundle=load_bundle(out, require_signature=False),
        verification=verification,
    )


def _seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest over all files that are there now."""
    files: dict[str, FileEntry] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            files[path.name] = file_entry(path)
    write_manifest(folder, replace(manifest, files=files))


def _graph(
    encoder: nn.Module,
    name: Literal["image", "text"],
    batches: Sequence[Mapping[str, NDArray[Any]]],
    folder: Path,
    precision: Precision,
    *,
    gate: Gate,
    probes: Sequence[Mapping[str, NDArray[Any]]],
    int8: Int8Export | None,
) -> EncoderEntry:
    """Export one encoder, rewrite it to the wanted precision, and take each graph through the gate's stages."""
    path = folder / f"{name}_encoder.onnx"
    gate.ask_torch(name, encoder, batches)
    traced = {key: torch.from_numpy(value) for key, value in _traced(batches).items()}
    single = export_encoder(encoder, traced, path, output=f"{name}_embedding")
    measured = gate.check(name, path, "fp32", COMPONENT_TOLERANCE["fp32"], NODES_TOLERANCE["fp32"])
    if precision == "fp16":
        half = to_half(single)
        # Before anything runs in half precision: an overflow is named here, later it would only be an infinity somewhere.
        gate.check_range(name, magnitudes(single, half, [dict(batch) for batch in (*batches, *probes)], folder))
        onnx.save(half, path)
        measured = gate.check(name, path, "fp16", COMPONENT_TOLERANCE["fp16"], NODES_TOLERANCE["fp16"])
    engine_path, quantisation = path, {}
    quantised = int8.quantised(name, single, folder) if int8 is not None else None
    if precision == "int8" and quantised is None:
        precision = "fp32"
    if quantised is not None:
        quantisation = quantised.facts
        onnx.save(quantised.model, path)
        measured = gate.check(name, path, "int8", COMPONENT_TOLERANCE["int8"], NODES_TOLERANCE["int8"])
        if quantised.engine_model is not None:
            engine_path = folder / f"{name}_encoder.engine.onnx"
            onnx.save(quantised.engine_model, engine_path)
            gate.check(name, engine_path, "int8 engine", COMPONENT_TOLERANCE["int8"], NODES_TOLERANCE["int8"])
    model = onnx.load(path)
    assert measured.largest_difference is not None
    return EncoderEntry(
        file=path.name,
        precision=precision,
        opset=OPSET,
        inputs=specs(model.graph.input),
        outputs=specs(model.graph.output[:1]),
        tolerance=COMPONENT_TOLERANCE[precision],
        measured=measured.largest_difference,
        engine_file="" if engine_path == path else engine_path.name,
        quantisation=quantisation,
        nodes=_nodes(encoder, specs(model.graph.output[1:]), measured, NODES_TOLERANCE[precision]),
    )


def _nodes(
    encoder: nn.Module, outputs: Sequence[TensorSpec], measured: GraphCheck, tolerance: float
) -> NodesOutput | None:
    """What the manifest says of the second output, if there is one."""
    if not isinstance(encoder, WithNodes):
        return None
    (output,) = outputs
    assert measured.nodes_difference is not None
    return NodesOutput(
        output=output,
        groups=encoder.groups(int(output.shape[1])),
        tolerance=tolerance,
        measured=measured.nodes_difference,
    )


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


def _image_probes(run: Run, dataset: Dataset, regions: RegionFile | None) -> list[dict[str, NDArray[Any]]]:
    """More real images from all over the data set, for magnitudes alone: two at a time, because every tensor of theirs is kept."""
    items = _spread(dataset.items, NUM_PROBED_IMAGES)
    return [
        image_inputs(run.model, run.preprocess, items[start : start + 2], regions) for start in range(0, len(items), 2)
    ]


def _text_probes(run: Run, dataset: Dataset) -> list[dict[str, NDArray[Any]]]:
    """More real captions, likewise."""
    captions = _spread(dataset.captions, NUM_PROBED_CAPTIONS)
    return [{"token_ids": run.tokenizer(captions[start : start + 16])} for start in range(0, len(captions), 16)]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most so many, evenly from the whole sequence."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


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


def _samples(
    run: Run, encoder: nn.Module, dataset: Dataset, regions: RegionFile | None
) -> dict[str, dict[str, NDArray[Any]]]:
    """A few raw inputs with torch's outputs, for a first comparison on any machine."""
    image_sample = image_inputs(run.model, run.preprocess, dataset.items[:NUM_SAMPLES], regions)
    text_sample = {"token_ids": run.tokenizer(dataset.captions[:NUM_SAMPLES])}
    with torch.inference_mode():
        image_out = encoder(**{name: torch.from_numpy(value) for name, value in image_sample.items()})
        text_out = run.model.text_encoder(torch.from_numpy(text_sample["token_ids"])).numpy()
    outputs = (
        dict(zip((EMBEDDING, NODES), image_out, strict=True))
        if isinstance(encoder, WithNodes)
        else {EMBEDDING: image_out}
    )
    return {
        "image": image_sample | {name: value.numpy() for name, value in outputs.items()},
        "text": {**text_sample, EMBEDDING: text_out},
    }
