"""Recall parity of a bundle here, on this backend, against torch's embeddings in the bundle; no torch needed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import MANIFEST, Bundle
from .configs import from_mapping
from .datasets import Dataset, ImageItem
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .parity import Comparison, Decision, Tolerances, compare, decide
from .reference import Reference, read_reference
from .regions import RegionFile

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes:
        decision: the verdict.
        comparison: retrieval before and after; None where there were no photographs to compare on.
        samples: largest absolute difference of the stored samples, by encoder.
        providers: what each encoder really ran on.
        captions_difference: largest difference of any caption's embedding to torch's.
    """

    decision: Decision
    comparison: Comparison | None
    samples: dict[str, float]
    providers: dict[str, str]
    captions_difference: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.decision.verdict,
            "reason": self.decision.reason,
            "samples": self.samples,
            "providers": self.providers,
            "captions_difference": self.captions_difference,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
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
    """Encode the gate's captions and, from `dataset`, its photographs, and compare retrieval with torch's.

    Args:
        dataset: holds the gate's photographs, found by the SHA-256 of their files wherever they are now; None where there is none.

    Raises:
        DualmatchError: photographs are missing from `dataset`.
    """
    reference = read_reference(bundle.path)
    with TextEncoder(bundle, backend=backend, threads=threads, batch_size=bundle.manifest.caption_batch) as encoder:
        samples = {"text": _sample_difference(encoder, reference, "text")}
        captions = encoder.encode(reference.texts)
        providers = {"text": encoder.provider}
    with ImageEncoder(bundle, backend=backend, threads=threads, batch_size=batch_size, regions=regions) as images:
        samples["image"] = _sample_difference(images, reference, "image")
        providers["image"] = images.provider
        embedded = None if dataset is None else _encode_images(images, reference, dataset, progress)
    captions_difference = float(np.abs(captions - reference.captions).max())
    if embedded is None:
        return Verification(
            decision=Decision(
                verdict="too few pairs",
                reason=f"samples and captions were compared, but recall needs the {len(reference.image_ids)} photographs that the bundle "
                "was gated on: give them with --data",
            ),
            comparison=None,
            samples=samples,
            providers=providers,
            captions_difference=captions_difference,
        )
    comparison = compare(
        (reference.images, reference.captions), (embedded, captions), reference.caption_image, split=reference.split
    )
    return Verification(
        decision=decide(comparison, tolerances_of(bundle)),
        comparison=comparison,
        samples=samples,
        providers=providers,
        captions_difference=captions_difference,
    )


def _sample_difference(encoder: ImageEncoder | TextEncoder, reference: Reference, name: str) -> float:
    sample = reference.samples[name]
    got = encoder.run({key: value for key, value in sample.items() if key != "embedding"})
    return float(np.abs(got - sample["embedding"]).max())


def _encode_images(
    encoder: ImageEncoder, reference: Reference, dataset: Dataset, progress: Progress | None
) -> NDArray[np.float32]:
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
    return encoder.encode_items([item_of[digest] for digest in reference.image_hashes], progress)
