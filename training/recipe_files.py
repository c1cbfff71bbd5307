"""Recipes as plain values: the shipped TOML files, the generated rows of the papers' tables, and files of one's own.

Imports neither torch nor the networks, so that recipes can be listed in the base install; `recipe.py` makes checked dataclasses of them.
"""

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from dualmatch.runtime.errors import DualmatchError

from .at_hand_recipes import AT_HAND_ROWS
from .paper_recipes import PAPER_ROWS

# Recipes that are generated, by name.
ROWS = PAPER_ROWS | AT_HAND_ROWS


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted({*_shipped_names(), *ROWS})


def recipe_values(name_or_path: str) -> dict[str, Any]:
    """A recipe's values, those of its bases beneath.

    Raises:
        DualmatchError: no such recipe, TOML that cannot be read, or a base that is none.
    """
    return _read(name_or_path, Path(), ())


def set_option(values: dict[str, Any], override: str) -> None:
    """Set one option from text, `table.key=value`.

    Raises:
        DualmatchError: no `key=value`, or a table's name where an option stands.
    """
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise DualmatchError(f"--set takes key=value, for example train.epochs=3; got {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise DualmatchError(f"--set {override}: {table!r} is an option, not a table.")
    values[last] = value


def _read(name_or_path: str, folder: Path, above: tuple[str, ...]) -> dict[str, Any]:
    """A recipe's values over those of its base; `above` are the recipes that led here."""
    row = ROWS.get(name_or_path)
    if row is not None and row.base:
        return merged(_read(row.base, folder, above), row.values)
    source = _shipped() / f"{name_or_path}.toml" if name_or_path in _shipped_names() else folder / name_or_path
    if not source.is_file():
        near = difflib.get_close_matches(name_or_path, recipe_names(), n=3)
        raise DualmatchError(
            f"there is no recipe {name_or_path!r}: it is neither a file nor one that `dualmatch train --list` shows"
            + (f"; did you mean {' or '.join(near)}?" if near else ", scenes-dsran-gru for example.")
        )
    if str(source) in above:
        raise DualmatchError(f"recipe {name_or_path} is its own base.")
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DualmatchError(f"recipe {name_or_path} is not valid TOML: {error}.") from None
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise DualmatchError(f"recipe {name_or_path}.base must be a recipe's name or file, got {base!r}.")
    inherited = _read(base, folder / Path(name_or_path).parent, (*above, str(source)))
    inherited.pop("name", None)
    return merged(inherited, values)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables merged, option by option; a list is one option."""
    result = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            result[key] = merged(below[key], above[key])
    return result


def _shipped() -> Any:
    return files("dualmatch.training.recipes")


def _shipped_names() -> list[str]:
    return [entry.name.removesuffix(".toml") for entry in _shipped().iterdir() if entry.name.endswith(".toml")]
