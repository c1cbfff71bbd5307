"""Search results to look at: one self-contained HTML page, or one PNG contact sheet."""

import base64
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from math import ceil
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .errors import DualmatchError
from .files import write_atomically

HTML_THUMBNAIL = 320  # pixels, the longer side; sharp on dense screens at the size shown
PNG_TILE, PNG_QUERY, PNG_GAP, PNG_COLUMNS = 200, 140, 16, 5  # pixels, pixels, pixels, hits side by side
GROUND, INK, SOFT, RIGHT = "#fafaf8", "#1c1c1a", "#6a6a64", "#1a7f4b"

STYLE = """
:root { color-scheme: light dark; --ground: #fafaf8; --card: #fff; --ink: #1c1c1a; --soft: #6a6a64; --line: #deded8; --right: #1a7f4b; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161614; --card: #21211f; --ink: #ececE6; --soft: #a0a098; --line: #3a3a36; --right: #5cc98f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 84rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
p.note { margin: 0; color: var(--soft); }
section { margin-top: 2.25rem; }
h2 { display: flex; gap: .75rem; align-items: center; font-size: 1.15rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 img { height: 6rem; max-width: 45%; object-fit: contain; border-radius: .4rem; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 11.5rem), 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
li.right { border-color: var(--right); box-shadow: 0 0 0 1px var(--right); }
li > img, li > .missing { display: block; width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: var(--ground); }
li > .missing { padding: 1rem; color: var(--soft); font-size: .85rem; overflow: auto; }
li > p { margin: 0; padding: .5rem .7rem 0; }
li > div.facts { display: flex; gap: .6rem; padding: .45rem .7rem .55rem; font-size: .8rem; color: var(--soft); }
.facts b { color: var(--ink); font-variant-numeric: tabular-nums; }
.facts .id { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.facts .mark { color: var(--right); font-weight: 600; white-space: nowrap; }
"""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer.

    Attributes:
        score: what the search ranked by.
        id: the item's id.
        image: its photograph, if it has one.
        caption: its text, if it has one.
        image_id: for a caption, the id of the image it describes, where that is known.
        right: whether it is marked as a right answer.
    """

    score: float
    id: str
    image: Path | None = None
    caption: str | None = None
    image_id: str | None = None
    right: bool = False


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


def _thumbnail(path: Path, side: int) -> Image.Image | str:
    """The photograph upright, in RGB on white, its longer side `side` pixels; or why there is none."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))  # JPEG decodes straight to a smaller size
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.new("RGBA", layer.size, "white")
                upright.alpha_composite(layer)
            return ImageOps.contain(upright.convert("RGB"), (side, side))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the file is damaged"
        return f"{path.name} cannot be shown: {reason}"


def _html(searches: Sequence[Search], title: str, note: str) -> str:
    sections = "\n".join(
        f"<section>\n<h2>{_html_query(search.query)}</h2>\n<ol>\n"
        + "\n".join(_html_hit(rank, hit) for rank, hit in enumerate(search.hits, start=1))
        + "\n</ol>\n</section>"
        for search in searches
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_shown(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_shown(title)}</h1>\n"
        + (f'<p class="note">{_shown(note)}</p>\n' if note else "")
        + f"{sections}\n</body>\n</html>\n"
    )


def _html_query(query: str | Path) -> str:
    if isinstance(query, str):
        return f"“{_shown(query)}”"
    return _html_image(query, f"query: {query.name}") + f"<span>{_shown(query.name)}</span>"


def _html_hit(rank: int, hit: Hit) -> str:
    image = "" if hit.image is None else _html_image(hit.image, hit.caption or f"hit {rank}: {hit.id}")
    caption = "" if hit.caption is None else f"<p>{_shown(hit.caption)}</p>"
    mark = '<span class="mark">✓ right</span>' if hit.right else ""
    return (
        f'<li{" class=right" if hit.right else ""}>{image}{caption}<div class="facts"><span>{rank}</span>'
        f'<span class="id" title="{_shown(hit.id)}">{_shown(hit.id)}</span>{mark}<b>{hit.score:.3f}</b></div></li>'
    )


def _html_image(path: Path, alternative: str) -> str:
    image = _thumbnail(path, HTML_THUMBNAIL)
    if isinstance(image, str):
        return f'<div class="missing">{_shown(image)}</div>'
    jpeg = BytesIO()
    image.save(jpeg, "JPEG", quality=85, comment=b"")
    source = base64.b64encode(jpeg.getvalue()).decode()
    return f'<img alt="{_shown(alternative)}" src="data:image/jpeg;base64,{source}">'


def _shown(text: str) -> str:
    # A file name that is not UTF-8 cannot be written into a page as it is; control characters have no place in HTML at all.
    return escape("".join(c if c >= " " or c in "\t\n" else "\ufffd" for c in text.encode(errors="replace").decode()))


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
    cell = PNG_TILE + 40 + PNG_GAP
    strip = Image.new("RGB", (width, head + -(-len(search.hits) // columns) * cell + PNG_GAP), GROUND)
    draw = ImageDraw.Draw(strip)
    _draw_line(draw, (PNG_GAP, 2), text, 18, width=width - 2 * PNG_GAP)
    if isinstance(search.query, Path):
        _draw_picture(strip, (PNG_GAP, 34), PNG_QUERY, _thumbnail(search.query, PNG_QUERY))
    for index, hit in enumerate(search.hits):
        x, y = PNG_GAP + index % columns * (PNG_TILE + PNG_GAP), head + index // columns * cell
        _draw_picture(
            strip, (x, y), PNG_TILE, (hit.caption or "") if hit.image is None else _thumbnail(hit.image, PNG_TILE)
        )
        score = f"{index + 1}.  {hit.score:.3f}" + ("  right" if hit.right else "")
        _draw_line(draw, (x, y + PNG_TILE + 4), score, 14, width=PNG_TILE, colour=RIGHT if hit.right else INK)
        below = hit.id if hit.caption is None or hit.image is None else hit.caption
        _draw_line(draw, (x, y + PNG_TILE + 21), below, 13, width=PNG_TILE, colour=SOFT)
        if hit.right:
            draw.rectangle((x - 3, y - 3, x + PNG_TILE + 2, y + PNG_TILE + 2), outline=RIGHT, width=3)
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
