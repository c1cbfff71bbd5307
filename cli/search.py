"""`dualmatch runtime search`."""

import time
from pathlib import Path
from typing import Any

import click

from .common import backend_options, existing, json_option, print_json, printable, regions_option


@click.command("search")
@click.argument("gallery", type=existing)
@click.option("--text", "texts", multiple=True, help="Find what fits this text; may be given several times.")
@click.option("--image", "images", type=existing, multiple=True, help="Find what fits this photograph; likewise.")
@click.option("--queries", type=existing, help="A file of queries: .txt, a text a line; .jsonl, `text` and/or `image`.")
@click.option("--combine", is_flag=True, help="Average all --text and --image into one query.")
@click.option("-k", "--top", "k", type=click.IntRange(1), default=10, show_default=True, help="How many answers.")
@click.option(
    "--filter", "filters", multiple=True, metavar="FIELD=VALUE", help="Only items with this; also != ~ < <= > >=."
)
@click.option("--metadata", type=existing, metavar="JSONL", help="More fields for --filter: objects with an `id`.")
@click.option(
    "--ann", is_flag=True, help="Search through the index that `dualmatch gallery index` built: faster, not exact."
)
@click.option("--bundle", type=existing, help="The bundle that encoded the gallery, if it has moved.")
@click.option("--sheet", type=existing, metavar="FILE", help="Draw the answers into an .html page or a .png picture.")
@click.option(
    "--explain",
    is_flag=True,
    help="On the sheet, beside each photograph: where the network looks, for itself and for the query.",
)
@backend_options
@regions_option
@json_option
def command(
    gallery: Path,
    texts: tuple[str, ...],
    images: tuple[Path, ...],
    queries: Path | None,
    k: int,
    filters: tuple[str, ...],
    metadata: Path | None,
    bundle: Path | None,
    sheet: Path | None,
    backend: str,
    threads: int,
    regions: Path | None,
    *,
    combine: bool,
    ann: bool,
    explain: bool,
    as_json: bool,
) -> None:
    """Search GALLERY by texts or photographs.

    Several queries pass over the gallery together. With --json, one --text or --image prints its list of hits, anything else a
    list of queries with their hits.
    """
    if not texts and not images and queries is None:
        raise click.UsageError("give a query: --text, --image or --queries.")
    if combine and (queries is not None or len(texts) + len(images) < 2):
        raise click.UsageError("--combine averages at least two of --text and --image.")
    if metadata is not None and not filters:
        raise click.UsageError("--metadata is for --filter: give a condition.")
    if explain and sheet is None:
        raise click.UsageError("--explain draws on the sheet: say where, --sheet FILE.html or FILE.png.")
    from dualmatch.runtime.galleries.ann import AnnIndex, describe
    from dualmatch.runtime.galleries.filters import select
    from dualmatch.runtime.galleries.gallery import Gallery
    from dualmatch.runtime.search import Query, bundle_of, read_queries, search_all

    from .common import region_file

    opened = Gallery.open(gallery)
    if combine:
        asked = [Query(texts=texts, images=images)]
    else:
        asked = [Query(texts=(text,)) for text in texts] + [Query(images=(image,)) for image in images]
        asked += read_queries(queries) if queries is not None else []
    found_bundle = bundle_of(opened, bundle)
    index = AnnIndex.open(opened) if ann else None
    among = select(opened, filters, metadata) if filters else None
    started = time.perf_counter()
    answers = search_all(
        opened,
        found_bundle,
        asked,
        k=k,
        among=among,
        ann=index,
        backend=backend,
        threads=threads,
        regions=region_file(regions),
    )
    searched = len(opened) if among is None else int(among.sum())
    how = f"exactly ({opened.engine_for(len(asked), searched)})" if index is None else f"by {describe(index.record)}"
    if sheet is not None:
        from dualmatch.runtime.explain import NOTE, explained
        from dualmatch.runtime.sheet import Search, search_sheet

        found = answers
        if explain:
            found = explained(
                found_bundle, asked, answers, backend=backend, threads=threads, regions=region_file(regions)
            )
        shown = [
            Search(query=query.images[0] if len(query.images) == 1 and not query.texts else str(query), hits=hits)
            for query, hits in zip(asked, found, strict=True)
        ]
        note = f"{len(opened)} items in {gallery}"
        search_sheet(shown, sheet, note=f"{note}. {NOTE}" if explain else note)
    if as_json:
        single = len(asked) == 1 and len(texts) + len(images) == 1
        values = [
            {"query": {"texts": list(query.texts), "images": list(map(str, query.images))}, "hits": _json(hits)}
            for query, hits in zip(asked, answers, strict=True)
        ]
        print_json(values[0]["hits"] if single else values)
        return
    for query, hits in zip(asked, answers, strict=True):
        if len(asked) > 1:
            click.echo(printable(str(query)))
        for rank, hit in enumerate(hits, 1):
            line = f"{rank:3d}  {hit.score:.4f}  {hit.id}" + (f"  {hit.caption}" if hit.caption else "")
            click.echo(printable(line))
    seconds = time.perf_counter() - started
    click.echo(f"{searched} items searched {how} in {seconds:.2f} s, queries encoded included", err=True)
    if sheet is not None:
        click.echo(f"sheet: {printable(str(sheet))}")


def _json(hits: Any) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "score": hit.score, "id": hit.id, "caption": hit.caption, "image": hit.image_id}
        for rank, hit in enumerate(hits, 1)
    ]
