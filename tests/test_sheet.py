"""Picture sheets: complete in themselves, safely escaped, and honest about photographs that cannot be shown."""

import base64
import os
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.sheet import Hit, Search, search_sheet

NASTY = '<script>alert("1")</script> & "dogs"'


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def photos(tmp_path):
    colours = ("red", "lime", "blue")
    for colour in colours:
        Image.new("RGB", (900, 600), colour).save(tmp_path / f"{colour}.png")
    return [tmp_path / f"{colour}.png" for colour in colours]


def hits(photos, **options):
    return [Hit(score=0.9 - rank / 10, id=path.name, image=path, **options) for rank, path in enumerate(photos)]


def test_a_page_has_one_small_picture_per_hit_and_nothing_from_outside(tmp_path, photos):
    search_sheet([Search(query="colours", hits=hits(photos))], tmp_path / "s.html", title="Find")
    text = (tmp_path / "s.html").read_text()
    page = Page(text)
    assert [image["alt"] for image in page.all("img")] == ["hit 1: red.png", "hit 2: lime.png", "hit 3: blue.png"]
    for image, colour in zip(page.all("img"), [(254, 0, 0), (0, 255, 1), (0, 0, 254)], strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        picture = Image.open(BytesIO(base64.b64decode(data)))
        assert picture.size == (320, 213)
        assert max(abs(a - b) for a, b in zip(picture.getpixel((9, 9)), colour, strict=True)) < 4
    assert [shown for shown in ("0.900", "0.800", "0.700") if shown in page.text] == ["0.900", "0.800", "0.700"]
    assert "http" not in text
    assert not page.all("link")
    assert not page.all("script")
    assert "prefers-color-scheme: dark" in text


def test_text_from_users_is_escaped_everywhere(tmp_path, photos):
    hit = Hit(score=1, id=NASTY, image=photos[0], caption=NASTY)
    search_sheet([Search(query=NASTY, hits=[hit])], tmp_path / "s.html", title=NASTY, note=NASTY)
    page = Page((tmp_path / "s.html").read_text())
    assert not page.all("script")
    assert page.text.count(NASTY) == 6  # title, heading, note, query, caption, id
    assert page.all("img")[0]["alt"] == NASTY
    assert [a["title"] for a in page.all("span") if "title" in a] == [NASTY]


def test_several_queries_marks_and_picture_queries_on_one_page(tmp_path, photos):
    searches = [
        Search(query="words", hits=[*hits(photos[:1]), *hits(photos[1:2], right=True)]),
        Search(query=photos[2], hits=[Hit(score=0.5, id="c1", caption="something blue")]),
    ]
    search_sheet(searches, tmp_path / "s.html")
    page = Page((tmp_path / "s.html").read_text())
    assert len(page.all("section")) == 2
    assert [item.get("class") for item in page.all("li")] == [None, "right", None]
    assert page.text.count("✓ right") == 1
    assert [image["alt"] for image in page.all("img")] == [
        "hit 1: red.png",
        "hit 2: lime.png",
        "query: blue.png",
    ]
    assert "something blue" in page.text


def test_photos_that_cannot_be_shown_are_named(tmp_path, photos):
    cut = tmp_path / "cut.png"
    cut.write_bytes(photos[0].read_bytes()[:200])
    broken = [Hit(score=1, id="cut", image=cut), Hit(score=0, id="gone", image=tmp_path / "gone.png")]
    search_sheet([Search(query="q", hits=broken)], tmp_path / "s.html")
    page = Page((tmp_path / "s.html").read_text())
    assert not page.all("img")
    assert "cut.png cannot be shown: the file is damaged" in page.text
    assert "gone.png cannot be shown: No such file or directory" in page.text
    search_sheet([Search(query="q", hits=broken)], tmp_path / "s.png")


def test_transparent_turned_and_palette_photos_look_as_they_should(tmp_path):
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("P", (40, 20)).save(tmp_path / "palette.png", transparency=0)
    Image.new("CMYK", (40, 20), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    names = ["clear.png", "turned.jpg", "palette.png", "print.jpg"]
    search_sheet([Search(query="q", hits=hits([tmp_path / n for n in names]))], tmp_path / "s.html")
    images = [
        Image.open(BytesIO(base64.b64decode(image["src"].split(",")[1])))
        for image in Page((tmp_path / "s.html").read_text()).all("img")
    ]
    assert [image.size for image in images] == [(320, 160), (160, 320), (320, 160), (320, 160)]
    assert [image.getpixel((5, 5)) for image in images] == [(255,) * 3, (254, 0, 0), (255,) * 3, (255,) * 3]


def test_a_png_shows_every_photo_in_its_place(tmp_path, photos):
    marked = [Search(query="colours", hits=[*hits(photos[:2]), *hits(photos[2:], right=True)])]
    search_sheet(marked, tmp_path / "s.png", title="Find", note="all of it")
    sheet = Image.open(tmp_path / "s.png").convert("RGB")
    colours = [colour for _, colour in sorted(sheet.getcolors(1 << 20), reverse=True)]
    assert set(colours[:5]) >= {(255, 0, 0), (0, 255, 0), (0, 0, 255)}
    rows = [x for x in range(sheet.width) if sheet.getpixel((x, 84 + 34 + 100)) == (0, 0, 255)]
    assert rows[0] > 2 * sheet.width / 3 - 20
    assert (26, 127, 75) in colours  # the mark


def test_a_png_holds_many_queries_and_long_words(tmp_path, photos):
    heights = []
    for count in (1, 3):
        searches = [
            Search(query="long " * 99, hits=hits(photos * 3, caption="w" * 300)),
            Search(query=photos[0], hits=[]),
        ]
        search_sheet(searches * count, tmp_path / "s.png", title="t" * 300)
        heights.append(Image.open(tmp_path / "s.png").size)
    assert heights[0][0] == heights[1][0] == 16 + 5 * 216
    assert heights[1][1] - heights[0][1] == 2 * (heights[0][1] - 60)


def test_names_that_are_not_utf8_are_drawn_with_a_question_mark(tmp_path, photos):
    path = photos[0].with_name(os.fsdecode(b"caf\xe9.png"))
    photos[0].rename(path)
    for name in ("s.html", "s.png"):
        search_sheet([Search(query=path, hits=hits([path]))], tmp_path / name)
    assert "caf?.png" in (tmp_path / "s.html").read_text()


def test_what_is_no_sheet_is_refused(tmp_path, photos):
    with pytest.raises(DualmatchError, match=r"\.html or \.png, not s\.gif"):
        search_sheet([Search(query="q", hits=hits(photos))], tmp_path / "s.gif")
    with pytest.raises(DualmatchError, match="at least one search"):
        search_sheet([], tmp_path / "s.html")
    (tmp_path / "file").touch()
    with pytest.raises(DualmatchError, match="cannot be written"):
        search_sheet([Search(query="q", hits=[])], tmp_path / "file" / "s.html")
