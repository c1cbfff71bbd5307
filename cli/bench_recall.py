"""`dualmatch bench recall`."""

from pathlib import Path

import click

from .common import (
    backend_options,
    batch_size_option,
    data_option,
    existing,
    json_option,
    print_json,
    progress_reports,
    regions_option,
    split_option,
)


@click.command("recall")
@click.argument("models", metavar="BUNDLE…", nargs=-1, required=True, type=existing)
@data_option
@split_option
@click.option(
    "--rerank",
    "k1",
    type=click.IntRange(0),
    default=15,
    show_default=True,
    metavar="K1",
    help="Candidates of the re-ranked rows, image to text; 0 leaves them out.",
)
@backend_options
@batch_size_option
@regions_option
@click.option("--out", type=existing, metavar="FILE", help="Write the report as JSON.")
@json_option
def command(
    models: tuple[Path, ...],
    data: str,
    split: str,
    k1: int,
    backend: str,
    threads: int,
    batch_size: int,
    regions: Path | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Recall of each BUNDLE and of their ensemble: every protocol, plain and re-ranked, with intervals; differences; kinds of captions.

    Every image and caption is encoded once by each bundle. The first bundle is the one that the others are compared with.
    A training run may stand for a bundle; it is then encoded in torch.
    """
    from dualmatch.bench.bundle_recall import recall_report
    from dualmatch.runtime.datasets import open_dataset

    from .common import region_file, splits
    from .encoded_models import encoded_models

    dataset = open_dataset(data).select(splits(split))
    with progress_reports() as progress:
        encoded = encoded_models(
            models,
            dataset,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            regions=region_file(regions, dataset),
            progress=progress,
        )
        progress("ranking", 0, 0)
        report = recall_report(encoded, dataset, rerank=k1)
    if out is not None:
        report.write(out)
    if as_json:
        print_json(report.to_json())
        return
    from rich.console import Console

    Console().print(report.tables())
    if out is not None:
        click.echo(f"{out}: report written")
