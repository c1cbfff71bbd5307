"""The training loop: epochs of pairs, validation by recall, the best epoch by Rsum, resume wherever it was saved.

Every random draw of an epoch follows from (seed, epoch) alone, or from a generator whose state is saved, so a resumed run continues
exactly as an uninterrupted one.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from dualmatch.models import DSRAN, VSRN
from dualmatch.models.trunks import preprocess_of
from dualmatch.runtime.datasets import Dataset, ImageItem
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.tokenizer import CaptionTokenizer, TokenizerOptions

from .batches import Batches, Plan, Setup, seed_of_epoch
from .checkpoint import (
    FORMAT,
    VERSION,
    build_model,
    frozen_names,
    save_tensors,
    tokenizer_options,
    versions,
)
from .distributed import Group, device_named, process_group
from .features import Progress, no_progress
from .interrupt import StopRequests, TrainingStoppedError
from .objective import Batch, Objective, build_captioner
from .recipe import Recipe
from .resume import check_resumable, hash_of_pairs
from .state import TrainingState, Unfinished
from .step import Differentiator, Losses, rng_state, set_rng_state
from .validation import Validation
from .vocabulary import build_tokenizer, save_tokenizer
from .watch import NoWatch, Watch
from .word_weights import load_word_weights
from .workers import LoadedAhead

# Other processes draw their dropout from other seeds.
RANK_STRIDE = 7_368_787
DIVERGED = "diverged.npz"


def train(
    recipe: Recipe,
    dataset: Dataset,
    out: Path,
    *,
    data_name: str,
    cache: Path,
    resume: bool = False,
    device: str = "cpu",
    workers: int = 2,
    watch: Watch | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Train `recipe` on `dataset` into the run folder `out`, which appears with the first finished epoch; `checkpoint` says what it holds.

    Started by torchrun, the processes train as one (see `distributed`). SIGINT or SIGTERM stops after the step in hand, saved.

    Args:
        data_name: how `--data` named the data set; kept so that export can use the same data for its gate.
        cache: folder for features of frozen parts.
        resume: continue the run in `out` where it was saved last.
        device: `cpu` or `cuda`.
        workers: threads that load batches ahead.
        watch: is told of every step and epoch, in the main process.

    Returns:
        Facts of the best epoch: epoch (from 1), val_rsum.

    Raises:
        DualmatchError: `out` is in use, the data does not fit the recipe, the run to resume is another one, or the loss became NaN.
        TrainingStoppedError: it was asked to stop; the message says how to go on.
    """
    chosen = device_named(device)
    if recipe.train.precision == "fp16" and chosen.type != "cuda":
        raise DualmatchError('train.precision = "fp16" needs a GPU (--device cuda); on a CPU take "bf16" or "fp32".')
    with process_group(chosen) as group:
        run = _Run(
            recipe,
            dataset,
            out,
            data_name=data_name,
            cache=cache,
            resume=resume,
            device=chosen,
            workers=workers,
            group=group,
            watch=watch if watch is not None and group.is_main else NoWatch(),
            progress=progress if group.is_main else no_progress,
        )
        with StopRequests() as requests:
            return run.train(requests)


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """What an epoch's steps gave."""

    losses: list[float]
    seconds: float
    waited: float
    pairs: int


class _Run:
    """A run that is under way: `train` with what it prepared."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        out: Path,
        *,
        data_name: str,
        cache: Path,
        resume: bool,
        device: torch.device,
        workers: int,
        group: Group,
        watch: Watch,
        progress: Progress,
    ) -> None:
        self.out, self.device, self.workers, self.group = out, device, workers, group
        self.watch, self.progress = watch, progress
        train_set = dataset.select(recipe.data.train_splits)
        val_set = dataset.select(recipe.data.val_splits)
        pairs = hash_of_pairs(train_set, val_set)
        if resume:
            check_resumable(recipe, pairs, out)
        elif out.exists() and (not out.is_dir() or any(path.name != DIVERGED for path in out.iterdir())):
            raise DualmatchError(f"{out} exists already; use --resume to continue a run, or give another --out.")
        group.collect(None)  # nobody looks at `out` any more when the first process begins to write there
        regions = _regions(recipe, dataset, [*train_set.items, *val_set.items])
        torch.manual_seed(recipe.train.seed)
        self.tokenizer_json = build_tokenizer(
            recipe.model.text,
            train_set.captions,
            min_count=recipe.data.min_word_count,
            word_weights=recipe.word_weights,
        )
        vocabulary_size = max(self.tokenizer_json.get_vocab(with_added_tokens=True).values()) + 1
        text = replace(recipe.model.text, vocabulary_size=vocabulary_size)
        self.recipe = recipe = replace(recipe, model=replace(recipe.model, text=text))
        self.model = build_model(recipe, pretrained=True)
        if not resume or recipe.model.text.frozen:  # what is trained comes from the checkpoint
            load_word_weights(self.model, recipe.word_weights, self.tokenizer_json)
        objective = Objective(self.model, build_captioner(self.model)).to(device)
        setup = Setup(
            recipe=recipe,
            model=self.model,
            preprocess=preprocess_of(recipe.model.trunk, recipe.data.resize),
            tokenizer=_caption_tokenizer(self.tokenizer_json, tokenizer_options(recipe), out),
            regions=regions,
            cache=cache,
            progress=progress,
        )
        with group.one_per_machine_first():
            self.batches = Batches(setup, train_set, share=(group.rank, group.size))
            self.validation = Validation(setup, val_set)
        self.objective = objective
        self.state = TrainingState(recipe, objective, steps_per_epoch=self.batches.steps_per_epoch)
        self.description = {
            "format": FORMAT,
            "version": VERSION,
            "recipe": recipe.to_json(),
            "data": data_name,
            "dataset": {"name": dataset.name, "layout": dataset.layout, "pairs_sha256": pairs},
            "versions": versions(),
        }
        self.unfinished: Unfinished | None = None
        if resume:
            if group.is_main:
                for part in out.glob(".*.part"):  # what a kill left half-written
                    part.unlink()
            self.unfinished = self.state.load(out / "last.safetensors", processes=group.size)
            if group.is_main:
                _write_description(out, self.description)  # the number of epochs may have grown
        self.differentiator = Differentiator(
            objective,
            group,
            recipe.loss,
            scaler=self.state.scaler,
            accumulate=recipe.train.accumulate,
            precision=recipe.train.precision,
        )

    def train(self, requests: StopRequests) -> dict[str, Any]:
        """All epochs that are left."""
        state, epochs = self.state, self.recipe.train.epochs
        started, first = time.perf_counter(), state.epoch
        self.watch.start(self.out, steps=state.steps)
        try:
            for epoch in range(state.epoch, epochs):
                done = self._epoch(epoch, requests)
                self._require_finite(epoch)
                line = self._validated(epoch, done)
                left = (time.perf_counter() - started) / (epoch + 1 - first) * (epochs - epoch - 1)
                self.progress(
                    f"epoch {epoch + 1}/{epochs}: loss {line['loss']:.4f}, val Rsum {line['val_rsum']:.1f} "
                    f"(best {state.best_rsum:.1f}){_time_left(left)}",
                    0,
                    0,
                )
                if any(self.group.collect(requests.requested)) and epoch + 1 < epochs:
                    raise self._stopped(f"epoch {epoch + 1} of {epochs}, which is finished")
        finally:
            self.watch.finish(self.out)
        return {"epoch": state.best_epoch, "val_rsum": state.best_rsum}

    def _epoch(self, epoch: int, requests: StopRequests) -> _Epoch:
        """The steps of an epoch, or what an interruption left of them."""
        options = self.recipe.train
        torch.manual_seed(seed_of_epoch(self.recipe, epoch) + RANK_STRIDE * self.group.rank)
        self.objective.train()
        losses, before, pairs = [], 0.0, 0
        if self.unfinished is not None:
            losses, before = list(self.unfinished.losses), self.unfinished.seconds
            set_rng_state(self.unfinished.rng[self.group.rank], self.device)
            self.unfinished = None
        started, skipped = time.perf_counter(), len(losses)
        loader = LoadedAhead(islice(self.batches.plans(epoch), skipped, None), self.batches.load, workers=self.workers)
        for plan, batch in loader:
            step = len(losses) + 1
            found = self._step(plan, batch, epoch, step)
            losses.append(found.total)
            pairs += len(plan.captions)
            self.progress(f"epoch {epoch + 1}/{options.epochs}", step, self.batches.steps_per_epoch)
            if step == self.batches.steps_per_epoch:
                break  # the epoch is validated and saved first, also on a request to stop
            # Every process asks at the same step, or one would wait for the others for ever.
            stop = any(self.group.collect(requests.requested))
            if stop or (options.save_steps and step % options.save_steps == 0):
                self._require_finite(epoch)
                seconds = before + time.perf_counter() - started
                self._save(Unfinished(losses=losses, seconds=seconds, rng=self.group.collect(rng_state(self.device))))
            if stop:
                raise self._stopped(f"step {step} of {self.batches.steps_per_epoch} of epoch {epoch + 1}")
        seconds = time.perf_counter() - started
        return _Epoch(
            losses=losses, seconds=before + seconds, waited=loader.waited / seconds, pairs=round(pairs / seconds)
        )

    def _step(self, plan: Plan, batch: Batch, epoch: int, step: int) -> Losses:
        """One update."""
        owner_M = torch.tensor(plan.owner, device=self.device)
        image_ids_I = torch.tensor(plan.images, device=self.device)
        self.state.optimiser.zero_grad(set_to_none=True)
        found = self.differentiator.gradients(batch.to(self.device), owner_M, image_ids_I, epoch=epoch)
        rate = self.state.learning_rate
        norm = self.state.step() if np.isfinite(found.total) else 0.0
        # Gradients are those of all processes together, so all of them stop here. With fp16 an overflow is the scaler's business.
        is_wrong = not np.isfinite(norm) and not self.state.scaler.is_enabled()
        if is_wrong or not np.isfinite(found.total):
            if self.group.is_main:
                self._save_diverged(plan, batch, found, epoch, step)
            what = f"the norm of the gradients became {norm}" if is_wrong else f"the loss became {found.total}"
            raise self._diverged(f"{what} in epoch {epoch + 1}, step {step}; its batch is in {self.out / DIVERGED}")
        self.watch.step(self.state.steps, loss=found.matching, caption_loss=found.captioning, rate=rate, norm=norm)
        return found

    def _validated(self, epoch: int, done: _Epoch) -> dict[str, Any]:
        """Recall after an epoch, best and last checkpoints, the log's line; the other processes wait for the main one."""
        state = self.state
        line: dict[str, Any] = {}
        rsum = 0.0
        if self.group.is_main:
            with state.averaged():
                recall = self.validation.recall()
                rsum = recall.rsum
                line = {
                    "epoch": epoch + 1,
                    "val_rsum": round(rsum, 4),
                    "loss": round(float(np.mean(done.losses)), 6),
                    "learning_rate": state.learning_rate,
                    "seconds": round(done.seconds, 2),
                    "pairs_per_second": done.pairs,
                    "data_wait": round(done.waited, 4),
                    "val": recall.to_json(),
                }
                state.finish_epoch(rsum)
                self._start_run()
                if state.is_best:
                    facts = {"epoch": epoch + 1, "val_rsum": line["val_rsum"]}
                    save_tensors(self.out / "best.safetensors", state.trained_tensors(), facts)
            _append_line(self.out / "log.jsonl", line, keep=epoch)
            # Last of all: a kill before it repeats the epoch, log line included.
            state.save(self.out / "last.safetensors")
            self.watch.epoch(self.out, line, steps=state.steps)
        line, rsum = self.group.agree((line, rsum))
        if not self.group.is_main:
            state.finish_epoch(rsum)
        return line

    def _save(self, unfinished: Unfinished) -> None:
        """Save the middle of an epoch."""
        if self.group.is_main:
            self._start_run()
            self.state.save(self.out / "last.safetensors", unfinished)

    def _start_run(self) -> None:
        """The parts of a run's folder that do not change, unless they are there."""
        if not (self.out / "run.json").is_file():
            _start_run(self.out, self.model, self.tokenizer_json, self.description)

    def _stopped(self, where: str) -> TrainingStoppedError:
        return TrainingStoppedError(
            f"stopped after {where}; the run in {self.out} is saved: the same command with --resume continues it."
        )

    def _require_finite(self, epoch: int) -> None:
        """Weights that are no numbers are not saved over those that are."""
        if not self.state.is_finite:
            raise self._diverged(f"a weight became infinite or NaN in epoch {epoch + 1}")

    def _diverged(self, what: str) -> DualmatchError:
        epoch = self.state.epoch
        kept = f"{self.out} keeps epoch {epoch}" if epoch else "no epoch was finished"
        return DualmatchError(f"{what}; {kept}. Try a smaller learning_rate.")

    def _save_diverged(self, plan: Plan, batch: Batch, found: Losses, epoch: int, step: int) -> None:
        """The batch whose loss or gradients are no numbers: names, captions, similarities, and this process's inputs."""
        items, captions = self.batches.items, self.batches.captions
        self.out.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": step,
            "image_ids": np.array([items[image].id for image in plan.images]),
            "captions": np.array([captions[caption] for caption in plan.captions]),
            "owner": np.array(plan.owner),
            "similarity": found.scores_IM.cpu().numpy(),
            "input.token_ids": batch.token_ids_MT.numpy(),
        }
        arrays |= {f"input.{name}": value.numpy() for name, value in (batch.images | batch.maps).items()}
        part = self.out / f".{DIVERGED}.part"
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(self.out / DIVERGED)


def _time_left(seconds: float) -> str:
    """`, 5 min left` and the like; nothing when less than a minute is left."""
    if seconds < 60:
        return ""
    minutes = round(seconds / 60)
    return f", {minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f", {minutes} min left"


def _caption_tokenizer(tokenizer: Tokenizer, options: TokenizerOptions, out: Path) -> CaptionTokenizer:
    """The tokenizer as the runtime will read it; through a file beside `out`, which also shows in time that one can write there."""
    beside = next(folder for folder in out.absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{out.name}.", suffix=".part") as folder:
        save_tokenizer(tokenizer, Path(folder) / "tokenizer.json")
        return CaptionTokenizer(Path(folder) / "tokenizer.json", options)


def _regions(recipe: Recipe, dataset: Dataset, items: Sequence[ImageItem]) -> RegionFile | None:
    if recipe.region_dims is None:
        return None
    channels, numbers = recipe.region_dims
    option = "model.feature_dim" if recipe.network == "vsrn" else "model.regions.feature_dim"
    where = recipe.data.regions or dataset.regions
    if not where:
        raise DualmatchError("the recipe takes precomputed regions; say where they are with --set data.regions=FILE.")
    regions = RegionFile(where)
    if regions.feature_dim != channels:
        raise DualmatchError(
            f"the recipe expects regions of {channels} channels, {where} has {regions.feature_dim}; "
            f"use --set {option}={regions.feature_dim}."
        )
    if (wanted := recipe.num_regions) not in (0, regions.num_regions):
        raise DualmatchError(
            f"the recipe expects {wanted} regions an image, {where} has {regions.num_regions}; "
            f"use --set model.regions.num_regions={regions.num_regions}."
        )
    if numbers not in (0, regions.position_dim):
        raise DualmatchError(
            f"the recipe expects region positions of {numbers} numbers, {where} has "
            f"{regions.position_dim or 'none'}; use --set model.regions.position_dim={regions.position_dim}."
        )
    regions.require([item.id for item in items])
    return regions


def _start_run(out: Path, model: DSRAN | VSRN, tokenizer: Tokenizer, description: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, out / "tokenizer.json")
    frozen = frozen_names(model)
    if frozen:
        save_tensors(
            out / "frozen.safetensors",
            {name: value for name, value in model.state_dict().items() if name in frozen},
            {},
        )
    _write_description(out, description)


def _write_description(out: Path, description: dict[str, Any]) -> None:
    write_atomically(out / "run.json", json.dumps(description, indent=2) + "\n")


def _append_line(path: Path, line: dict[str, Any], *, keep: int) -> None:
    """Write the log's first `keep` lines and this one: after a kill between checkpoint and log, no epoch stands twice."""
    lines = path.read_text(encoding="utf-8").splitlines()[:keep] if path.is_file() else []
    write_atomically(path, "\n".join([*lines, json.dumps(line)]) + "\n")
