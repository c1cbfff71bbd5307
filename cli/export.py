"""`dualmatch export`."""

from pathlib import Path
from typing import Literal

import click

from .common import existing, json_option, print_json, progress_reports, regions_option


@click.command("export")
@click.argument("run", type=existing)
@click.option("--out", required=True, type=existing, help="The bundle's folder.")
@click.option("--fp32", "precision", flag_value="fp32", default=True, help="Compute in float32 (the default).")
@click.option("--fp16", "precision", flag_value="fp16", help="Compute in float16, sums and normalisations in float32.")
@click.option(
    "--data", metavar="DATA", help="Pairs for the gate. [default: the data that RUN was trained on, all splits]"
)
@regions_option
@click.option(
    "--unverified",
    is_flag=True,
    help="Write the bundle although the pairs are too few to tell; the manifest records it.",
)
@json_option
def command(
    run: Path,
    out: Path,
    precision: Literal["fp32", "fp16"],
    data: str | None,
    regions: Path | None,
    *,
    unverified: bool,
    as_json: bool,
) -> None:
    """Export RUN's best epoch as a bundle: two ONNX graphs that left the gate with their recall."""
    from dualmatch.export.bundle import GateRefusedError, export_run
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.training.checkpoint import load_run
    from dualmatch.training.evaluation import regions_of

    from .common import region_file
    from .verify import verification_lines

    opened = load_run(run)
    data = data or opened.data
    with progress_reports() as progress:
        try:
            result = export_run(
                opened,
                open_dataset(data),
                out,
                precision=precision,
                regions=regions_of(opened, region_file(regions)),
                unverified=unverified,
                generated_data=data if data == "scenes" else None,
                progress=progress,
            )
        except GateRefusedError as refusal:
            click.echo(verification_lines(refusal.verification), err=True)
            raise
    if as_json:
        print_json({"bundle": str(out), "hash": result.bundle.hash, **result.verification.to_json()})
        return
    click.echo(verification_lines(result.verification))
    for name, found in result.magnitudes.items():
        if found:
            top = found[0]
            click.echo(
                f"largest {name} tensor in float16: {top.largest:.3g} ({top.operator}), {100 * top.share:.1f} % of the range"
            )
    click.echo(f"{out}: bundle written, {precision}")
