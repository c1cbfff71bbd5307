"""`python -m dualmatch.bench.gpu`: run the GPU benchmark and keep its report as JSON; without a GPU say so and exit 3."""

import json
import sys
from pathlib import Path

import click

from dualmatch.bench.measure import Plan
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.flavours import gpu_compute_capability

NOT_RUN = 3


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True, help="Folder."
)
@click.option("--check", is_flag=True, help="Only say whether there is a GPU: exit 0 or 3.")
@click.option("--quick", is_flag=True, help="A tiny network and short measurements, to try the benchmark out.")
@click.option("--budget", type=float, default=4.0, show_default=True, help="Seconds for each case.")
def main(out: Path, budget: float, *, check: bool, quick: bool) -> None:
    """Every backend against torch on this machine's GPU."""
    try:
        capability = gpu_compute_capability()
    except DualmatchError as error:
        click.echo(f"NOT RUN: nothing that needs a GPU was run: {error}", err=True)
        sys.exit(NOT_RUN)
    click.echo(f"GPU of compute capability {capability}")
    if check:
        return
    from .cases import run_all

    report = run_all(
        device="cuda",
        trunk="tiny" if quick else "resnet152",
        batches=(1, 32),
        plan=Plan(budget_s=0.3 if quick else budget),
        progress=lambda line: click.echo(line, err=True),
    )
    out.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{'quick-' if quick else ''}cc{capability}-{report['environment']['date'][:10]}.json"
    write_atomically(out / name, json.dumps(report, indent=2) + "\n")
    click.echo(
        f"{out / name}: {len(report['cases'])} cases, {len(report['not_run'])} not run, {len(report['failed'])} failed"
    )
    for line in report["failed"]:
        click.echo(f"FAILED: {line}", err=True)
    sys.exit(1 if report["failed"] else 0)


if __name__ == "__main__":
    main()
