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
        DualmatchError: a folder that is no finished run or given twice, an unknown option, runs that differ in more than it and the seed, one
            value alone, or a picture that is no SVG.
    """
    if out.suffix.lower() != ".svg":
        raise DualmatchError(f"the picture is an SVG; call it {out.with_suffix('.svg').name}, not {out.name}.")
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
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DualmatchError("a run is given twice; a sweep counts each once.")
    described = [read_run_json(folder) for folder in folders]
    recipes = [
        recipe_from_json(values["recipe"], str(folder)).to_json()
        for folder, values in zip(folders, described, strict=True)
    ]
    pairs = [values.get("dataset", {}).get("pairs_sha256") for values in described]
    for folder, own in zip(folders, pairs, strict=True):
        if own != pairs[0]:
            raise DualmatchError(
                f"{folders[0]} and {folder} were trained on other images or captions; a sweep takes runs on the same data."
            )
    free = _FREE | _MOVES.get(option, set()) | {option}
    for folder, recipe in zip(folders, recipes, strict=True):
        if others := sorted(set(changed_options(recipes[0], recipe)) - free):
            raise DualmatchError(
                f"{folders[0]} and {folder} differ in {', '.join(others)} too; a sweep takes runs that differ in {option} and the seed alone."
            )
    runs = []
    for folder, recipe in zip(folders, recipes, strict=True):
        log = _log(folder / "log.jsonl")
        if len(log) < recipe["train"]["epochs"]:
            raise DualmatchError(
                f"{folder} has finished {len(log)} of its {recipe['train']['epochs']} epochs; resume it first."
            )
        runs.append(_Run(value=_value(recipe, option), seed=recipe["train"]["seed"], log=log))
    return runs


def _log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none where it has not finished an epoch."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        log = [json.loads(line) for line in lines]
        for line in log:
            float(line["val_rsum"]), float(line["loss"]), float(line["epoch"])
    except (ValueError, KeyError, TypeError):
        raise DualmatchError(f"{path} is damaged: a line of it is not an epoch of a run.") from None
    return log


def _value(recipe: dict[str, Any], option: str) -> Any:
    value: Any = recipe
    for name in option.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DualmatchError(f"runs have no option {option!r}; `train.epochs` is one.")
        value = value[name]
    if isinstance(value, dict | list):
        raise DualmatchError(f"{option} is no single value; a sweep is over one.")
    return value
