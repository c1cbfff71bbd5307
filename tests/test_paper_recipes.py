"""A recipe for every row of the papers: numbers, the authors' settings, networks that build, first steps; and the list of them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dualmatch.models import DSRAN, VSRN
from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.training.catalogue import catalogue
from dualmatch.training.loop import train
from dualmatch.training.paper_recipes import ABLATIONS
from dualmatch.training.recipe import load_recipe, recipe_names
from dualmatch.training.recipe_files import ROWS
from dualmatch.training.vocabulary import build_tokenizer
from dualmatch.training.word_weights import load_word_weights

from .data_layouts import write_karpathy, write_scan, write_vsepp
from .demo_fixture import dualmatch
from .test_imports import EXTRAS, checked
from .tiny_runs import scenes, write_regions

TARGETS = [(name, target) for name, row in ROWS.items() for target in row.targets]
# Their six numbers sum to a tenth more or less than the paper prints.
ROUNDED = {"Table III, line 1", "Table III, line 6", "Table III, line 10", "Table III, line 12"}


@pytest.mark.parametrize(("name", "target"), TARGETS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(TARGETS)])
def test_a_papers_numbers_are_recalls_that_sum_to_the_printed_rsum(name, target):
    for side in (target.i2t, target.t2i):
        assert 0 < side[0] < side[1] < side[2] < 100
    assert target.i2t[0] > target.t2i[0]
    off = round(abs(sum(target.i2t) + sum(target.t2i) - target.rsum), 1)
    assert off == (0.1 if target.table in ROUNDED else 0.0)


def test_rsums_of_the_tables():
    def rsums(name):
        return {(t.test_set, t.models, t.rerank): t.rsum for t in ROWS[name].targets}

    assert rsums("dsran-bert-flickr30k") == {
        ("Flickr30K", 1, 0): 500.3,
        ("Flickr30K", 1, 15): 504.8,
        ("Flickr30K", 2, 0): 507.6,
        ("Flickr30K", 2, 15): 511.0,
    }
    assert rsums("dsran-gru-coco")["COCO 1K", 2, 15] == 526.2
    assert rsums("dsran-bert-coco")["COCO 5K", 1, 0] == 418.2
    assert rsums("vsrn-coco") == {("COCO 1K", 2, 0): 516.8, ("COCO 5K", 2, 0): 415.7}  # as DSRAN's Table I sums them
    assert rsums("vsrn-flickr30k") == {("Flickr30K", 2, 0): 482.6}
    lines = [ROWS[f"dsran-{'bert' if n < 9 else 'gru'}-flickr30k-table3-{n}"].targets[0].rsum for n in range(1, 17)]
    assert lines == [396.4, 409.0, 439.1, 491.6, 476.9, 495.6, 495.9, 500.3, 372.9, 404.3, 444.7, 470.9, 464.2, 481.8, 480.2, 492.6]  # fmt: skip


def test_re_ranking_changes_only_image_to_text():
    for row in ROWS.values():
        plain = {(t.test_set, t.models): t for t in row.targets if not t.rerank}
        for target in row.targets:
            assert target.t2i == plain[target.test_set, target.models].t2i
            assert sum(target.i2t) >= sum(plain[target.test_set, target.models].i2t)


# (optimiser, rate, epochs, step, batch, clip, K): official-code.md, sections 7 and 13.
SETTINGS = {
    "dsran-gru-flickr30k": ("adam", 2e-4, 16, 8, 128, 2.0, 2),
    "dsran-bert-flickr30k": ("bertadam", 2e-5, 12, 6, 128, 1.0, 2),
    "dsran-gru-coco": ("adam", 2e-4, 18, 9, 300, 2.0, 2),
    "dsran-bert-coco": ("bertadam", 2e-5, 18, 9, 320, 1.0, 4),
    "vsrn-coco": ("adam", 2e-4, 30, 15, 128, 2.0, None),
    "vsrn-flickr30k": ("adam", 2e-4, 30, 10, 128, 2.0, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_authors_settings(name):
    recipe = load_recipe(name)
    options = recipe.train
    assert SETTINGS[name] == (
        options.optimiser,
        options.learning_rate,
        options.epochs,
        options.step_epochs,
        options.batch_size,
        options.clip_norm,
        getattr(recipe.model, "joint_graphs", None),
    )
    assert options.schedule == "step"
    assert options.epoch_over == "pairs"
    assert options.warmup == (0.1 if "bert" in name else 0.0)
    assert (recipe.loss.kind, recipe.loss.margin, recipe.loss.hardest, recipe.loss.num_negatives) == (
        "hinge",
        0.2,
        True,
        1,
    )
    assert not recipe.loss.mask_same_image


def test_every_row_says_only_what_differs():
    for name, row in ROWS.items():
        if not row.base:
            continue
        recipe, base = load_recipe(name), load_recipe(row.base)
        same = replace(recipe, name=base.name, description=base.description)
        if row.group.endswith("epochs"):
            assert same.model == base.model
            assert recipe.train == replace(base.train, epochs=recipe.train.epochs, step_epochs=recipe.train.epochs // 2)
        elif "Table III" in row.group:
            assert same.train == base.train
            assert same.loss == base.loss


@pytest.mark.parametrize("number", range(1, 17))
def test_table_3_builds_what_its_line_says(number):
    text = "bert" if number < 9 else "gru"
    recipe = load_recipe(f"dsran-{text}-flickr30k-table3-{number}")
    is_global, is_regional, separate, joint = ABLATIONS[(number - 1) % 8]
    text_config = replace(recipe.model.text, encoder="gru", pretrained="none", vocabulary_size=9)
    with torch.device("meta"):
        network = DSRAN(replace(recipe.model, text=text_config), None).image_encoder
    assert ((network.grid is not None), (network.regions is not None)) == (is_global, is_regional)
    assert (network.grid_graph is not None) == (is_global and separate)
    assert (network.region_graph is not None) == (is_regional and separate)
    assert len(network.joint_graphs) == (2 if joint else 0)
    # Both paths without JSR meet in one gated fusion layer; with it, the K = 2 joint vectors do.
    assert len(network.fusions) == int(is_global and is_regional)
    assert network.input_names == (("pixels",) if is_global else ()) + (
        () if not is_regional else ("regions", "region_positions") if text == "bert" else ("regions",)
    )
    assert recipe.model.text.encoder == text


def test_every_network_builds():
    """On the meta device, where tensors have shapes and no values; the trunks have tests of their own."""
    networks = {replace(load_recipe(name).model, text=replace(load_recipe(name).model.text, vocabulary_size=99, num_layers=1, pretrained="none")) for name in recipe_names()}  # fmt: skip
    assert len(networks) > 40
    with torch.device("meta"):
        for config in networks:
            network = DSRAN(config, None) if hasattr(config, "joint_graphs") else VSRN(config, None)
            assert all(parameter.is_meta for parameter in network.parameters())


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """By recipe's kind: data sets in the layouts that hold what it needs. SCAN's files have no photographs, and no split restval."""
    folder = tmp_path_factory.mktemp("layouts")
    scan = [open_dataset(write_scan(folder / "scan"))]
    return {
        ("dsran", "flickr30k"): [open_dataset(write_karpathy(folder / "f30k"))],
        ("dsran", "coco"): [
            open_dataset(write_karpathy(folder / "karpathy", coco=True)),
            open_dataset(write_vsepp(folder / "vsepp")),
        ],
        ("vsrn", "flickr30k"): scan,
        ("vsrn", "coco"): scan,
    }


def test_every_recipe_names_splits_that_its_data_has(layouts):
    names = [name for name in recipe_names() if not name.startswith(("scenes", "flickr8k"))]
    assert len(names) > 60
    for name in names:
        recipe = load_recipe(name)
        for dataset in layouts[recipe.network, "coco" if "coco" in name else "flickr30k"]:
            for split in (*recipe.data.train_splits, *recipe.data.val_splits):
                assert dataset.select([split]).items, (name, split)


SMALL_DSRAN = (
    "model.trunk.image_size=32", "model.embed_dim=16", "model.num_heads=2", "model.text.word_dim=12", "model.text.pretrained=none",
    "train.batch_size=16", "train.epochs=1", "data.min_word_count=1", 'data.train_splits=["train"]', 'data.val_splits=["val"]',
)  # fmt: skip
FILES = ("model.regions.feature_dim=10", "model.regions.position_dim=0")
PIXELS = ("model.trunk.name=tiny", "model.trunk.frozen=false")
BERT = ("model.text.num_layers=1", "model.text.num_heads=2", "model.text.intermediate_dim=16")
SMALL_VSRN = (
    "model.feature_dim=10", "model.embed_dim=16", "model.text.word_dim=12", "model.captioning.hidden_dim=8", "model.captioning.word_dim=8",
    "train.batch_size=16", "train.epochs=1", 'data.val_splits=["val"]', "data.min_word_count=1", "model.l2_epsilon=1e-6",
)  # fmt: skip
FAMILIES = {
    "dsran-gru-flickr30k": (*SMALL_DSRAN, *FILES, *PIXELS),
    "dsran-bert-coco": (*SMALL_DSRAN, *FILES, *PIXELS, *BERT),
    "dsran-bert-flickr30k-table3-3": (*SMALL_DSRAN, *FILES, *BERT),
    "dsran-bert-flickr30k-table3-6": (*SMALL_DSRAN, *FILES, *PIXELS, *BERT),
    "dsran-bert-flickr30k-without-batchnorm": (*SMALL_DSRAN, *FILES, *PIXELS, *BERT),
    "dsran-bert-flickr30k-modern": (*SMALL_DSRAN, *FILES, *PIXELS, *BERT, "model.regions.num_regions=3"),
    "vse++-coco": (*SMALL_DSRAN, *PIXELS),
    "vsrn-coco-table4-rrr": SMALL_VSRN,
    "vsrn-flickr30k": SMALL_VSRN,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains(name, tmp_path):
    regions = write_regions(tmp_path / "regions.npz", scenes())
    recipe = load_recipe(name, [*FAMILIES[name], f"data.regions={regions}"])
    best = train(recipe, scenes(), tmp_path / "run", data_name="scenes", cache=tmp_path / "cache", workers=0)
    assert best["epoch"] == 1
    assert best["val_rsum"] > 0


def test_another_number_of_regions_is_refused(tmp_path):
    regions = write_regions(tmp_path / "regions.npz", scenes())
    overrides = [*FAMILIES["dsran-bert-flickr30k-modern"], "model.regions.num_regions=5", f"data.regions={regions}"]
    with pytest.raises(
        DualmatchError, match=r"expects 5 regions an image, .* has 3; use --set model.regions.num_regions=3"
    ):
        train(
            load_recipe("dsran-bert-flickr30k-modern", overrides),
            scenes(),
            tmp_path / "run",
            data_name="scenes",
            cache=tmp_path,
        )


# Pretrained words from files.


def tiny(name, *overrides):
    recipe = load_recipe(name, [*FAMILIES[name], "model.text.pretrained=file", *overrides])
    return recipe.model, recipe


def test_glove_starts_the_words_that_it_knows(tmp_path):
    glove = tmp_path / "glove.txt"
    glove.write_text("beach " + " ".join(["0.5"] * 12) + "\nzzz " + " ".join(["1"] * 12) + "\n")
    config, recipe = tiny("dsran-gru-flickr30k", f"word_weights={glove}")
    tokenizer = build_tokenizer(config.text, ["a beach"], min_count=1, word_weights=recipe.word_weights)
    model = DSRAN(replace(config, text=replace(config.text, vocabulary_size=6)), None)
    before = model.text_encoder.words.embed.weight.detach().clone()
    load_word_weights(model, recipe.word_weights, tokenizer)
    after, row = model.text_encoder.words.embed.weight, tokenizer.token_to_id("beach")
    assert torch.equal(after[row], torch.full((12,), 0.5))
    assert torch.equal(after[torch.arange(6) != row], before[torch.arange(6) != row])


def test_a_berts_folder_starts_the_words_and_cuts_the_captions(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nbeach\n")
    config, recipe = tiny("dsran-bert-flickr30k-table3-6", f"word_weights={folder}")
    tokenizer = build_tokenizer(config.text, (), min_count=1, word_weights=recipe.word_weights)
    assert tokenizer.encode("A beach!").ids == [2, 4, 5, 1, 3]
    config = replace(config, text=replace(config.text, vocabulary_size=6))
    torch.manual_seed(1)
    source, target = DSRAN(config, None), DSRAN(config, None)
    published = {f"bert.{name}": value for name, value in source.text_encoder.words.bert.state_dict().items()}
    published = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in published.items()}
    save_file({**published, "cls.predictions.bias": torch.ones(6)}, folder / "model.safetensors")
    load_word_weights(target, recipe.word_weights, tokenizer)
    for name, value in target.text_encoder.words.state_dict().items():
        assert torch.equal(value, source.text_encoder.words.state_dict()[name]), name
    save_file({"bert.embeddings.word_embeddings.weight": torch.ones(6, 12)}, folder / "model.safetensors")
    with pytest.raises(DualmatchError, match="belongs to another network: it lacks"):
        load_word_weights(target, recipe.word_weights, tokenizer)


@pytest.mark.parametrize(
    ("name", "weights", "sentence"),
    [
        ("dsran-gru-flickr30k", "", r"a GloVe text file by --set word_weights=PATH, .* model\.text\.pretrained=none"),
        ("dsran-gru-flickr30k", "nowhere.txt", "names nowhere.txt, which is not a GloVe text file"),
        ("dsran-bert-coco", "nowhere", "which is not a folder with a BERT's model.safetensors and vocab.txt"),
    ],
)
def test_word_weights_that_are_not_there(name, weights, sentence, tmp_path):
    regions = write_regions(tmp_path / "regions.npz", scenes())
    _, recipe = tiny(name, f"word_weights={weights}", f"data.regions={regions}")
    with pytest.raises(DualmatchError, match=sentence):
        train(recipe, scenes(), tmp_path / "run", data_name="scenes", cache=tmp_path)
    assert not (tmp_path / "run").exists()


# The list.


def test_the_list_shows_every_recipe_once_in_groups():
    entries = catalogue()
    assert sorted(entry["name"] for entry in entries) == recipe_names()
    groups = [entry["group"] for entry in entries]
    assert len(set(groups)) == sum(one != other for one, other in zip(groups, [None, *groups], strict=False))
    assert all(entry["description"].endswith((".", "FILE.")) for entry in entries)


def test_the_list_on_the_command_line():
    found = dualmatch("train", "bert-flickr30k-table3-6", "--list", "--json").json
    assert [entry["name"] for entry in found] == ["dsran-bert-flickr30k-table3-6"]
    (target,) = found[0]["targets"]
    assert target["i2t"] == {"r1": 72.8, "r5": 93.4, "r10": 97.1}
    assert target["rsum"] == 495.6
    text = dualmatch("train", "dsran-gru-coco", "--list").out
    assert "Table I, COCO 1K, two models, re-ranked K1 = 15: 80.4 96.7 98.7 64.2 90.4 95.8, Rsum 526.2" in text
    assert dualmatch("train", "zzz", "--list").code == 2
    assert dualmatch("train", "scenes-vsrn", "--data", "scenes", "--out", "x", "--json").code == 2
    evaluate = [t["evaluate"] for e in json.loads(dualmatch("train", "--list", "--json").out) for t in e["targets"]]
    assert "dualmatch runtime evaluate BUNDLE --data DATA --split test --ensemble BUNDLE2 --rerank 15" in evaluate
    assert any("--split testall --protocol five-folds --ensemble BUNDLE2" in one for one in evaluate)


def test_the_list_needs_no_extra():
    code = "from dualmatch.cli.main import main\nsys.argv[1:] = ['train', '--list']\nmain()"
    assert "Rsum 511.0" in checked(code, blocked=EXTRAS)
