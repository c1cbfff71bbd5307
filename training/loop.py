"""The training loop: epochs of pairs, validation by recall, the best epoch by Rsum, resume at the last finished epoch.

Every random draw of an epoch follows from (seed, epoch) alone, so a resumed run continues exactly as an uninterrupted one.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from dualmatch.models import DSRAN
from dualmatch.models.trunks import preprocess_of
from dualmatch.runtime.datasets import Dataset, ImageItem
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes, write_atomically
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.tokenizer import CaptionTokenizer, TokenizerOptions

from .batches import Batches, Setup, Validation, seed_of_epoch
from .checkpoint import (
    FORMAT,
    VERSION,
    build_model,
    frozen_names,
    read_run_json,
    save_tensors,
    tokenizer_options,
    versions,
)
from .features import Progress, no_progress
from .loss import matching_loss
from .recipe import Recipe, recipe_from_json
from .state import TrainingState
from .vocabulary import build_tokenizer, save_tokenizer


def train(
    recipe: Recipe,
    dataset: Dataset,
    out: Path,
    *,
    data_name: str,
    cache: Path,
    resume: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Train `recipe` on `dataset` into the run folder `out`, which appears with the first finished epoch; `checkpoint` says what it holds.

    Args:
        data_name: how `--data` named the data set; kept so that export can use the same data for its gate.
        cache: folder for features of frozen parts.
        resume: continue after the last finished epoch of the run in `out`.

    Returns:
        Facts of the best epoch: epoch (from 1), val_rsum.

    Raises:
        DualmatchError: `out` is in use, the data does not fit the recipe, the run to resume is another one, or the loss became NaN.
    """
    train_set = dataset.select(recipe.data.train_splits)
    val_set = dataset.select(recipe.data.val_splits)
    pairs = _hash_of_pairs(train_set, val_set)
    if resume:
        _check_resumable(recipe, pairs, out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DualmatchError(f"{out} exists already; use --resume to continue a run, or give another --out.")
    regions = _regions(recipe, [*train_set.items, *val_set.items])
    torch.manual_seed(recipe.train.seed)
    tokenizer_json = build_tokenizer(recipe.model.text, train_set.captions, min_count=recipe.data.min_word_count)
    vocabulary_size = max(tokenizer_json.get_vocab(with_added_tokens=True).values()) + 1
    recipe = replace(
        recipe, model=replace(recipe.model, text=replace(recipe.model.text, vocabulary_size=vocabulary_size))
    )
    model = build_model(recipe, pretrained=True)
    tokenizer = _caption_tokenizer(tokenizer_json, tokenizer_options(recipe), out)
    preprocess = preprocess_of(recipe.model.trunk, recipe.data.resize)
    setup = Setup(
        recipe=recipe,
        model=model,
        preprocess=preprocess,
        tokenizer=tokenizer,
        regions=regions,
        cache=cache,
        progress=progress,
    )
    batches, validation = Batches(setup, train_set), Validation(setup, val_set)
    state = TrainingState(recipe, model, steps_per_epoch=batches.steps_per_epoch)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe.to_json(),
        "data": data_name,
        "dataset": {"name": dataset.name, "layout": dataset.layout, "pairs_sha256": pairs},
        "versions": versions(),
    }
    if resume:
        state.load(out / "last.safetensors")
        _write_description(out, description)  # the number of epochs may have grown

    for epoch in range(state.epoch, recipe.train.epochs):
        started = time.perf_counter()
        torch.manual_seed(seed_of_epoch(recipe, epoch))
        model.train()
        losses = []
        for step, batch in enumerate(batches.epoch(epoch)):
            scores_IM = batch.images_ID @ batch.captions_MD.T
            loss = matching_loss(scores_IM, batch.owner_M, batch.image_ids_I, recipe.loss, epoch=epoch)
            if not torch.isfinite(loss):
                raise _diverged(f"the loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}", state, out)
            state.step(loss)
            losses.append(loss.item())
            progress(f"epoch {epoch + 1}/{recipe.train.epochs}", step + 1, batches.steps_per_epoch)
        if not all(bool(weights.isfinite().all()) for weights in state.parameters.values()):
            raise _diverged(f"a weight became infinite or NaN in epoch {epoch + 1}", state, out)
        with state.averaged():
            recall = validation.recall()
            state.finish_epoch(recall.rsum)
            facts = {"epoch": epoch + 1, "val_rsum": round(recall.rsum, 4)}
            if epoch == 0:
                _start_run(out, model, tokenizer_json, description)
            if state.is_best:
                save_tensors(out / "best.safetensors", state.trained_tensors(), facts)
        line = {
            **facts,
            "loss": round(float(np.mean(losses)), 6),
            "learning_rate": state.learning_rate,
            "seconds": round(time.perf_counter() - started, 2),
            "val": recall.to_json(),
        }
        _append_line(out / "log.jsonl", line, keep=epoch)
        state.save(out / "last.safetensors")  # last of all: a kill before it repeats the epoch, log line included
        progress(
            f"epoch {epoch + 1}/{recipe.train.epochs}: loss {line['loss']:.4f}, val Rsum {recall.rsum:.1f} (best {state.best_rsum:.1f})",
            0,
            0,
        )
    return {"epoch": state.best_epoch, "val_rsum": state.best_rsum}


def _hash_of_pairs(*sets: Dataset) -> str:
    """The identity of the pairs that a run sees."""
    return sha256_of_bytes(json.dumps([[(item.id, item.captions) for item in one.items] for one in sets]).encode())


def _diverged(what: str, state: TrainingState, out: Path) -> DualmatchError:
    kept = f"{out} keeps epoch {state.epoch}" if state.epoch else "no epoch was finished, so nothing was written"
    return DualmatchError(f"{what}; {kept}. Try a smaller learning_rate.")


def _caption_tokenizer(tokenizer: Tokenizer, options: TokenizerOptions, out: Path) -> CaptionTokenizer:
    """The tokenizer as the runtime will read it; through a file beside `out`, which also shows in time that one can write there."""
    beside = next(folder for folder in out.absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{out.name}.", suffix=".part") as folder:
        save_tokenizer(tokenizer, Path(folder) / "tokenizer.json")
        return CaptionTokenizer(Path(folder) / "tokenizer.json", options)


def _regions(recipe: Recipe, items: Sequence[ImageItem]) -> RegionFile | None:
    needs = recipe.model.regional_path and recipe.model.regions.source == "precomputed"
    if not needs:
        return None
    if not recipe.data.regions:
        raise DualmatchError("the recipe takes precomputed regions; say where they are with --set data.regions=FILE.")
    regions = RegionFile(Path(recipe.data.regions))
    if regions.feature_dim != recipe.model.regions.feature_dim:
        raise DualmatchError(
            f"the recipe expects regions of {recipe.model.regions.feature_dim} channels, {recipe.data.regions} has {regions.feature_dim}; "
            f"use --set model.regions.feature_dim={regions.feature_dim}."
        )
    if recipe.model.regions.position_dim not in (0, regions.position_dim):
        raise DualmatchError(
            f"the recipe expects region positions of {recipe.model.regions.position_dim} numbers, {recipe.data.regions} has "
            f"{regions.position_dim or 'none'}; use --set model.regions.position_dim={regions.position_dim}."
        )
    for item in items:
        regions.features(item.id)  # one that is missing is an error now, not hours later
    return regions


def _check_resumable(recipe: Recipe, pairs: str, out: Path) -> None:
    """Refuse to resume a run with another recipe or other pairs; only the number of epochs may grow."""
    values = read_run_json(out)
    before = recipe_from_json(values["recipe"], f"{out / 'run.json'}: recipe")
    if not (out / "last.safetensors").is_file():
        raise DualmatchError(f"{out} has no finished epoch to resume from; remove it and start again.")
    if recipe.train.epochs < before.train.epochs:
        raise DualmatchError(
            f"the run in {out} was started for {before.train.epochs} epochs, {recipe.train.epochs} are fewer; resume it with as many or more."
        )
    same = replace(
        recipe,
        model=replace(recipe.model, text=replace(recipe.model.text, vocabulary_size=before.model.text.vocabulary_size)),
        train=replace(recipe.train, epochs=before.train.epochs),
    )
    if same != before:
        changed = ", ".join(_changed(before.to_json(), same.to_json()))
        raise DualmatchError(f"the run in {out} was started with another {changed}; resume it with the same options.")
    if values.get("dataset", {}).get("pairs_sha256") != pairs:
        raise DualmatchError(f"the run in {out} was started on other images or captions; resume it with the same data.")


def _changed(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the options that differ."""
    names = []
    for key, value in before.items():
        if isinstance(value, dict):
            names += _changed(value, after[key], f"{prefix}{key}.")
        elif value != after[key]:
            names.append(prefix + key)
    return names


def _start_run(out: Path, model: DSRAN, tokenizer: Tokenizer, description: dict[str, Any]) -> None:
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
