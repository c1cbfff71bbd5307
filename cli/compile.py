"""`dualmatch compile`."""

from pathlib import Path

import click

from .common import existing, json_option, print_json, progress_reports


@click.command("compile")
@click.argument("bundle", type=existing)
@click.option(
    "--flavour",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt",
    show_default=True,
    help="tensorrt-rtx builds without a GPU.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="PROFILE",
    help="latency (batch 1), throughput (1:32:64), or MIN:OPT:MAX; repeatable. [default: both named ones]",
)
@click.option(
    "--length",
    default=None,
    metavar="MIN:OPT:MAX",
    help="Caption lengths in tokens. [default: 1:16:the bundle's limit]",
)
@click.option("--workspace-mib", type=click.IntRange(1), help="Limit of scratch memory while building and running.")
@json_option
def command(
    bundle: Path,
    flavour: str,
    profiles: tuple[str, ...],
    length: str | None,
    workspace_mib: int | None,
    *,
    as_json: bool,
) -> None:
    """Compile BUNDLE's two graphs to TensorRT engines, kept in BUNDLE/engines and listed in its manifest."""
    from dualmatch.export.compile import compile_bundle

    with progress_reports() as progress:
        records = compile_bundle(
            bundle,
            flavour=flavour,
            profiles=profiles or ("latency", "throughput"),
            length=length,
            workspace_bytes=workspace_mib * 2**20 if workspace_mib else None,
            progress=progress,
        )
    if as_json:
        print_json([record.to_json() for record in records])
        return
    for record in records:
        names = ", ".join(profile.name for profile in record.profiles)
        click.echo(
            f"{bundle / record.file}: {record.bytes / 2**20:.1f} MiB in {record.seconds:.1f} s, "
            f"{record.flavour} {record.tensorrt_version}, profiles {names}"
        )
