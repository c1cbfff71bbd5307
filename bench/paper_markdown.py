"""What `bench paper` found, as Markdown that is readable as it stands: cells padded to their column."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

_HEADER = (
    "network", "test set", "models", "re-ranked", "whose", "i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "Rsum", "to the paper",
)  # fmt: skip
_LEFT = 5  # columns of words


def markdown(report: Mapping[str, Any]) -> str:
    """A table for each of the papers' tables, and one of the evaluations that stand beside none."""
    run = sum(bool(row["ours"]) for row in report["rows"])
    parts = [f"Of {len(report['rows'])} printed rows {run} {'was' if run == 1 else 'were'} run here."]
    for (paper, table), rows in groupby(report["rows"], key=lambda row: (row["paper"], row["table"].partition(",")[0])):
        parts.append(f"## {paper}, {table}\n\n{_lines(_HEADER, [line for row in rows for line in _printed(row)])}")
        if notes := _notes(report["rows"], paper, table):
            parts.append(notes)
    if report["beside_none"]:
        parts.append(
            "## Beside no printed row\n\nNot comparable with the papers' tables, each for the reason given.\n\n"
            + _lines(("network", "data", *_HEADER[2:4], *_HEADER[5:12], "why"), [_other(one) for one in report["beside_none"]], left=4)
        )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _printed(row: Mapping[str, Any]) -> list[list[str]]:
    line = row["table"].partition(", ")[2]
    network = f"`{min(row['recipes'], key=len)}`" + (f" ({line})" if line else "")
    what = [network, row["test_set"], str(row["models"] or "not stated"), _reranked(row["rerank"])]
    lines = [[*what, "paper", *_recalls(row), "" if row["ours"] else "not run"]]
    for one in row["ours"]:
        what = ["", "", str(len(one["models"])), _reranked(row["rerank"])]
        lines.append([*what, f"ours, {_precision(one)}", *_recalls(one), f"{one['rsum_difference']:+.1f}"])
    return lines


def _other(one: Mapping[str, Any]) -> list[str]:
    protocol, data = one["protocol"], one["data"]
    networks = dict.fromkeys(f"`{model['recipe']}`, {model['precision']}" for model in one["models"])
    folds = "" if protocol["folds"] == 1 else f", {protocol['folds']} folds"
    what = f"{data['name']}, {', '.join(data['splits'])}" if data else f"not said; split {protocol['split']}"
    return [
        " + ".join(networks) or one["source"],
        f"{what}: {protocol['images']} images{folds}",
        str(protocol["ensemble"]),
        protocol["rerank"],
        *_recalls(one),
        one["reason"],
    ]


def _notes(rows: Sequence[Mapping[str, Any]], paper: str, table: str) -> str:
    """What a reader must know of ours in this table."""
    found = dict.fromkeys(
        f"- {one['source']}: {note}."
        for row in rows
        if (row["paper"], row["table"].partition(",")[0]) == (paper, table)
        for one in row["ours"]
        for note in one["notes"]
    )
    return "\n".join(found)


def _precision(one: Mapping[str, Any]) -> str:
    return " and ".join(dict.fromkeys(model["precision"] for model in one["models"]))


def _reranked(k1: int) -> str:
    return f"i2t, K1 = {k1}" if k1 else "no"


def _recalls(row: Mapping[str, Any]) -> list[str]:
    six = [f"{row[way][cut]:.1f}" for way in ("i2t", "t2i") for cut in ("r1", "r5", "r10")]
    return [*six, f"{row['rsum']:.1f}"]


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = _LEFT) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    right = [column >= left and header[column] != "why" for column in range(len(header))]
    rule = ["-" * (width - 1) + (":" if is_right else "-") for width, is_right in zip(widths, right, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        + " |"
        for row in (cells[0], rule, *cells[1:])
    )
