"""Plots: marks where their values are, ticks that are round, words that are escaped."""

import re
import xml.etree.ElementTree as ET

import pytest

from dualmatch.runtime.plot import WIDTH, Axis, Row, Series, as_file, chart, rows

SPACE = "{http://www.w3.org/2000/svg}"


def parsed(svg):
    return ET.fromstring(svg if "xmlns" in svg else svg.replace("<svg ", f'<svg xmlns="{SPACE[1:-1]}" ', 1))


def circles(svg):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in parsed(svg).iter(f"{SPACE}circle")]


def words(svg):
    return [text.text for text in parsed(svg).iter(f"{SPACE}text")]


def test_points_lie_where_the_axes_say():
    points = [(0.0, 0.0), (5.0, 50.0), (10.0, 100.0)]
    svg = chart("t", [Series(label="", points=points, kind="points")], Axis(label="x"), Axis(label="y"))
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x2
    assert y0 > y2
    shown = words(svg)
    assert {"0", "2", "4", "6", "8", "10", "20", "100"} <= set(shown)


def test_a_logarithmic_axis_spaces_equal_ratios_equally():
    points = [(1.0, 1.0), (10.0, 1.0), (100.0, 1.0)]
    svg = chart("t", [Series(label="", points=points, kind="points")], Axis(label="ms", log=True), Axis(label="y"))
    x = [place[0] for place in circles(svg)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert {"1", "10", "100", "ms (logarithmic)"} <= set(words(svg))


@pytest.mark.parametrize(
    "values", [[5.0], [0.0, 0.0], [1e-9, 2e-9], [1e6, 3e7], [-3.0, 4.0], [99.99, 100.0], [31.0, 80.0]]
)
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_and_inside_whatever_the_values(values, log):
    points = [(abs(v) + 1e-12 if log else v, v) for v in values]
    svg = chart("t", [Series(label="", points=points, kind="points")], Axis(label="", log=log), Axis(label=""))
    across = [
        t
        for t in parsed(svg).iter(f"{SPACE}text")
        if t.get("text-anchor") == "middle" and t.text and re.match(r"[-\d]", t.text)
    ]
    assert 1 <= len(across) <= 10
    assert all(0 <= float(t.get("x")) <= WIDTH for t in across)
    assert all(0 <= x <= WIDTH for x, _ in circles(svg))


def test_rows_share_one_axis():
    given = [Row(label="a", dots=[(1.0, True)], line=(1.0, 3.0)), Row(label="b", dots=[(3.0, False)], bar=(0.0, 3.0))]
    svg = rows("t", given, Axis(label="x"), from_zero=True)
    (ax, ay), (bx, by) = circles(svg)
    assert ax < bx
    assert ay < by
    bar = next(parsed(svg).iter(f"{SPACE}rect"))
    assert float(bar.get("x")) + float(bar.get("width")) == pytest.approx(bx, abs=0.2)


def test_a_plot_names_itself_and_escapes():
    nasty = '"><script>&'
    svg = chart(
        nasty,
        [Series(label=nasty, points=[(1, 1)], kind="points", names=[nasty])],
        Axis(label=nasty),
        Axis(label=nasty),
    )
    root = parsed(svg)
    assert root.get("aria-label") == root.find(f"{SPACE}title").text == nasty
    assert root.get("role") == "img"
    assert not list(root.iter(f"{SPACE}script"))
    whole = parsed(as_file(nasty, [("one", svg), ("two", svg)], words=nasty))
    assert whole.find(f"{SPACE}desc").text == nasty
    assert whole.get("viewBox").split()[2] == str(2 * WIDTH)


def test_names_of_points_at_one_place_do_not_cover_each_other():
    series = [Series(label="", points=[(1, 1)], kind="points", names=[str(n)]) for n in range(3)]
    svg = chart("t", series, Axis(label=""), Axis(label=""))
    places = [(t.get("x"), t.get("y")) for t in parsed(svg).iter(f"{SPACE}text") if t.get("class") == "name"]
    assert len(set(places)) == 3
