"""Bundles, or runs in their place, encoded for `bench recall` and `bench paper`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualmatch.bench.recall_rows import Encoded
    from dualmatch.runtime.datasets import Dataset


def encoded_models(
    paths: Sequence[Path],
    dataset: "Dataset",
    *,
    backend: str,
    threads: int,
    batch_size: int,
    regions: Any,
    progress: Callable[[str, int, int], None],
) -> "list[Encoded]":
    """Every image and caption encoded once by each; a folder with a run.json in torch.

    Raises:
        DualmatchError: one was given twice, is neither bundle nor run, or cannot encode this data set.
    """
    from dataclasses import replace

    from dualmatch.bench.bundle_recall import encoded_bundles, labels
    from dualmatch.bench.recall_rows import Encoded
    from dualmatch.runtime.bundle import load_bundle

    names = labels(paths)
    is_run = [(path / "run.json").is_file() for path in paths]
    bundles = [load_bundle(path) for path, run in zip(paths, is_run, strict=True) if not run]
    served = iter(
        encoded_bundles(
            bundles,
            dataset,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            regions=regions,
            progress=progress,
        )
    )
    encoded = []
    for name, path, run in zip(names, paths, is_run, strict=True):
        if not run:
            encoded.append(replace(next(served), label=name))
            continue
        from dualmatch.training.evaluation import encode_run

        about, images, captions = encode_run(path, dataset, batch_size=batch_size, regions=regions, progress=progress)
        encoded.append(Encoded(label=name, about=about, images=images, captions=captions))
    return encoded
