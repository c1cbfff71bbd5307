"""`dualmatch runtime encode-gallery`."""

from pathlib import Path
from typing import Literal

import click

from .common import backend_options, batch_size_option, existing, json_option, progress_reports, regions_option
from .encoding import encoding_options, local_folder, report_gallery, stoppable


@click.command("encode-gallery")
@click.argument("bundle", type=existing)
@click.argument("photos")
@backend_options
@batch_size_option
@encoding_options
@regions_option
@click.option("--column", help="Of parquet and arrow files, where more than one can hold photographs.")
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=200_000_000,
    show_default=True,
    help="Photographs with more are quarantined before they are decoded.",
)
@click.option(
    "--engine",
    type=click.Choice(["process", "ray"]),
    default="process",
    show_default=True,
    help="This process alone, or actors of a Ray cluster; both give the same gallery.",
)
@click.option(
    "--actors", type=click.IntRange(1), help="Of --engine ray: how many encode at once.  [default: all that fit]"
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Of --engine ray: a running cluster (`auto`, `host:6379`).  [default: one is started on this machine]",
)
@json_option
def command(
    bundle: Path,
    photos: str,
    out: Path | str,
    backend: str,
    threads: int,
    batch_size: int,
    dtype: Literal["float16", "float32"],
    rows: tuple[int, int | None] | None,
    rows_per_shard: int | None,
    prepare_threads: int | None,
    regions: Path | None,
    column: str | None,
    max_pixels: int,
    engine: str,
    actors: int | None,
    ray_address: str | None,
    on_error: Literal["quarantine", "fail"],
    *,
    resume: bool,
    as_json: bool,
) -> None:
    """Encode PHOTOS with BUNDLE into a gallery.

    PHOTOS is a folder, a list (.txt, or - for standard input), .tar or .tar.gz archives, or .parquet or .arrow files; several of these
    by a pattern in quotes: 'shards/{000..099}.tar', 'data/*.parquet'. Lists, archives and (with --engine ray) --out may be URLs: s3://….
    """
    from functools import partial

    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.encode import encode_gallery

    from .common import region_file

    if engine == "ray" and rows is not None:
        raise click.UsageError("--engine ray splits the rows itself; --rows is for splitting by hand.")
    if engine != "ray" and (actors is not None or ray_address is not None):
        raise click.UsageError("--actors and --ray-address belong to --engine ray.")
    with progress_reports() as progress, stoppable(out) as check:

        def report(done: int, total: int) -> None:
            progress("encoding photographs", done, total)
            check()

        if engine == "ray":
            from dualmatch.runtime.ray_engine import encode_gallery_on_ray

            encode = partial(encode_gallery_on_ray, out=out, regions=regions, actors=actors, address=ray_address)
        else:
            encode = partial(encode_gallery, out=local_folder(out), regions=region_file(regions), rows=rows)
        summary, provider = encode(
            load_bundle(bundle),
            photos,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            dtype=dtype,
            column=column,
            max_pixels=max_pixels,
            rows_per_shard=rows_per_shard,
            prepare_threads=prepare_threads,
            resume=resume,
            on_error=on_error,
            progress=report,
        )
    report_gallery(out, summary, provider, as_json=as_json)
