"""`dualmatch bench compare`."""

from pathlib import Path

import click

from .bench_common import (
    batch_sizes_of,
    budget_option,
    length_option,
    percent_of,
    run_option,
    seed_option,
    strict_option,
)
from .common import (
    existing,
    json_option,
    print_json,
    progress_reports,
    signature_option,
    split_option,
    splits,
    threads_option,
)


@click.command("compare")
@click.argument("bundles", type=existing, nargs=-1, required=True, metavar="BUNDLE...")
@click.option(
    "--backends",
    default="onnxruntime",
    show_default=True,
    help="Separated by commas; besides the usual ones torch-eager and torch-compile (with --run).",
)
@run_option
@click.option("--encoders", default="image,text", show_default=True, help="image, text, or both.")
@click.option("--batch-sizes", default="1,32", show_default=True, help="Batch sizes, separated by commas.")
@length_option
@budget_option
@threads_option
@click.option("--data", metavar="DATA", help="Measure recall on this data set; else what each bundle's gate recorded.")
@split_option
@seed_option
@click.option("--out", type=existing, metavar="FILE", help="Write the report as JSON.")
@click.option("--samples", type=existing, metavar="FILE", help="Write every sample as JSON lines.")
@click.option(
    "--pictures",
    type=existing,
    metavar="DIR",
    help="Write SVGs: speed beside recall, and the roofline of each encoder.",
)
@click.option("--baseline", type=existing, metavar="FILE", help="Compare with an earlier report of this command.")
@click.option(
    "--fail-if-slower",
    default="10%",
    show_default=True,
    metavar="P%",
    help="With --baseline: exit with 1 where a median is more than P% slower, and certainly slower.",
)
@strict_option
@signature_option
@json_option
def command(
    bundles: tuple[Path, ...],
    backends: str,
    run: Path | None,
    encoders: str,
    batch_sizes: str,
    length: int,
    budget: float,
    threads: int,
    data: str | None,
    split: str,
    seed: int,
    out: Path | None,
    samples: Path | None,
    pictures: Path | None,
    baseline: Path | None,
    fail_if_slower: str,
    *,
    strict: bool,
    as_json: bool,
) -> None:
    """Compare BUNDLEs on backends, interleaved (A B B A); the first bundle on the first backend is the reference."""
    from dualmatch.bench.baseline import against_baseline
    from dualmatch.bench.bundle_compare import compare_bundles
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.runtime.files import write_atomically

    batches, limit = batch_sizes_of(batch_sizes), percent_of(fail_if_slower)
    sides = splits(encoders)
    if not sides or not set(sides) <= {"image", "text"}:
        raise click.UsageError(f"--encoders takes image, text, or both separated by a comma, got {encoders!r}.")
    if baseline is not None and not baseline.is_file():
        raise DualmatchError(f"there is no baseline {baseline}; write one with --out.")
    with progress_reports() as progress:
        comparison = compare_bundles(
            bundles,
            backends=splits(backends),
            run=run,
            encoders=sides,  # type: ignore[arg-type]
            batches=batches,
            threads=threads,
            length=length,
            budget_s=budget,
            data=data,
            splits=splits(split),
            seed=seed,
            progress=progress,
        )
    report = comparison.to_json()
    slowdowns = [] if baseline is None else against_baseline(report, baseline, limit)
    if baseline is not None:
        report["baseline"] = [
            {"case": s.name, "times_as_slow": s.value, "interval": [s.low, s.high], "failed": s.failed}
            for s in slowdowns
        ]
    if out is not None:
        comparison.write(out)
    if samples is not None:
        write_atomically(samples, "".join(f"{line}\n" for line in comparison.sample_lines()))
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, svg in comparison.pictures().items():
            write_atomically(pictures / name, svg)
    if as_json:
        print_json(report)
    else:
        from rich.console import Console

        Console().print(comparison.tables())
        for slowdown in slowdowns:
            click.echo(f"against {baseline}: {slowdown}")
    if failed := [slowdown for slowdown in slowdowns if slowdown.failed]:
        names = "; ".join(str(slowdown) for slowdown in failed)
        raise DualmatchError(f"slower than the baseline by more than {fail_if_slower}: {names}.")
    if strict and not comparison.stable:
        raise DualmatchError(
            "UNSTABLE, and --strict was asked for: a warm-up did not settle; measure longer (--budget)."
        )
