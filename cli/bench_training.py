"""`dualmatch bench training`."""

import json
from pathlib import Path

import click

from .common import data_option, existing, json_option, print_json


@click.command("training")
@click.argument("recipe")
@data_option
@click.option(
    "--workers", default="0,2", show_default=True, help="Numbers of loading threads to compare, separated by commas."
)
@click.option("--epochs", type=click.IntRange(2), default=3, show_default=True, help="The first is not counted.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change an option of the recipe.")
@click.option("--cache", type=existing, help="Folder for features of frozen networks.")
@click.option("--out", type=existing, metavar="FILE", help="Write the report as JSON.")
@json_option
def command(
    recipe: str,
    data: str,
    workers: str,
    epochs: int,
    device: str,
    overrides: tuple[str, ...],
    cache: Path | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Pairs per second of training RECIPE, and the share of time it waits for data, by number of loading threads."""
    from dualmatch.bench.training import bench_training, to_json, training_table
    from dualmatch.runtime.files import write_atomically

    numbers = [part.strip() for part in workers.split(",")]
    if not all(part.isdecimal() and int(part) <= 256 for part in numbers):
        raise click.UsageError(f"--workers takes numbers from 0 to 256 separated by commas, got {workers!r}.")
    cases = bench_training(
        recipe,
        data,
        workers=[int(part) for part in numbers],
        epochs=epochs,
        device=device,
        overrides=overrides,
        cache=cache,
    )
    report = to_json(recipe, data, cases)
    if out is not None:
        write_atomically(out, json.dumps(report, indent=2) + "\n")
    if as_json:
        print_json(report)
        return
    from rich.console import Console

    Console().print(training_table(cases))
