"""The report's sections on retrieval: what was trained, what it finds, and what precision and export cost."""

from collections.abc import Sequence
from typing import Any

from dualmatch.runtime.curves import best_epoch, curves
from dualmatch.runtime.page import shown, table
from dualmatch.runtime.plot import Axis, Row, rows, tone_of

from .found import Findings, FoundReport, FoundRun, Values
from .parts import Section, figure, plots

WAYS = (("i2t", "image to text"), ("t2i", "text to image"))
RECALL_HEADS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "Rsum")


def recall_cells(recall: Values) -> tuple[str, ...]:
    """R@1, 5, 10 both ways, and Rsum."""
    return (*(f"{recall[way][k]:.1f}" for way, _ in WAYS for k in ("r1", "r5", "r10")), f"{recall['rsum']:.1f}")


def protocol_words(protocol: Values) -> str:
    """What a recall was measured on."""
    words = (
        f"split {protocol.get('split') or 'not named'}: {protocol['images']} images, {protocol['captions']} captions"
    )
    if protocol.get("folds", 1) != 1:
        words += f", average of {protocol['folds']} folds"
    if protocol.get("rerank", "none") != "none":
        words += f", re-ranked ({protocol['rerank']})"
    if protocol.get("ensemble", 1) != 1:
        words += f", ensemble of {protocol['ensemble']}"
    return words


def bundles_section(found: Findings) -> Section | None:
    """Every bundle: network, recipe, precision, size, hash."""
    if not found.bundles:
        return None
    cells = []
    for one in found.bundles:
        manifest = one.bundle.manifest
        sizes = [
            manifest.files[entry.file].bytes for entry in manifest.encoders.values() if entry.file in manifest.files
        ]
        cells.append((
            one.name, one.network, str(manifest.provenance.get("recipe") or "-"), one.precision, f"{sum(sizes) / 2**20:.1f}", str(manifest.embedding_dimension),
            one.bundle.hash[:12],
        ))  # fmt: skip
    heads = ("bundle", "network", "recipe", "precision", "graphs, MiB", "dimensions", "hash")
    return Section(key="bundles", title="Bundles", body=[table(heads, cells)])


def recall_section(found: Findings, measured: Sequence[tuple[str, Values]]) -> Section | None:
    """Recall on data, from every source at hand.

    Args:
        measured: (name, recall) of the bundles that the report ran itself.
    """
    cells = [(name, *recall_cells(recall), protocol_words(recall["protocol"])) for name, recall in measured]
    cells += [
        (one.name, *recall_cells(one.values), protocol_words(one.values["protocol"])) for one in found.evaluations
    ]
    body: list[str] = []
    if cells:
        body.append(table(("", *RECALL_HEADS, "measured on"), cells))
    for report in found.recalls:
        body += _bench_recall(report)
    return Section(key="recall", title="Recall", body=body) if body else None


def _bench_recall(report: FoundReport) -> list[str]:
    values = report.values
    bars, cells = [], []
    for number, row in enumerate(values["rows"]):
        low, high = row["rsum_interval"]
        label = _who(row)
        bars.append(
            Row(label=f"{label}: {row['rsum']:.1f}", line=(low, high), dots=[(row["rsum"], True)], tone=tone_of(number))
        )
        cells.append((label, *recall_cells(row), f"{low:.1f} to {high:.1f}"))
    name = values["subject"]["data"]["name"]
    title = f"Rsum on {name}, with 95 % intervals"
    parts = [
        f"<h3>{shown(title)}</h3>",
        f'<p class="soft">{shown(report.name)}; {shown(protocol_words(values["rows"][0]["protocol"]))}.</p>'
        if values["rows"]
        else "",
        figure(rows(title, bars, Axis(label="Rsum")), table(("model", *RECALL_HEADS, "95 % of Rsum"), cells)),
    ]
    if values.get("comparisons"):
        told = [
            (
                _who(c["of"]), _who(c["against"]), f"{c['rsum_difference']:+.1f}",
                f"{c['interval'][0]:+.1f} to {c['interval'][1]:+.1f}",
                "yes" if c["interval"][0] > 0 or c["interval"][1] < 0 else "no",
            )
            for c in values["comparisons"]
        ]  # fmt: skip
        heads = ("model", "against", "difference of Rsum", "95 %", "more than chance")
        parts += ["<h3>Differences on the same queries</h3>", table(heads, told)]
    return parts + _slices(values) + _hard_pairs(values)


def _who(row: Values) -> str:
    """The models of a row, and how they were ranked where it is not the plain way."""
    words = [" + ".join(row["models"])]
    if row.get("rerank"):
        words.append(f"re-ranked {row['rerank']}")
    if row.get("protocol_name", "full") != "full":
        words.append(str(row["protocol_name"]))
    return ", ".join(words)


def _slices(values: Values) -> list[str]:
    """Where a model is weak: text to image by kinds of captions."""
    if not values["slices"]:
        return []
    groups: dict[str, list[Values]] = {}
    for one in values["slices"]:
        groups.setdefault(one["group"], []).append(one)
    models = list(dict.fromkeys(" + ".join(one["models"]) for one in values["slices"]))
    figures = []
    for group, slices in groups.items():
        bars, cells = [], []
        for one in slices:
            model = " + ".join(one["models"])
            low, high = one["intervals"]["r1"]
            label = one["slice"] if len(models) == 1 else f"{one['slice']} ({model})"
            bars.append(
                Row(
                    label=f"{label}: {one['r1']:.1f}",
                    line=(low, high),
                    dots=[(one["r1"], True)],
                    tone=tone_of(models.index(model)),
                )
            )
            cells.append(
                (
                    label,
                    str(one["captions"]),
                    f"{one['r1']:.1f}",
                    f"{low:.1f} to {high:.1f}",
                    f"{one['r5']:.1f}",
                    f"{one['r10']:.1f}",
                )
            )
        title = f"Text to image R@1 by {group}"
        picture = rows(title, bars, Axis(label="R@1, %, with 95 % interval"))
        figures.append(
            figure(picture, table(("captions", "number", "R@1", "95 %", "R@5", "R@10"), cells), heading=title)
        )
    return ["<h3>Where it is weak: by kind of caption</h3>", *figures]


def _hard_pairs(values: Values) -> list[str]:
    pairs = values.get("hard_pairs")
    if not pairs:
        return []
    cells = [
        (
            " + ".join(one["models"]), one["differs"], str(one["pairs"]), f"{one['captions']['value']:.1f}",
            f"{one['captions']['interval'][0]:.1f} to {one['captions']['interval'][1]:.1f}",
        )
        for one in pairs
    ]  # fmt: skip
    heads = ("model", "pairs that differ in", "pairs", "captions nearer to their own image, %", "95 %")
    return ["<h3>Hard pairs</h3>", '<p class="soft">Chance is 50 %.</p>', table(heads, cells)]


def precision_section(found: Findings) -> Section | None:
    """Recall before and after each export, as its gate or `verify` measured it."""
    compared: list[tuple[str, Values]] = [
        (f"{one.name} ({one.precision})", one.bundle.manifest.parity)
        for one in found.bundles
        if one.bundle.manifest.parity.get("comparison")
    ]
    compared += [(one.name, one.values) for one in found.verifications if one.values["comparison"]]
    if not compared:
        return None
    lines, cells, notes = [], [], []
    for number, (name, parity) in enumerate(compared):
        comparison = parity["comparison"]
        before, after, loss, bound = (comparison[key] for key in ("before", "after", "rsum_loss", "bound"))
        label = f"{name}: {before['rsum']:.2f} → {after['rsum']:.2f}"
        lines.append(Row(label=label, line=(loss, bound), dots=[(loss, True)], tone=tone_of(number)))
        cells.append((name, "before, torch", *recall_cells(before), "", ""))
        cells.append(("", "after", *recall_cells(after), f"{loss:.2f}", f"{bound:.2f}"))
        words = shown(protocol_words(before["protocol"]))
        verdict = f"{shown(str(parity['verdict']))}; {shown(str(parity['reason']))}"
        notes.append(f'<p><b>{shown(name)}</b>: {verdict}. <span class="soft">{words}</span></p>')
    title = "Rsum lost by export: measured (point), and at most so much with 95 % confidence (line)"
    heads = ("", "", *RECALL_HEADS, "loss", "95 % bound")
    note = '<p class="soft">On the pairs that the gate had, training pairs among them: it shows what export costs, not how well the network generalises.</p>'
    return Section(
        key="precision", title="Recall before and after each precision",
        body=[note, figure(rows(title, lines, Axis(label="points of Rsum lost"), from_zero=True), table(heads, cells), heading=title), *notes],
    )  # fmt: skip


def training_section(found: Findings) -> Section | None:
    """Curves of every run, with a table of its epochs."""
    body: list[str] = []
    for run in found.runs:
        body += _training(run)
    return Section(key="training", title="Training", body=body) if body else None


def _training(run: FoundRun) -> list[str]:
    head = f"<h3>{shown(run.name)}</h3>"
    recipe, data = run.values["recipe"], run.values["dataset"]["name"]
    if not run.epochs:
        return [head, f"<p>{shown(str(recipe['name']))} on {shown(str(data))}: no epoch finished yet.</p>"]
    best: Any = best_epoch(run.epochs)
    words = f"{recipe['name']} on {data}: {len(run.epochs)} epoch{'s' if len(run.epochs) > 1 else ''}, best validation Rsum {best['val_rsum']:.1f} in epoch {best['epoch']}."
    cells = [
        (
            str(line["epoch"]),
            f"{line['loss']:.4f}",
            *recall_cells({**line["val"], "rsum": line["val_rsum"]}),
            f"{line['learning_rate']:.2e}",
        )
        for line in run.epochs
    ]
    numbers = table(("epoch", "loss", *RECALL_HEADS, "learning rate"), cells)
    figures = [figure(plot, heading=f"{words}, {run.name}") for words, plot in curves(run.epochs)]
    return [
        head,
        f"<p>{shown(words)}</p>",
        plots(figures),
        f"<details><summary>the numbers of every epoch</summary>{numbers}</details>",
    ]
