"""`dualmatch bench paper`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    backend_options,
    batch_size_option,
    existing,
    json_option,
    print_json,
    progress_reports,
    regions_option,
    split_option,
    splits,
)

if TYPE_CHECKING:
    from dualmatch.bench.paper import Evaluation


@click.command("paper")
@click.argument("sources", metavar="[RECIPE:]SOURCE…", nargs=-1)
@click.option("--data", metavar="DATA", help="The data set to evaluate bundles and runs on.")
@split_option
@click.option("--only", default="", metavar="TEXT", help="Rows whose recipe has this in its name, e.g. table3.")
@backend_options
@batch_size_option
@regions_option
@click.option("--out", type=existing, metavar="FILE", help="Write the report as JSON.")
@json_option
def command(
    sources: tuple[str, ...],
    data: str | None,
    split: str,
    only: str,
    backend: str,
    threads: int,
    batch_size: int,
    regions: Path | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Our numbers beside the papers' tables, as Markdown; without a SOURCE the tables alone.

    A SOURCE is the JSON of an evaluation (`runtime evaluate`, `evaluate-checkpoint`, `bench recall`), or a bundle or run to evaluate on
    --data: alone, and together with the others of its recipe. RECIPE: in front says whose row it belongs to, where it does not say so
    itself (a bundle of the authors' checkpoint). A number stands beside a printed one only where network, test set, protocol, number of
    models and re-ranking agree; the others have a table of their own, with the reason.
    """
    from dualmatch.bench.paper import paper_report, read_evaluations
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.training.catalogue import catalogue

    entries = catalogue()
    known = {entry["name"] for entry in entries}
    named = [_named(source, known) for source in sources]
    evaluations: list[Evaluation] = []
    folders = []
    for recipe, path in named:
        if path.is_dir():
            folders.append((recipe, path))
        else:
            evaluations += read_evaluations(path, recipe)
    if folders:
        if data is None:
            raise DualmatchError(
                f"{folders[0][1]} is a folder, and evaluating it takes --data; or give the JSON of an evaluation."
            )
        evaluations += _evaluated(
            folders, data, split, backend=backend, threads=threads, batch_size=batch_size, regions=regions
        )
    report = paper_report(evaluations, entries, only)
    if out is not None:
        report.write(out)
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(report.markdown(), nl=False)


def _named(source: str, known: set[str]) -> tuple[str | None, Path]:
    """The recipe, where one is named before a colon, and the path."""
    recipe, colon, path = source.partition(":")
    return (recipe, Path(path)) if colon and recipe in known else (None, Path(source))


def _evaluated(
    folders: Sequence[tuple[str | None, Path]], data: str, split: str, *, regions: Path | None, **how: Any
) -> "list[Evaluation]":
    """Every row of the bundles and runs, those of one recipe also together."""
    from dataclasses import replace

    from dualmatch.bench.paper import evaluated, named
    from dualmatch.runtime.datasets import open_dataset

    from .common import region_file
    from .encoded_models import encoded_models

    dataset = open_dataset(data).select(splits(split))
    with progress_reports() as progress:
        encoded = encoded_models(
            [path for _, path in folders], dataset, regions=region_file(regions, dataset), progress=progress, **how
        )
    by_recipe: dict[str, list[Any]] = {}
    for (recipe, _), model in zip(folders, encoded, strict=True):
        told = replace(model, about=named(model.about, recipe)) if recipe else model
        by_recipe.setdefault(told.about["recipe"], []).append(told)
    return [one for models in by_recipe.values() for one in evaluated(models, dataset)]
