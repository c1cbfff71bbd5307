"""`dualmatch train`."""

import os
from pathlib import Path
from typing import Literal

import click

from .common import default_cache, existing, json_option, print_json, progress_reports


@click.command("train")
@click.argument("recipe", required=False)
@click.option("--data", metavar="DATA", help="A data set's folder, or `scenes`.")
@click.option("--out", type=existing, help="The run's folder.")
@click.option("--resume", is_flag=True, help="Continue the run in --out where it was saved last.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change an option of the recipe, for example train.epochs=3.",
)
@click.option(
    "--cache", type=existing, help="Folder for features of frozen networks. [default: the user's cache folder]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    default=2,
    show_default=True,
    help="Threads that load and augment ahead; 0: none.",
)
@click.option(
    "--tensorboard/--no-tensorboard", default=True, show_default=True, help="Write RUN/tensorboard, beside curves.svg."
)
@click.option(
    "--list",
    "list_recipes",
    is_flag=True,
    help="Show the recipes with the papers' numbers and stop; RECIPE, if given, is part of a name.",
)
@json_option
def command(
    recipe: str | None,
    data: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    cache: Path | None,
    device: Literal["cpu", "cuda"],
    workers: int,
    *,
    resume: bool,
    tensorboard: bool,
    list_recipes: bool,
    as_json: bool,
) -> None:
    """Train RECIPE (a name from --list, or a TOML file) on a data set.

    Ctrl-C finishes the step and saves; --resume continues exactly there. On several GPUs or machines:
    torchrun --nproc-per-node N --no-python dualmatch train …
    """
    if list_recipes:
        _list(recipe or "", as_json=as_json)
        return
    for given, what in ((recipe, "RECIPE"), (data, "--data"), (out, "--out")):
        if given is None:
            raise click.UsageError(f"{what} is missing.")
    assert recipe is not None
    assert data is not None
    assert out is not None
    if as_json:
        raise click.UsageError("--json goes with --list; a run's figures are in its log.jsonl.")
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.training.interrupt import TrainingStoppedError
    from dualmatch.training.loop import train
    from dualmatch.training.recipe import load_recipe
    from dualmatch.training.watch import RunWatch

    chosen = load_recipe(recipe, overrides)
    if unread := chosen.unread_files:
        reads = {
            "data.regions": "a network with precomputed regions (model.regions.source, and a regional path)",
            "trunk_weights": "the trunk resnet152",
            "word_weights": 'words with model.text.pretrained = "file"',
        }
        raise DualmatchError(f"{unread[0]} is for {reads[unread[0]]}; {chosen.name} does not read it, leave it out.")
    try:
        with progress_reports() as progress:
            best = train(
                chosen,
                open_dataset(data),
                out,
                data_name=data,
                cache=cache or default_cache(),
                resume=resume,
                device=device,
                workers=workers,
                watch=RunWatch(tensorboard=tensorboard),
                progress=progress,
            )
    except TrainingStoppedError as stopped:
        if _is_main():
            click.echo(f"dualmatch: {stopped}", err=True)
        raise SystemExit(130) from None
    if _is_main():
        click.echo(f"{out}: best epoch {best['epoch']}, validation Rsum {best['val_rsum']:.1f}")


def _list(containing: str, *, as_json: bool) -> None:
    from dualmatch.training.catalogue import catalogue, listing

    entries = catalogue(containing)
    if not entries:
        raise click.UsageError(f"no recipe's name contains {containing!r}; --list alone shows them all.")
    if as_json:
        print_json(entries)
    else:
        click.echo(listing(entries))


def _is_main() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
