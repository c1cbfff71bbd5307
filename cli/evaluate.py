"""`dualmatch runtime evaluate`."""

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
    recall_lines,
    regions_option,
    split_option,
)


@click.command("evaluate")
@click.argument("bundle", type=existing)
@data_option
@split_option
@click.option(
    "--protocol",
    type=click.Choice(["full", "five-folds"]),
    default="full",
    show_default=True,
    help="All images together, or the mean of five fifths.",
)
@click.option(
    "--rerank",
    "k1",
    type=click.IntRange(1),
    metavar="K1",
    help="Re-rank image-to-text with so many candidates (the paper: 15).",
)
@click.option(
    "--rerank-t2i",
    "t2i_k1",
    type=click.IntRange(1),
    metavar="K1",
    help="Re-rank text-to-image too (the papers do not).",
)
@click.option(
    "--ensemble", type=existing, multiple=True, metavar="BUNDLE2", help="Average similarities with this bundle too."
)
@backend_options
@batch_size_option
@regions_option
@json_option
def command(
    bundle: Path,
    data: str,
    split: str,
    protocol: str,
    k1: int | None,
    t2i_k1: int | None,
    ensemble: tuple[Path, ...],
    backend: str,
    threads: int,
    batch_size: int,
    regions: Path | None,
    *,
    as_json: bool,
) -> None:
    """Recall of BUNDLE on a data set, without torch."""
    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.runtime.evaluate import evaluate_bundles
    from dualmatch.runtime.subject import about_bundle, subject

    from .common import region_file, splits

    dataset = open_dataset(data).select(splits(split))
    bundles = [load_bundle(path) for path in (bundle, *ensemble)]
    with progress_reports() as progress:
        recall = evaluate_bundles(
            bundles,
            dataset,
            protocol=protocol,
            rerank_k1=k1,
            rerank_t2i_k1=t2i_k1,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            regions=region_file(regions, dataset),
            progress=progress,
        )
    if as_json:
        print_json({**recall.to_json(), **subject(dataset, [about_bundle(one) for one in bundles])})
    else:
        click.echo(recall_lines(recall))
