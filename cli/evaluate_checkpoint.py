"""`dualmatch evaluate-checkpoint`."""

from pathlib import Path

import click

from .common import (
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


@click.command("evaluate-checkpoint")
@click.argument("run", type=existing)
@data_option
@split_option
@batch_size_option
@regions_option
@click.option(
    "--rerank",
    "k1",
    type=click.IntRange(1),
    metavar="K1",
    help="Re-rank image-to-text with so many candidates (the paper: 15).",
)
@click.option(
    "--save-embeddings", type=existing, metavar="FILE", help="Write both sides' embeddings and ids to an .npz file."
)
@json_option
def command(
    run: Path,
    data: str,
    split: str,
    batch_size: int,
    regions: Path | None,
    k1: int | None,
    save_embeddings: Path | None,
    *,
    as_json: bool,
) -> None:
    """Recall of RUN's best epoch in torch, float32, from pixels: the reference that everything exported is compared with."""
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.runtime.subject import subject
    from dualmatch.training.about import about_run
    from dualmatch.training.evaluation import evaluate_run

    from .common import region_file, splits

    dataset = open_dataset(data).select(splits(split))
    with progress_reports() as progress:
        recall = evaluate_run(
            run,
            dataset,
            batch_size=batch_size,
            regions=region_file(regions, dataset),
            rerank_k1=k1,
            save_embeddings=save_embeddings,
            progress=progress,
        )
    if as_json:
        print_json({**recall.to_json(), **subject(dataset, [about_run(run)])})
    else:
        click.echo(recall_lines(recall))
