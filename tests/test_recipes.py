"""Recipes: every shipped one loads, and what is wrong is named with the nearest right key."""

import json
import re
from dataclasses import replace

import pytest

from dualmatch.runtime.errors import DualmatchError
from dualmatch.training.recipe import Recipe, load_recipe, recipe_from_json, recipe_names

SCENES = "scenes-dsran-gru"


def written(tmp_path, text, name="mine.toml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(name, overrides=()):
    with pytest.raises(DualmatchError) as caught:
        load_recipe(name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_promised_recipes_are_there():
    assert {SCENES, "flickr8k-dsran-minilm", "flickr8k-dsran-minilm-resnet152"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_json(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith((".", "FILE."))
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json())), "back") == recipe


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("flickr8k")])
def test_flickr8k_recipes_train_on_train_and_none_and_choose_on_val(name):
    data = load_recipe(name).data
    assert set(data.train_splits) == {"train", "none"}
    assert data.val_splits == ("val",)


def test_a_file_is_named_after_itself(tmp_path):
    recipe = load_recipe(written(tmp_path, '[model.trunk]\nname = "tiny"\nfrozen = false\n[train]\nepochs = 2\n'))
    assert (recipe.name, recipe.train.epochs, recipe.model.trunk.name) == ("mine", 2, "tiny")
    assert load_recipe(written(tmp_path, 'name = "other"\n')).name == "other"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("[train]\nepoch = 3\n", ("mine.toml.train has no option 'epoch'", "did you mean 'epochs'?")),
        ("[trian]\nepochs = 3\n", ("mine.toml has no option 'trian'", "did you mean 'train'?")),
        ('[model.text]\nencodr = "gru"\n', ("mine.toml.model.text has no option 'encodr'", "'encoder'?")),
        (
            "[zzzzz]\nx = 1\n",
            ("has no option 'zzzzz'", "it takes name, description, trunk_weights, word_weights, network, model,"),
        ),
        ("model = 3\n", ("mine.toml.model must be a table, got 3",)),
        ('[train]\nepochs = "3"\n', ("mine.toml.train.epochs must be of type int, got '3'",)),
        ("[train]\nepochs = 3.5\n", ("must be of type int, got 3.5",)),
        ('[loss]\nkind = "triplet"\n', ("mine.toml.loss.kind must be one of 'hinge', 'infonce', got 'triplet'",)),
        ("[model]\njoint_graphs = 3\n", ("model.joint_graphs must be one of 1, 2, 4, got 3",)),
        ("[model]\njoint_graphs = true\n", ("model.joint_graphs must be one of 1, 2, 4, got True",)),
        ("[train]\nepochs = 0\n", ("mine.toml.train: epochs must lie between 1 and",)),
        ("[train\n", ("mine.toml is not valid TOML",)),
        ("[train]\nepochs = 1\nepochs = 2\n", ("mine.toml is not valid TOML",)),
        (b'description = "\xff"\n', ("mine.toml is not valid TOML",)),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, text, sentences):
    message = refusal(written(tmp_path, text))
    assert all(sentence in message for sentence in sentences), message


@pytest.mark.parametrize("name", ["flickr", "", ".", "../recipes/scenes-dsran-gru", "nowhere.toml"])
def test_a_recipe_that_is_not_there(name):
    message = refusal(name)
    assert "`dualmatch train --list` shows" in message
    assert SCENES in message or "did you mean" in message


def test_a_misspelt_recipe_gets_the_nearest_names():
    assert "did you mean dsran-bert-flickr30k-table3-6 or" in refusal("dsran-bert-flickr30k-tabel3-6")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.epochs=3", lambda r: r.train.epochs == 3),
        ("train.learning_rate=1e-4", lambda r: r.train.learning_rate == 1e-4),
        ("train.learning_rate = 1", lambda r: r.train.learning_rate == 1.0),
        ("loss.kind=hinge", lambda r: r.loss.kind == "hinge"),
        ('loss.kind="hinge"', lambda r: r.loss.kind == "hinge"),
        ("loss.hardest=false", lambda r: r.loss.hardest is False),
        ("model.trunk.image_size=64", lambda r: r.model.trunk.image_size == 64),
        ('data.train_splits=["train", "test"]', lambda r: r.data.train_splits == ("train", "test")),
        ("model.regions.levels=[1,4]", lambda r: r.model.regions.levels == (1, 4)),
        (
            "trunk_weights=/some where/it's=here.safetensors",
            lambda r: r.trunk_weights.endswith("it's=here.safetensors"),
        ),
        ("description=", lambda r: r.description == ""),
    ],
)
def test_set(override, read):
    recipe = load_recipe(SCENES, [override])
    assert read(recipe)
    assert recipe != load_recipe(SCENES)


def test_the_last_set_wins_and_the_rest_stays():
    recipe = load_recipe(SCENES, ["train.epochs=3", "train.epochs=4"])
    before = load_recipe(SCENES)
    assert recipe == replace(before, train=replace(before.train, epochs=4))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epochs", "--set takes key=value, for example train.epochs=3; got 'train.epochs'"),
        ("=3", "--set takes key=value"),
        ("train.epochs=three", "train.epochs must be of type int, got 'three'"),
        ("train.epoch=3", "did you mean 'epochs'?"),
        ("trian.epochs=3", "did you mean 'train'?"),
        ("train=3", ".train must be a table, got 3"),
        ("description.epochs=3", "'description' is an option, not a table"),
        ("data.train_splits=train,none", ".data.train_splits must be a list, got 'train,none'"),
        ("train..epochs=3", "has no option ''"),
    ],
)
def test_a_wrong_set_is_refused(override, sentence):
    assert sentence in refusal(SCENES, [override])


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("train.batch_size=1", "batch_size"),
        ("train.captions_per_image=0", "captions_per_image"),
        ("train.learning_rate=0", "learning_rate"),
        ("train.learning_rate=nan", "learning_rate"),
        ("train.learning_rate=inf", "learning_rate"),
        ("train.graph_learning_rate=-1", "graph_learning_rate"),
        ("train.weight_decay=-1", "weight_decay"),
        ("train.step_epochs=0", "step_epochs"),
        ("train.warmup=0.95", "warmup"),
        ("train.clip_norm=-1", "clip_norm"),
        ("train.average=1", "average"),
        ("train.accumulate=0", "accumulate"),
        ("train.accumulate=33", "accumulate"),
        ("train.save_steps=-1", "save_steps"),
        ("train.seed=-1", "seed"),
        ("loss.margin=-0.1", "margin"),
        ("loss.temperature=0", "temperature"),
        ("loss.warmup_epochs=-1", "warmup_epochs"),
        ("data.views=0", "views"),
        ("data.crop_min_area=0", "crop_min_area"),
        ("data.min_word_count=0", "min_word_count"),
        ("data.val_splits=[]", "val_splits"),
        ("model.trunk.image_size=8", "image_size"),
        ("model.embed_dim=130", "embed_dim"),
    ],
)
def test_ranges(override, name):
    assert re.search(rf"\b{name}\b.*(must|need)", refusal(SCENES, [override]))


@pytest.mark.parametrize(
    ("recipe", "overrides", "sentence"),
    [
        (SCENES, ("train.epoch_over=pairs",), "captions_per_image is for"),
        (SCENES, ("train.optimiser=adam",), "weight_decay is for"),
        (SCENES, ("data.views=2",), "data.augment = true"),
        ("flickr8k-dsran-minilm", ("data.augment=true",), "data.views"),
        (SCENES, ("model.trunk.frozen=true",), "set frozen = false"),
        (SCENES, ("model.trunk.name=none",), "without a trunk"),
    ],
)
def test_options_that_contradict_each_other_are_refused(recipe, overrides, sentence):
    assert sentence in refusal(recipe, overrides)


def test_a_recipe_says_only_what_differs_from_its_base(tmp_path):
    written(tmp_path, f'base = "{SCENES}"\ndescription = "Mine."\n[train]\nepochs = 3\n', "below.toml")
    mine = load_recipe(written(tmp_path, 'base = "below.toml"\n[model.regions]\nlevels = [1, 2]\n'))
    shipped = load_recipe(SCENES)
    assert (mine.name, mine.description, mine.train.epochs) == ("mine", "Mine.", 3)
    assert mine.model == replace(shipped.model, regions=replace(shipped.model.regions, levels=(1, 2)))
    assert mine.train == replace(shipped.train, epochs=3)
    assert mine.data == shipped.data


def test_a_base_that_cannot_be_is_refused(tmp_path):
    assert "there is no recipe 'nowhere'" in refusal(written(tmp_path, 'base = "nowhere"\n'))
    assert "mine.toml.base must be a recipe's name or file, got 3" in refusal(written(tmp_path, "base = 3\n"))
    written(tmp_path, 'base = "mine.toml"\n', "other.toml")
    assert "is its own base" in refusal(written(tmp_path, 'base = "other.toml"\n'))


def test_a_vsrn_recipe_takes_vsrns_options():
    recipe = load_recipe("scenes-vsrn", ["model.num_relation_layers=2"])
    assert recipe.model == replace(load_recipe("scenes-vsrn").model, num_relation_layers=2)
    assert "model has no option 'joint_graphs'" in refusal("scenes-vsrn", ["model.joint_graphs=2"])
    assert "network must be one of 'dsran', 'vsrn', got 'clip'" in refusal(SCENES, ["network=clip"])
    assert 'measure must be "cosine"' in refusal("scenes-vsrn", ["model.measure=order"])
    assert recipe.region_dims is None
    assert load_recipe("flickr8k-vsrn").region_dims == (1280, 0)


def test_a_recipe_needs_a_name():
    with pytest.raises(DualmatchError, match=r"run\.json lacks the option 'name'"):
        recipe_from_json({}, "run.json")
    assert recipe_from_json({"name": "n"}, "run.json") == Recipe(name="n")
