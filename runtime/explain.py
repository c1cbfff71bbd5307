"""Search results with pictures of what the network looks at: in each photograph found, for itself and for the query."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image, ImageOps

from .attention import AttentionMaps, attention_maps, overlay
from .bundle import Bundle
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .nodes import NodeKind
from .preprocess import open_rgb
from .regions import RegionFile
from .search import Query, embed
from .sheet import HTML_THUMBNAIL, Hit

PLACES: dict[NodeKind, str] = {"regional": "regions", "global": "grid"}
OWN, TOWARDS_QUERY, TOWARDS_CAPTION = "looks at", "fits query", "fits caption"
NOTE = f"“{OWN}”: places by agreement with the photograph's own embedding; “{TOWARDS_QUERY}”: with the query's. Brighter ranks higher."

Looked = tuple[Image.Image, AttentionMaps]


def explained(
    bundle: Bundle,
    queries: Sequence[Query],
    answers: Sequence[Sequence[Hit]],
    *,
    backend: str = "onnxruntime",
    threads: int = 0,
    regions: RegionFile | None = None,
) -> list[list[Hit]]:
    """The hits with pictures of what the network looks at.

    A photograph that was found is drawn for its own embedding, and for the query's. Where captions were found for a photograph, it is
    the photograph that is drawn, for each caption. Photographs that cannot be read have no pictures.

    Args:
        queries, answers: as `search.search_all` takes and gives them.

    Raises:
        DualmatchError: the bundle was exported without attention, or there is no photograph to draw on.
    """
    photographs: dict[Path, str] = {}  # with what the region file knows it by
    for query, hits in zip(queries, answers, strict=True):
        if (asked := _photograph(query)) is not None:
            photographs.setdefault(asked, asked.name)
        photographs |= {hit.image: hit.id for hit in hits if isinstance(hit.image, Path)}
    captions = list(dict.fromkeys(hit.caption for hits in answers for hit in hits if hit.image is None and hit.caption))
    with ImageEncoder(bundle, backend=backend, threads=threads, regions=regions, attention=True) as images:
        looked = dict(chain.from_iterable(_looked(images, *one) for one in photographs.items()))
    drawn_captions: list[str] = captions if any(_photograph(query) in looked for query in queries) else []
    vectors: dict[str, NDArray[Any]] = {}
    if drawn_captions:
        with TextEncoder(bundle, backend=backend, threads=threads) as texts:
            vectors = dict(zip(drawn_captions, texts.encode(drawn_captions), strict=True))
    if not looked:
        raise DualmatchError(
            "there is no photograph to draw attention on: neither a query nor an answer is one that can be read."
        )
    asked_for = embed(bundle, queries, backend=backend, threads=threads, regions=regions)
    return [
        [replace(hit, pictures=_pictures(hit, looked, _photograph(query), vector, vectors)) for hit in hits]
        for query, vector, hits in zip(queries, asked_for, answers, strict=True)
    ]


def _photograph(query: Query) -> Path | None:
    """The photograph that a query is, if it is one and no more."""
    return query.images[0] if len(query.images) == 1 and not query.texts else None


def _looked(encoder: ImageEncoder, path: Path, image_id: str) -> list[tuple[Path, Looked]]:
    try:
        photograph = open_rgb(path)
    except DualmatchError:
        return []  # the sheet says so in its place
    (found,) = attention_maps(encoder, [photograph], [image_id])
    return [(path, (ImageOps.contain(photograph, (HTML_THUMBNAIL, HTML_THUMBNAIL)), found))]


def _pictures(
    hit: Hit,
    looked: dict[Path, Looked],
    asked: Path | None,
    query: NDArray[Any],
    captions: dict[str, NDArray[Any]],
) -> list[tuple[str, Image.Image]]:
    if isinstance(hit.image, Path):
        if hit.image not in looked:
            return []
        return [*_drawn(looked[hit.image], OWN, None), *_drawn(looked[hit.image], TOWARDS_QUERY, query)]
    if asked in looked and hit.caption in captions:
        return _drawn(looked[asked], TOWARDS_CAPTION, captions[hit.caption])
    return []


def _drawn(looked: Looked, what: str, vector: NDArray[Any] | None) -> list[tuple[str, Image.Image]]:
    photograph, found = looked
    return [
        (f"{what}: {PLACES[kind]}", overlay(photograph, found.heat(kind, vector=vector, size=photograph.size)))
        for kind in PLACES
        if kind in found.kinds
    ]
