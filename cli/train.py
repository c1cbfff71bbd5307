"""`dualmatch train`."""

from pathlib import Path

import click

from .common import default_cache, existing, progress_reports


@click.command("train")
@click.argument("recipe", required=False)
@click.option("--data", metavar="DATA", help="A data set's folder, or `scenes`.")
@click.option("--out", type=existing, help="The run's folder.")
@click.option("--resume", is_flag=True, help="Continue after the last finished epoch of the run in --out.")
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
@click.option("--list", "list_recipes", is_flag=True, help="Show the recipes and stop.")
def command(
    recipe: str | None,
    data: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    cache: Path | None,
    *,
    resume: bool,
    list_recipes: bool,
) -> None:
    """Train RECIPE (a name from --list, or a TOML file) on a data set."""
    from dualmatch.training.recipe import load_recipe, recipe_names

    if list_recipes:
        for name in recipe_names():
            click.echo(f"{name}\n    {load_recipe(name).description}")
        return
    for given, what in ((recipe, "RECIPE"), (data, "--data"), (out, "--out")):
        if given is None:
            raise click.UsageError(f"{what} is missing.")
    assert recipe is not None
    assert data is not None
    assert out is not None
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.training.loop import train

    chosen = load_recipe(recipe, overrides)
    with progress_reports() as progress:
        best = train(
            chosen,
            open_dataset(data),
            out,
            data_name=data,
            cache=cache or default_cache(),
            resume=resume,
            progress=progress,
        )
    click.echo(f"{out}: best epoch {best['epoch']}, validation Rsum {best['val_rsum']:.1f}")
