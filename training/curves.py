"""A run's curves as a picture: loss, recall and learning rate by epoch."""

import json
from pathlib import Path

from dualmatch.runtime.curves import curves
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.plot import as_file

CURVES = "curves.svg"


def draw_curves(run: Path) -> Path:
    """Draw RUN/curves.svg from RUN/log.jsonl; returns its path."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    write_atomically(run / CURVES, as_file(run.name, curves(lines)))
    return run / CURVES
