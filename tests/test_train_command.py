"""`dualmatch train`, and data that does not fit: one sentence, and nothing left behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from dualmatch.runtime.datasets import Dataset, ImageItem, open_dataset
from dualmatch.training.checkpoint import load_run, load_tensors
from dualmatch.training.evaluation import evaluate_run

from .tiny_runs import (
    LITE0,
    NO_TRUNK,
    REGIONS,
    SIZES,
    assert_same_tensors,
    first,
    left_behind,
    log_of,
    refusal,
    scenes,
    train_here,
    write_regions,
)


def test_data_that_does_not_fit_leaves_nothing(tmp_path):
    one = first(scenes(), "train", 1).items + scenes().select(["val"]).items
    one_image = Dataset(name="one", layout="scenes", items=one)
    assert "at least two are needed" in refusal(tmp_path, dataset=one_image)
    assert "has no split 'dev'" in refusal(tmp_path, 'data.val_splits=["dev"]')
    assert "trunk_weights" in refusal(tmp_path, "model.trunk.name=resnet152", "model.trunk.frozen=true")
    assert "there is no file" in refusal(
        tmp_path, "model.trunk.name=resnet152", "model.trunk.frozen=true", "trunk_weights=nowhere.safetensors"
    )
    assert "grid_size is 9" in refusal(tmp_path, "model.trunk.grid_size=9")
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = ImageItem(id="broken.png", split="train", captions=("a dog",), path=tmp_path / "broken.png")
    with_broken = Dataset(name="broken", layout="captions", items=(broken, *scenes().items))
    assert "broken.png is not an image" in refusal(tmp_path, dataset=with_broken)
    assert left_behind(tmp_path) == ["broken.png"]


@pytest.mark.parametrize("network", [NO_TRUNK, ("model.global_path=true",), LITE0])
def test_precomputed_regions_train(tmp_path, network):
    file = write_regions(tmp_path / "regions.npz", scenes())
    train_here(tmp_path, *network, *REGIONS, f"data.regions={file}", "train.epochs=2")
    log = log_of(tmp_path / "run")
    assert log[1]["loss"] < log[0]["loss"]
    run = load_run(tmp_path / "run")
    assert ("pixels" in run.model.image_encoder.input_names) == (network != NO_TRUNK)
    assert evaluate_run(tmp_path / "run", scenes().select(["val"])).rsum == pytest.approx(
        run.facts["val_rsum"], abs=1e-3
    )


def test_regions_with_positions_train(tmp_path):
    positions = np.random.default_rng(1).normal(size=(48, 3, 4)).astype(np.float32)
    file = write_regions(tmp_path / "regions.npz", scenes(), positions=positions)
    train_here(tmp_path, *NO_TRUNK, *REGIONS, "model.regions.position_dim=4", f"data.regions={file}", "train.epochs=1")
    assert load_run(tmp_path / "run").model.image_encoder.input_names == ("regions", "region_positions")


def test_regions_that_do_not_fit_leave_nothing(tmp_path):
    def refused(**content):
        file = write_regions(tmp_path / "regions.npz", content.pop("dataset", scenes()), **content)
        return refusal(tmp_path, *NO_TRUNK, *REGIONS, f"data.regions={file}")

    assert "--set data.regions=FILE" in refusal(tmp_path, *NO_TRUNK, *REGIONS)
    assert "there is no region file" in refusal(tmp_path, *NO_TRUNK, *REGIONS, "data.regions=nowhere.npz")
    assert "use --set model.regions.feature_dim=12" in refused(channels=12)
    assert "lacks the array 'filenames'" in refused(filenames=None)
    assert "no features for image 'val-" in refused(dataset=scenes().select(["train"]))
    file = write_regions(tmp_path / "regions.npz", scenes())
    message = refusal(tmp_path, *NO_TRUNK, *REGIONS, "model.regions.position_dim=4", f"data.regions={file}")
    assert "expects region positions of 4 numbers" in message
    assert left_behind(tmp_path) == ["regions.npz"]


@pytest.fixture
def dualmatch(monkeypatch, tmp_path, capsys):
    """Run `dualmatch …` in a folder of its own: (exit code, standard output, standard error)."""
    from dualmatch.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALMATCH_CACHE", str(tmp_path / "cache"))

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["dualmatch", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def photographs(tmp_path):
    """The tiny scenes as a folder in the `captions` layout."""
    folder = tmp_path / "photographs"
    (folder / "images").mkdir(parents=True)
    entries = []
    for item in first(scenes(), "train", 8).items + first(scenes(), "val", 4).items:
        (folder / "images" / f"{item.id}.png").write_bytes(item.read_bytes())
        entries.append({"filename": f"{item.id}.png", "split": item.split, "captions": list(item.captions)})
    (folder / "captions.json").write_text(json.dumps({"images": entries}))
    return folder


SETTINGS = [part for override in (*SIZES, "train.epochs=2") for part in ("--set", override)]


def test_train_from_the_command_line(dualmatch, photographs):
    code, out, err = dualmatch("train", "scenes-dsran-gru", "--data", photographs, "--out", "run", *SETTINGS)
    assert code == 0, err
    assert out.startswith("run: best epoch ")
    assert "epoch 2/2: loss " in err
    assert json.loads(Path("run/run.json").read_text())["data"] == str(photographs)
    best = float(out.rpartition(" ")[2])
    assert evaluate_run(Path("run"), open_dataset(photographs).select(["val"])).rsum == pytest.approx(best, abs=0.06)
    code, _, err = dualmatch("train", "scenes-dsran-gru", "--data", photographs, "--out", "run", *SETTINGS)
    assert code == 1
    assert "run exists already" in err
    more = ["--resume", *SETTINGS, "--set", "train.epochs=3"]
    code, _, err = dualmatch("train", "scenes-dsran-gru", "--data", photographs, "--out", "run", *more)
    assert code == 0
    assert len(log_of(Path("run"))) == 3


def test_the_list_of_recipes(dualmatch):
    code, out, _ = dualmatch("train", "--list")
    assert code == 0
    assert "scenes-dsran-gru\n    DSRAN with a GRU" in out
    assert "flickr8k-dsran-minilm\n" in out


@pytest.mark.parametrize("missing", ["RECIPE", "--data", "--out"])
def test_wrong_usage(dualmatch, missing):
    arguments = {"RECIPE": ["scenes-dsran-gru"], "--data": ["--data", "scenes"], "--out": ["--out", "run"]}
    code, _, err = dualmatch("train", *(part for name, parts in arguments.items() if name != missing for part in parts))
    assert code == 2
    assert f"{missing} is missing" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("scenes-dsran-gru", "--set", "train.epoch=3"), "has no option 'epoch'; did you mean 'epochs'?"),
        (("misspelt.toml",), "misspelt.toml.train has no option 'lerning_rate'; did you mean 'learning_rate'?"),
        (("scenes-dsran-gur",), "there is no recipe 'scenes-dsran-gur'"),
        (("scenes-dsran-gru", "--data", "empty"), "found an empty folder"),
        (("scenes-dsran-gru", "--data", "nowhere"), "there is no such folder"),
        (("scenes-dsran-gru", "--data", "no-images"), "there is no folder images/"),
        (("scenes-dsran-gru", "--data", "image-missing"), "1 of 1 listed images are not in"),
        (("scenes-dsran-gru", "--resume"), "there is no run folder"),
        (("flickr8k-dsran-minilm-resnet152", "--set", 'data.train_splits=["train"]'), "--set trunk_weights=FILE"),
        (("scenes-dsran-gru", "--out", "misspelt.toml/run"), "misspelt.toml"),
        (("scenes-dsran-gru", "--data", ""), "the data set has no name"),
        (("scenes-dsran-gru", "--set", 'data.val_splits=["test", "train"]'), "'train' is in train_splits and in val_splits"),
        (("scenes-dsran-gru", "--set", "data.regions=r.npz"), "data.regions is for a network with precomputed regions"),
        (("scenes-dsran-gru", "--set", "trunk_weights=w"), "trunk_weights is for the trunk resnet152"),
        (("scenes-dsran-gru", "--set", "word_weights=w"), "word_weights is for words with"),
    ],
)  # fmt: skip
def test_a_failure_is_one_sentence_and_leaves_nothing(dualmatch, tmp_path, arguments, sentence):
    (tmp_path / "misspelt.toml").write_text("[train]\nlerning_rate = 1e-3\n")
    for name in ("empty", "no-images", "image-missing/images"):
        (tmp_path / name).mkdir(parents=True)
    entry = {"filename": "a.jpg", "captions": ["a dog"]}
    for name in ("no-images", "image-missing"):
        (tmp_path / name / "captions.json").write_text(json.dumps({"images": [entry]}))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = dualmatch("train", "--data", "scenes", "--out", "run", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("dualmatch: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# VSRN.

VSRN_SIZES = (
    "model.embed_dim=16",
    "model.num_relation_layers=2",
    "model.text.word_dim=12",
    "model.captioning.hidden_dim=8",
    "model.captioning.word_dim=8",
    "model.captioning.max_length=12",
    "train.batch_size=16",
    "train.epochs=3",
)


def train_vsrn(folder, recipe, *overrides, **options):
    from dualmatch.training.loop import train
    from dualmatch.training.recipe import load_recipe

    chosen = load_recipe(recipe, [*VSRN_SIZES, *overrides])
    return train(chosen, scenes(), folder / "run", data_name="scenes", cache=folder / "cache", **options)


IN_GRAPH = ("scenes-vsrn", "model.trunk.image_size=32")


@pytest.mark.parametrize("weight", ["0.01", "0"])
def test_vsrn_trains_on_regions_pooled_in_the_graph(tmp_path, weight):
    best = train_vsrn(tmp_path, *IN_GRAPH, f"model.captioning.weight={weight}")
    log = log_of(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"]
    run = load_run(tmp_path / "run")
    assert run.model.image_encoder.input_names == ("pixels",)
    assert not any("captioner" in name for name in run.model.state_dict())
    assert evaluate_run(tmp_path / "run", scenes().select(["val"])).rsum == pytest.approx(best["val_rsum"])
    with_captions = "captioner.decoder.output.weight" in load_tensors(tmp_path / "run/last.safetensors")[0]
    assert with_captions == (weight != "0")


def test_vsrn_trains_on_regions_from_files_and_from_cached_maps(tmp_path):
    file = write_regions(tmp_path / "regions.npz", scenes())
    assert "--set data.regions=FILE" in vsrn_refusal(tmp_path, "flickr8k-vsrn", *SPLITS)
    named = ("flickr8k-vsrn", *SPLITS, f"data.regions={file}")
    assert "use --set model.feature_dim=10" in vsrn_refusal(tmp_path, *named)
    best = train_vsrn(tmp_path, *named, "model.feature_dim=10")
    assert load_run(tmp_path / "run").model.image_encoder.input_names == ("regions",)
    assert evaluate_run(tmp_path / "run", scenes().select(["val"])).rsum == pytest.approx(best["val_rsum"])
    (tmp_path / "cached").mkdir()
    frozen = ("model.trunk.name=efficientnet-lite0", "model.trunk.frozen=true", "model.trunk.image_size=64")
    best = train_vsrn(tmp_path / "cached", *IN_GRAPH, *frozen, "data.views=2")
    assert load_run(tmp_path / "cached/run").facts["val_rsum"] == pytest.approx(best["val_rsum"], abs=1e-4)
    assert (tmp_path / "cached/run/frozen.safetensors").is_file()


SPLITS = ('data.train_splits=["train"]', "model.text.word_dropout=0", "data.min_word_count=1")


def vsrn_refusal(folder, *arguments):
    from dualmatch.runtime.errors import DualmatchError

    with pytest.raises(DualmatchError) as caught:
        train_vsrn(folder, *arguments)
    assert "run" not in left_behind(folder)
    return str(caught.value)


def test_a_resumed_vsrn_is_the_uninterrupted_one(tmp_path):
    def stop(what, done, of):
        if what.startswith("epoch 2/") and of:
            raise KeyboardInterrupt

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train_vsrn(tmp_path / "whole", *IN_GRAPH)
    with pytest.raises(KeyboardInterrupt):
        train_vsrn(tmp_path / "parts", *IN_GRAPH, progress=stop)
    train_vsrn(tmp_path / "parts", *IN_GRAPH, resume=True)
    for name in ("best", "last"):
        assert_same_tensors(tmp_path / f"whole/run/{name}.safetensors", tmp_path / f"parts/run/{name}.safetensors")


def test_a_vsrn_run_exports_and_passes_its_gate(tmp_path):
    pytest.importorskip("onnxscript")
    from dualmatch.export.bundle import export_run

    train_vsrn(tmp_path, *IN_GRAPH, "train.epochs=1")
    result = export_run(load_run(tmp_path / "run"), scenes(), tmp_path / "bundle", unverified=True)
    assert result.verification.decision.verdict in ("pass", "too few pairs")
    assert [spec.name for spec in result.bundle.manifest.encoders["image"].inputs] == ["pixels"]
