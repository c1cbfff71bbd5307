"""Filters on what is known about items: their own fields, and fields of a metadata file joined by id."""

import fnmatch
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

from .gallery import Gallery, Item

OWN_FIELDS = ("row", "id", "caption", "image")
# Longer operators first, so that `<=` is not read as `<`.
CONDITION = re.compile(r"\s*([^\s=!<>~]+)\s*(<=|>=|!=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
Metadata = Mapping[str, Mapping[str, Any]]
Test = Callable[[Mapping[str, Any]], bool]


def select(gallery: Gallery, conditions: Sequence[str], metadata: Path | None = None) -> NDArray[np.bool_]:
    """The items for which every condition holds, bool (count,), for `Gallery.search(among=…)`.

    A condition is FIELD OP VALUE with OP one of `=`, `!=` (text, numbers by value), `~` (a pattern with * and ?), `<`, `<=`,
    `>`, `>=` (numbers; else text, so that ISO dates compare). An item without the field fulfils `!=` only; a list fulfils a
    condition if one of its values does (`!=`: if none equals).

    Args:
        gallery: whose items.
        conditions: at least one, or metadata without any is an error of the caller.
        metadata: a JSONL file of objects with `id` and any other fields.

    Raises:
        DualmatchError: a condition that cannot be read, a field that no item has, a metadata file that is damaged or names
            none of the items, or nothing left to search.
    """
    known = read_metadata(metadata) if metadata is not None else {}
    tests = [parse(condition) for condition in conditions]
    seen: set[str] = set()
    matched = 0

    def wanted(item: Item) -> bool:
        nonlocal matched
        fields = {name: value for name, value in asdict(item).items() if value is not None}
        if item.id in known:
            matched += 1
            fields = {**known[item.id], **fields}
        seen.update(fields)
        return all(test(fields) for _, test in tests)

    chosen = gallery.select(wanted)
    if metadata is not None and not matched:
        raise DualmatchError(f"{metadata} names none of the {len(gallery)} items of gallery {gallery.path} by its id.")
    for name, _ in tests:
        if name not in seen:
            raise DualmatchError(f"no item has a field {name!r}; there are {', '.join(sorted(seen))}.")
    if not chosen.any():
        raise DualmatchError(f"no item fulfils {' and '.join(map(repr, conditions))}.")
    return chosen


def parse(condition: str) -> tuple[str, Test]:
    """The field and the test of a condition.

    Raises:
        DualmatchError: it is not FIELD OP VALUE.
    """
    found = CONDITION.fullmatch(condition)
    if found is None:
        raise DualmatchError(f"the filter {condition!r} is not FIELD=VALUE (or !=, ~, <, <=, >, >= in place of =).")
    name, sign, wanted = found.groups()
    return name, lambda fields: _holds(fields.get(name), sign, wanted)


def read_metadata(path: Path) -> Metadata:
    """Objects by their id, from a JSONL file.

    Raises:
        DualmatchError: the file cannot be read, a line is no object with an `id`, an id occurs twice, or a field has the name
            of an item's own.
    """
    entries: dict[str, Mapping[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
        raise DualmatchError(f"metadata {path} cannot be read: {reason}.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DualmatchError(f"{path}, line {number}: not JSON ({error}).") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
            raise DualmatchError(f"{path}, line {number}: expected an object with an 'id', found {line[:40]}.")
        id_ = str(entry.pop("id"))
        if id_ in entries:
            raise DualmatchError(f"{path}, line {number}: the id {id_!r} occurs twice.")
        if taken := sorted({*OWN_FIELDS} & {*entry}):
            raise DualmatchError(
                f"{path}, line {number}: the field {taken[0]!r} is the item's own; give it another name."
            )
        entries[id_] = entry
    return entries


def _holds(value: Any, sign: str, wanted: str) -> bool:
    if isinstance(value, list):
        return (all if sign == "!=" else any)(_holds(one, sign, wanted) for one in value)
    if value is None:
        return sign == "!="
    text = value if isinstance(value, str) else json.dumps(value)
    if sign == "~":
        return fnmatch.fnmatchcase(text, wanted)
    # A number in the data makes it a comparison of numbers; `007` in text stays text.
    pair: tuple[Any, Any] = (text, wanted)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            pair = (value, float(wanted))
        except ValueError:
            return sign == "!="
    if sign in ("=", "!="):
        return bool(pair[0] == pair[1]) == (sign == "=")
    return ORDERS[sign](*pair)
