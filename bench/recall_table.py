"""What `bench recall` found, as tables that fit 80 columns: models are letters there, which the heading explains."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from string import ascii_uppercase
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

_CUTOFFS = ("r1", "r5", "r10")


def tables(report: Mapping[str, Any]) -> Group:
    """All tables of a report's JSON."""
    report = _lettered(report)
    shown: list[Table | Text] = [Text(_heading(report)), Text(), _rows(report), Text()]
    if report["comparisons"]:
        shown += [_comparisons(report["comparisons"]), Text()]
    shown.append(_slices(report["slices"]))
    if further := [row for row in report["slices"] if row["against_first"] is not None]:
        shown += [Text(), _against_first(further)]
    if report["hard_pairs"]:
        shown += [Text(), _hard_pairs(report["hard_pairs"])]
    return Group(*shown)


def _lettered(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The report with a letter in place of each label (its number, past 26)."""
    models = report["subject"]["models"]
    letter = {
        one["label"]: ascii_uppercase[place] if len(models) <= len(ascii_uppercase) else str(place + 1)
        for place, one in enumerate(models)
    }

    def lettered(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: lettered(inner, name) for name, inner in value.items()}
        if key == "models" and all(isinstance(one, str) for one in value):
            return [letter[one] for one in value]
        return [lettered(one) for one in value] if isinstance(value, list) else value

    return {**lettered(dict(report)), "subject": report["subject"], "letters": letter}


def _heading(report: Mapping[str, Any]) -> str:
    data = report["subject"]["data"]
    lines = [
        f"{report['letters'][one['label']]}: {one['label']} ({one['recipe']}, {one['precision']})"
        for one in report["subject"]["models"]
    ]
    splits = ", ".join(data["splits"])
    return "\n".join([f"{data['name']}, split {splits}: {data['images']} images, {data['captions']} captions", *lines])


def _rows(report: Mapping[str, Any]) -> Table:
    caption = "R@1, 5, 10. Equal scores: smaller index first. Rsum with its 95 % interval, images resampled with their captions."
    caption += "".join(f"\nNot possible here: {one['row']}: {one['reason']}" for one in report["absent"])
    if not any(row["test_set"] for row in report["rows"]):
        caption += "\nThis is none of the papers' test sets: do not put these figures beside their tables."
    table = _table("Recall", caption)
    for header in ("", "protocol", "re-rank"):
        table.add_column(header, no_wrap=True)
    for header in ("i2t 1", "5", "10", "t2i 1", "5", "10", "Rsum", "95 %"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            _models(row),
            row["test_set"] or row["protocol_name"],
            f"K1 {row['rerank']}" if row["rerank"] else "none",
            *(f"{row[way][cut]:.1f}" for way in ("i2t", "t2i") for cut in _CUTOFFS),
            f"{row['rsum']:.1f}",
            _range(row["rsum_interval"]),
        )
    return table


def _comparisons(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    caption = (
        "Paired: the same images resampled for both. An interval that holds 0 tells nothing about which is better."
    )
    table = _table("Differences of Rsum", caption)
    for header in ("", "against", "protocol", "re-rank"):
        table.add_column(header, no_wrap=True)
    for header in ("Rsum", "95 %"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("tells", no_wrap=True)
    for one in comparisons:
        of, against = one["of"], one["against"]
        reranked = of["models"] == against["models"]
        table.add_row(
            _models(of),
            "not re-ranked" if reranked else _models(against),
            of["protocol_name"],
            f"K1 {of['rerank']}" if of["rerank"] else "none",
            _signed(one["rsum_difference"]),
            _range(one["interval"], signed=True),
            "yes" if one["tells"] else "no",
        )
    return table


def _slices(rows: Sequence[Mapping[str, Any]]) -> Table:
    caption = (
        "Text to image, all images together, no re-ranking; 95 % intervals. To rest: R@1 of the slice less that of all other "
        "captions. Of twenty slices that are like the rest, one interval misses 0 by chance."
    )
    table = _table("By kind of caption", caption)
    table.add_column("", no_wrap=True)
    table.add_column("captions with", overflow="fold")
    for header in ("number", "R@1", "95 %", "R@5", "R@10", "to rest", "95 %"):
        table.add_column(header, justify="right", no_wrap=True)
    for _, group in groupby(rows, key=lambda row: (row["models"], row["group"])):
        for row in group:
            rest = row["against_rest"]
            table.add_row(
                _models(row),
                f"{row['group']}: {row['slice']}" if row["group"] in ("relation", "setting") else row["slice"],
                str(row["captions"]),
                f"{row['r1']:.1f}",
                _range(row["intervals"]["r1"]),
                f"{row['r5']:.1f}",
                f"{row['r10']:.1f}",
                "-" if rest is None else _signed(rest["r1"]),
                "-" if rest is None else _range(rest["intervals"]["r1"], signed=True),
            )
        table.add_section()
    return table


def _against_first(rows: Sequence[Mapping[str, Any]]) -> Table:
    caption = "Points of recall above A on the same captions, paired; R@1 with its 95 % interval."
    table = _table("By kind of caption, against A", caption)
    table.add_column("", no_wrap=True)
    table.add_column("captions with", overflow="fold")
    for header in ("number", "R@1", "95 %", "R@5", "R@10"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        found = row["against_first"]
        table.add_row(
            _models(row),
            f"{row['group']}: {row['slice']}" if row["group"] in ("relation", "setting") else row["slice"],
            str(row["captions"]),
            _signed(found["r1"]),
            _range(found["intervals"]["r1"], signed=True),
            _signed(found["r5"]),
            _signed(found["r10"]),
        )
    return table


def _hard_pairs(rows: Sequence[Mapping[str, Any]]) -> Table:
    caption = (
        "Percent of captions that score higher on their own scene than on its partner, and of scenes that score their best own caption "
        "above the partner's best; chance is 50 %."
    )
    table = _table("Pairs of scenes that differ in one thing only", caption)
    table.add_column("", no_wrap=True)
    table.add_column("differ in")
    for header in ("pairs", "captions told", "95 %", "scenes told", "95 %"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row[side]['value']:.1f}" for side in ("captions", "images")]
        ranges = [_range(row[side]["interval"]) for side in ("captions", "images")]
        table.add_row(_models(row), row["differs"], str(row["pairs"]), cells[0], ranges[0], cells[1], ranges[1])
    return table


def _models(row: Mapping[str, Any]) -> str:
    return "+".join(row["models"])


def _range(interval: Sequence[float], *, signed: bool = False) -> str:
    return " to ".join(_signed(value) if signed else f"{value:.1f}" for value in interval)


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # plus zero: there is no -0.0


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
