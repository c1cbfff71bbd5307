"""One option's effect as a picture: Rsum over its values, and loss and validation Rsum by epoch, from the folders of finished runs.

DSRAN's Fig. 7 (`model.joint_graphs`), Fig. 8 (`train.epochs`) and Fig. 9 (`model.norm`) for the runs at hand.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.plot import NUM_TONES, Axis, Series, as_file, chart

from .checkpoint import read_run_json
from .recipe import recipe_from_json
from .resume import changed_options

# What does not make two runs incomparable: their names, their seeds, and what an option moves with it.
_FREE = {"name", "description", "train.seed"}
_MOVES = {"train.epochs": {"train.step_epochs"}}


@dataclass(frozen=True, kw_only=True)
class _Run:
    value: Any
    seed: int
    log: list[dict[str, Any]]

    @property
    def best(self) -> float:
        return max(float(line["val_rsum"]) for line in self.log)


def draw_sweep(runs: Sequence[Path], option: str, out: Path) -> dict[str, list[float]]:
    """Draw the runs over `option` (`model.joint_graphs`) into `out`, an SVG.

    The first plot has a dot for each run, the best validation Rsum of its epochs, and a line through the means of the seeds (words have no line, only the means); the legend
    names the seeds. The others have a line for each run.

    Returns:
        The best validation Rsums by the option's value.

    Raises:
        DualmatchError: a folder that is no run, an unknown option, runs that differ in more than it and the seed, or one value alone.
    """
    found = _read(runs, option)
    values = sorted({run.value for run in found}, key=lambda value: (str(type(value)), value))
    if len(values) < 2:
        raise DualmatchError(
            f"all {len(found)} runs have {option} = {values[0]!r}; a sweep takes runs that differ in it."
        )
    by_value = {value: [run for run in found if run.value == value] for value in values}
    kind: Literal["dashed", "hollow"]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        places = {value: float(value) for value in values}
        over_axis, kind = Axis(label=option), "dashed"
    else:  # words stand one beside the other, and no line leads from one to the next
        places = {value: float(number) for number, value in enumerate(values)}
        over_axis, kind = Axis(label=option, names=[(place, str(value)) for value, place in places.items()]), "hollow"
    means = [(places[value], fmean(run.best for run in by_value[value])) for value in values]
    over = [Series(label="mean of the seeds", points=means, kind=kind, tone=NUM_TONES)]
    loss: list[Series] = []
    recall: list[Series] = []
    for tone, value in enumerate(values, 1):
        seeds = by_value[value]
        label = f"{value}, seed{'s' if len(seeds) > 1 else ''} {', '.join(str(run.seed) for run in seeds)}"
        dots = [(places[value], run.best) for run in seeds]
        over.append(Series(label=label, points=dots, kind="points", tone=tone))
        for lines, what in ((loss, "loss"), (recall, "val_rsum")):
            for run in seeds:
                points = [(float(line["epoch"]), float(line[what])) for line in run.log]
                lines.append(Series(label="", points=points, tone=tone))
    epoch, plain = Axis(label="epoch"), Axis(label="")
    plots = [
        ("best validation Rsum", chart(f"best validation Rsum by {option}", over, over_axis, plain)),
        ("training loss", chart("training loss by epoch", loss, epoch, plain)),
        ("validation Rsum", chart("validation Rsum by epoch", recall, epoch, plain)),
    ]
    rsums = {str(value): [run.best for run in by_value[value]] for value in values}
    words = "; ".join(f"{value}: {', '.join(f'{rsum:.1f}' for rsum in of)}" for value, of in rsums.items())
    write_atomically(out, as_file(f"by {option}", plots, words=f"best validation Rsum, {words}"))
    return rsums


def _read(folders: Sequence[Path], option: str) -> list[_Run]:
    recipes = [recipe_from_json(read_run_json(folder)["recipe"], str(folder)).to_json() for folder in folders]
    free = _FREE | _MOVES.get(option, set()) | {option}
    for folder, recipe in zip(folders, recipes, strict=True):
        if others := sorted(set(changed_options(recipes[0], recipe)) - free):
            raise DualmatchError(
                f"{folders[0]} and {folder} differ in {', '.join(others)} too; a sweep takes runs that differ in {option} and the seed alone."
            )
    runs = []
    for folder, recipe in zip(folders, recipes, strict=True):
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        runs.append(
            _Run(value=_value(recipe, option), seed=recipe["train"]["seed"], log=[json.loads(line) for line in lines])
        )
    return runs


def _value(recipe: dict[str, Any], option: str) -> Any:
    value: Any = recipe
    for name in option.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DualmatchError(f"runs have no option {option!r}; `train.epochs` is one.")
        value = value[name]
    if isinstance(value, dict | list):
        raise DualmatchError(f"{option} is no single value; a sweep is over one.")
    return value
