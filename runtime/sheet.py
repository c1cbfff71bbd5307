"""Search results to look at: one self-contained HTML page, or one PNG contact sheet."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .errors import DualmatchError
from .files import write_atomically
from .page import Markup, image_tag, page, shown, thumbnail

HTML_THUMBNAIL = 320  # pixels, the longer side; sharp on dense screens at the size shown
PNG_TILE, PNG_QUERY, PNG_GAP, PNG_COLUMNS = 200, 140, 16, 5  # pixels, pixels, pixels, hits side by side
PNG_LOOK = 98  # pixels: two of a hit's further pictures are as wide as its tile
GROUND, INK, SOFT, RIGHT = "#fafaf8", "#1c1c1a", "#6a6a64", "#1a7f4b"


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer.

    Attributes:
        score: what the search ranked by.
        id: the item's id.
        image: its photograph, if it has one: a file, or a file's bytes.
        caption: its text, if it has one.
        image_id: for a caption, the id of the image it describes, where that is known.
        right: whether it is marked as a right answer.
        rank: its place, where it is not the one that it is shown at.
        alt: what the photograph shows, for those who do not see it; the caption by default.
        pictures: more pictures of it, each with a few words on what it shows.
    """

    score: float
    id: str
    image: Path | bytes | None = None
    caption: str | None = None
    image_id: str | None = None
    right: bool = False
    rank: int | None = None
    alt: str = ""
    pictures: Sequence[tuple[str, Image.Image]] = ()


@dataclass(frozen=True, kw_only=True)
class Search:
    """A query (text, or the path of a photograph) and its answers, best first."""

    query: str | Path
    hits: Sequence[Hit]


def search_sheet(searches: Sequence[Search], out: Path, *, title: str = "Search", note: str = "") -> None:
    """Draw searches, one below the other, into `out`: a page (`.html`) that needs no other file, or a picture (`.png`).

    A photograph that cannot be read is named in its place.

    Args:
        searches: at least one.
        out: written atomically; an older sheet is replaced.
        title: of the sheet.
        note: a line below the title (which gallery, which bundle).

    Raises:
        DualmatchError: no searches, another suffix, or `out` cannot be written.
    """
    if not searches:
        raise DualmatchError("a sheet needs at least one search.")
    if out.suffix.lower() not in (".html", ".png"):
        raise DualmatchError(f"a sheet is .html or .png, not {out.name}.")
    data = _html(searches, title, note).encode() if out.suffix.lower() == ".html" else _png(searches, title, note)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data)
    except OSError as error:
        raise DualmatchError(f"sheet {out} cannot be written: {error.strerror}.") from None


def _html(searches: Sequence[Search], title: str, note: str) -> str:
    parts = [f"<h1>{shown(title)}</h1>"]
    if note:
        parts.append(f'<p class="soft">{shown(note)}</p>')
    parts += [
        f'<section>\n<h2 class="query">{_html_query(search.query)}</h2>\n{hit_list(search.hits)}\n</section>'
        for search in searches
    ]
    return page(title, "\n".join(parts))


def _html_query(query: str | Path) -> str:
    if isinstance(query, str):
        return f"“{shown(query)}”"
    picture = image_tag(thumbnail(query, HTML_THUMBNAIL), f"query: {query.name}")
    return f"{picture}<span>{shown(query.name)}</span>"


def hit_list(hits: Sequence[Hit], *, side: int = HTML_THUMBNAIL) -> Markup:
    """Hits as a list for a page, best first, the right ones marked; thumbnails of `side` pixels."""
    kind = "hits explained" if any(hit.pictures for hit in hits) else "hits"
    return Markup(
        f'<ol class="{kind}">\n' + "\n".join(_html_hit(*pair, side) for pair in enumerate(hits, start=1)) + "\n</ol>"
    )


def _html_hit(rank: int, hit: Hit, side: int) -> str:
    image = ""
    if hit.image is not None:
        name = hit.id if isinstance(hit.image, bytes) else ""
        image = image_tag(thumbnail(hit.image, side, name=name), hit.alt or hit.caption or f"hit {rank}: {hit.id}")
    caption = "" if hit.caption is None else f"<p>{shown(hit.caption)}</p>"
    mark = '<span class="mark">✓ right</span>' if hit.right else ""
    return (
        f'<li{" class=right" if hit.right else ""}>{image}{_html_pictures(hit)}{caption}<div class="facts"><span>{hit.rank or rank}</span>'
        f'<span class="id" title="{shown(hit.id)}">{shown(hit.id)}</span>{mark}<b>{hit.score:.3f}</b></div></li>'
    )


def _html_pictures(hit: Hit) -> str:
    if not hit.pictures:
        return ""
    figures = (
        f"<figure>{image_tag(picture, f'{hit.id}: {label}')}<figcaption>{shown(label)}</figcaption></figure>"
        for label, picture in hit.pictures
    )
    return f'<div class="pictures">{"".join(figures)}</div>'


def _png(searches: Sequence[Search], title: str, note: str) -> bytes:
    columns = max(3, min(PNG_COLUMNS, max(len(search.hits) for search in searches)))
    width = PNG_GAP + columns * (PNG_TILE + PNG_GAP)
    head = Image.new("RGB", (width, 84 if note else 60), GROUND)
    draw = ImageDraw.Draw(head)
    _draw_line(draw, (PNG_GAP, PNG_GAP), title, 24, width=width - 2 * PNG_GAP)
    _draw_line(draw, (PNG_GAP, 50), note, 14, width=width - 2 * PNG_GAP, colour=SOFT)
    strips = [head, *(_png_strip(search, columns, width) for search in searches)]
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), GROUND)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    png = BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def _png_strip(search: Search, columns: int, width: int) -> Image.Image:
    """One query and the grid of its hits."""
    text = f"“{search.query}”" if isinstance(search.query, str) else search.query.name
    head = 34 if isinstance(search.query, str) else 34 + PNG_QUERY + PNG_GAP
    looks = -(-max((len(hit.pictures) for hit in search.hits), default=0) // 2)  # rows of two
    cell = PNG_TILE + looks * (PNG_LOOK + 20) + 40 + PNG_GAP
    strip = Image.new("RGB", (width, head + -(-len(search.hits) // columns) * cell + PNG_GAP), GROUND)
    draw = ImageDraw.Draw(strip)
    _draw_line(draw, (PNG_GAP, 2), text, 18, width=width - 2 * PNG_GAP)
    if isinstance(search.query, Path):
        _draw_picture(strip, (PNG_GAP, 34), PNG_QUERY, thumbnail(search.query, PNG_QUERY))
    for index, hit in enumerate(search.hits):
        x, y = PNG_GAP + index % columns * (PNG_TILE + PNG_GAP), head + index // columns * cell
        _draw_picture(
            strip, (x, y), PNG_TILE, (hit.caption or "") if hit.image is None else thumbnail(hit.image, PNG_TILE)
        )
        for number, (label, picture) in enumerate(hit.pictures):
            corner = x + number % 2 * (PNG_LOOK + 4), y + PNG_TILE + 4 + number // 2 * (PNG_LOOK + 20)
            _draw_picture(strip, corner, PNG_LOOK, ImageOps.contain(picture, (PNG_LOOK, PNG_LOOK)))
            _draw_line(draw, (corner[0], corner[1] + PNG_LOOK), label, 11, width=PNG_LOOK, colour=SOFT)
        y += looks * (PNG_LOOK + 20)
        score = f"{index + 1}.  {hit.score:.3f}" + ("  right" if hit.right else "")
        _draw_line(draw, (x, y + PNG_TILE + 4), score, 14, width=PNG_TILE, colour=RIGHT if hit.right else INK)
        below = hit.id if hit.caption is None or hit.image is None else hit.caption
        _draw_line(draw, (x, y + PNG_TILE + 21), below, 13, width=PNG_TILE, colour=SOFT)
        if hit.right:
            top = y - looks * (PNG_LOOK + 20)
            draw.rectangle((x - 3, top - 3, x + PNG_TILE + 2, top + PNG_TILE + 2), outline=RIGHT, width=3)
    return strip


def _draw_picture(strip: Image.Image, corner: tuple[int, int], side: int, picture: Image.Image | str) -> None:
    """A thumbnail in the middle of its square, or the words that stand in its place."""
    x, y = corner
    draw = ImageDraw.Draw(strip)
    draw.rectangle((x, y, x + side - 1, y + side - 1), fill="white")
    if isinstance(picture, Image.Image):
        strip.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
        return
    for number, line in enumerate(wrap(picture, side // 8)[: side // 20]):
        _draw_line(draw, (x + 8, y + 8 + 19 * number), line, 14, width=side - 16)


def _draw_line(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, *, width: int, colour: str = INK
) -> None:
    """One line of text, its end cut off where it does not fit into `width` pixels."""
    font = ImageFont.load_default(size)
    text = text.encode(errors="replace").decode().replace("\n", " ")
    if draw.textlength(text, font) > width:
        fits = bisect(range(len(text)), width, key=lambda length: ceil(draw.textlength(text[:length] + "…", font)))
        text = text[: fits - 1] + "…"
    draw.text(corner, text, colour, font)
