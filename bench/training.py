"""Throughput of the training loop, and the share of its time that it waits for data, by number of loading threads.

Each case is `dualmatch train` in a process of its own; the numbers are those of its log. The first epoch, which fills caches and warms
up, is left out.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dualmatch.runtime.errors import DualmatchError

if TYPE_CHECKING:
    from rich.table import Table

# More of a step's time than this spent waiting for data means that the loop is held up by it.
MOST_WAIT = 0.10


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """What one number of threads gave.

    Attributes:
        workers: loading threads; 0 loads in the training thread, so that all loading is waiting.
        pairs_per_second: of image and caption, median over the epochs.
        data_wait: share of the steps' time, median over the epochs.
    """

    workers: int
    pairs_per_second: float
    data_wait: float


def bench_training(
    recipe: str,
    data: str,
    *,
    workers: Sequence[int],
    epochs: int = 3,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    cache: Path | None = None,
) -> list[TrainingCase]:
    """Train a recipe for a few epochs with each number of loading threads.

    Raises:
        DualmatchError: training failed; the message is its own.
    """
    assert epochs >= 2
    cases = []
    for number in workers:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = ["train", recipe, "--data", data, "--out", str(out), "--no-tensorboard", "--device", device]
            command += ["--workers", str(number), *(f"--set={one}" for one in (*overrides, f"train.epochs={epochs}"))]
            command += [f"--cache={cache}"] if cache is not None else []
            started = [sys.executable, "-c", "from dualmatch.cli.main import main; main()", *command]
            done = subprocess.run(started, capture_output=True, text=True, check=False)  # noqa: S603  (our own command)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
                raise DualmatchError(f"training with {number} workers failed: {last.removeprefix('dualmatch: ')}")
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        cases.append(
            TrainingCase(
                workers=number,
                pairs_per_second=median([line["pairs_per_second"] for line in lines[1:]]),
                data_wait=median([line["data_wait"] for line in lines[1:]]),
            )
        )
    return cases


def to_json(recipe: str, data: str, cases: Sequence[TrainingCase]) -> dict[str, Any]:
    """The report as plain values."""
    return {"recipe": recipe, "data": data, "most_wait": MOST_WAIT, "cases": [asdict(case) for case in cases]}


def training_table(cases: Sequence[TrainingCase]) -> "Table":
    """One row per number of threads."""
    from rich.table import Table

    table = Table(title="Training loop", caption=f"Held up by its data where it waits more than {MOST_WAIT:.0%}.")
    for name in ("loading threads", "pairs/s", f"against {cases[0].workers} threads", "waits for data"):
        table.add_column(name, justify="right")
    for case in cases:
        ratio = case.pairs_per_second / cases[0].pairs_per_second
        held_up = " (held up)" if case.data_wait > MOST_WAIT else ""
        table.add_row(
            str(case.workers), f"{case.pairs_per_second:.0f}", f"{ratio:.2f} x", f"{case.data_wait:.1%}{held_up}"
        )
    return table
