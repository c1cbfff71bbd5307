"""Tokenizers: word vocabularies from captions, MiniLM's WordPiece, cutting and padding."""

import numpy as np
import pytest

from dualmatch.models import TextConfig
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.tokenizer import CaptionTokenizer, TokenizerOptions
from dualmatch.training.vocabulary import SPECIALS, build_tokenizer, save_tokenizer, word_level_tokenizer

CAPTIONS = ("A dog and a Dog, running.", "a cat's ball", "the dog  runs\tfast", "a cat")
MINILM = TextConfig(encoder="bert", pretrained="minilm", word_dim=384)


def saved(tokenizer, folder, **options):
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    return CaptionTokenizer(folder / "tokenizer.json", TokenizerOptions(**options))


@pytest.fixture
def words(tmp_path):
    return lambda **options: saved(word_level_tokenizer(CAPTIONS, min_count=1), tmp_path, **options)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    return saved(build_tokenizer(MINILM, (), min_count=1), tmp_path_factory.mktemp("minilm"))


def test_specials_come_first_then_words_by_count_then_by_letter():
    vocabulary = word_level_tokenizer(CAPTIONS, min_count=1).get_vocab()
    in_order = sorted(vocabulary, key=vocabulary.get)
    assert in_order[:4] == list(SPECIALS) == ["<pad>", "<start>", "<end>", "<unk>"]
    assert in_order[4:7] == ["a", "dog", "cat"]  # 4, 3 and 2 times
    assert in_order[7:] == sorted(in_order[7:]) == ["'", ",", ".", "and", "ball", "fast", "running", "runs", "s", "the"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_the_order_of_captions_does_not_matter():
    one, other = (word_level_tokenizer(captions, min_count=1) for captions in (CAPTIONS, CAPTIONS[::-1]))
    assert one.to_str() == other.to_str()


def test_rare_words_are_left_out():
    assert sorted(set(word_level_tokenizer(CAPTIONS, min_count=2).get_vocab()) - set(SPECIALS)) == ["a", "cat", "dog"]


def test_captions_become_ids(words):
    tokenizer = words()
    assert tokenizer.ids(["a Dog", "a zebra"]) == [[1, 4, 5, 2], [1, 4, 3, 2]]
    assert tokenizer.vocabulary_size == 17
    ids = tokenizer(["a dog", "a cat and a dog"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [[1, 4, 5, 2, 0, 0, 0], [1, 4, 6, 10, 4, 5, 2]]


def test_every_training_caption_survives_the_file(words):
    tokenizer, word_of = words(), word_level_tokenizer(CAPTIONS, min_count=1).id_to_token
    spelt = [" ".join(word_of(i) for i in ids) for ids in tokenizer.ids(CAPTIONS)]
    assert spelt[0] == "<start> a dog and a dog , running . <end>"
    assert spelt[1] == "<start> a cat ' s ball <end>"
    assert not any("<unk>" in caption for caption in spelt)


def test_accents_are_one_letter_however_they_are_written(tmp_path):
    tokenizer = saved(word_level_tokenizer(["un café"], min_count=1), tmp_path)
    assert tokenizer.ids(["UN CAFE\u0301"]) == tokenizer.ids(["un caf\u00e9"]) == [[1, 5, 4, 2]]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, [1, 4, 5, 10, 4, 6, 2]),
        ({"max_length": 0}, [1, 4, 5, 10, 4, 6, 2]),
        ({"max_length": 7}, [1, 4, 5, 10, 4, 6, 2]),
        ({"max_length": 4}, [1, 4, 5, 2]),
        ({"max_length": 4, "keep_last_special": False}, [1, 4, 5, 10]),
        ({"max_length": 4, "fixed_length": 6}, [1, 4, 5, 2, 0, 0]),
        ({"max_length": 6, "fixed_length": 6, "keep_last_special": False}, [1, 4, 5, 10, 4, 6]),
        ({"max_length": 9, "fixed_length": 9}, [1, 4, 5, 10, 4, 6, 2, 0, 0]),
    ],
)
def test_cutting_and_padding(words, options, ids):
    assert words(**options)(["a dog and a cat"]).tolist() == [ids]


@pytest.mark.parametrize("caption", ["[PAD]", "<pad>", "[CLS] <start> [SEP] <end>", "a <unk> b"])
def test_a_caption_that_spells_a_special_is_text(words, minilm, caption):
    for tokenizer in (words(), minilm):
        (ids,) = tokenizer.ids([caption])
        specials = {0, ids[0], ids[-1]}
        assert len(ids) > 3
        assert not specials & set(ids[1:-1])


@pytest.mark.parametrize("caption", ["", "  ", "\n\t"])
def test_an_empty_caption_is_refused(words, caption):
    with pytest.raises(DualmatchError, match="caption 1 is empty"):
        words()(["a dog", caption])


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("a dog on the beach", [101, 1037, 3899, 2006, 1996, 3509, 102]),
        ("Two dogs.", [101, 2048, 6077, 1012, 102]),
        ("The [MASK]", [101, 1996, 1031, 7308, 1033, 102]),
    ],
)
def test_minilm_ids(minilm, caption, ids):
    assert minilm.ids([caption]) == [ids]


def test_minilm_pieces_case_and_accents(minilm):
    assert minilm.ids(["CAFÉ  playing"]) == minilm.ids(["cafe playing"])
    assert len(minilm.ids(["xylographically"])[0]) > 4
    assert minilm.vocabulary_size == 30522
    assert minilm.ids(["dog " * 300])[0] == [101, *[3899] * 62, 102]  # cut by our options, not by the file's


def test_a_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DualmatchError, match="cannot be read"):
        CaptionTokenizer(tmp_path / "tokenizer.json", TokenizerOptions())
