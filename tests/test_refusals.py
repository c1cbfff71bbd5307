"""Inputs that once destroyed a file, waited forever or ended in a traceback."""

import os
import subprocess
import sys

import numpy as np
import pytest

from dualmatch.runtime.datasets import make_scenes
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.sources import photos_in
from dualmatch.runtime.similarity import SimsInfo, load_sims, save_sims


def run(*arguments, cwd):
    command = [sys.executable, "-c", "from dualmatch.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_rerank_never_writes_over_its_own_matrix(tmp_path):
    similarity = np.random.default_rng(0).random((20, 100), dtype=np.float32)
    info = SimsInfo(
        image_ids=tuple(map(str, range(20))),
        caption_ids=tuple(map(str, range(100))),
        caption_image=tuple(np.repeat(range(20), 5).tolist()),
        bundle="b",
    )
    save_sims(tmp_path / "sims.npy", similarity, info)
    refused = run("runtime", "rerank", "sims.npy", "--direction", "t2i", "--out", "./sims.npy", cwd=tmp_path)
    assert refused.returncode == 1
    assert "is the similarity matrix itself" in refused.stderr
    np.testing.assert_array_equal(load_sims(tmp_path / "sims.npy")[0], similarity)
    written = run("runtime", "rerank", "sims.npy", "--direction", "t2i", "--out", "order.npy", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert np.load(tmp_path / "order.npy").shape == (100, 15)


def test_an_output_below_a_file_is_named_as_the_user_named_it(tmp_path):
    similarity = np.ones((2, 2), np.float32)
    info = SimsInfo(image_ids=("a", "b"), caption_ids=("c", "d"), caption_image=(0, 1), bundle="b")
    save_sims(tmp_path / "sims.npy", similarity, info)
    (tmp_path / "no").write_text("a file in a folder's place")
    refused = run("runtime", "rerank", "sims.npy", "--direction", "i2t", "--k1", 1, "--out", "no/x.npy", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.endswith("no is a file, so nothing can be written below it; give a path elsewhere.\n")
    assert ".part" not in refused.stderr


def test_a_pipe_among_photographs_is_no_photograph(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (source,) = photos_in(tmp_path)
    with pytest.raises(DualmatchError, match="not a regular file"):
        source.read()


def test_half_a_surrogate_pair_is_no_caption(tmp_path):
    pytest.importorskip("torch")
    from dualmatch.runtime.tokenizer import CaptionTokenizer, TokenizerOptions
    from dualmatch.training.vocabulary import save_tokenizer, word_level_tokenizer

    save_tokenizer(word_level_tokenizer(["a dog"], min_count=1), tmp_path / "tokenizer.json")
    tokenizer = CaptionTokenizer(tmp_path / "tokenizer.json", TokenizerOptions())
    with pytest.raises(DualmatchError, match="caption 1 is not valid Unicode"):
        tokenizer(["a dog", "a \udcff dog"])


def test_no_split_is_no_set():
    with pytest.raises(DualmatchError, match="no split was named"):
        make_scenes(num_train=2, num_val=2, num_test=2).select([])
