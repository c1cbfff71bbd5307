"""The training loop: epochs of pairs, validation by recall, the best epoch by Rsum, resume at the last finished epoch.

Every random draw of an epoch follows from (seed, epoch) alone, so a resumed run continues exactly as an uninterrupted one.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from dualmatch.models import DSRAN
from dualmatch.models.trunks import preprocess_of
from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.tokenizer import CaptionTokenizer

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
    """Train `recipe` on `dataset` into the run folder `out`; see `checkpoint` for what it holds.

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
    if resume:
        recipe = _recipe_to_resume(recipe, out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DualmatchError(f"{out} exists already; use --resume to continue a run, or give another --out.")
    regions = _regions(recipe)
    torch.manual_seed(recipe.train.seed)
    tokenizer_json = build_tokenizer(recipe.model.text, train_set.captions, min_count=recipe.data.min_word_count)
    vocabulary_size = max(tokenizer_json.get_vocab(with_added_tokens=True).values()) + 1
    recipe = replace(
        recipe, model=replace(recipe.model, text=replace(recipe.model.text, vocabulary_size=vocabulary_size))
    )
    model = build_model(recipe, pretrained=True)
    if not resume:
        _start_run(out, recipe, model, tokenizer_json, dataset=dataset, data_name=data_name)
    tokenizer = CaptionTokenizer(out / "tokenizer.json", tokenizer_options(recipe))
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
    if resume:
        state.load(out / "last.safetensors")

    for epoch in range(state.epoch, recipe.train.epochs):
        started = time.perf_counter()
        torch.manual_seed(seed_of_epoch(recipe, epoch))
        model.train()
        losses = []
        for step, batch in enumerate(batches.epoch(epoch)):
            scores_IM = batch.images_ID @ batch.captions_MD.T
            loss = matching_loss(scores_IM, batch.owner_M, batch.image_ids_I, recipe.loss, epoch=epoch)
            if not torch.isfinite(loss):
                raise DualmatchError(
                    f"the loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}; the last good epoch is kept in {out}. "
                    "Try a smaller learning_rate."
                )
            state.step(loss)
            losses.append(loss.item())
            progress(f"epoch {epoch + 1}/{recipe.train.epochs}", step + 1, batches.steps_per_epoch)
        with state.averaged():
            recall = validation.recall()
            state.finish_epoch(recall.rsum)
            facts = {"epoch": epoch + 1, "val_rsum": round(recall.rsum, 4)}
            if state.is_best:
                save_tensors(out / "best.safetensors", state.trained_tensors(), facts)
        state.save(out / "last.safetensors")
        line = {
            **facts,
            "loss": round(float(np.mean(losses)), 6),
            "learning_rate": state.learning_rate,
            "seconds": round(time.perf_counter() - started, 2),
            "val": recall.to_json(),
        }
        _append_line(out / "log.jsonl", line, keep=epoch)
        progress(
            f"epoch {epoch + 1}/{recipe.train.epochs}: loss {line['loss']:.4f}, val Rsum {recall.rsum:.1f} (best {state.best_rsum:.1f})",
            0,
            0,
        )
    return {"epoch": state.best_epoch, "val_rsum": state.best_rsum}


def _regions(recipe: Recipe) -> RegionFile | None:
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
    return regions


def _recipe_to_resume(recipe: Recipe, out: Path) -> Recipe:
    """Refuse to resume a run with another recipe; only the number of epochs may grow."""
    before = recipe_from_json(read_run_json(out)["recipe"], f"{out / 'run.json'}: recipe")
    if not (out / "last.safetensors").is_file():
        raise DualmatchError(f"{out} has no finished epoch to resume from; remove it and start again.")
    same = replace(
        recipe,
        model=replace(recipe.model, text=replace(recipe.model.text, vocabulary_size=before.model.text.vocabulary_size)),
        train=replace(recipe.train, epochs=before.train.epochs),
    )
    if same != before:
        raise DualmatchError(
            f"the run in {out} was started with other options than the recipe asks for now; resume it with the same ones."
        )
    return recipe


def _start_run(
    out: Path, recipe: Recipe, model: DSRAN, tokenizer_json: Tokenizer, *, dataset: Dataset, data_name: str
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer_json, out / "tokenizer.json")
    frozen = frozen_names(model)
    if frozen:
        save_tensors(
            out / "frozen.safetensors",
            {name: value for name, value in model.state_dict().items() if name in frozen},
            {},
        )
    description = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe.to_json(),
        "data": data_name,
        "dataset": {"name": dataset.name, "layout": dataset.layout},
        "versions": versions(),
    }
    write_atomically(out / "run.json", json.dumps(description, indent=2) + "\n")


def _append_line(path: Path, line: dict[str, Any], *, keep: int) -> None:
    """Write the log's first `keep` lines and this one: after a kill between checkpoint and log, no epoch stands twice."""
    lines = path.read_text(encoding="utf-8").splitlines()[:keep] if path.is_file() else []
    write_atomically(path, "\n".join([*lines, json.dumps(line)]) + "\n")
