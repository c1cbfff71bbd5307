"""`dualmatch runtime search`."""

from pathlib import Path

import click

from .common import backend_options, existing, json_option, print_json, regions_option


@click.command("search")
@click.argument("gallery", type=existing)
@click.option("--text", help="Find what fits this text.")
@click.option("--image", type=existing, help="Find what fits this photograph.")
@click.option("-k", "--top", "k", type=click.IntRange(1), default=10, show_default=True, help="How many answers.")
@click.option("--bundle", type=existing, help="The bundle that encoded the gallery, if it has moved.")
@click.option("--sheet", type=existing, metavar="FILE", help="Draw the answers into an .html page or a .png picture.")
@backend_options
@regions_option
@json_option
def command(
    gallery: Path,
    text: str | None,
    image: Path | None,
    k: int,
    bundle: Path | None,
    sheet: Path | None,
    backend: str,
    threads: int,
    regions: Path | None,
    *,
    as_json: bool,
) -> None:
    """Search GALLERY by text or by photograph."""
    if (text is None) == (image is None):
        raise click.UsageError("give one query: --text or --image.")
    from dualmatch.runtime.galleries.gallery import Gallery
    from dualmatch.runtime.search import bundle_of, search

    from .common import region_file

    opened = Gallery.open(gallery)
    hits = search(
        opened,
        bundle_of(opened, bundle),
        text=text,
        image=image,
        k=k,
        backend=backend,
        threads=threads,
        regions=region_file(regions),
    )
    if sheet is not None:
        from dualmatch.runtime.sheet import Search, search_sheet

        query = text if text is not None else image
        assert query is not None
        search_sheet([Search(query=query, hits=hits)], sheet, note=f"{len(opened)} items in {gallery}")
    if as_json:
        print_json(
            [
                {"rank": rank, "score": hit.score, "id": hit.id, "caption": hit.caption}
                for rank, hit in enumerate(hits, 1)
            ]
        )
        return
    for rank, hit in enumerate(hits, 1):
        click.echo(f"{rank:3d}  {hit.score:.4f}  {hit.id}" + (f"  {hit.caption}" if hit.caption else ""))
    if sheet is not None:
        click.echo(f"sheet: {sheet}")
