"""`dualmatch bench sweep`."""

from pathlib import Path

import click

from .common import existing


@click.command("sweep")
@click.argument("runs", nargs=-1, required=True, type=existing)
@click.option("--over", "option", required=True, metavar="OPTION", help="In what the runs differ: model.joint_graphs.")
@click.option("--out", required=True, type=existing, help="The picture to write, .svg.")
def command(runs: tuple[Path, ...], option: str, out: Path) -> None:
    """Draw finished RUNS over one option: best Rsum by its value, loss and Rsum by epoch.

    DSRAN's Fig. 7 is --over model.joint_graphs, Fig. 8 --over train.epochs, Fig. 9 --over model.norm.
    """
    from dualmatch.training.sweep import draw_sweep

    found = draw_sweep(runs, option, out)
    for value, rsums in found.items():
        click.echo(f"{option} = {value}: best validation Rsum {', '.join(f'{rsum:.1f}' for rsum in rsums)}")
    click.echo(f"{out}: {len(runs)} runs")
