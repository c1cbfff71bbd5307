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
from .int8_sensitivity import cosines

if TYPE_CHECKING:
    from .int8_ranges import Feeds

NUM_IMAGES, NUM_CAPTIONS = 32, 128
LEAST_IMAGES = 8
_BATCH = 16


class Int8Export:
    """Quantises the image encoder, then the text encoder, which is judged beside the image graphs that were settled on.

    Args:
        calibration: real images with captions; up to `NUM_IMAGES` and `NUM_CAPTIONS` of them are used, evenly spaced.
        dataset: the gate's pairs.
        images, captions: torch's embeddings of them.
        tolerances: the gate's.
        unverified: "too few pairs" is good enough.

    Raises:
        DualmatchError: fewer than `LEAST_IMAGES` images to calibrate on, one of them cannot be read, or so few pairs that no graph
            could pass.
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
        self._settled = [images]
        self._tolerances, self._progress = tolerances, progress
        self._accepts: tuple[Verdict, ...] = ("pass", "too few pairs") if unverified else ("pass",)
        owners = np.asarray(dataset.caption_image, dtype=np.int64)
        unchanged = decide(compare(self._reference, self._reference, owners), tolerances)
        if unchanged.verdict == "too few pairs" and not unverified:
            raise DualmatchError(
                f"int8 cannot be decided on these pairs even if nothing were lost: {unchanged.reason} (or --unverified)."
            )
        self._batches = {
            name: [slice(start, min(start + step, count)) for start in range(0, count, step)]
            for name, count, step in (
                ("image", len(images), _BATCH),
                ("text", len(captions), run.caption_batch),
            )
        }
        self.data = {"name": calibration.name, "splits": list(calibration.splits)}
        self._feeds: dict[str, list[Feeds]] = {
            "image": [self._inputs([item]) for item in _spread(calibration.items, NUM_IMAGES)],
            "text": [{"token_ids": run.tokenizer([text])} for text in _spread(calibration.captions, NUM_CAPTIONS)],
        }

    def quantised(self, name: Literal["image", "text"], single: onnx.ModelProto, scratch: Path) -> Quantised | None:
        """One encoder's int8 graphs, or None where int8 has nothing to serve; the image encoder first."""
        passed: list[NDArray[np.float32]] = []

        def decide_on(model: onnx.ModelProto) -> Decision:
            decision, embeddings = self._decide(name, model, scratch / "candidate.onnx")
            if decision.verdict in self._accepts and embeddings is not None:
                passed.append(embeddings)
            return decision

        result = quantise(
            single,
            self._feeds[name],
            scratch,
            name=name,
            decide=decide_on,
            accepts=self._accepts,
            progress=self._progress,
        )
        if result is None:
            self._progress(f"the {name} encoder has nothing that int8 serves: it stays in float32", 0, 0)
            return None
        if name == "image":
            self._settled = passed
        return replace(result, facts={**result.facts, "calibration": self.data})

    def _decide(
        self, name: Literal["image", "text"], model: onnx.ModelProto, path: Path
    ) -> tuple[Decision, NDArray[np.float32] | None]:
        """The verdict on a graph, and its embeddings if all pairs were encoded for it."""
        onnx.save(model, path)
        try:
            with open_session(path) as session:
                encoded = self._encode(name, session)
        finally:
            path.unlink()
        if isinstance(encoded, Decision):
            return encoded, None
        owners = np.asarray(self._dataset.caption_image, dtype=np.int64)
        # The text encoder works beside each of the image encoder's graphs: the first that is not accepted decides.
        others = [(encoded, self._reference[1])] if name == "image" else [(one, encoded) for one in self._settled]
        for after in others:
            decision = decide(compare(self._reference, after, owners), self._tolerances)
            if decision.verdict not in self._accepts:
                break
        return decision, encoded

    def _encode(self, name: Literal["image", "text"], session: Session) -> NDArray[np.float32] | Decision:
        """Embeddings of all the gate's images or captions; a refusal as soon as one is below the cosine's floor."""
        items, texts, floor = self._dataset.items, self._dataset.captions, self._tolerances.worst_cosine
        wanted, what = (self._reference[0], "images") if name == "image" else (self._reference[1], "captions")
        batches = self._batches[name]
        found, done = np.empty_like(wanted), 0
        for number, rows in enumerate(batches):
            feeds = self._inputs(items[rows]) if name == "image" else {"token_ids": self._run.tokenizer(texts[rows])}
            found[rows] = session.run(feeds)[f"{name}_embedding"]
            done += len(found[rows])
            self._progress(f"encoding {what} with int8", done, len(wanted))
            worst = float(cosines(wanted[rows], found[rows]).min())
            if not worst >= floor:
                # What ended this trial is what ends the next one, if anything does.
                batches.insert(0, batches.pop(number))
                reason = (
                    f"the worst cosine of {done} of {len(wanted)} {what} is {worst:.6f}, below the floor of {floor}"
                )
                return Decision(verdict="fail", reason=reason)
        return found

    def _inputs(self, items: Sequence[Any]) -> dict[str, NDArray[np.float32]]:
        return image_inputs(self._run.model, self._run.preprocess, items, self._regions)


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced."""
    if len(values) <= most:
        return list(values)
    return [values[index * len(values) // most] for index in range(most)]
