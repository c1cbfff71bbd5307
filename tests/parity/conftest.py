"""The bundle under test: $DUALMATCH_PARITY_BUNDLE on $DUALMATCH_PARITY_BACKEND with the photographs of $DUALMATCH_PARITY_DATA.

Without the first, the demo's bundle. Nothing here needs torch: what torch gave is in the bundle.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dualmatch.runtime.bundle import Bundle, load_bundle
from dualmatch.runtime.datasets import Dataset, open_dataset
from dualmatch.runtime.encoders import ImageEncoder, TextEncoder
from dualmatch.runtime.reference import Reference, read_reference
from dualmatch.runtime.regions import RegionFile


@dataclass(frozen=True)
class Subject:
    """A bundle, what runs it, and where its photographs are."""

    bundle: Bundle
    backend: str
    reference: Reference
    dataset: Dataset | None
    regions: RegionFile | None

    def images(self, **options: Any) -> ImageEncoder:
        return ImageEncoder(self.bundle, backend=self.backend, regions=self.regions, **options)

    def texts(self, **options: Any) -> TextEncoder:
        return TextEncoder(self.bundle, backend=self.backend, **options)


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Subject:
    given = os.environ.get("DUALMATCH_PARITY_BUNDLE")
    bundle = load_bundle(Path(given) if given else request.getfixturevalue("demo").bundle)
    reference = read_reference(bundle.path)
    data = os.environ.get("DUALMATCH_PARITY_DATA") or reference.data
    regions = os.environ.get("DUALMATCH_PARITY_REGIONS")
    return Subject(
        bundle=bundle,
        backend=os.environ.get("DUALMATCH_PARITY_BACKEND") or "onnxruntime",
        reference=reference,
        dataset=open_dataset(data) if data else None,
        regions=RegionFile(Path(regions)) if regions else None,
    )
