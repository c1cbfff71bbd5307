"""A run's curves as a picture: loss, recall and learning rate by epoch."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from dualmatch.runtime.files import write_atomically

CURVES = "curves.svg"


def draw_curves(run: Path) -> Path:
    """Draw RUN/curves.svg from RUN/log.jsonl; returns its path."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    epochs = [line["epoch"] for line in lines]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, recall, rate = figure.subplots(1, 3)
    loss.plot(epochs, [line["loss"] for line in lines], marker=".")
    loss.set_title("training loss")
    for way, style in (("i2t", "-"), ("t2i", "--")):
        for k, colour in (("r1", "tab:blue"), ("r5", "tab:orange"), ("r10", "tab:green")):
            label = f"{'image to text' if way == 'i2t' else 'text to image'} R@{k[1:]}"
            recall.plot(epochs, [line["val"][way][k] for line in lines], style, color=colour, label=label)
    best: dict[str, Any] = max(lines, key=lambda line: line["val_rsum"])
    recall.axvline(best["epoch"], color="grey", linewidth=0.8)
    recall.set_title(f"validation recall, best Rsum {best['val_rsum']:.1f} in epoch {best['epoch']}")
    recall.legend(fontsize="x-small")
    rate.plot(epochs, [line["learning_rate"] for line in lines], marker=".")
    rate.set_title("learning rate after the epoch")
    for axes in (loss, recall, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    write_atomically(run / CURVES, picture.getvalue())
    return run / CURVES
