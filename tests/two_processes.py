"""What two processes and one are compared on: gradients of one batch and a short run. Run by torchrun, it writes its results to a folder."""

import sys
from pathlib import Path

import torch

from dualmatch.runtime.datasets import make_scenes
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.tokenizer import CaptionTokenizer
from dualmatch.training.batches import Batches, Setup
from dualmatch.training.checkpoint import build_model, save_tensors, tokenizer_options
from dualmatch.training.distributed import Group, process_group
from dualmatch.training.features import no_progress
from dualmatch.training.loop import train
from dualmatch.training.objective import Objective, build_captioner
from dualmatch.training.recipe import load_recipe
from dualmatch.training.step import Differentiator
from dualmatch.training.vocabulary import build_tokenizer, save_tokenizer

SIZES = ("model.embed_dim=16", "model.text.word_dim=12", "train.batch_size=13", "train.epochs=2")
PAIRS = ("train.epoch_over=pairs", "train.captions_per_image=1")
# Without dropout and BatchNorm, which see each process's share alone.
DSRAN = (
    "scenes-dsran-gru",
    "model.norm=layer",
    "model.num_heads=2",
    "model.trunk.name=none",
    "model.global_path=false",
    "model.regions.source=precomputed",
    "model.regions.feature_dim=10",
    "model.regions.position_dim=0",
)
VSRN = (
    "scenes-vsrn",
    "model.trunk.name=none",
    "model.trunk.frozen=true",
    "model.feature_dim=10",
    "model.num_relation_layers=0",
    "model.captioning.weight=0.5",
    "model.captioning.hidden_dim=8",
    "model.captioning.word_dim=8",
    "model.captioning.max_length=12",
    "model.captioning.dropout=0",
)
CASES = {
    "infonce": DSRAN,
    "hinge": (*DSRAN, *PAIRS, "loss.kind=hinge"),
    "all-negatives": (*DSRAN, "loss.kind=hinge", "loss.hardest=false", "loss.mask_same_image=false"),
    "authors-padding": (*DSRAN, "model.pad_policy=authors"),
    "vsrn": VSRN,
}
# Shares of 3 and 4 images: one that can be divided into two parts of two or more, and one that cannot.
UNEVEN = ("train.batch_size=7",)


def gradients(folder, name, group, *, accumulate=1, extra=()):
    """Parameters' gradients after the batch of the first plan, with its losses."""
    recipe_name, *overrides = CASES[name]
    recipe = load_recipe(recipe_name, [*overrides, *SIZES, *extra, f"data.regions={folder / 'regions.npz'}"])
    data = make_scenes(num_train=20, num_val=4, num_test=0).select(["train"])
    vocabulary = build_tokenizer(recipe.model.text, data.captions, min_count=1)
    if group.is_main:
        save_tokenizer(vocabulary, folder / "tokenizer.json")
    group.collect(None)
    tokenizer = CaptionTokenizer(folder / "tokenizer.json", tokenizer_options(recipe))
    recipe = load_recipe(
        recipe_name, [*overrides, *SIZES, *extra, f"model.text.vocabulary_size={tokenizer.vocabulary_size}"]
    )
    torch.manual_seed(0)
    model = build_model(recipe, pretrained=True)
    objective = Objective(model, build_captioner(model)).train()
    setup = Setup(
        recipe=recipe,
        model=model,
        preprocess=None,
        tokenizer=tokenizer,
        regions=RegionFile(folder / "regions.npz"),
        cache=folder,
        progress=no_progress,
    )
    batches = Batches(setup, data, share=(group.rank, group.size))
    differentiator = Differentiator(
        objective, group, recipe.loss, scaler=torch.amp.GradScaler("cpu", enabled=False), accumulate=accumulate
    )
    plan = next(batches.plans(0))
    losses = differentiator.gradients(batches.load(plan), torch.tensor(plan.owner), torch.tensor(plan.images), epoch=0)
    found = {key: value.grad.clone() for key, value in objective.named_parameters()}
    return found | {"matching": torch.tensor(losses.matching), "captioning": torch.tensor(losses.captioning)}


def short_run(folder, out):
    """Two epochs; each process works on its share."""
    recipe_name, *overrides = CASES["infonce"]
    recipe = load_recipe(recipe_name, [*overrides, *SIZES, f"data.regions={folder / 'regions.npz'}"])
    data = make_scenes(num_train=20, num_val=4, num_test=0)
    return train(recipe, data, out, data_name="scenes", cache=folder / "cache")


def main(folder):
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as group:
        for name in CASES:
            save_tensors(folder / f"{name}-{group.rank}.safetensors", gradients(folder, name, group), {})
        both = gradients(folder, "vsrn", group, accumulate=2)
        save_tensors(folder / f"vsrn-accumulated-{group.rank}.safetensors", both, {})
        uneven = gradients(folder, "infonce", group, accumulate=2, extra=UNEVEN)
        save_tensors(folder / f"uneven-{group.rank}.safetensors", uneven, {})
        assert group.collect(group.rank) == list(range(group.size)) != [0]
        assert isinstance(group, Group)
        short_run(folder, folder / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
