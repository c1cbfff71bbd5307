"""What may go on: is the run in a folder the one that a recipe asks for, and is it finished?"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes

from .checkpoint import read_facts, read_run_json
from .recipe import Recipe, recipe_from_json


def hash_of_pairs(*sets: Dataset) -> str:
    """The identity of the pairs that a run sees."""
    return sha256_of_bytes(json.dumps([[(item.id, item.captions) for item in one.items] for one in sets]).encode())


def check_resumable(recipe: Recipe, pairs: str, out: Path) -> None:
    """Refuse to resume a run with another recipe or other pairs; the number of epochs may grow, and how often it is saved may change."""
    values = read_run_json(out)
    before = recipe_from_json(values["recipe"], f"{out / 'run.json'}: recipe")
    if not (out / "last.safetensors").is_file():
        raise DualmatchError(f"{out} has no finished epoch to resume from; remove it and start again.")
    if recipe.train.epochs < before.train.epochs:
        raise DualmatchError(
            f"the run in {out} was started for {before.train.epochs} epochs, {recipe.train.epochs} are fewer; resume it with as many or more."
        )
    same = replace(
        recipe,
        model=replace(recipe.model, text=replace(recipe.model.text, vocabulary_size=before.model.text.vocabulary_size)),
        train=replace(recipe.train, epochs=before.train.epochs, save_steps=before.train.save_steps),
    )
    if same != before:
        changed = ", ".join(changed_options(before.to_json(), same.to_json()))
        raise DualmatchError(f"the run in {out} was started with another {changed}; resume it with the same options.")
    if values.get("dataset", {}).get("pairs_sha256") != pairs:
        raise DualmatchError(f"the run in {out} was started on other images or captions; resume it with the same data.")


def is_finished(recipe: Recipe, dataset: Dataset, out: Path) -> bool:
    """Whether `out` holds all epochs of this very run; False where none of them is finished.

    Raises:
        DualmatchError: it holds another run.
    """
    if not (out / "last.safetensors").is_file():
        return False
    data = recipe.data
    check_resumable(recipe, hash_of_pairs(dataset.select(data.train_splits), dataset.select(data.val_splits)), out)
    return bool(read_facts(out / "last.safetensors")["epoch"] >= recipe.train.epochs)


def changed_options(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the options that differ, or that only one of the two has."""
    names = []
    for key in before | after:
        one, other = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names += changed_options(one, other, f"{prefix}{key}.")
        elif one != other:
            names.append(prefix + key)
    return names
