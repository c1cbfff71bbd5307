"""The parts of a data set that a study trains and compares on: its own splits, or folds of all its images. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes
from dualmatch.runtime.hard_pairs import has_pairs

# Of the images outside a fold, every eighth chooses the epoch.
VAL_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one run of a study sees.

    Attributes:
        dataset: the data set, its images assigned to splits.
        compared: of these, the images that rows are compared on.
        prefix: before `seedN` in the name of the run's folder.
        overrides: options that name the splits.
    """

    dataset: Dataset
    compared: Dataset
    prefix: str = ""
    overrides: tuple[str, ...] = ()


def parts_of(dataset: Dataset, splits: Sequence[str], folds: int = 1) -> list[Part]:
    """One part: the data set as it is, compared on `splits`; or `folds` parts, in each of which another share of all images is the test set.

    An image's fold follows from its id and the other ids, not from their order. The rest is trained on, but for every eighth, which
    chooses the epoch.

    Raises:
        DualmatchError: a split that the data set does not have, or, with folds, hard pairs, or fewer than ten images a fold.
    """
    if folds == 1:
        return [Part(dataset=dataset, compared=dataset.select(splits))]
    if has_pairs(dataset):
        raise DualmatchError(
            f"data set {dataset.name!r} comes in hard pairs, which folds would tear apart; compare it on a split."
        )
    if len(dataset.items) < 10 * folds:
        raise DualmatchError(
            f"{len(dataset.items)} images are too few for {folds} folds of ten or more; ask for fewer."
        )
    order = sorted(range(len(dataset.items)), key=lambda row: sha256_of_bytes(dataset.items[row].id.encode()))
    place = {row: number for number, row in enumerate(order)}
    found = []
    for fold in range(folds):
        items = tuple(
            replace(item, split=_split(place[row] % folds == fold, place[row] // folds % VAL_EVERY == 0))
            for row, item in enumerate(dataset.items)
        )
        cut = replace(dataset, items=items)
        found.append(
            Part(
                dataset=cut,
                compared=cut.select(["test"]),
                prefix=f"fold{fold}of{folds}-",
                overrides=('data.train_splits=["train"]', 'data.val_splits=["val"]'),
            )
        )
    return found


def _split(is_tested: bool, is_validated: bool) -> str:
    return "test" if is_tested else "val" if is_validated else "train"
