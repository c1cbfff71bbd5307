"""`dualmatch runtime encode-gallery`."""

from pathlib import Path
from typing import Literal

import click

from .common import backend_options, batch_size_option, existing, json_option, progress_reports, regions_option
from .encoding import encoding_options, report_gallery, stoppable


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
@json_option
def command(
    bundle: Path,
    photos: str,
    out: Path,
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
    on_error: Literal["quarantine", "fail"],
    *,
    resume: bool,
    as_json: bool,
) -> None:
    """Encode PHOTOS with BUNDLE into a gallery.

    PHOTOS is a folder, a list (.txt, or - for standard input), .tar archives, or .parquet or .arrow files; several of these
    by a pattern in quotes: 'shards/{000..099}.tar', 'data/*.parquet'.
    """
    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.encode import encode_gallery

    from .common import region_file

    with progress_reports() as progress, stoppable(out) as check:

        def report(done: int, total: int) -> None:
            progress("encoding photographs", done, total)
            check()

        summary, provider = encode_gallery(
            load_bundle(bundle),
            photos,
            out,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            dtype=dtype,
            regions=region_file(regions),
            column=column,
            max_pixels=max_pixels,
            rows=rows,
            rows_per_shard=rows_per_shard,
            prepare_threads=prepare_threads,
            resume=resume,
            on_error=on_error,
            progress=report,
        )
    report_gallery(out, summary, provider, as_json=as_json)
