"""`dualmatch runtime encode-captions`."""

from pathlib import Path
from typing import Literal

import click

from .common import backend_options, existing, json_option, progress_reports


@click.command("encode-captions")
@click.argument("bundle", type=existing)
@click.argument("captions", type=existing)
@click.option("--out", required=True, type=existing, help="The gallery's folder.")
@backend_options
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the stored vectors.",
)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option(
    "--on-error",
    type=click.Choice(["quarantine", "fail"]),
    default="quarantine",
    show_default=True,
    help="What an unusable caption does.",
)
@json_option
def command(
    bundle: Path,
    captions: Path,
    out: Path,
    backend: str,
    threads: int,
    batch_size: int,
    dtype: Literal["float16", "float32"],
    on_error: Literal["quarantine", "fail"],
    *,
    resume: bool,
    as_json: bool,
) -> None:
    """Encode CAPTIONS (.txt with one a line, .jsonl, or captions.json) with BUNDLE into a gallery."""
    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.encode import encode_caption_gallery

    from .encode_gallery import report_gallery

    with progress_reports() as progress:
        summary, provider = encode_caption_gallery(
            load_bundle(bundle),
            captions,
            out,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            dtype=dtype,
            resume=resume,
            on_error=on_error,
            progress=lambda done, total: progress("encoding captions", done, total),
        )
    report_gallery(out, summary, provider, as_json=as_json)
