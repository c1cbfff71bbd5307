"""What a run is, for an evaluation's JSON and a bundle's manifest: its recipe, and where its options depart from it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualmatch.runtime.files import sha256_of_file

from .checkpoint import read_run_json
from .recipe import ForeignRecipe, Recipe, load_recipe, recipe_from_json
from .recipe_files import recipe_names

# Where things lie, what is drawn by chance, and what the training captions decide: no other recipe.
_NO_CHANGE = {
    "name", "description", "trunk_weights", "word_weights", "data.regions", "train.seed", "train.save_steps", "model.text.vocabulary_size",
}  # fmt: skip


def changes(recipe: Recipe | ForeignRecipe) -> list[str] | None:
    """The options that differ from the shipped recipe of the same name, as `train --set` takes them; None where there is none."""
    if not isinstance(recipe, Recipe) or recipe.name not in recipe_names():
        return None
    own, shipped = (_flat(asdict(one)) for one in (recipe, load_recipe(recipe.name)))
    return [f"{key}={own[key]}" for key in sorted(own) if key not in _NO_CHANGE and own[key] != shipped.get(key)]


def about_run(folder: Path) -> dict[str, Any]:
    """The run's part of `runtime.subject`: network, recipe, changed options, seed, and which checkpoint it is.

    Raises:
        DualmatchError: as `read_run_json`.
    """
    recipe = recipe_from_json(read_run_json(folder)["recipe"], f"{folder / 'run.json'}: recipe")
    return {
        "name": recipe.network,
        "recipe": recipe.name,
        "changed": changes(recipe),
        "seed": recipe.train.seed,
        "precision": "torch fp32",
        "checkpoint": sha256_of_file(folder / "best.safetensors"),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
