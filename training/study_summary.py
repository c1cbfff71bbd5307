"""What a study found: means and deviations over seeds, hard pairs, and paired intervals between rows. Reads run folders; imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.bootstrap import interval, losses
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_file
from dualmatch.runtime.hard_pairs import DIFFERENCES, has_pairs, partners, told_apart
from dualmatch.runtime.recall import Ranks, Recall, ranks
from dualmatch.runtime.recall import summary as recall_of

from .folds import Part, parts_of
from .studies import Study

Points = NDArray[np.float64]
FORMAT = "dualmatch-study"


def run_folder(out: Path, recipe: str, seed: int, part: Part | None = None) -> Path:
    """Where a study keeps a run."""
    return out / recipe / f"{'' if part is None else part.prefix}seed{seed}"


def embeddings_path(folder: Path, splits: Sequence[str]) -> Path:
    """Where the embeddings of these splits are kept."""
    return folder / f"embeddings-{'+'.join(splits)}.npz"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row with one seed on the compared images: one run, or one for each fold.

    Attributes:
        ranks: of the image queries and of the caption queries, 0-based, each fold ranked by itself, one fold behind the other.
        apart: by what hard pairs differ in: see `hard_pairs.told_apart`, in percent; empty for data without hard pairs.
        best: epoch and validation Rsum of the checkpoint, averaged over folds.
        epochs: that a run was trained for.
    """

    seed: int
    recall: Recall
    ranks: tuple[Ranks, Ranks]
    apart: dict[str, Points]
    best: dict[str, float]
    epochs: int

    def to_json(self) -> dict[str, Any]:
        """Its figures."""
        return {
            "seed": self.seed,
            **self.recall.to_json(),
            **{name: float(np.nanmean(shares)) for name, shares in self.apart.items()},
            "best_epoch": self.best["epoch"],
            "val_rsum": self.best["val_rsum"],
            "epochs": self.epochs,
        }


def summarise(
    study: Study, dataset: Dataset, out: Path, *, seeds: Sequence[int], splits: Sequence[str], folds: int = 1
) -> dict[str, Any]:
    """The study as JSON values: rows, contrasts, and which runs are missing.

    A contrast is over the seeds that both rows have: an image's gain is the mean over those seeds, and the images are resampled (both
    images of a hard pair together). Its interval so covers the choice of the images, not that of the seeds; the deviation over seeds
    stands in the rows.

    Raises:
        DualmatchError: no run is there, or embeddings of other images or of another checkpoint.
    """
    parts = parts_of(dataset, splits, folds)
    measured = {
        label: [
            _measured(out, recipe, parts, seed)
            for seed in seeds
            if all(_embeddings(out, recipe, part, seed).is_file() for part in parts)
        ]
        for label, recipe in study.rows.items()
    }
    owners = _owners(parts)
    pair = partners(parts[0].compared) if len(parts) == 1 else None
    if not any(measured.values()):
        raise DualmatchError(f"{out} holds no evaluated run of this study; train it first.")
    return {
        "format": FORMAT,
        "version": 1,
        "description": study.description,
        "data": dataset.name,
        "protocol": next(str(runs[0].recall.protocol) for runs in measured.values() if runs),
        "rows": [_row(label, study.rows[label], runs) for label, runs in measured.items() if runs],
        "contrasts": [
            {**contrast, "printed": study.printed_gain(before, after)}
            for before, after in study.contrasts
            if (contrast := _contrast(before, after, measured, owners, pair)) is not None
        ],
        "missing": [
            f"{label}, seed {seed}"
            for label, runs in measured.items()
            for seed in seeds
            if seed not in [run.seed for run in runs]
        ],
    }


def _embeddings(out: Path, recipe: str, part: Part, seed: int) -> Path:
    return embeddings_path(run_folder(out, recipe, seed, part), part.compared.splits)


def _owners(parts: Sequence[Part]) -> NDArray[np.int64]:
    """For each caption, one part behind the other, the row of its image."""
    counts = [len(item.captions) for part in parts for item in part.compared.items]
    return np.repeat(np.arange(len(counts)), counts)


def _measured(out: Path, recipe: str, parts: Sequence[Part], seed: int) -> Measured:
    found: list[tuple[Ranks, Ranks]] = []
    apart: dict[str, Points] = {}
    bests, epochs = [], 0
    for part in parts:
        compared, path = part.compared, _embeddings(out, recipe, part, seed)
        with np.load(path) as arrays:
            images, captions, ids = arrays["images"], arrays["captions"], arrays["image_ids"].tolist()
            checkpoint = str(arrays["checkpoint"])
        if checkpoint != sha256_of_file(path.with_name("best.safetensors")):
            raise DualmatchError(
                f"{path} was made by another checkpoint than {path.parent} holds; without --no-train it is made anew."
            )
        if ids != [item.id for item in compared.items]:
            raise DualmatchError(f"{path} holds embeddings of other images than data set {compared.name!r} has now.")
        similarity = images @ captions.T
        found.append(ranks(similarity, compared.caption_image))
        if has_pairs(compared):
            apart = {what: 100 * told_apart(similarity, compared, what) for what in DIFFERENCES}
        log = [json.loads(line) for line in path.with_name("log.jsonl").read_text(encoding="utf-8").splitlines()]
        bests.append(max(log, key=lambda line: line["val_rsum"]))
        epochs = len(log)
    split = ", ".join(parts[0].compared.splits)
    return Measured(
        seed=seed,
        recall=recall_of(found, _owners(parts), split=split),
        ranks=(np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found])),
        apart=apart,
        best={key: fmean(best[key] for best in bests) for key in ("epoch", "val_rsum")},
        epochs=epochs,
    )


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; one value has none."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}


def _row(label: str, recipe: str, runs: Sequence[Measured]) -> dict[str, Any]:
    figures = [run.to_json() for run in runs]
    return {
        "label": label,
        "recipe": recipe,
        "seeds": [run.seed for run in runs],
        "rsum": _spread([one["rsum"] for one in figures]),
        **{
            side: {k: _spread([one[side][k] for one in figures]) for k in ("r1", "r5", "r10")}
            for side in ("i2t", "t2i")
        },
        **{what: _spread([one[what] for one in figures]) for what in runs[0].apart},
        "runs": figures,
    }


def _contrast(
    before: str,
    after: str,
    measured: dict[str, list[Measured]],
    owners: NDArray[np.int64],
    pair: NDArray[np.int64] | None,
) -> dict[str, Any] | None:
    """What the second row has more than the first; None where they have no seed in common."""
    first, second = ({run.seed: run for run in measured[label]} for label in (before, after))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    lost = np.mean([losses(first[seed].ranks, second[seed].ranks, owners) for seed in seeds], axis=0)
    found: dict[str, Any] = {"without": before, "with": after, "seeds": seeds, "rsum": _gain(lost, pair)}
    for what in first[seeds[0]].apart:
        lost = np.mean([first[seed].apart[what] - second[seed].apart[what] for seed in seeds], axis=0)
        found[what] = _gain(lost, pair)
    return found


def _gain(lost: Points, pair: NDArray[np.int64] | None) -> dict[str, float]:
    """The mean gain with its interval; the two images of a hard pair compete for each other's captions, so they are one observation."""
    observed = lost if pair is None else (lost + lost[pair])[np.arange(len(pair)) < pair] / 2
    observed = observed[~np.isnan(observed)]
    low, high = interval(observed, paired=True)
    return {"difference": float(-observed.mean()), "low": -high, "high": -low}


def markdown(summary: dict[str, Any]) -> str:
    """Rows and contrasts as two Markdown tables."""
    pairs = [what for what in DIFFERENCES if what in summary["rows"][0]]
    titles = ["row", "seeds", "Rsum", "i2t R@1", "t2i R@1", *(f"told apart by {what}, %" for what in pairs)]
    lines = [
        f"{summary['description']}; {summary['protocol']}. Mean ± sample standard deviation over seeds.",
        "",
        *_table(
            titles,
            [
                [
                    row["label"],
                    str(len(row["seeds"])),
                    *(_cell(row[what] if what == "rsum" else row[what]["r1"]) for what in ("rsum", "i2t", "t2i")),
                    *(_cell(row[what]) for what in pairs),
                ]
                for row in summary["rows"]
            ],
        ),
    ]
    if summary["contrasts"]:
        is_printed = any(one["printed"] is not None for one in summary["contrasts"])
        source = " Last column: the difference of Rsum between these lines in DSRAN's Table III, on Flickr30K."
        lines += [
            "",
            "Difference [95 % interval of a paired bootstrap over the images], the mean of the common seeds."
            + source * is_printed,
            "",
            *_table(
                ["from", "to", "seeds", "Rsum", *pairs, *["printed"] * is_printed],
                [
                    [
                        one["without"],
                        one["with"],
                        str(len(one["seeds"])),
                        *(_gained(one[what]) for what in ("rsum", *pairs)),
                        *["-" if one["printed"] is None else f"{one['printed']:+.1f}"] * is_printed,
                    ]
                    for one in summary["contrasts"]
                ],
            ),
        ]
    if summary["missing"]:
        lines += ["", f"Not there: {'; '.join(summary['missing'])}."]
    return "\n".join(lines) + "\n"


def _cell(spread: dict[str, float | None]) -> str:
    return f"{spread['mean']:.1f}" + ("" if spread["std"] is None else f" ± {spread['std']:.1f}")


def _gained(gain: dict[str, float]) -> str:
    """Bold where the interval leaves zero out."""
    text = f"{gain['difference']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]"
    return f"**{text}**" if gain["low"] > 0 or gain["high"] < 0 else text


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
