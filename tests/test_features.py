"""Cached features of frozen parts equal fresh ones, and are never served for something else."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dualmatch.models import DSRAN, TextConfig, TrunkConfig
from dualmatch.models.trunks import TinyTrunk, build_trunk, preprocess_of
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import Preprocess
from dualmatch.runtime.tokenizer import CaptionTokenizer, TokenizerOptions
from dualmatch.training.features import MapCache, WordCache, augmented
from dualmatch.training.vocabulary import build_tokenizer, save_tokenizer

from .tiny_models import text_config
from .tiny_runs import first, scenes

CONFIG = TrunkConfig(name="efficientnet-lite0", image_size=64)
STAGES = ("final", "previous")
CAPTIONS = ("two dogs on a beach", "a cat", "a man riding a very tall unicycle at night", "snow", "the cat sat, again")


@pytest.fixture(scope="module")
def trunk():
    return build_trunk(CONFIG)  # in training mode, as training builds it


@pytest.fixture
def items():
    return first(scenes(), "train", 6).items


@pytest.fixture
def cache(tmp_path, trunk):
    """A cache; arguments replace its own."""

    def make(**options):
        given = {"folder": tmp_path, "trunk": trunk, "stages": STAGES, "preprocess": preprocess_of(CONFIG, "squash")}
        given |= {"min_area": 0.3, **options}
        return MapCache(
            given["folder"], given["trunk"], given["stages"], given["preprocess"], min_area=given["min_area"]
        )

    return make


def fresh(trunk, pixels):
    trunk.eval()
    with torch.inference_mode():
        return trunk(torch.from_numpy(np.stack(pixels)))


def assert_close_in_float16(cached, expected):
    for stage in STAGES:
        assert cached[stage].dtype == torch.float32
        torch.testing.assert_close(cached[stage], expected[stage], rtol=2**-10, atol=1e-4)


def test_cached_maps_are_the_trunks(cache, trunk, items):
    maps = cache()
    stems = maps.prepare(items, views=2, batch_size=4)
    pixels = [maps.preprocess(item.read_bytes()) for item in items]
    assert_close_in_float16(maps.load([views[0] for views in stems]), fresh(trunk, pixels))
    mirrored = [np.ascontiguousarray(one[:, :, ::-1]) for one in pixels]
    assert_close_in_float16(maps.load([views[1] for views in stems]), fresh(trunk, mirrored))
    order = [stems[i][0] for i in (3, 0, 3)]
    assert_close_in_float16(maps.load(order), fresh(trunk, [pixels[i] for i in (3, 0, 3)]))


def test_further_views_are_crops_that_fall_alike_everywhere(cache, trunk, items, tmp_path):
    one, other = cache(), cache(folder=tmp_path / "other")
    stems, again = one.prepare(items[:2], views=4), other.prepare(items[:2], views=4, batch_size=3)
    views = one.load(stems[0])
    torch.testing.assert_close(views, other.load(again[0]), rtol=2**-9, atol=1e-3)
    final = views["final"].flatten(1)
    assert torch.cdist(final, final).add(torch.eye(4) * 99).min() > 0.1  # four different views


def test_what_is_there_is_not_computed_again(cache, items, monkeypatch):
    maps = cache()
    stems = maps.prepare(items[:3], views=1)
    seen = []
    forward = maps.trunk.forward
    monkeypatch.setattr(maps.trunk, "forward", lambda pixels: (seen.append(len(pixels)), forward(pixels))[1])
    assert cache().prepare(items[:3], views=1) == stems
    assert seen == []
    cache().prepare(items[:4], views=2)
    assert sum(seen) == 5  # the fourth image, and four mirrored ones
    (stems[0][0].parent / f"{stems[0][0].name}-previous.npy").unlink()
    cache().prepare(items[:3], views=1)
    assert sum(seen) == 6


def test_a_file_is_never_half_written(cache, items, monkeypatch):
    maps = cache()

    def stopped(file, array):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            maps.prepare(items[:1], views=1)
    maps.load([views[0] for views in maps.prepare(items[:1], views=1)])


def test_the_key_has_all_that_features_depend_on(cache, trunk, items):
    (stem,), *_ = cache().prepare(items[:1], views=1)
    changed = replace(items[0], description=items[1].description)  # the same name, another picture
    (other,), *_ = cache().prepare([changed], views=1)
    assert other.name != stem.name
    weights = trunk.state_dict()
    altered = build_trunk(CONFIG, pretrained=False).eval()
    altered.load_state_dict({name: value + 1e-3 if name.endswith("bias") else value for name, value in weights.items()})
    others = [
        cache(trunk=altered),
        cache(preprocess=preprocess_of(CONFIG, "crop")),
        cache(preprocess=preprocess_of(replace(CONFIG, image_size=96), "squash")),
        cache(preprocess=replace(preprocess_of(CONFIG, "squash"), mean=(0.5, 0.5, 0.5))),
        cache(min_area=0.5),
    ]
    folders = {made.folder for made in (cache(), *others)}
    assert len(folders) == 6
    assert cache().folder == stem.parent


def test_what_float16_cannot_hold_is_refused(cache, items):
    torch.manual_seed(0)
    trunk = TinyTrunk().eval()
    torch.nn.init.constant_(trunk.layers[-1][1].weight, 1e7)
    with pytest.raises(DualmatchError, match="larger than float16 can hold"):
        cache(trunk=trunk).prepare(items[:1], views=1)


def test_random_views_keep_area_and_aspect():
    across, down = np.meshgrid(np.arange(240), np.arange(160))
    image = Image.fromarray(np.stack([across, down, down * 0], axis=-1).astype(np.uint8))
    preprocess = Preprocess(image_size=40, resize="squash", mean=(0, 0, 0), std=(1, 1, 1))
    chance, flipped, shares = random.Random(0), 0, []
    for _ in range(200):
        view = np.asarray(augmented(image, preprocess, chance, min_area=0.2), dtype=float)
        assert view.shape == (40, 40, 3)
        width = (view[20, -1, 0] - view[20, 0, 0]) * 40 / 39
        height = (view[-1, 20, 1] - view[0, 20, 1]) * 40 / 39
        flipped += width < 0
        shares.append(abs(width) * height / (240 * 160))
        assert 0.7 < abs(width) / height < 1.42 or shares[-1] > 0.95
    assert 0.17 < min(shares) < 0.3
    assert max(shares) > 0.6
    assert 70 < flipped < 130


@pytest.fixture(scope="module")
def minilm():
    text = TextConfig(
        encoder="bert", pretrained="minilm", frozen=True, word_dim=384, vocabulary_size=30522, normalise_tokens=False
    )
    torch.manual_seed(0)
    return DSRAN(replace(text_config("bert"), text=text), TinyTrunk())  # in training mode, as training builds it


@pytest.fixture
def tokenizer(tmp_path, minilm):
    save_tokenizer(build_tokenizer(minilm.config.text, (), min_count=1), tmp_path / "tokenizer.json")
    return lambda **options: CaptionTokenizer(tmp_path / "tokenizer.json", TokenizerOptions(**options))


def test_cached_words_are_minilms(tmp_path, minilm, tokenizer, monkeypatch):
    words, ids = WordCache(tmp_path / "cache", minilm, tokenizer(), CAPTIONS), torch.from_numpy(tokenizer()(CAPTIONS))
    features, mask = words.load(range(5))
    minilm.eval()
    with torch.inference_mode():
        fresh_words = minilm.text_encoder.words(ids, ids != 0)
        torch.testing.assert_close(mask, ids != 0)
        torch.testing.assert_close(features[mask], fresh_words[mask], rtol=2**-10, atol=1e-4)
        assert not features[~mask].any()
        order = [4, 1]
        embedded = minilm.text_encoder.embed(*words.load(order))
        torch.testing.assert_close(embedded, minilm.text_encoder(ids[order]), rtol=0, atol=2e-3)
    monkeypatch.setattr(minilm.text_encoder.words, "forward", None)  # it is not asked again
    torch.testing.assert_close(WordCache(tmp_path / "cache", minilm, tokenizer(), CAPTIONS).load(range(5))[0], features)


def test_words_are_keyed_by_captions_and_cutting(tmp_path, minilm, tokenizer):
    folder = tmp_path / "cache"
    WordCache(folder, minilm, tokenizer(), CAPTIONS[:2])
    WordCache(folder, minilm, tokenizer(), CAPTIONS[1::-1])
    WordCache(folder, minilm, tokenizer(max_length=4), CAPTIONS[:2])
    bias = minilm.text_encoder.words.bert.embeddings.LayerNorm.bias.data
    bias[0] += 0.5
    WordCache(folder, minilm, tokenizer(), CAPTIONS[:2])
    bias[0] -= 0.5
    assert len(list(folder.iterdir())) == 4
