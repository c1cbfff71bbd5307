"""The report laid out by a browser, on a desk and on a phone, light and dark: nothing sticks out, nothing is fetched, all can be read."""

import json
import shutil
from dataclasses import replace

import pytest

from dualmatch.bench.html.report import write_report
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.gate_report import write_gate_report
from dualmatch.runtime.sheet import Hit, Search, search_sheet
from dualmatch.runtime.verify import NamedFlip, verify

from . import browser
from .demo_fixture import dualmatch
from .test_report import a_run, compare_report, latency_case, latency_report, write

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="not run: no Chromium here (apt-get install chromium, or DUALMATCH_CHROMIUM=PROGRAM)"
)
DESK, PHONE = 1280, 390
LEAST_CONTRAST = 4.5  # WCAG 2, level AA, for text of any size; 3 for what is drawn

# What reaches beyond the viewport, but for what lies in a region that scrolls by itself; at most ten.
OVERFLOWING = """
[...document.body.querySelectorAll("*")].filter(element => {
  const box = element.getBoundingClientRect();
  if (!box.width || box.right <= document.documentElement.clientWidth + 0.5 && box.left >= -0.5) return false;
  for (let outer = element; outer; outer = outer.parentElement)
    if (outer !== element && /auto|scroll/.test(getComputedStyle(outer).overflowX)) return false;
  return true;
}).slice(0, 10).map(element => element.outerHTML.slice(0, 80))
"""

# Words that are cut off by the edge of their plot, or reach out of it.
OUTSIDE_THEIR_PLOT = """
[...document.querySelectorAll("svg text")].filter(text => {
  const own = text.getBoundingClientRect(), plot = text.closest("svg").getBoundingClientRect();
  return own.width && (own.left < plot.left - 1 || own.right > plot.right + 1 || own.top < plot.top - 1 || own.bottom > plot.bottom + 1);
}).slice(0, 10).map(text => text.textContent)
"""

NO_ALTERNATIVE = """
[...document.querySelectorAll("img, svg, [role=img]")].filter(image =>
  !(image.tagName === "IMG" ? image.getAttribute("alt") : image.getAttribute("aria-label")) ||
  image.tagName === "IMG" && !image.naturalWidth
).map(image => image.outerHTML.slice(0, 80))
"""

# Contrast of every text with what lies behind it, from computed colours; below the least ones.
PALE = """
(() => {
  const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parsed = colour => { const found = colour.match(/[\\d.]+/g).map(Number); return found.length < 4 ? [...found, 1] : found; };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const found = parsed(getComputedStyle(element).backgroundColor);
      if (found[3] > 0.99) return found;
    }
    return [255, 255, 255];
  };
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((m, n) => n - m); return (x + 0.05) / (y + 0.05); };
  const pale = [];
  for (const element of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(element), svg = element.closest("svg");
    const words = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (words && element.tagName !== "title" && element.getBoundingClientRect().width) {
      const found = contrast(parsed(svg ? style.fill : style.color), behind(element));
      if (found < LEAST) pale.push([found.toFixed(2), element.outerHTML.slice(0, 80)]);
    } else if (svg && element.matches("[class*=tone]")) {
      const drawn = style.fill === "none" || element.matches(".hollow, line") ? style.stroke : style.fill;
      const found = contrast(parsed(drawn), behind(element));
      if (found < 3) pale.push([found.toFixed(2), element.outerHTML.slice(0, 80)]);
    }
  }
  return pale.slice(0, 10);
})()
""".replace("LEAST", str(LEAST_CONTRAST))

SMALLEST_LETTERS = """
Math.min(...[...document.querySelectorAll("svg text")].map(text => {
  const svg = text.closest("svg");
  return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
}))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory, small_bundle, small_run, attentive):
    """A page with all that there can be, names too long for a phone among it."""
    folder = tmp_path_factory.mktemp("everything") / "report"
    shutil.copytree(small_bundle, folder / "bundle-with-a-name-that-is-much-too-long-for-a-phone")
    shutil.copytree(attentive, folder / "attentive")
    shutil.copytree(small_run.folder, folder / "run")
    a_run(folder / "longer", epochs=[(n, 100 + n % 7) for n in range(1, 31)])
    cases = [
        latency_case([1.0 + n % 9 for n in range(120)], encoder, batch)
        for encoder in ("image", "text")
        for batch in (1, 8, 32)
    ]
    write(folder / "latency.json", latency_report(*cases))
    lines = [
        {"case": number, "phase": "steady", "latency_ns": 1_000_000 * (1 + n % 9)}
        for number in range(6)
        for n in range(120)
    ]
    write(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    rows = [(f"fp{n} onnxruntime-with-a-long-name-{n}", 1.0 + n / 50, 400.0 + n / 10) for n in range(9)]
    compared = compare_report(*rows)
    for case in compared["cases"]:
        case["roofline"] = {
            "intensity": 12.5, "achieved": {"operations_per_s": 3e10, "bytes_per_s": 2e9}, "percent": {"gemm": 30.0, "copy": 9.0}, "bound": "gemm",
        }  # fmt: skip
    compared["roofs"] = {"gemm": {"float32": {"avg": 1e11}, "int8": {"avg": 4e11}}, "copy": {"avg": 1.2e10}}
    write(folder / "compare.json", compared)
    write(folder / "no-recall.json", compare_report(("a", 1.0, None), ("b", 30.0, None)))
    write(
        folder / "evaluated.json",
        dualmatch("runtime", "evaluate", small_bundle, "--data", small_run.data, "--json").out,
    )
    write(folder / "damaged-with-a-name-that-is-much-too-long-for-a-phone-to-show-in-one-line.json", "{")
    return write_report(folder, dataset=open_dataset(small_run.data).select(["test"])).path


@pytest.fixture(scope="module")
def opened():
    with browser.Browser(PROGRAM) as found:
        yield found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_page_can_be_read(opened, page, width, dark):
    opened.open(page, width=width, dark=dark)
    assert opened.evaluate("innerWidth") == width
    assert opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    assert opened.evaluate("document.querySelectorAll('section').length") >= 9
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.evaluate(OVERFLOWING) == []
    assert opened.evaluate(OUTSIDE_THEIR_PLOT) == []
    assert opened.evaluate(NO_ALTERNATIVE) == []
    assert opened.evaluate(PALE) == []
    assert opened.evaluate(SMALLEST_LETTERS) >= 9.5
    assert opened.requests() == [page.resolve().as_uri()]


def test_every_link_leads_somewhere_and_every_plot_has_its_numbers(opened, page):
    opened.open(page, width=DESK)
    assert opened.evaluate(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    )
    bare = "[...document.querySelectorAll('svg.plot')].filter(svg => !svg.closest('section').querySelector('table')).length"
    assert opened.evaluate(bare) == 0
    in_figures = "[...document.querySelectorAll('section:not(#training) figure.plot-box')].filter(box => !box.querySelector('table')).length"
    assert opened.evaluate(in_figures) == 0
    assert opened.evaluate("document.querySelectorAll('#training figure.plot-box').length") == 6
    assert opened.evaluate("document.querySelectorAll('#training details table').length") == 2


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_sheets_and_the_gates_page_can_be_read_too(opened, tmp_path, small_bundle, small_run, width):
    photos = [item for item in small_run.dataset.items if item.path]
    hits = [
        Hit(score=0.9, id=f"{item.id}{'-long' * 30}", image=item.path, caption=item.captions[0], right=True)
        for item in photos[:7]
    ]
    search_sheet(
        [Search(query="word " * 40, hits=hits), Search(query=photos[0].path, hits=hits)], tmp_path / "sheet.html"
    )
    found = verify(load_bundle(small_bundle), small_run.dataset)
    flips = [
        NamedFlip(direction=way, query=photos[0].captions[0], image=photos[0].id, rank_before=1, rank_after=12, first_before=photos[1].id, first_after="gone.png")
        for way in ("i2t", "t2i")
    ]  # fmt: skip
    write_gate_report(replace(found, flips=tuple(flips)), tmp_path / "gate.html", title="gate")
    for name in ("sheet.html", "gate.html"):
        opened.open(tmp_path / name, width=width, dark=True)
        assert opened.evaluate("document.querySelectorAll('img').length") >= 3
        for check in (OVERFLOWING, NO_ALTERNATIVE, PALE):
            assert opened.evaluate(check) == []
        assert opened.requests() == [(tmp_path / name).resolve().as_uri()]


PLANTED = {
    "a box that is too wide": ('<div style="width: 2000px">wide</div>', OVERFLOWING),
    "an image without words": (f'<img src="data:image/gif;base64,{"R0lGODlhAQABAAAAACw="}">', NO_ALTERNATIVE),
    "a plot without a name": ('<svg class="plot" viewBox="0 0 9 9"></svg>', NO_ALTERNATIVE),
    "pale text": ('<p style="color: #aaa; background: #fff">pale</p>', PALE),
    "text without contrast in the dark only": ('<p style="color: #333; background: var(--ground)">dim</p>', PALE),
    "words beyond their plot": (
        '<svg class="plot" viewBox="0 0 9 9" aria-label="x"><text x="8" y="5">far out</text></svg>',
        OUTSIDE_THEIR_PLOT,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_planted_in_the_page_is_seen(opened, page, tmp_path, name):
    fault, check = PLANTED[name]
    planted = write(tmp_path / "page.html", page.read_text().replace("</header>", f"</header>{fault}"))
    opened.open(planted, width=PHONE, dark=True)
    assert opened.evaluate(check)
    if name == "text without contrast in the dark only":
        opened.open(planted, width=PHONE)
        assert opened.evaluate(check) == []


def test_a_request_to_outside_is_seen(opened, page, tmp_path):
    outside = '<img alt="x" src="http://127.0.0.1:9/outside.png"><style>@import url("http://127.0.0.1:9/outside.css");</style>'
    planted = write(tmp_path / "page.html", page.read_text().replace("</header>", f"</header>{outside}"))
    opened.open(planted, width=PHONE)
    assert {url.rpartition("/")[2] for url in opened.requests()} == {"page.html", "outside.png", "outside.css"}
