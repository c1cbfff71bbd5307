"""VSE++ as a configuration: the mean of the image's grid against the GRU's state at the last word, and nothing else."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from dualmatch.models import DSRAN
from dualmatch.models.trunks import build_trunk
from dualmatch.runtime.recall import evaluate
from dualmatch.training.checkpoint import load_run
from dualmatch.training.encode import encode_captions, encode_images
from dualmatch.training.loop import train
from dualmatch.training.recipe import load_recipe

from .tiny_models import captions, images, randomised, settled
from .tiny_runs import SIZES, scenes

NAME = "scenes-vse++"
SIDES = ("image", "text")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = load_recipe(NAME, [*SIZES, "model.text.vocabulary_size=50"]).model
    model = DSRAN(config, build_trunk(config.trunk)).eval()
    for side in SIDES:
        randomised(encoder_of(model, side))
        settled(encoder_of(model, side), feeds(model, side, 16, seed=99))
    return model


def feeds(network, side, batch, length=9, seed=0):
    if side == "text":
        return {"token_ids": captions(batch, length, seed=seed)}
    return images(network.image_encoder, batch, seed=seed)


def encoder_of(network, side):
    return network.image_encoder if side == "image" else network.text_encoder


def test_it_has_no_graphs_and_no_regions(network):
    parts = {name.partition(".")[2].partition(".")[0] for name in network.state_dict()}
    assert parts == {"trunk", "grid", "words"}


def test_an_image_is_the_mean_of_its_grid(network):
    pixels = feeds(network, "image", 3)["pixels"]
    with torch.no_grad():
        final = network.image_encoder.trunk(pixels)["final"]
        mean = network.image_encoder.grid.project.linear(final.mean(dim=(2, 3)))
        wanted = torch.nn.functional.normalize(mean, dim=1)
        torch.testing.assert_close(network.image_encoder(pixels), wanted, rtol=0, atol=1e-6)


def test_a_caption_is_the_state_at_its_last_word(network):
    ids = captions(5, 9, seed=1)
    words = network.text_encoder.words
    with torch.no_grad():
        for one, embedded in zip(ids, network.text_encoder(ids), strict=True):
            _, last = words.gru(words.embed(one[one > 0])[None])
            wanted = torch.nn.functional.normalize(last[0, 0], dim=0)
            torch.testing.assert_close(embedded, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pad_policy", ["masked", "authors"])
def test_padding_changes_nothing(pad_policy):
    torch.manual_seed(0)
    options = [*SIZES, "model.text.vocabulary_size=50", f"model.pad_policy={pad_policy}"]
    config = load_recipe(NAME, options).model
    encoder = DSRAN(config, build_trunk(config.trunk)).text_encoder.eval()
    ids = captions(6, 9, seed=2)
    with torch.no_grad():
        padded = encoder(torch.nn.functional.pad(ids, (0, 31)))
        torch.testing.assert_close(padded, encoder(ids), rtol=0, atol=1e-6)
        alone = torch.cat([encoder(one[one > 0][None]) for one in ids])
        torch.testing.assert_close(alone, encoder(ids), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def graphs(network, tmp_path_factory):
    pytest.importorskip("onnxscript")
    from dualmatch.export.graph import export_encoder

    folder = tmp_path_factory.mktemp("vsepp")
    for side in SIDES:
        path = folder / f"{side}.onnx"
        export_encoder(encoder_of(network, side), feeds(network, side, 3, seed=9), path, output=f"{side}_embedding")
    return folder


@pytest.mark.parametrize("side", SIDES)
def test_onnx_gives_torchs_embeddings_on_every_shape(side, network, graphs):
    from .agreement import largest_difference

    lengths = (1, 2, 5, 17, 40) if side == "text" else (0,)
    batches = [
        {name: value.numpy() for name, value in feeds(network, side, batch, length, seed=batch).items()}
        for batch in (1, 2, 7)
        for length in lengths
    ]
    assert largest_difference(encoder_of(network, side), graphs / f"{side}.onnx", batches) <= 1e-5
    with torch.no_grad():
        embedded = encoder_of(network, side)(**feeds(network, side, 7, 17, seed=7)).numpy()
    cosines = embedded @ embedded.T
    assert cosines[~np.eye(7, dtype=bool)].max() < 0.999, "an encoder that ignored its input would pass"


def test_its_recipe_trains_and_opens_again(tmp_path):
    recipe = load_recipe(NAME, [*SIZES, "train.epochs=6"])
    train(recipe, scenes(), tmp_path / "run", data_name="scenes", cache=tmp_path / "cache")
    run = load_run(tmp_path / "run")
    assert (run.recipe.name, run.model.config.text.pooling) == (NAME, "last")
    seen = scenes().select(["train"])
    similarity = (
        encode_images(run.model, run.preprocess, seen.items)
        @ encode_captions(run.model, run.tokenizer, seen.captions).T
    )
    chance = 100 * (1 + 5 + 10) / len(seen.items)
    recall = evaluate(similarity, caption_image=seen.caption_image).t2i
    assert recall.r1 + recall.r5 + recall.r10 > 1.2 * chance
