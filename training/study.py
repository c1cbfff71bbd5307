"""Run a study: train and evaluate each of its rows with each seed, one after another; what is finished is not done again.

OUT/RECIPE/seedN                          a run, as `dualmatch train` leaves it; with folds OUT/RECIPE/foldFofM-seedN
OUT/RECIPE/seedN/embeddings-SPLIT.npz     embeddings of the evaluated splits by its best epoch
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_file

from .evaluation import embed_from_cache, write_embeddings
from .features import Progress, no_progress
from .folds import Part, parts_of
from .interrupt import TrainingStoppedError
from .loop import train
from .recipe import Recipe, load_recipe
from .resume import is_finished
from .studies import Study
from .study_summary import embeddings_path, run_folder
from .watch import RunWatch


def run_study(
    study: Study,
    dataset: Dataset,
    out: Path,
    *,
    data_name: str,
    cache: Path,
    seeds: Sequence[int],
    splits: Sequence[str],
    folds: int = 1,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    workers: int = 2,
    progress: Progress = no_progress,
) -> None:
    """Train and evaluate what is missing of every row and seed; all rows of a seed come before those of the next.

    A frozen trunk's features are taken from the cache in training and in evaluation alike (see `embed_from_cache`).

    Args:
        splits: joined into the set that the rows are compared on; not read with folds.
        folds: with more than one, each row and seed is trained so many times, and tested on another share of all images each time.
        overrides: `key=value` options that every row is trained with.

    Raises:
        DualmatchError: a run in `out` is another one than the study's, or as `train`.
        TrainingStoppedError: it was asked to stop; the same call goes on where it stopped.
    """
    # All recipes are read before the first is trained: an option that one of them does not have shows now, not hours later.
    runs = [
        (label, part, folder, _recipe(name, part, seed, overrides))
        for label, name, part, seed, folder in _runs(study, parts_of(dataset, splits, folds), seeds, out)
    ]
    for label, part, folder, recipe in runs:

        def report(what: str, done: int, total: int, prefix: str = f"{label}, {folder.name}") -> None:
            progress(f"{prefix}: {what}", done, total)

        if not is_finished(recipe, part.dataset, folder):
            try:
                train(
                    recipe,
                    part.dataset,
                    folder,
                    data_name=data_name,
                    cache=cache,
                    resume=(folder / "last.safetensors").is_file(),
                    device=device,
                    workers=workers,
                    watch=RunWatch(tensorboard=False),
                    progress=report,
                )
            except TrainingStoppedError as stopped:
                where = str(stopped).partition(":")[0]
                raise TrainingStoppedError(f"{where}: the same command continues the study.") from None
        _evaluate(folder, part.compared, cache, report)


def check_runs(
    study: Study,
    dataset: Dataset,
    out: Path,
    *,
    seeds: Sequence[int],
    splits: Sequence[str],
    folds: int = 1,
    overrides: Sequence[str] = (),
) -> None:
    """Refuse a folder that holds a run with other options than the study's: what stands in one table was trained alike.

    Raises:
        DualmatchError: such a run, or one on other images or captions.
    """
    for _, name, part, seed, folder in _runs(study, parts_of(dataset, splits, folds), seeds, out):
        if (folder / "run.json").is_file():
            is_finished(_recipe(name, part, seed, overrides), part.dataset, folder)


def _runs(
    study: Study, parts: Sequence[Part], seeds: Sequence[int], out: Path
) -> Iterator[tuple[str, str, Part, int, Path]]:
    """Label, recipe, part of the data, seed and folder of every run, in the order of training."""
    for seed in seeds:
        for part in parts:
            for label, name in study.rows.items():
                yield label, name, part, seed, run_folder(out, name, seed, part)


def _recipe(name: str, part: Part, seed: int, overrides: Sequence[str]) -> Recipe:
    return load_recipe(name, [*overrides, *part.overrides, f"train.seed={seed}"])


def _evaluate(folder: Path, compared: Dataset, cache: Path, progress: Progress) -> None:
    """Embeddings of the compared images by the best epoch, unless they are there."""
    path = embeddings_path(folder, compared.splits)
    checkpoint = sha256_of_file(folder / "best.safetensors")
    if path.is_file():
        try:
            with np.load(path) as arrays:
                if str(arrays["checkpoint"]) == checkpoint and arrays["image_ids"].tolist() == [
                    item.id for item in compared.items
                ]:
                    return
        except (BadZipFile, KeyError, ValueError, OSError):
            pass  # damaged or of another kind: written anew
    images, captions = embed_from_cache(folder, compared, cache, progress=progress)
    if not (np.isfinite(images).all() and np.isfinite(captions).all()):
        raise DualmatchError(f"the run in {folder} gives embeddings that are no numbers.")
    write_embeddings(path, compared, images, captions, checkpoint=checkpoint)
