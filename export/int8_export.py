"""int8 for a run: what to calibrate on, and the gate's retrieval measured on every candidate graph."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray

from dualmatch.runtime.backends import Session, open_session
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.parity import Comparison, Decision, Tolerances, Verdict, compare, decide
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.stages import RECALL, Stage
from dualmatch.runtime.verify import Verification, named_flips
from dualmatch.training.checkpoint import Run
from dualmatch.training.encode import image_inputs
from dualmatch.training.evaluation import regions_of
from dualmatch.training.features import Progress

from .gate import GateRefusedError
from .int8_search import Quantised, SearchFailedError, quantise
from .int8_sensitivity import cosines

if TYPE_CHECKING:
    from .int8_ranges import Feeds

NUM_IMAGES, NUM_CAPTIONS = 32, 128
LEAST_IMAGES = 8
_BATCH = 16


class Int8Export:
    """Quantises the image encoder, then the text encoder, which is judged beside the image graphs that were settled on.

    Args:
        dataset: the gate's pairs.
        images, captions: torch's embeddings of them.
        calibration: the data that the ranges are found on; named in the manifest.
        feeds: of them, from `calibration_feeds`.
        regions: of the gate's pairs.
        tolerances: the gate's.
        unverified: "too few pairs" is good enough.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        images: NDArray[np.float32],
        captions: NDArray[np.float32],
        *,
        calibration: Dataset,
        feeds: "dict[str, list[Feeds]]",
        regions: RegionFile | None,
        tolerances: Tolerances,
        unverified: bool,
        progress: Progress,
    ) -> None:
        self._run, self._dataset, self._regions = run, dataset, regions
        self._reference = (images, captions)
        self._settled = [images]
        self._tolerances, self._progress = tolerances, progress
        self._accepts: tuple[Verdict, ...] = ("pass", "too few pairs") if unverified else ("pass",)
        self._batches = {
            name: [slice(start, min(start + step, count)) for start in range(0, count, step)]
            for name, count, step in (
                ("image", len(images), _BATCH),
                ("text", len(captions), run.caption_batch),
            )
        }
        self.data = {"name": calibration.name, "splits": list(calibration.splits)}
        self._feeds = feeds

    def quantised(self, name: Literal["image", "text"], single: onnx.ModelProto, scratch: Path) -> Quantised | None:
        """One encoder's int8 graphs, or None where int8 has nothing to serve; the image encoder first.

        Raises:
            GateRefusedError: no graph keeps retrieval; it has the last trial's comparison on all pairs, and a stage for each trial.
        """
        passed: list[NDArray[np.float32]] = []

        def decide_on(model: onnx.ModelProto) -> Decision:
            decision, embeddings = self._decide(name, model, scratch / "candidate.onnx")
            if decision.verdict in self._accepts and embeddings is not None:
                passed.append(embeddings)
            return decision

        try:
            result = quantise(
                single,
                self._feeds[name],
                scratch,
                name=name,
                decide=decide_on,
                accepts=self._accepts,
                progress=self._progress,
            )
        except SearchFailedError as failed:
            self._refuse(name, failed, scratch / "candidate.onnx")
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
        encoded = self._encoded(name, model, path, floor=self._tolerances.worst_cosine)
        return (encoded, None) if isinstance(encoded, Decision) else (self._judged(name, encoded)[0], encoded)

    def _judged(self, name: Literal["image", "text"], encoded: NDArray[np.float32]) -> tuple[Decision, Comparison]:
        """The verdict on an encoder's embeddings of all pairs, and what was compared for it."""
        owners = np.asarray(self._dataset.caption_image, dtype=np.int64)
        # The text encoder works beside each of the image encoder's graphs: the first that is not accepted decides.
        others = [(encoded, self._reference[1])] if name == "image" else [(one, encoded) for one in self._settled]
        for after in others:
            comparison = compare(self._reference, after, owners, split=", ".join(self._dataset.splits))
            decision = decide(comparison, self._tolerances)
            if decision.verdict not in self._accepts:
                break
        return decision, comparison

    def _refuse(self, name: Literal["image", "text"], failed: SearchFailedError, path: Path) -> NoReturn:
        """The gate's refusal by the last trial's graph: all pairs encoded, which the trial itself may not have come to."""
        encoded = self._encoded(name, failed.model, path, floor=None)
        assert not isinstance(encoded, Decision)
        decision, comparison = self._judged(name, encoded)
        photographs = {item.id: item for item in self._dataset.items}
        trials = [
            Stage(
                name="trial",
                graph=f"{name} int8, {trial['graph']}, {trial['excluded']} layers in float32",
                status="OK" if trial["verdict"] in self._accepts else "FAIL",
                found=trial["reason"],
            )
            for trial in failed.trials
        ]
        verification = Verification(
            decision=decision,
            stages=(*trials, _recall(decision)),
            tolerances=self._tolerances,
            comparison=comparison,
            flips=named_flips(comparison.flips, [*photographs], self._dataset.captions, self._dataset.caption_image),
            photographs=photographs,
        )
        raise GateRefusedError(failed.sentence(failed.found, decision.reason), verification) from None

    def _encoded(
        self, name: Literal["image", "text"], model: onnx.ModelProto, path: Path, *, floor: float | None
    ) -> NDArray[np.float32] | Decision:
        """Embeddings of all the gate's images or captions by a graph; with a floor a refusal as soon as a cosine is below it."""
        onnx.save(model, path)
        try:
            with open_session(path) as session:
                return self._encode(name, session, floor)
        finally:
            path.unlink()

    def _encode(
        self, name: Literal["image", "text"], session: Session, floor: float | None
    ) -> NDArray[np.float32] | Decision:
        items, texts = self._dataset.items, self._dataset.captions
        wanted, what = (self._reference[0], "images") if name == "image" else (self._reference[1], "captions")
        batches = self._batches[name]
        found, done = np.empty_like(wanted), 0
        for number, rows in enumerate(batches):
            feeds = self._inputs(items[rows]) if name == "image" else {"token_ids": self._run.tokenizer(texts[rows])}
            found[rows] = session.run(feeds)[f"{name}_embedding"]
            done += len(found[rows])
            self._progress(f"encoding {what} with int8", done, len(wanted))
            worst = float(cosines(wanted[rows], found[rows]).min())
            if floor is not None and not worst >= floor:
                # What ended this trial is what ends the next one, if anything does.
                batches.insert(0, batches.pop(number))
                reason = (
                    f"the worst cosine of {done} of {len(wanted)} {what} is {worst:.6f}, below the floor of {floor}"
                )
                return Decision(verdict="fail", reason=reason)
        return found

    def _inputs(self, items: Sequence[Any]) -> dict[str, NDArray[np.float32]]:
        return image_inputs(self._run.model, self._run.preprocess, items, self._regions)


def calibration_feeds(
    run: Run, calibration: Dataset, dataset: Dataset, regions: RegionFile | None
) -> "dict[str, list[Feeds]]":
    """What the ranges are found on, by encoder, one item each; export asks for it before hours of encoding, to know what is missing.

    Args:
        calibration: real images with captions; up to `NUM_IMAGES` and `NUM_CAPTIONS` of them are used, evenly spaced.
        dataset, regions: the gate's pairs and their regions, which calibration data without regions of their own share.

    Raises:
        DualmatchError: fewer than `LEAST_IMAGES` images, one of them cannot be read, or has no regions where the network takes them.
    """
    if len(calibration.items) < LEAST_IMAGES:
        raise DualmatchError(
            f"int8 needs real images to find its ranges on: at least {LEAST_IMAGES}, and data set {calibration.name!r} has "
            f"{len(calibration.items)}; name a larger one with --calibration DATA."
        )
    items = _spread(calibration.items, NUM_IMAGES)
    if "regions" in run.model.image_encoder.input_names:
        if calibration is not dataset and calibration.regions is not None:
            regions = regions_of(run, RegionFile(calibration.regions))
        if calibration is not dataset and regions is not None:
            _require_regions(regions, [item.id for item in items], calibration.name)
    return {
        "image": [image_inputs(run.model, run.preprocess, [item], regions) for item in items],
        "text": [{"token_ids": run.tokenizer([text])} for text in _spread(calibration.captions, NUM_CAPTIONS)],
    }


def require_enough_pairs(dataset: Dataset, tolerances: Tolerances) -> None:
    """Refuse, before anything is encoded, pairs on which not even a graph that changed nothing would pass.

    Raises:
        GateRefusedError: there are too few.
    """
    # Nothing is lost by embeddings that stay as they are, whichever they are.
    unchanged = np.ones((len(dataset.items), 1), np.float32), np.ones((len(dataset.captions), 1), np.float32)
    owners = np.asarray(dataset.caption_image, dtype=np.int64)
    decision = decide(compare(unchanged, unchanged, owners), tolerances)
    if decision.verdict == "too few pairs":
        raise GateRefusedError(
            f"int8 cannot be decided on these pairs even if nothing were lost: {decision.reason} (or --unverified).",
            Verification(decision=decision, stages=(_recall(decision),), tolerances=tolerances),
        )


def _require_regions(regions: RegionFile, image_ids: Sequence[str], name: str) -> None:
    try:
        regions.require(image_ids)
    except DualmatchError as error:
        raise DualmatchError(
            f"int8 cannot find its ranges on data set {name!r}: {str(error).removesuffix('.')}; "
            "name data that come with their regions with --calibration DATA, or leave it out."
        ) from None


def _recall(decision: Decision) -> Stage:
    return Stage(name=RECALL, graph="both", status="FAIL", found=decision.reason)


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced."""
    if len(values) <= most:
        return list(values)
    return [values[index * len(values) // most] for index in range(most)]
