"""Pages that need no other file: one frame, one stylesheet, escaped text, tables, and photographs as thumbnails inside the page."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

COLOURS = """
:root { color-scheme: light dark; --ground: #fafaf8; --card: #fff; --ink: #1c1c1a; --soft: #62625c; --line: #deded8;
  --good: #1a7f4b; --bad: #b3261e; --tone1: #0b62c4; --tone2: #b3541e; --tone3: #1a7f4b; --tone4: #8a3ab9; --tone5: #a3195b; --tone6: #62625c; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161614; --card: #21211f; --ink: #ececE6; --soft: #a0a098; --line: #3a3a36;
    --good: #5cc98f; --bad: #f2857c; --tone1: #7db7ff; --tone2: #f2a36b; --tone3: #5cc98f; --tone4: #cf9bf0; --tone5: #f58ab8; --tone6: #a0a098; }
}
"""
STYLE = (
    COLOURS
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 80rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .25rem 0; } a { color: var(--tone1); } code { font-size: .9em; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict { border-left: .3rem solid; padding: .4rem .8rem; background: var(--card); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { overflow-wrap: normal; } /* a table that is too wide scrolls */
th { font-weight: 600; color: var(--soft); } th.number, td.number { text-align: right; } th, td.short { white-space: nowrap; } td:not(.short) { min-width: 16rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; margin: .8rem 0; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .8rem; color: var(--soft); }
figure > img { display: block; max-width: 100%; height: auto; border-radius: .3rem; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: .6rem; }
.row > figure { flex: 1 1 9rem; max-width: 15rem; }
h2.query { display: flex; gap: .75rem; align-items: center; }
h2.query img { height: 6rem; width: auto; max-width: 45%; object-fit: contain; border-radius: .4rem; }
.hits { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11.5rem), 1fr)); }
.hits > li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
.hits > li.right { border-color: var(--good); box-shadow: 0 0 0 1px var(--good); }
.hits img, .hits .missing { display: block; width: 100%; height: auto; aspect-ratio: 4 / 3; object-fit: contain; background: var(--ground); }
.missing { padding: 1rem; color: var(--soft); font-size: .85rem; overflow: auto; }
.hits.explained { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem .2rem; margin-top: .2rem; }
.pictures figcaption { padding: 0 .4rem; }
.hits p { margin: 0; padding: .5rem .7rem 0; }
.facts { display: flex; gap: .6rem; padding: .45rem .7rem .55rem; font-size: .8rem; color: var(--soft); }
.facts b { color: var(--ink); font-variant-numeric: tabular-nums; }
.facts .id { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.facts .mark { color: var(--good); font-weight: 600; white-space: nowrap; }
"""
)

_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r"[-+<>]?\d.*")


class Markup(str):
    """Text that is HTML already: `shown` leaves it as it is."""

    __slots__ = ()


def shown(text: str) -> str:
    """Text as it may stand in a page, between tags and in attributes.

    A file name that is not UTF-8 cannot be written into a page as it is; control characters have no place in HTML at all.
    """
    if isinstance(text, Markup):
        return text
    return escape("".join(c if c >= " " or c in "\t\n" else "\ufffd" for c in text.encode(errors="replace").decode()))


def page(title: str, body: str, *, style: str = "") -> str:
    """A page that reads well on a phone, in light and dark; `style` follows the stylesheet that all pages share."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{shown(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table that scrolls by itself where it is too wide; columns of numbers stand to the right."""
    rows = [tuple(row) for row in rows]
    numeric = [
        column > 0 and all(_NUMBER.fullmatch(row[column]) or row[column] in ("", "-") for row in rows)
        for column in range(len(heads))
    ]
    short = [all(len(_TAG.sub("", row[column])) <= 40 for row in rows) for column in range(len(heads))]
    names = [" ".join(["number"] * number + ["short"] * brief) for number, brief in zip(numeric, short, strict=True)]
    kinds = [f' class="{name}"' if name else "" for name in names]
    head = "".join(f"<th{kind}>{shown(cell)}</th>" for kind, cell in zip(kinds, heads, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{shown(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    # A region that scrolls must be reachable by keyboard.
    return Markup(f'<div class="wide" tabindex="0"><table>\n<tr>{head}</tr>\n{body}\n</table></div>')


def thumbnail(source: Path | bytes, side: int, *, name: str = "") -> Image.Image | str:
    """A photograph upright, in RGB on white, its longer side `side` pixels; or the sentence that stands in its place.

    Args:
        source: the file, or its bytes.
        name: what the sentence calls it; a path's file name by default.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.draft("RGB", (side, side))  # JPEG decodes straight to a smaller size
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.new("RGBA", layer.size, "white")
                upright.alpha_composite(layer)
            return ImageOps.contain(upright.convert("RGB"), (side, side))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the file is damaged"
        called = name or (source.name if isinstance(source, Path) else "a photograph")
        return f"{called} cannot be shown: {reason}"


def image_tag(picture: Image.Image | str, alternative: str) -> Markup:
    """A picture inside the page, or the words in its place (`thumbnail`)."""
    if isinstance(picture, str):
        return Markup(f'<div class="missing">{shown(picture)}</div>')
    jpeg = BytesIO()
    picture.save(jpeg, "JPEG", quality=82, comment=b"")
    source = base64.b64encode(jpeg.getvalue()).decode()
    return Markup(
        f'<img alt="{shown(alternative)}" width="{picture.width}" height="{picture.height}" src="data:image/jpeg;base64,{source}">'
    )
