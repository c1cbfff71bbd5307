"""`dualmatch runtime encode-gallery`."""

from pathlib import Path
from typing import Literal

import click

from .common import (
    backend_options,
    batch_size_option,
    existing,
    json_option,
    print_json,
    progress_reports,
    regions_option,
)


@click.command("encode-gallery")
@click.argument("bundle", type=existing)
@click.argument("photos", type=existing)
@click.option("--out", required=True, type=existing, help="The gallery's folder.")
@backend_options
@batch_size_option
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the stored vectors.",
)
@regions_option
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option(
    "--on-error",
    type=click.Choice(["quarantine", "fail"]),
    default="quarantine",
    show_default=True,
    help="What an unreadable photograph does.",
)
@json_option
def command(
    bundle: Path,
    photos: Path,
    out: Path,
    backend: str,
    threads: int,
    batch_size: int,
    dtype: Literal["float16", "float32"],
    regions: Path | None,
    on_error: Literal["quarantine", "fail"],
    *,
    resume: bool,
    as_json: bool,
) -> None:
    """Encode PHOTOS (a folder, or a .txt list) with BUNDLE into a gallery."""
    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.encode import encode_gallery

    from .common import region_file

    with progress_reports() as progress:
        summary, provider = encode_gallery(
            load_bundle(bundle),
            photos,
            out,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            dtype=dtype,
            regions=region_file(regions),
            resume=resume,
            on_error=on_error,
            progress=lambda done, total: progress("encoding photographs", done, total),
        )
    report_gallery(out, summary, provider, as_json=as_json)


def report_gallery(out: Path, summary: object, provider: str, *, as_json: bool) -> None:
    """Print what was encoded, and the first photographs that could not be."""
    from dualmatch.runtime.galleries.gallery import Gallery
    from dualmatch.runtime.galleries.writer import Summary

    assert isinstance(summary, Summary)
    gallery = Gallery.open(out)
    quarantine = gallery.quarantine
    if as_json:
        print_json(
            {
                "gallery": str(out),
                "rows": summary.rows,
                "count": summary.count,
                "quarantined": [{"id": one.id, "reason": one.reason} for one in quarantine],
                "provider": provider,
            }
        )
        return
    for one in quarantine[:10]:
        click.echo(f"quarantined: {one.id}: {one.reason}")
    if len(quarantine) > 10:
        click.echo(f"… and {len(quarantine) - 10} more in {out / 'quarantine.jsonl'}")
    click.echo(
        f"{out}: {summary.count} of {summary.rows} encoded on {provider}, {summary.quarantined} quarantined, dimension {gallery.dimension}"
    )
