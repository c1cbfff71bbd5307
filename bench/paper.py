"""`bench paper`: our numbers beside those that the papers print, each row only where network, test set, protocol, models and re-ranking agree.

A printed row belongs to the recipes that train its network (`training.catalogue`, whose entries are handed in). Whatever cannot stand
beside one is listed by itself, with the reason.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json, write_atomically
from dualmatch.runtime.recall import FOLDS, checked_caption_image
from dualmatch.runtime.subject import about_data

from . import bundle_recall
from .recall_rows import Encoded, all_rows
from .test_sets import recognised

SCHEMA = {"name": "dualmatch.bench.paper", "version": 1}
# What makes two entries of the catalogue the same printed row.
_ROW = ("paper", "table", "test_set", "models", "rerank")

JSON = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One recall of ours.

    Attributes:
        source: the file, bundles or runs that it comes from.
        recall: `rsum`, `i2t`, `t2i`, `protocol`.
        data, models: see `runtime.subject`; empty where the file does not say.
    """

    source: str
    recall: JSON
    data: JSON = field(default_factory=dict)
    models: Sequence[JSON] = ()

    @property
    def protocol_name(self) -> str | None:
        """A key of `recall.FOLDS`; None for other folds."""
        return next((name for name, folds in FOLDS.items() if folds == self.recall["protocol"]["folds"]), None)

    @property
    def rerank(self) -> int | None:
        """K1 from image to text, 0 for none; None where text to image was re-ranked too, which no paper does."""
        told = self.recall["protocol"]["rerank"]
        found = re.fullmatch(r"i2t k1=(\d+)", told)
        return 0 if told == "none" else int(found[1]) if found else None

    def to_json(self) -> dict[str, Any]:
        recall = {key: self.recall[key] for key in ("rsum", "i2t", "t2i", "protocol")}
        return {"source": self.source, "data": dict(self.data), "models": [dict(one) for one in self.models], **recall}


def named(model: JSON, recipe: str) -> dict[str, Any]:
    """A model (see `runtime.subject`) that belongs to the row of `recipe` because the user says so."""
    return {**model, "recipe": recipe, "changed": None, "calls_itself": model["recipe"]}


def read_evaluations(path: Path, recipe: str | None = None) -> list[Evaluation]:
    """The recalls in a file of `runtime evaluate --json`, `evaluate-checkpoint --json` or `bench recall --out`.

    Args:
        recipe: whose row they belong to, in place of what the file says.

    Raises:
        DualmatchError: another file.
    """
    content = read_json(path, "evaluation")
    try:
        subject = content.get("subject") or {}
        models = [named(one, recipe) if recipe else one for one in subject.get("models", ())]
        if content.get("schema") == bundle_recall.SCHEMA:
            by_label = {one["label"]: one for one in models}
            found = [(row, [by_label[label] for label in row["models"]]) for row in content["rows"]]
        else:
            found = [(content, models)]
        evaluations = [
            Evaluation(source=str(path), recall=row, data=subject.get("data", {}), models=its) for row, its in found
        ]
        for one in evaluations:
            one.to_json()
            _numbers(one.recall)
            _ = one.protocol_name, one.rerank, one.recall["protocol"]["ensemble"]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DualmatchError(
            f"{path} is no evaluation; give the JSON of `runtime evaluate --json`, `evaluate-checkpoint --json` or `bench recall --out`."
        ) from None
    return evaluations


def evaluated(models: Sequence[Encoded], dataset: Dataset, *, rerank: int = 15) -> list[Evaluation]:
    """Every row of `bench recall`, single and together, of models that one recipe trained."""
    image_of = checked_caption_image(len(dataset.items), len(dataset.captions), dataset.caption_image)
    rows, _ = all_rows(models, image_of=image_of, rerank=rerank, split=", ".join(dataset.splits))
    about = {model.label: {"label": model.label, **model.about} for model in models}
    return [
        Evaluation(
            source=" + ".join(row.models),
            recall=row.recall.to_json(),
            data=about_data(dataset),
            models=[about[label] for label in row.models],
        )
        for row in rows
    ]


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A row of a paper's table.

    Attributes:
        target: see `training.paper_tables.Target.to_json`.
        recipes: those that train its network.
        ours: what was measured for it, with what a reader must know of each.
    """

    target: JSON
    recipes: list[str]
    ours: list[tuple[Evaluation, list[str]]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.target,
            "recipes": self.recipes,
            "status": "run" if self.ours else "not run",
            "ours": [
                {**one.to_json(), "rsum_difference": one.recall["rsum"] - self.target["rsum"], "notes": notes}
                for one, notes in self.ours
            ],
        }


@dataclass(frozen=True, kw_only=True)
class PaperReport:
    """The papers' rows with ours, and the evaluations that stand beside none, with the reason of each."""

    printed: Sequence[Printed]
    beside_none: Sequence[tuple[Evaluation, str]]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": dict(SCHEMA),
            "rows": [row.to_json() for row in self.printed],
            "beside_none": [{**one.to_json(), "reason": reason} for one, reason in self.beside_none],
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        write_atomically(path, json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def markdown(self) -> str:
        """The tables, to read or to paste."""
        from .paper_markdown import markdown

        return markdown(self.to_json())


def paper_report(evaluations: Sequence[Evaluation], catalogue: Sequence[JSON], only: str = "") -> PaperReport:
    """Every printed row, with the evaluations that measured the same.

    Args:
        catalogue: the entries of `training.catalogue.catalogue()`: a recipe's `name` and its `targets`.
        only: leave out rows whose recipes do not have this in their names.

    Raises:
        DualmatchError: no row is left.
    """
    rows: dict[tuple[Any, ...], Printed] = {}
    for entry in catalogue:
        for target in entry["targets"]:
            # Numbers too: where the ablations of one table share the rest of the key, they are rows of their own.
            key = (*(target[name] for name in _ROW), *_numbers(target))
            rows.setdefault(key, Printed(target=target, recipes=[])).recipes.append(entry["name"])
    shown = [row for row in rows.values() if any(only in recipe for recipe in row.recipes)]
    if not shown:
        raise DualmatchError(
            f"the papers print nothing for a recipe with {only!r} in its name; see `dualmatch train --list`."
        )
    beside_none = []
    for one in evaluations:
        row, words = _place(one, list(rows.values()))
        if row is not None and row not in shown:
            words = [f"its row, {row.target['paper']} {row.target['table']}, is left out here"]
            row = None
        if row is None:
            beside_none.append((one, "; ".join(words)))
        else:
            row.ours.append((one, words))
    return PaperReport(
        printed=sorted(shown, key=lambda row: _place_in_paper(row.target)),
        beside_none=beside_none,
    )


def _place(one: Evaluation, rows: Sequence[Printed]) -> tuple[Printed | None, list[str]]:
    """The printed row that an evaluation measured again, and what to know of it; or None, and why there is none."""
    if not one.data or not one.models:
        return None, ["the file does not say on which data and by which network it was measured: evaluate again"]
    if one.protocol_name is None:
        return None, [f"{one.recall['protocol']['folds']} folds, which no paper averages"]
    test_set, reason = recognised(one.data, one.protocol_name)
    if test_set is None:
        return None, [reason]
    if one.rerank is None:
        return None, ["text to image was re-ranked too, which the papers do not"]
    recipes = list(dict.fromkeys(model["recipe"] for model in one.models))
    if len(recipes) > 1:
        return None, [f"an ensemble of {' and '.join(recipes)}: the papers average two models of one network"]
    if changed := [option for model in one.models for option in model.get("changed") or ()]:
        return None, [f"trained with other options than {recipes[0]}: {', '.join(dict.fromkeys(changed))}"]
    own = [row for row in rows if recipes[0] in row.recipes]
    if not own:
        return None, [f"no printed row belongs to the recipe {recipes[0]}"]
    count = len(one.models)
    same = [
        row
        for row in own
        if (row.target["test_set"], row.target["rerank"]) == (test_set, one.rerank)
        and row.target["models"] in (0, count)
    ]
    if not same:
        how = f"{count} model{'s' if count > 1 else ''}, {f're-ranked with K1 = {one.rerank}' if one.rerank else 'not re-ranked'}"
        return None, [f"the papers print no row of {recipes[0]} on {test_set} with {how}"]
    notes = []
    if same[0].target["models"] == 0:
        notes.append("the paper does not say how many models")
    if by_hand := [model["calls_itself"] for model in one.models if "calls_itself" in model]:
        notes.append(f"put here by hand; it calls itself {' and '.join(dict.fromkeys(by_hand))}")
    if any(model.get("changed") is None for model in one.models):
        notes.append("whether options of the recipe were changed is not known")
    return same[0], notes


def _numbers(recall: JSON) -> list[float]:
    return [float(recall[way][cut]) for way in ("i2t", "t2i") for cut in ("r1", "r5", "r10")]


def _place_in_paper(target: JSON) -> tuple[str, str, int]:
    """Paper, table and line: what the rows are in order of."""
    table, _, line = target["table"].partition(", line ")
    return target["paper"], table, int(line or 0)
