"""Ablations: each recipe differs in what its name says and builds without the rest; studies run, resume and are summarised; sweeps are drawn."""

import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from dualmatch.models import DSRAN
from dualmatch.models.config import DsranConfig, TrunkConfig
from dualmatch.runtime.datasets import Dataset, ImageItem, make_scenes
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_file
from dualmatch.runtime.hard_pairs import told_apart
from dualmatch.runtime.recall import evaluate as recall_of
from dualmatch.training import study as study_module
from dualmatch.training.catalogue import catalogue
from dualmatch.training.checkpoint import load_run
from dualmatch.training.evaluation import embed_from_cache, evaluate_run, write_embeddings
from dualmatch.training.folds import parts_of
from dualmatch.training.paper_recipes import ABLATIONS
from dualmatch.training.recipe import load_recipe
from dualmatch.training.resume import changed_options, is_finished
from dualmatch.training.studies import LINES, STUDIES, WHOLE, Study
from dualmatch.training.study import check_runs, run_study
from dualmatch.training.study_summary import embeddings_path, markdown, run_folder, summarise
from dualmatch.training.sweep import draw_sweep

from .demo_fixture import dualmatch
from .tiny_models import image_config, image_encoder
from .tiny_runs import LITE0, SIZES, first, scenes, train_here

# The catalogue.

MODULES = ("model.global_path", "model.regional_path", "model.separate_relations", "model.joint_relations")


def test_every_row_of_a_study_is_a_recipe_and_listed():
    listed = {entry["name"]: entry for entry in catalogue()}
    for study in STUDIES.values():
        assert len(set(study.rows.values())) == len(study.rows)
        assert {label for contrast in study.contrasts for label in contrast} <= set(study.rows)
        for name in study.rows.values():
            assert listed[name]["needs"] or name == "scenes-vsrn"


def test_the_global_line_on_photographs_is_the_linear_head():
    linear, line = (
        load_recipe(name) for name in ("flickr8k-linear-minilm-resnet152", STUDIES["flickr8k"].rows["global"])
    )
    changed = {option for option in changed_options(linear.to_json(), line.to_json()) if option.startswith("model.")}
    # What belongs to regions or to graphs, and the network has neither.
    assert changed == {
        "model.regions.source",
        "model.regions.stage",
        "model.joint_graphs",
        "model.norm",
        "model.zero_residual",
    }
    shapes = []
    for recipe in (linear, line):
        text = replace(recipe.model.text, encoder="gru", pretrained="none", frozen=False, vocabulary_size=9)
        with torch.device("meta"):
            encoder = DSRAN(replace(recipe.model, text=text), None).image_encoder
        shapes.append({name: value.shape for name, value in encoder.state_dict().items()})
    assert shapes[0] == shapes[1]
    assert not any("graph" in name for name in shapes[0])


@pytest.mark.parametrize(("study", "base"), [("scenes", "scenes-dsran-gru"), ("flickr8k", "flickr8k-dsran-boxes")])
def test_a_line_differs_in_its_modules_alone_and_builds_no_other(study, base):
    whole = load_recipe(base)
    for label, modules in zip(LINES, ABLATIONS, strict=True):
        recipe = load_recipe(STUDIES[study].rows[label])
        assert [bool(value) for value in modules] == [
            label.startswith(("global", "both")),
            label.startswith(("regional", "both")),
            "SSR" in label,
            "JSR" in label,
        ]
        expected = {name for name, on in zip(MODULES, modules, strict=True) if not on}
        without_trunk = {"model.trunk.name"} if study == "flickr8k" and not modules[0] else set()
        changed = set(changed_options(whole.to_json(), recipe.to_json())) - {"name", "description"}
        assert changed == expected | without_trunk, label
        text = replace(recipe.model.text, encoder="gru", pretrained="none", frozen=False, vocabulary_size=9)
        with torch.device("meta"):
            encoder = DSRAN(replace(recipe.model, text=text), None).image_encoder
        is_global, is_regional, separate, joint = modules
        assert (encoder.grid is not None, encoder.regions is not None) == (is_global, is_regional)
        assert (encoder.grid_graph is not None, encoder.region_graph is not None) == (
            is_global and separate,
            is_regional and separate,
        )
        assert len(encoder.joint_graphs) == (2 if joint else 0)
        # Both paths without JSR meet in the gated fusion layer; with it, the two joint graphs do; one path has nothing to meet.
        assert len(encoder.fusions) == int(is_global and is_regional)


def test_the_rows_about_places_and_curves_change_what_they_say():
    def changed(name, base):
        options = changed_options(load_recipe(base).to_json(), load_recipe(name).to_json())
        return set(options) - {"name", "description"}

    base = "scenes-dsran-gru"
    places = STUDIES["scenes-places"].rows
    assert changed(places["global, SSR, positions"], places["global, SSR"]) == {"model.grid_positions"}
    assert changed(places["regional, SSR, no positions"], places["regional, SSR"]) == {"model.regions.position_dim"}
    assert changed(places["regional, SSR, small regions"], places["regional, SSR"]) == {"model.regions.levels"}
    assert changed(places[f"{WHOLE}, positions"], places[WHOLE]) == {"model.grid_positions"}
    assert changed(f"{base}-k4", f"{base}-k1") == {"model.joint_graphs"}
    assert changed(f"{base}-k2", base) == set()
    assert changed(f"{base}-with-batchnorm", base) == set()
    for norm in ("with-layernorm", "without-batchnorm"):
        assert changed(f"{base}-{norm}", base) == {"model.norm"}
    modern = changed("flickr8k-dsran-boxes-modern", "flickr8k-dsran-boxes")
    assert {"model.image_pooling", "loss.num_negatives", "model.drop_nodes"} <= modern
    assert not any(option.startswith(("model.trunk", "data.")) for option in modern)


# Grid positions.


@pytest.mark.parametrize("paths", ["grid", "grid-pooled"])
def test_a_grid_node_knows_its_place_only_when_it_is_told(paths):
    for told in (False, True):
        torch.manual_seed(0)
        encoder = image_encoder(image_config(paths, "no-jsr", grid_positions=told))
        maps = torch.randn(2, 96, 4, 4)
        left, mirrored = (encoder.embed({"final": one}) for one in (maps, maps.flip(3)))
        assert torch.allclose(left, mirrored, atol=1e-5) != told


def test_grid_positions_without_a_grid_are_refused():
    with pytest.raises(DualmatchError, match="grid_positions are for the global path"):
        DsranConfig(trunk=TrunkConfig(name="tiny", frozen=False), global_path=False, grid_positions=True)


# Hard pairs.


def test_hard_pairs_are_told_apart_by_the_better_score_alone():
    data = make_scenes(num_train=0, num_val=0, num_test=8)  # pairs 0-1 and 4-5 differ in the relation
    owners = np.array(data.caption_image)
    similarity = np.zeros((8, 40), np.float32)
    similarity[owners, np.arange(40)] = 1
    np.testing.assert_array_equal(told_apart(similarity, data, "relation")[[0, 1, 4, 5]], 1)
    assert np.isnan(told_apart(similarity, data, "relation")[[2, 3, 6, 7]]).all()
    np.testing.assert_array_equal(told_apart(similarity, data, "setting")[[2, 3, 6, 7]], 1)
    similarity[1, 0] = 2  # the partner of image 0 takes its first caption
    similarity[0, 1] = 0  # a tie tells nothing apart
    similarity[7, 2] = 9  # an image that is no partner does not matter
    assert told_apart(similarity, data, "relation")[0] == pytest.approx(0.6)
    with pytest.raises(DualmatchError, match="has no hard pairs that differ in the colour"):
        told_apart(similarity, data, "colour")
    with pytest.raises(DualmatchError, match="lacks one of its two images"):
        told_apart(similarity[:1, :5], first(data, "test", 1), "relation")


# The summary, on runs that were never trained.

TWO = Study(
    description="two rows", rows={"weak": "weak-recipe", "strong": "strong-recipe"}, contrasts=(("weak", "strong"),)
)


def pretended(out, recipe, seed, data, noise, part=None):
    """A run folder whose embeddings retrieve the worse, the more noise there is."""
    folder = run_folder(out, recipe, seed, part)
    folder.mkdir(parents=True)
    chance = np.random.default_rng(seed)
    images = chance.normal(size=(len(data.items), 16))
    captions = images[data.caption_image] + noise * chance.normal(size=(len(data.caption_image), 16))
    images, captions = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, captions))
    (folder / "best.safetensors").write_bytes(recipe.encode())
    checkpoint = sha256_of_file(folder / "best.safetensors")
    images_f4, captions_f4 = images.astype("f4"), captions.astype("f4")
    write_embeddings(embeddings_path(folder, data.splits), data, images_f4, captions_f4, checkpoint=checkpoint)
    log = [{"epoch": epoch, "val_rsum": rsum} for epoch, rsum in ((1, 10.0), (2, 30.0), (3, 20.0))]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return images @ captions.T


def test_the_summary_is_the_runs_figures(tmp_path):
    data = make_scenes(num_train=0, num_val=0, num_test=80)
    for seed in (0, 1, 2):
        pretended(tmp_path, "weak-recipe", seed, data, noise=1.6)
    strong = [pretended(tmp_path, "strong-recipe", seed, data, noise=0.6) for seed in (0, 1)]
    found = summarise(TWO, data, tmp_path, seeds=[0, 1, 2], splits=["test"])
    weak_row, strong_row = found["rows"]
    assert (weak_row["seeds"], strong_row["seeds"]) == ([0, 1, 2], [0, 1])
    rsums = [run["rsum"] for run in weak_row["runs"]]
    assert weak_row["rsum"]["mean"] == pytest.approx(np.mean(rsums))
    assert weak_row["rsum"]["std"] == pytest.approx(np.std(rsums, ddof=1))
    for run, similarity in zip(strong_row["runs"], strong, strict=True):
        assert run["relation"] == pytest.approx(100 * np.nanmean(told_apart(similarity, data, "relation")))
        assert (run["best_epoch"], run["val_rsum"], run["epochs"]) == (2, 30.0, 3)
    (contrast,) = found["contrasts"]
    assert contrast["seeds"] == [0, 1]  # those that both rows have
    gain = np.mean([s["rsum"] - w["rsum"] for s, w in zip(strong_row["runs"], weak_row["runs"], strict=False)])
    assert contrast["rsum"]["difference"] == pytest.approx(gain)
    assert 0 < contrast["rsum"]["low"] < gain < contrast["rsum"]["high"]
    assert contrast["setting"]["difference"] == pytest.approx(
        np.mean([s["setting"] - w["setting"] for s, w in zip(strong_row["runs"], weak_row["runs"], strict=False)])
    )
    assert found["missing"] == ["strong, seed 2"]
    text = markdown(found)
    assert f"| weak | 3 | {np.mean(rsums):.1f} ± {np.std(rsums, ddof=1):.1f} |" in text
    assert "| weak | strong | 2 | **+" in text
    assert "Not there: strong, seed 2." in text


def test_the_papers_own_difference_stands_beside_ours(tmp_path):
    data = photographs(12)
    data = replace(data, items=tuple(replace(item, split="test") for item in data.items))
    rows = {"global": "a", "global, SSR": "b", "VSRN": "c"}
    study = replace(STUDIES["scenes"], rows=rows, contrasts=(("global", "global, SSR"), ("VSRN", "global")))
    for recipe in rows.values():
        pretended(tmp_path, recipe, 0, data, noise=1.0)
    found = summarise(study, data, tmp_path, seeds=[0], splits=["test"])
    # Table III, lines 9 and 10: it prints sums of 372.9 and 404.3.
    assert [one["printed"] for one in found["contrasts"]] == [31.4, None]
    text = markdown(found)
    assert "Rsum | printed |" in text
    assert "| +31.4 |" in text
    assert STUDIES["flickr8k"].printed_gain("both, SSR", WHOLE) == 4.7
    assert STUDIES["scenes-curves"].printed_gain("K = 1", "K = 4") is None


def test_a_row_against_itself_differs_by_nothing(tmp_path):
    data = make_scenes(num_train=0, num_val=0, num_test=20)
    for recipe in TWO.rows.values():
        pretended(tmp_path, recipe, 0, data, noise=1.0)
    (contrast,) = summarise(TWO, data, tmp_path, seeds=[0], splits=["test"])["contrasts"]
    for what in ("rsum", "relation", "setting"):
        assert contrast[what]["difference"] == 0
        assert contrast[what]["low"] < 0 < contrast[what]["high"]  # among ten pairs something may still change


def test_data_without_pairs_has_no_columns_for_them(tmp_path):
    items = tuple(ImageItem(id=f"{n}.jpg", split="test", captions=("a", "b")) for n in range(12))
    data = Dataset(name="photographs", layout="captions", items=items)
    pretended(tmp_path, "weak-recipe", 0, data, noise=1.0)
    found = summarise(TWO, data, tmp_path, seeds=[0], splits=["test"])
    assert "relation" not in found["rows"][0]
    assert found["rows"][0]["rsum"]["std"] is None
    assert "told apart" not in markdown(found)


def test_a_summary_of_nothing_or_of_other_images_is_refused(tmp_path):
    data = make_scenes(num_train=0, num_val=0, num_test=8)
    with pytest.raises(DualmatchError, match="holds no evaluated run"):
        summarise(TWO, data, tmp_path, seeds=[0], splits=["test"])
    pretended(tmp_path, "weak-recipe", 0, data, noise=1.0)
    with pytest.raises(DualmatchError, match="embeddings of other images"):
        summarise(TWO, make_scenes(num_train=0, num_val=0, num_test=10), tmp_path, seeds=[0], splits=["test"])
    (run_folder(tmp_path, "weak-recipe", 0) / "best.safetensors").write_bytes(b"trained further")
    with pytest.raises(DualmatchError, match="made by another checkpoint"):
        summarise(TWO, data, tmp_path, seeds=[0], splits=["test"])


# Running.

TINY = Study(
    description="tiny", rows={"global": "scenes-dsran-gru-table3-9", "both": "scenes-dsran-gru-table3-16"}, contrasts=(("global", "both"),)
)  # fmt: skip
OVERRIDES = [*SIZES, "train.epochs=2"]


def run_tiny(out, **options):
    arguments = {
        "data_name": "scenes",
        "cache": out / "cache",
        "seeds": [0],
        "splits": ["test"],
        "overrides": OVERRIDES,
    }
    run_study(TINY, scenes(), out / "study", workers=0, **(arguments | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny study with one seed, trained once."""
    out = tmp_path_factory.mktemp("study")
    run_tiny(out)
    return out


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_study_evaluates_as_evaluate_checkpoint_does(trained):
    found = summarise(TINY, scenes(), trained / "study", seeds=[0], splits=["test"])
    for row in found["rows"]:
        recall = evaluate_run(run_folder(trained / "study", row["recipe"], 0), scenes().select(["test"]))
        assert row["runs"][0]["rsum"] == pytest.approx(recall.rsum)
    assert found["missing"] == []


def test_a_frozen_trunk_runs_once_for_all_runs(tmp_path, monkeypatch):
    train_here(tmp_path, *LITE0, "train.epochs=1")
    test, cache = scenes().select(["test"]), tmp_path / "cache"
    images, captions = embed_from_cache(tmp_path / "run", test, cache)
    monkeypatch.setattr("dualmatch.models.efficientnet_lite.EfficientNetLite0.forward", None)
    again, _ = embed_from_cache(tmp_path / "run", test, cache)
    np.testing.assert_array_equal(images, again)
    monkeypatch.undo()
    evaluate_run(tmp_path / "run", test, save_embeddings=tmp_path / "pixels.npz")
    with np.load(tmp_path / "pixels.npz") as pixels:
        np.testing.assert_allclose(images, pixels["images"], atol=5e-3)  # float16 features
        np.testing.assert_allclose(captions, pixels["captions"], atol=1e-5)


def test_a_run_of_another_network_is_refused_in_a_sentence(trained):
    folder = run_folder(trained / "study", TINY.rows["both"], 0)
    recipe = load_recipe("scenes-vsrn", ["train.epochs=2"])
    with pytest.raises(DualmatchError, match=r"was started with another .*network"):
        is_finished(recipe, scenes(), folder)
    assert not is_finished(recipe, scenes(), folder.parent / "seed9")
    longer = load_recipe(TINY.rows["both"], [*OVERRIDES, "train.epochs=3"])
    assert not is_finished(longer, scenes(), folder)


def counted(monkeypatch):
    """The runs that are trained and evaluated from now on, as `verb recipe/seed`."""
    done = []
    train, embed = study_module.train, study_module.embed_from_cache

    def training(recipe, dataset, folder, **options):
        done.append(f"train {folder.parent.name}")
        return train(recipe, dataset, folder, **options)

    def embedding(folder, *arguments, **options):
        done.append(f"evaluate {folder.parent.name}")
        return embed(folder, *arguments, **options)

    monkeypatch.setattr(study_module, "train", training)
    monkeypatch.setattr(study_module, "embed_from_cache", embedding)
    return done


def test_what_is_finished_is_not_done_again(copied, monkeypatch):
    done = counted(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    run_tiny(copied)
    assert done == []
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()} == before
    embeddings_path(run_folder(copied / "study", TINY.rows["both"], 0), ["test"]).write_bytes(b"PK half an archive")
    shutil.rmtree(run_folder(copied / "study", TINY.rows["global"], 0))
    run_tiny(copied)
    both, alone = TINY.rows["both"], TINY.rows["global"]
    assert done == [f"train {alone}", f"evaluate {alone}", f"evaluate {both}"]


def test_an_interrupted_run_continues_to_the_same_figures(trained, copied, monkeypatch):
    folder = run_folder(copied / "study", TINY.rows["global"], 0)
    shutil.rmtree(folder)
    monkeypatch.setattr("dualmatch.training.loop._Run._validated", interrupted_after(1))
    with pytest.raises(KeyboardInterrupt):
        run_tiny(copied)
    monkeypatch.undo()
    run_tiny(copied)
    figures = [
        summarise(TINY, scenes(), out / "study", seeds=[0], splits=["test"])["rows"][0]["runs"]
        for out in (trained, copied)
    ]
    assert figures[0] == figures[1]


def interrupted_after(epochs):
    """A validation that is killed after so many epochs."""
    from dualmatch.training.loop import _Run

    whole = _Run._validated

    def validated(self, epoch, done):
        if epoch >= epochs:
            raise KeyboardInterrupt
        return whole(self, epoch, done)

    return validated


def test_another_study_in_the_folder_is_refused(copied):
    with pytest.raises(DualmatchError, match=r"was started with another model\.embed_dim"):
        run_tiny(copied, overrides=[*OVERRIDES, "model.embed_dim=32"])
    with pytest.raises(DualmatchError, match="lern"):
        run_tiny(copied, overrides=[*OVERRIDES, "train.lern=3"])


def test_a_table_holds_no_run_with_other_options(copied):
    arguments = {"seeds": [0], "splits": ["test"], "overrides": OVERRIDES}
    check_runs(TINY, scenes(), copied / "study", **arguments)
    path = run_folder(copied / "study", TINY.rows["global"], 0) / "run.json"
    values = json.loads(path.read_text())
    values["recipe"]["loss"]["temperature"] = 0.07
    path.write_text(json.dumps(values))
    with pytest.raises(DualmatchError, match=r"table3-9/seed0 was started with another loss\.temperature"):
        check_runs(TINY, scenes(), copied / "study", **arguments)
    done = dualmatch("bench", "ablation", "scenes", "--data", "scenes", "--out", copied / "study", "--no-train")
    assert (done.code, "was started with" in done.err) == (1, True)


def test_a_studys_run_has_its_curves(trained):
    assert (run_folder(trained / "study", TINY.rows["global"], 0) / "curves.svg").is_file()


def test_what_cannot_be_trained_leaves_no_folder(tmp_path, small_run):
    arguments = (
        "--data",
        small_run.data,
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path,
        "--split",
        "test",
        "--seeds",
        "0",
    )
    done = dualmatch("bench", "ablation", "flickr8k", *arguments, "--set", 'data.train_splits=["train"]')
    assert (done.code, "resnet152 trunk needs its weights" in done.err) == (1, True)
    assert not (tmp_path / "out").exists()


def test_the_command(copied):
    out = copied / "study"
    shutil.rmtree(out / "scenes-vsrn", ignore_errors=True)
    done = dualmatch("bench", "ablation", "scenes", "--data", "scenes", "--out", out, "--seeds", "7", "--no-train")
    assert (done.code, "holds no evaluated run" in done.err) == (1, True)
    assert dualmatch("bench", "ablation", "nothing", "--data", "scenes", "--out", out).code == 2
    for wrong in (
        ("--seeds", "one"),
        ("--seeds", "0,00"),
        ("--set", "train.seed=3"),
        ("--folds", "5", "--set", 'data.val_splits=["test"]'),
        ("--no-train", "--row", "global"),
    ):
        assert dualmatch("bench", "ablation", "scenes", "--data", "scenes", "--out", out, *wrong).code == 2


# Sweeps.


def test_a_sweep_is_drawn_from_runs(tmp_path):
    for graphs, seed in ((1, 0), (1, 1), (2, 0)):
        folder = tmp_path / f"k{graphs}-{seed}"
        train_here(
            folder, f"model.joint_graphs={graphs}", f"train.seed={seed}", "train.epochs=2", cache=tmp_path / "cache"
        )
    runs = [tmp_path / name / "run" for name in ("k1-0", "k1-1", "k2-0")]
    found = draw_sweep(runs, "model.joint_graphs", tmp_path / "k.svg")
    best = [max(json.loads(line)["val_rsum"] for line in (run / "log.jsonl").open()) for run in runs]
    assert found == {"1": best[:2], "2": best[2:]}
    assert ET.parse(tmp_path / "k.svg").getroot().tag.endswith("svg")
    with pytest.raises(DualmatchError, match="all 2 runs have"):
        draw_sweep(runs[:2], "model.joint_graphs", tmp_path / "x.svg")
    with pytest.raises(DualmatchError, match=r"differ in model\.joint_graphs too"):
        draw_sweep(runs, "train.seed", tmp_path / "x.svg")
    with pytest.raises(DualmatchError, match=r"no option 'model\.k'"):
        draw_sweep(runs[:2], "model.k", tmp_path / "x.svg")
    numbers = (tmp_path / "k.svg").read_text()
    assert ">1.4</text>" in numbers  # an axis of numbers has round ones between
    train_here(tmp_path / "none", "model.norm=none", "train.epochs=2", cache=tmp_path / "cache")
    draw_sweep([runs[2], tmp_path / "none" / "run"], "model.norm", tmp_path / "norm.svg")
    words = (tmp_path / "norm.svg").read_text()
    assert ">layer</text>" in words
    assert ">none</text>" in words
    assert ">0.5</text>" not in words  # there is nothing between two words
    done = dualmatch("bench", "sweep", *runs, "--over", "model.joint_graphs", "--out", tmp_path / "again.svg")
    assert f"model.joint_graphs = 2: best validation Rsum {best[2]:.1f}" in done.out
    for wrong, why in (
        ([*runs, runs[0]], "given twice"),
        ([runs[0], _changed(runs[0], tmp_path / "longer", "run.json", '"epochs": 2', '"epochs": 3')], "2 of its 3 epochs"),
        ([runs[0], _changed(runs[2], tmp_path / "other", "run.json", '"pairs_sha256": "', '"pairs_sha256": "0')], "other images"),
        ([runs[0], _changed(runs[2], tmp_path / "cut", "log.jsonl", '"loss"', "")], "is damaged"),
    ):  # fmt: skip
        with pytest.raises(DualmatchError, match=why):
            draw_sweep(wrong, "train.epochs" if "epochs" in why else "model.joint_graphs", tmp_path / "x.svg")
    with pytest.raises(DualmatchError, match=r"call it x\.svg, not x\.png"):
        draw_sweep(runs, "model.joint_graphs", tmp_path / "x.png")
    assert not (tmp_path / "x.svg").exists()


def _changed(run, copy, name, old, new):
    shutil.copytree(run, copy)
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new))
    return copy


# Folds.


def photographs(count, **options):
    items = tuple(ImageItem(id=f"{n}.jpg", split="none", captions=("a", "b"), **options) for n in range(count))
    return Dataset(name="photographs", layout="captions", items=items)


def test_folds_test_every_image_once_and_never_train_on_it():
    data = photographs(53)
    parts = parts_of(data, ["test"], 5)
    tested = [[item.id for item in part.compared.items] for part in parts]
    assert sorted(name for ids in tested for name in ids) == sorted(item.id for item in data.items)
    assert {len(ids) for ids in tested} == {10, 11}
    for part, ids in zip(parts, tested, strict=True):
        splits = {split: {item.id for item in part.dataset.select([split]).items} for split in ("train", "val")}
        assert splits["train"] | splits["val"] | set(ids) == {item.id for item in data.items}
        assert len(splits["train"]) + len(splits["val"]) + len(ids) == 53  # no image is in two
        assert len(splits["val"]) == 8
    # Which fold an image is in follows from ids, not from the order in which a reader gives them.
    turned = parts_of(replace(data, items=data.items[::-1]), ["test"], 5)
    assert [{item.id for item in part.compared.items} for part in turned] == [set(ids) for ids in tested]
    # Not every fifth in the data's order, which may be the order in which photographs were taken.
    assert tested[0] != [item.id for item in data.items if item.id in (f"{n}.jpg" for n in range(0, 53, 5))]


def test_folds_are_refused_where_they_would_mean_nothing():
    with pytest.raises(DualmatchError, match="hard pairs, which folds would tear apart"):
        parts_of(scenes(), ["test"], 2)
    with pytest.raises(DualmatchError, match="49 images are too few for 5 folds"):
        parts_of(photographs(49), ["test"], 5)


def test_a_summary_of_folds_ranks_each_by_itself_and_pairs_all_images(tmp_path):
    data = photographs(40)
    parts = parts_of(data, ["test"], 4)
    rsums = {}
    for recipe, noise in (("weak-recipe", 1.6), ("strong-recipe", 0.6)):
        for part in parts:
            similarity = pretended(tmp_path, recipe, 0, part.compared, noise, part)
            rsums.setdefault(recipe, []).append(recall_of(similarity, captions_per_image=2).rsum)
    found = summarise(TWO, data, tmp_path, seeds=[0], splits=["test"], folds=4)
    weak, strong = found["rows"]
    assert weak["runs"][0]["rsum"] == pytest.approx(np.mean(rsums["weak-recipe"]))
    assert "average of 4 folds" in found["protocol"]
    assert "40 images" in found["protocol"]
    (contrast,) = found["contrasts"]
    assert contrast["rsum"]["difference"] == pytest.approx(strong["rsum"]["mean"] - weak["rsum"]["mean"])
    assert contrast["rsum"]["low"] > 0
    shutil.rmtree(run_folder(tmp_path, "strong-recipe", 0, parts[3]))  # a seed counts when all its folds are there
    assert summarise(TWO, data, tmp_path, seeds=[0], splits=["test"], folds=4)["missing"] == ["strong, seed 0"]


def test_a_study_in_folds_trains_each_fold_on_the_others(tmp_path):
    items = tuple(replace(item, tags=()) for item in scenes().items)
    data = replace(scenes(), name="photographs", layout="captions", items=items)
    study = TINY.only(["global"])
    arguments = {"data_name": "x", "cache": tmp_path / "cache", "seeds": [3], "splits": ["test"], "workers": 0}
    overrides = [*SIZES, "train.epochs=1"]
    run_study(study, data, tmp_path / "out", folds=2, overrides=overrides, **arguments)
    runs = sorted(path.name for path in (tmp_path / "out" / TINY.rows["global"]).iterdir())
    assert runs == ["fold0of2-seed3", "fold1of2-seed3"]
    found = summarise(TINY, data, tmp_path / "out", seeds=[3], splits=["test"], folds=2)
    for fold, part in enumerate(parts_of(data, ["test"], 2)):
        folder = tmp_path / "out" / TINY.rows["global"] / f"fold{fold}of2-seed3"
        with np.load(folder / "embeddings-test.npz") as arrays:
            assert arrays["image_ids"].tolist() == [item.id for item in part.compared.items]
        assert is_finished(load_run(folder).recipe, part.dataset, folder)
    assert found["rows"][0]["runs"][0]["protocol"]["images"] == 48


def test_rows_of_a_study_are_chosen_by_label(tmp_path):
    assert list(TINY.only(["both"]).rows) == ["both"]
    with pytest.raises(DualmatchError, match="no row 'bth'; it has global; both"):
        TINY.only(["bth"])
    arguments = ("bench", "ablation", "scenes", "--data", "scenes", "--out", tmp_path)
    assert dualmatch(*arguments, "--folds", "5", "--split", "val").code == 2
    done = dualmatch(*arguments, "--row", "all")
    assert (done.code, "no row 'all'" in done.err) == (1, True)
