"""A run's folder: what it holds, and that foreign or damaged files are refused in one sentence."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from dualmatch.models import DSRAN
from dualmatch.runtime.datasets import make_scenes
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_file
from dualmatch.training.checkpoint import count_parameters, frozen_names, load_run, load_tensors, save_tensors
from dualmatch.training.encode import encode_captions, encode_images
from dualmatch.training.evaluation import evaluate_run
from dualmatch.training.recipe import recipe_from_json

from .tiny_runs import BERT, LITE0, first, scenes, tiny_recipe, train_here

FILES = ["best.safetensors", "last.safetensors", "log.jsonl", "run.json", "tokenizer.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    train_here(folder)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory):
    """A run over a frozen trunk and a frozen word encoder."""
    folder = tmp_path_factory.mktemp("frozen")
    few = make_scenes(num_train=6, num_val=4, num_test=0)
    options = (*LITE0, *BERT, "model.text.frozen=true", "data.views=3", "train.batch_size=4", "train.epochs=2")
    train_here(folder, *options, dataset=few)
    return folder / "run"


def refusal(run):
    with pytest.raises(DualmatchError) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(run, **changes):
    values = json.loads((run / "run.json").read_text()) | changes
    (run / "run.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_the_folder_holds_what_is_promised(trained):
    assert sorted(path.name for path in trained.iterdir()) == FILES
    description = json.loads((trained / "run.json").read_text())
    assert recipe_from_json(description["recipe"], "run").train == tiny_recipe().train
    assert description["recipe"]["model"]["text"]["vocabulary_size"] > 50
    assert (description["data"], description["dataset"]["layout"]) == ("scenes", "scenes")
    assert description["versions"]["torch"] == torch.__version__
    assert len((trained / "log.jsonl").read_text().splitlines()) == 3


def test_no_file_is_a_pickle(trained, frozen_run):
    for path in (*trained.iterdir(), *frozen_run.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
        else:
            for line in (
                path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            ):
                json.loads(line)


def test_frozen_tensors_are_written_once(frozen_run, trained):
    assert sorted(path.name for path in frozen_run.iterdir()) == sorted([*FILES, "frozen.safetensors"])
    frozen, _ = load_tensors(frozen_run / "frozen.safetensors")
    best, _ = load_tensors(frozen_run / "best.safetensors")
    model = load_run(frozen_run).model
    assert set(frozen) == frozen_names(model)
    assert not set(frozen) & set(best)
    assert set(frozen) | set(best) == set(model.state_dict())
    assert {name.split(".")[1] for name in frozen} == {"trunk", "words"}
    assert not frozen_names(load_run(trained).model)


def test_a_frozen_run_opens_with_the_trunk_it_was_trained_with(frozen_run):
    from dualmatch.models.trunks import build_trunk, hash_of_weights

    run = load_run(frozen_run)
    fresh = build_trunk(run.recipe.model.trunk)
    assert hash_of_weights(run.model.image_encoder.trunk) == hash_of_weights(fresh)
    val = make_scenes(num_train=6, num_val=4, num_test=0).select(["val"])
    # Validation ran on float16 features; from pixels the ranks of these four images are the same.
    assert evaluate_run(frozen_run, val).rsum == pytest.approx(run.facts["val_rsum"], abs=0.01)


def test_an_opened_run(trained):
    run = load_run(trained)
    assert isinstance(run.model, DSRAN)
    assert not any(module.training for module in run.model.modules())
    assert {value.dtype for value in run.model.state_dict().values()} == {torch.float32, torch.int64}
    assert run.checkpoint_hash == sha256_of_file(trained / "best.safetensors")
    assert run.data == "scenes"
    assert set(run.facts) == {"epoch", "val_rsum"}
    assert run.tokenizer.vocabulary_size == run.recipe.model.text.vocabulary_size
    assert count_parameters(run.model)[1] == 0


def test_an_opened_run_retrieves_as_in_training(trained, tmp_path):
    import numpy as np

    recall = evaluate_run(trained, scenes().select(["val"]), save_embeddings=tmp_path / "embeddings.npz")
    assert recall.rsum == pytest.approx(load_run(trained).facts["val_rsum"], abs=1e-3)
    with np.load(tmp_path / "embeddings.npz") as arrays:
        assert arrays["images"].shape == (8, 16)
        assert arrays["captions"].shape == (40, 16)
        assert arrays["image_ids"].tolist() == [item.id for item in scenes().select(["val"]).items]
        assert arrays["caption_image"].tolist() == [i // 5 for i in range(40)]
        np.testing.assert_allclose(np.linalg.norm(arrays["images"], axis=1), 1, rtol=1e-5)


def test_embeddings_do_not_depend_on_the_batch(trained):
    import numpy as np

    run, data = load_run(trained), first(scenes(), "test", 5)
    images = [encode_images(run.model, run.preprocess, data.items, batch_size=size) for size in (5, 2)]
    captions = [encode_captions(run.model, run.tokenizer, data.captions, batch_size=size) for size in (25, 1)]
    np.testing.assert_allclose(*images, atol=1e-6)
    np.testing.assert_allclose(*captions, atol=1e-6)


def test_tensors_and_facts_come_back(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(7), "c": torch.zeros(0)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"epoch": 3, "name": "é"})
    loaded, facts = load_tensors(tmp_path / "x.safetensors")
    assert facts == {"epoch": 3, "name": "é"}
    assert {name: value.tolist() for name, value in loaded.items()} == {n: v.tolist() for n, v in tensors.items()}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("model.embed_dim=32",), "has shape"),
        (("model.joint_graphs=4",), "tensors too many, the first 'image_encoder.fusions.1."),
        (("model.joint_graphs=1",), "lacks"),
        (BERT, "lacks"),
    ],
)
def test_another_networks_checkpoint_is_refused(run, tmp_path, overrides, sentence):
    train_here(tmp_path / "other", *overrides, "train.epochs=1")
    shutil.copy(tmp_path / "other" / "run" / "best.safetensors", run)
    message = refusal(run)
    assert "best.safetensors belongs to another network" in message
    assert sentence in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_refused(run, keep):
    best = run / "best.safetensors"
    best.write_bytes(best.read_bytes()[:keep])
    assert "best.safetensors is damaged" in refusal(run)


def test_missing_files_are_named(run):
    (run / "tokenizer.json").unlink()
    assert "tokenizer.json cannot be read" in refusal(run)
    (run / "best.safetensors").unlink()
    assert "there is no checkpoint" in refusal(run)
    (run / "run.json").unlink()
    assert "is not a training run: it has no run.json" in refusal(run)
    shutil.rmtree(run)
    assert "there is no run folder" in refusal(run)


def test_missing_frozen_tensors_are_refused(frozen_run, tmp_path):
    run = shutil.copytree(frozen_run, tmp_path / "run")
    (run / "frozen.safetensors").unlink()
    assert "lacks" in refusal(run)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "other"}, "does not describe a dualmatch run"),
        ({"version": 2}, "has format version 2; this dualmatch reads version 1"),
        ({"recipe": None}, "is incomplete"),
        ({"recipe": [1]}, "is incomplete"),
        ({"data": None}, "is incomplete"),
        ({"recipe": {"name": "x", "trian": {}}}, "did you mean 'train'?"),
    ],
)
def test_another_description_is_refused(run, changes, sentence):
    edit(run, **changes)
    assert sentence in refusal(run)


@pytest.mark.parametrize("content", ["", "[]", "{", "3"])
def test_a_description_of_another_kind_is_refused(run, content):
    (run / "run.json").write_text(content)
    assert "run.json" in refusal(run)
