"""The list of recipes, by group, with the papers' numbers; imports no torch."""

from typing import Any

from .recipe_files import ROWS, recipe_names, recipe_values

# What is listed first; the rows of the papers follow in the order in which they are generated.
GROUPS = {"scenes": "scenes", "flickr8k": "flickr8k-1000", "modern": "With what was found since"}


def catalogue(containing: str = "") -> list[dict[str, Any]]:
    """Every recipe whose name contains some text: name, group, description, needs, targets; groups stand together."""
    entries = [_entry(name) for name in recipe_names() if containing in name]
    order = list(dict.fromkeys([*GROUPS.values(), *(row.group for row in ROWS.values())]))
    places = {name: place for place, name in enumerate(ROWS)}
    return sorted(
        entries, key=lambda entry: (order.index(entry["group"]), places.get(entry["name"], -1), entry["name"])
    )


def _entry(name: str) -> dict[str, Any]:
    row = ROWS.get(name)
    group = row.group if row else GROUPS["modern" if name.endswith("-modern") else name.partition("-")[0]]
    return {
        "name": name,
        "group": group,
        "description": recipe_values(name).get("description", ""),
        "needs": row.needs if row else "",
        "targets": [target.to_json() for target in row.targets] if row else [],
    }


def listing(entries: list[dict[str, Any]]) -> str:
    """The catalogue as text."""
    lines: list[str] = []
    group = ""
    for entry in entries:
        if entry["group"] != group:
            group = entry["group"]
            lines += [*([""] if lines else []), group, "=" * len(group)]
        lines += [entry["name"], f"    {entry['description']}"]
        if entry["needs"]:
            lines.append(f"    needs {entry['needs']}")
        lines += [f"    {_numbers(target)}" for target in entry["targets"]]
    return "\n".join(lines)


def _numbers(target: dict[str, Any]) -> str:
    models = {0: "models not stated", 1: "one model", 2: "two models"}[target["models"]]
    recalls = " ".join(f"{target[side][k]:.1f}" for side in ("i2t", "t2i") for k in ("r1", "r5", "r10"))
    how = models + (f", re-ranked K1 = {target['rerank']}" if target["rerank"] else "")
    return f"{target['paper']} {target['table']}, {target['test_set']}, {how}: {recalls}, Rsum {target['rsum']:.1f}"
