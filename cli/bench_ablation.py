"""`dualmatch bench ablation`."""

import json
from pathlib import Path
from typing import Literal

import click

from .common import data_option, default_cache, existing, json_option, print_json, progress_reports, splits


@click.command("ablation")
@click.argument("study")
@data_option
@click.option("--out", required=True, type=existing, help="Folder for the runs and the summary.")
@click.option(
    "--seeds", default="0,1,2", show_default=True, help="Every row is trained with each, separated by commas."
)
@click.option(
    "--split", default="test", show_default=True, help="Splits that the rows are compared on, separated by commas."
)
@click.option(
    "--folds",
    type=click.IntRange(2, 100),
    help="In place of --split: cut all images into so many folds, train each row once a fold, and compare on every image.",
)
@click.option(
    "--row",
    "rows",
    multiple=True,
    metavar="LABEL",
    help="Train this row only; several are allowed. The summary holds all that are there.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change an option of every row, as `dualmatch train`. Runs in --out that were trained without it are refused.",
)
@click.option("--no-train", is_flag=True, help="Summarise what is there; runs that are not are listed.")
@click.option("--cache", type=existing, help="Folder for features of frozen networks, as `dualmatch train`.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--workers", type=click.IntRange(0, 256), default=2, show_default=True, help="Threads that load ahead.")
@json_option
def command(
    study: str,
    data: str,
    out: Path,
    seeds: str,
    split: str,
    folds: int | None,
    rows: tuple[str, ...],
    overrides: tuple[str, ...],
    cache: Path | None,
    device: Literal["cpu", "cuda"],
    workers: int,
    *,
    no_train: bool,
    as_json: bool,
) -> None:
    """Train the rows of STUDY with several seeds, and compare them: recall, hard pairs, paired intervals.

    Studies: scenes, scenes-places, scenes-curves, flickr8k. What is finished in --out is not done again, an interrupted run is continued.
    Leaves OUT/STUDY.json and OUT/STUDY.md (with folds OUT/STUDY-foldsN.json and .md).
    """
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.runtime.files import write_atomically
    from dualmatch.training.interrupt import TrainingStoppedError
    from dualmatch.training.studies import STUDIES
    from dualmatch.training.study import check_runs, run_study
    from dualmatch.training.study_summary import markdown, summarise

    if study not in STUDIES:
        raise click.UsageError(f"there is no study {study!r}; there are {', '.join(STUDIES)}.")
    numbers = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() for part in numbers):
        raise click.UsageError(f"--seeds takes whole numbers separated by commas, got {seeds!r}.")
    if len({*map(int, numbers)}) < len(numbers):
        raise click.UsageError(f"--seeds names one twice: {seeds!r}; a run counts once.")
    for option in ("train.seed", *(("data.train_splits", "data.val_splits") if folds else ())):
        if any(one.partition("=")[0].strip() == option for one in overrides):
            raise click.UsageError(
                f"{option} is what {'--seeds' if option == 'train.seed' else '--folds'} sets; leave it out of --set."
            )
    if no_train and rows:
        raise click.UsageError("--row says what is trained, and --no-train that nothing is; leave one out.")
    if folds and click.get_current_context().get_parameter_source("split") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--folds takes every image in turn as a test image; leave --split out.")
    chosen, dataset, wanted = [int(part) for part in numbers], open_dataset(data), splits(split)
    wanted_rows = STUDIES[study].only(rows) if rows else STUDIES[study]
    check_runs(STUDIES[study], dataset, out, seeds=chosen, splits=wanted, folds=folds or 1, overrides=overrides)
    if not no_train:
        try:
            with progress_reports() as progress:
                run_study(
                    wanted_rows,
                    dataset,
                    out,
                    data_name=data,
                    cache=cache or default_cache(),
                    seeds=chosen,
                    splits=wanted,
                    folds=folds or 1,
                    overrides=overrides,
                    device=device,
                    workers=workers,
                    progress=progress,
                )
        except TrainingStoppedError as stopped:
            click.echo(f"dualmatch: {stopped}", err=True)
            raise SystemExit(130) from None
    summary = summarise(STUDIES[study], dataset, out, seeds=chosen, splits=wanted, folds=folds or 1)
    text, name = markdown(summary), f"{study}-folds{folds}" if folds else study
    write_atomically(out / f"{name}.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(out / f"{name}.md", text)
    if as_json:
        print_json(summary)
    else:
        click.echo(text, nl=False)
