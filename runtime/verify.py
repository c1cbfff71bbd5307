"""Recall parity of a bundle here, on this backend, against torch's embeddings in the bundle; no torch needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from .backends import ENGINE_BACKENDS
from .bundle import MANIFEST, Bundle, EncoderName
from .configs import from_mapping
from .datasets import Dataset, ImageItem
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .parity import Comparison, Decision, Flip, Tolerances, compare, decide
from .reference import Reference, read_reference
from .regions import RegionFile
from .stages import RANGE, RECALL, Contract, GraphCheck, Magnitude, Stage, StageTable, check_session

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class NamedFlip:
    """A query whose answer entered or left the first 1, 5 or 10, in names.

    Attributes:
        query: the caption (t2i), or the image's id (i2t).
        image: id of the image that the query belongs to.
        rank_before, rank_after: of its best right answer, counted from 1.
        first_before, first_after: what was ranked first: a caption (i2t) or an image's id (t2i).
    """

    direction: Literal["i2t", "t2i"]
    query: str
    image: str
    rank_before: int
    rank_after: int
    first_before: str
    first_after: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the gate, or `verify`, found.

    Attributes:
        decision: the verdict.
        stages: how each stage ended.
        tolerances: what was allowed.
        comparison: retrieval before and after; None where a stage before it failed or there were no photographs to compare on.
        flips: the queries that flipped, worst first.
        magnitudes: by encoder the float16 tensors with their largest magnitudes on real inputs at export, largest first.
        samples: largest absolute difference of a component in the checks of each encoder.
        providers: what each encoder really ran on.
        captions_difference: largest difference of any caption's embedding to torch's.
        photographs: the compared images by id, to show them.
    """

    decision: Decision
    stages: tuple[Stage, ...]
    tolerances: Tolerances
    comparison: Comparison | None = None
    flips: tuple[NamedFlip, ...] = ()
    magnitudes: Mapping[str, Sequence[Magnitude]] = field(default_factory=dict)
    samples: Mapping[str, float] = field(default_factory=dict)
    providers: Mapping[str, str] = field(default_factory=dict)
    captions_difference: float | None = None
    photographs: Mapping[str, ImageItem] = field(default_factory=dict, repr=False)

    def to_json(self, *, flips: int | None = None) -> dict[str, Any]:
        """Plain values; `flips` cuts the list of flipped queries."""
        decision = self.decision
        return {
            "verdict": decision.verdict,
            "reason": decision.reason,
            "pairs_needed": decision.pairs_needed,
            "tolerances": asdict(self.tolerances),
            "smallest_tolerances": None if decision.smallest is None else asdict(decision.smallest),
            "stages": [asdict(stage) for stage in self.stages],
            "samples": dict(self.samples),
            "providers": dict(self.providers),
            "captions_difference": self.captions_difference,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "flipped": [asdict(flip) for flip in self.flips[:flips]],
            "largest_magnitudes": {name: [asdict(one) for one in found] for name, found in self.magnitudes.items()},
        }


def tolerances_of(bundle: Bundle) -> Tolerances:
    """The tolerances that the bundle's gate was run with.

    Raises:
        DualmatchError: the manifest does not have them.
    """
    where = f"{bundle.path / MANIFEST}: parity.tolerances"
    return from_mapping(Tolerances, bundle.manifest.parity.get("tolerances", {}), where)


def verify(
    bundle: Bundle,
    dataset: Dataset | None,
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    batch_size: int = 32,
    regions: RegionFile | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Take both graphs through the stages, then compare retrieval with torch's.

    Args:
        dataset: holds the gate's photographs, found by the SHA-256 of their files wherever they are now; None where there is none.

    Raises:
        DualmatchError: photographs are missing from `dataset`, or the backend cannot run the bundle.
    """
    reference, tolerances = read_reference(bundle), tolerances_of(bundle)
    magnitudes = _magnitudes_of(bundle)
    with (
        TextEncoder(bundle, backend=backend, threads=threads, batch_size=bundle.manifest.caption_batch) as texts,
        ImageEncoder(
            bundle,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            regions=regions,
            attention=bundle.manifest.encoders["image"].nodes is not None and backend not in ENGINE_BACKENDS,
        ) as images,
    ):
        encoders: dict[EncoderName, ImageEncoder | TextEncoder] = {"image": images, "text": texts}
        checks = {name: _check(encoder, name, reference) for name, encoder in encoders.items()}
        stages = [*checks["image"].stages, *checks["text"].stages, _range(magnitudes)]
        table = StageTable([*((stage.name, stage.graph) for stage in stages), (RECALL, "both")])
        table.record(*stages)
        providers = {name: encoder.provider for name, encoder in encoders.items()}
        samples = {
            name: check.largest_difference for name, check in checks.items() if check.largest_difference is not None
        }
        failed = [stage for check in checks.values() if (stage := check.failed)]
        found: dict[str, Any] = {
            "tolerances": tolerances,
            "magnitudes": magnitudes,
            "samples": samples,
            "providers": providers,
        }
        if failed:
            reason = "; ".join(f"the {stage.graph} graph {stage.found} (stage {stage.name})" for stage in failed)
            return Verification(decision=Decision(verdict="fail", reason=reason), stages=table.rows, **found)
        captions = texts.encode(reference.texts)
        found["captions_difference"] = float(np.abs(captions - reference.captions).max())
        if dataset is None:
            reason = (
                f"graphs and captions were compared, but recall needs the {len(reference.image_ids)} photographs that the bundle was "
                "gated on: give them with --data"
            )
            table.record(Stage(name=RECALL, graph="both", status="SKIPPED", found="no photographs to compare on"))
            return Verification(decision=Decision(verdict="too few pairs", reason=reason), stages=table.rows, **found)
        items = _gated_items(reference, dataset)
        embedded = images.encode_items(items, progress)
    comparison = compare(
        (reference.images, reference.captions), (embedded, captions), reference.caption_image, split=reference.split
    )
    decision = decide(comparison, tolerances)
    status: Literal["OK", "FAIL"] = "OK" if decision.verdict == "pass" else "FAIL"
    table.record(Stage(name=RECALL, graph="both", status=status, found=decision.reason))
    return Verification(
        decision=decision,
        stages=table.rows,
        comparison=comparison,
        flips=named_flips(comparison.flips, reference.image_ids, reference.texts, reference.caption_image.tolist()),
        photographs=dict(zip(reference.image_ids, items, strict=True)),
        **found,
    )


def _check(encoder: ImageEncoder | TextEncoder, name: EncoderName, reference: Reference) -> GraphCheck:
    manifest = encoder.bundle.manifest
    entry = manifest.encoders[name]
    (output,) = entry.outputs
    # The embedding dimension is said twice in a manifest; galleries go by the one outside the entry.
    outputs = [type(output)(name=output.name, dtype=output.dtype, shape=("batch", manifest.embedding_dimension))]
    if isinstance(encoder, ImageEncoder) and encoder.nodes is not None:
        outputs.append(encoder.nodes.output)
    contract = Contract(
        inputs=entry.inputs,
        outputs=tuple(outputs),
        tolerance=entry.tolerance,
        nodes_tolerance=0.0 if entry.nodes is None else entry.nodes.tolerance,
    )
    return check_session(encoder.session, contract, reference.checks(name), f"{name} {entry.precision}")


@dataclass(frozen=True, kw_only=True)
class _Magnitudes:
    image: tuple[Magnitude, ...] = ()
    text: tuple[Magnitude, ...] = ()


def _magnitudes_of(bundle: Bundle) -> dict[str, Sequence[Magnitude]]:
    """As the manifest has them: the largest few of each encoder."""
    where = f"{bundle.path / MANIFEST}: parity.largest_magnitudes"
    found = from_mapping(_Magnitudes, bundle.manifest.parity.get("largest_magnitudes", {}), where)
    return {"image": found.image, "text": found.text}


def _range(magnitudes: Mapping[str, Sequence[Magnitude]]) -> Stage:
    """The share of float16's range was measured at export, on the float32 graph, which a bundle does not have."""
    tops = [f"{name} {100 * found[0].share:.1f} %" for name, found in magnitudes.items() if found]
    found = f"measured at export: {', '.join(tops)} of float16's range" if tops else "no float16"
    return Stage(name=RANGE, graph="both", status="SKIPPED", found=found)


def _gated_items(reference: Reference, dataset: Dataset) -> list[ImageItem]:
    wanted = set(reference.image_hashes)
    item_of: dict[str, ImageItem] = {}
    for item in dataset.items:
        digest = item.content_hash()
        if digest in wanted:
            item_of.setdefault(digest, item)
    if missing := [
        one for one, digest in zip(reference.image_ids, reference.image_hashes, strict=True) if digest not in item_of
    ]:
        raise DualmatchError(
            f"data set {dataset.name!r} lacks {len(missing)} of the {len(reference.image_ids)} photographs that the bundle was gated on "
            f"(found by the SHA-256 of their files), the first {missing[0]!r}; give the data that the bundle was exported with"
            + (f", or leave --data out: {reference.data!r} can be generated." if reference.data else ".")
        )
    return [item_of[digest] for digest in reference.image_hashes]


def named_flips(
    flips: Sequence[Flip], image_ids: Sequence[str], texts: Sequence[str], caption_image: Sequence[int]
) -> tuple[NamedFlip, ...]:
    """Flips in words: images by id, captions by text, ranks from 1.

    Args:
        image_ids, texts, caption_image: of the pairs that were compared.
    """

    def named(flip: Flip) -> NamedFlip:
        of_image = flip.direction == "i2t"
        image = flip.query if of_image else int(caption_image[flip.query])
        answers = texts if of_image else image_ids
        return NamedFlip(
            direction=flip.direction,
            query=image_ids[image] if of_image else texts[flip.query],
            image=image_ids[image],
            rank_before=flip.rank_before + 1,
            rank_after=flip.rank_after + 1,
            first_before=answers[flip.first_before],
            first_after=answers[flip.first_after],
        )

    return tuple(map(named, flips))
