"""`dualmatch compile`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .common import existing, json_option, print_json, progress_reports, signature_option


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
    help="Caption lengths in tokens. [default: 1:16:the bundle's limit, or 64 where it has none]",
)
@click.option("--workspace-mib", type=click.IntRange(1), help="Limit of scratch memory while building and running.")
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="CC",
    help="tensorrt-rtx: a GPU to build for, as in 8.6; repeatable. [default: Ampere and later]",
)
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "same-compute-capability", "ampere-plus"]),
    default="none",
    show_default=True,
    help="tensorrt: other GPUs that the engines run on, at some cost in speed.",
)
@click.option("--version-compatible", is_flag=True, help="tensorrt: later releases of its major version load them too.")
@click.option("--timing-cache", type=existing, metavar="FILE", help="tensorrt: kernel timings, read and written.")
@signature_option
@json_option
def command(
    bundle: Path, flavour: str, profiles: tuple[str, ...], workspace_mib: int | None, *, as_json: bool, **options: Any
) -> None:
    """Compile BUNDLE's two graphs to TensorRT engines, kept in BUNDLE/engines and listed in its manifest."""
    from dualmatch.export.compile import compile_bundle

    with _phase_bars() as progress:
        records = compile_bundle(
            bundle,
            flavour=flavour,
            profiles=profiles or ("latency", "throughput"),
            workspace_bytes=workspace_mib * 2**20 if workspace_mib else None,
            progress=progress,
            **options,
        )
    if (bundle / "manifest.sig").is_file():
        click.echo(
            f"{bundle} was signed before; its signature is stale now: sign it again with `dualmatch sign`.", err=True
        )
    if as_json:
        print_json([record.to_json() for record in records])
        return
    for record in records:
        names = ", ".join(profile.name for profile in record.profiles)
        peak = "unknown" if record.peak_memory_bytes is None else f"{record.peak_memory_bytes / 2**20:.0f} MiB"
        click.echo(
            f"{bundle / record.file}: {record.bytes / 2**20:.1f} MiB in {record.seconds:.1f} s, peak memory {peak}, "
            f"{record.flavour} {record.tensorrt_version}, profiles {names}, "
            f"for compute capability {', '.join(record.compute_capabilities) or '8.0 and later'}"
        )


@contextmanager
def _phase_bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar for every phase under way: TensorRT's phases nest, so that several are open at once."""
    if not sys.stderr.isatty():
        with progress_reports() as lines:
            yield lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done)
            if done == total:
                bars.remove_task(tasks.pop(phase))

        yield report
