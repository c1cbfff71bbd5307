"""int8 for a run: what to calibrate on, and the gate's retrieval measured on every candidate graph."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from dualmatch.runtime.backends import Session, open_session
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.parity import Decision, Tolerances, Verdict, compare, decide
from dualmatch.runtime.regions import RegionFile
from dualmatch.training.checkpoint import Run
from dualmatch.training.encode import image_inputs
from dualmatch.training.features import Progress

from .int8_search import Quantised, quantise

if TYPE_CHECKING:
    from .int8_ranges import Feeds

NUM_IMAGES, NUM_CAPTIONS = 32, 128
LEAST_IMAGES = 8
_BATCH = 16


class Int8Export:
    """Quantises the image encoder, then the text encoder, which is judged together with the image embeddings that were settled on.

    Args:
        calibration: real images with captions; up to `NUM_IMAGES` and `NUM_CAPTIONS` of them are used, evenly spaced.
        dataset: the gate's pairs.
        images, captions: torch's embeddings of them.
        tolerances: the gate's.
        unverified: "too few pairs" is good enough.

    Raises:
        DualmatchError: fewer than `LEAST_IMAGES` images to calibrate on, or one of them cannot be read.
    """

    def __init__(
        self,
        run: Run,
        calibration: Dataset,
        dataset: Dataset,
        images: NDArray[np.float32],
        captions: NDArray[np.float32],
        *,
        regions: RegionFile | None,
        tolerances: Tolerances,
        unverified: bool,
        progress: Progress,
    ) -> None:
        if len(calibration.items) < LEAST_IMAGES:
            raise DualmatchError(
                f"int8 needs real images to find its ranges on: at least {LEAST_IMAGES}, and data set {calibration.name!r} has "
                f"{len(calibration.items)}; name a larger one with --calibration DATA."
            )
        self._run, self._dataset, self._regions = run, dataset, regions
        self._reference = (images, captions)
        self._settled = images
        self._last = images
        self._tolerances, self._progress = tolerances, progress
        self._accepts: tuple[Verdict, ...] = ("pass", "too few pairs") if unverified else ("pass",)
        self.data = {"name": calibration.name, "splits": list(calibration.splits)}
        self._feeds: dict[str, list[Feeds]] = {
            "image": [self._inputs([item]) for item in _spread(calibration.items, NUM_IMAGES)],
            "text": [{"token_ids": run.tokenizer([text])} for text in _spread(calibration.captions, NUM_CAPTIONS)],
        }

    def quantised(self, name: Literal["image", "text"], single: onnx.ModelProto, scratch: Path) -> Quantised | None:
        """One encoder's int8 graphs, or None where int8 has nothing to serve; the image encoder first."""
        result = quantise(
            single,
            self._feeds[name],
            scratch,
            name=name,
            decide=lambda model: self._decide(name, model, scratch / "candidate.onnx"),
            accepts=self._accepts,
            progress=self._progress,
        )
        if result is None:
            self._progress(f"the {name} encoder has no product with constant weights: it stays in float32", 0, 0)
            return None
        self._settled = self._last
        return replace(result, facts={**result.facts, "calibration": self.data})

    def _decide(self, name: Literal["image", "text"], model: onnx.ModelProto, path: Path) -> Decision:
        onnx.save(model, path)
        try:
            with open_session(path) as session:
                if name == "image":
                    self._last = self._encode_images(session)
                    after = (self._last, self._reference[1])
                else:
                    after = (self._settled, self._encode_captions(session))
        finally:
            path.unlink()
        owners = np.asarray(self._dataset.caption_image, dtype=np.int64)
        return decide(compare(self._reference, after, owners), self._tolerances)

    def _inputs(self, items: Sequence[Any]) -> dict[str, NDArray[np.float32]]:
        return image_inputs(self._run.model, self._run.preprocess, items, self._regions)

    def _encode_images(self, session: Session) -> NDArray[np.float32]:
        items, parts = self._dataset.items, []
        for start in range(0, len(items), _BATCH):
            parts.append(_only(session.run(self._inputs(items[start : start + _BATCH]))))
            self._progress("encoding images with int8", min(start + _BATCH, len(items)), len(items))
        return np.concatenate(parts)

    def _encode_captions(self, session: Session) -> NDArray[np.float32]:
        run, texts = self._run, self._dataset.captions
        parts = []
        for start in range(0, len(texts), run.caption_batch):
            parts.append(_only(session.run({"token_ids": run.tokenizer(texts[start : start + run.caption_batch])})))
            self._progress("encoding captions with int8", min(start + run.caption_batch, len(texts)), len(texts))
        return np.concatenate(parts)


def _only(outputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    (value,) = outputs.values()
    return value


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced."""
    if len(values) <= most:
        return list(values)
    return [values[index * len(values) // most] for index in range(most)]
