"""Who is told of a run's steps and epochs: TensorBoard, and the curves in the run's folder."""

import time
from pathlib import Path
from typing import Any

from .curves import draw_curves

FLUSH_STEPS = 50
# Drawing takes about a second: not after each of a thousand short epochs.
REDRAW_SECONDS = 60.0


class Watch:
    """Told of every step and epoch; does nothing by itself."""

    def start(self, out: Path, *, steps: int) -> None:
        """Training begins, or goes on, after so many steps."""

    def step(self, steps: int, *, loss: float, caption_loss: float, rate: float, norm: float) -> None:
        """A step was made: the matching and the caption loss, the learning rate, the gradient's norm before clipping."""

    def epoch(self, out: Path, line: dict[str, Any], *, steps: int) -> None:
        """An epoch was finished and saved; `line` is the log's."""

    def finish(self, out: Path) -> None:
        """Training ends, for whatever reason."""


NoWatch = Watch


class RunWatch(Watch):
    """Keeps RUN/curves.svg and, with `tensorboard`, RUN/tensorboard.

    Nothing is written before the run's folder is there; what TensorBoard shows beyond the step that a resumed run goes on from is
    taken back.
    """

    def __init__(self, *, tensorboard: bool = True) -> None:
        if tensorboard:  # missing packages are told now, not after the first epoch
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        self.tensorboard = tensorboard
        self._waiting: list[tuple[str, float, int]] = []
        self._writer: Any = None
        self._out, self._steps, self._drawn = Path(), 0, 0.0

    def start(self, out: Path, *, steps: int) -> None:
        self._out, self._steps = out, steps

    def step(self, steps: int, *, loss: float, caption_loss: float, rate: float, norm: float) -> None:
        if not self.tensorboard:
            return
        values = {"loss/matching": loss, "learning rate": rate, "gradient norm": norm}
        if caption_loss:
            values["loss/captioning"] = caption_loss
        self._waiting += [(name, value, steps) for name, value in values.items()]
        if steps % FLUSH_STEPS == 0:
            self._flush()

    def epoch(self, out: Path, line: dict[str, Any], *, steps: int) -> None:
        recall = {f"recall/{way} {k}": line["val"][way][k] for way in ("i2t", "t2i") for k in ("r1", "r5", "r10")}
        values = {"recall/Rsum": line["val_rsum"], **recall, "pairs per second": line["pairs_per_second"]}
        if self.tensorboard:
            self._waiting += [(name, value, steps) for name, value in values.items()]
            self._flush()
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            draw_curves(out)
            self._drawn = time.monotonic()

    def finish(self, out: Path) -> None:
        if (out / "log.jsonl").is_file():
            draw_curves(out)
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if not self._waiting or not (self._out / "run.json").is_file():
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._out / "tensorboard"), purge_step=self._steps + 1)
        for name, value, steps in self._waiting:
            self._writer.add_scalar(name, value, steps)
        self._waiting.clear()
        self._writer.flush()
