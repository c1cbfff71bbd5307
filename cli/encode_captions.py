"""`dualmatch runtime encode-captions`."""

from pathlib import Path
from typing import Literal

import click

from .common import backend_options, existing, json_option, progress_reports
from .encoding import encoding_options, local_folder, report_gallery, stoppable


@click.command("encode-captions")
@click.argument("bundle", type=existing)
@click.argument("captions", type=existing)
@backend_options
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@encoding_options
@json_option
def command(
    bundle: Path,
    captions: Path,
    out: Path | str,
    backend: str,
    threads: int,
    batch_size: int,
    dtype: Literal["float16", "float32"],
    rows: tuple[int, int | None] | None,
    rows_per_shard: int | None,
    prepare_threads: int | None,
    on_error: Literal["quarantine", "fail"],
    *,
    resume: bool,
    as_json: bool,
) -> None:
    """Encode CAPTIONS (.txt with one a line, .jsonl, or captions.json) with BUNDLE into a gallery."""
    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.encode import encode_caption_gallery

    with progress_reports() as progress, stoppable(out) as check:

        def report(done: int, total: int) -> None:
            progress("encoding captions", done, total)
            check()

        summary, provider = encode_caption_gallery(
            load_bundle(bundle),
            captions,
            local_folder(out),
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            dtype=dtype,
            rows=rows,
            rows_per_shard=rows_per_shard,
            prepare_threads=prepare_threads,
            resume=resume,
            on_error=on_error,
            progress=report,
        )
    report_gallery(out, summary, provider, as_json=as_json)
