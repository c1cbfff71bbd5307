"""The authors' words without NLTK, against NLTK."""

import json
import re
from pathlib import Path

import nltk
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.tokenize import word_tokenize
from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

from dualmatch.runtime.datasets import open_dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.tokenizer import CaptionTokenizer
from dualmatch.training.authors_data import WORD_OPTIONS
from dualmatch.training.treebank import punkt_abbreviations, treebank_tokenizer
from dualmatch.training.vocabulary import save_tokenizer

SPECIALS = {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3}
ABBREVIATIONS = frozenset({"dr", "mr", "st", "p.m", "u.s", "co", "vs"})
FLICKR8K = Path(__file__).parents[2] / "shared" / "data" / "flickr8k-1000" / "captions.json"


def words_by(tokenizer):
    def words(caption):
        text = tokenizer.normalizer.normalize_str(caption)
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    return words


ours = words_by(treebank_tokenizer(SPECIALS))
ours_by_sentence = words_by(treebank_tokenizer(SPECIALS, abbreviations=ABBREVIATIONS))


def standard_library(rule):
    """NLTK compiles with the `regex` package since 3.10; the authors' NLTK used `re`, which takes other characters for letters."""
    pattern, what = rule
    return re.compile(pattern.pattern, pattern.flags & (re.IGNORECASE | re.UNICODE)), what


class AuthorsTime(NLTKWordTokenizer):
    """NLTK's own rules, compiled as in the authors' time."""

    STARTING_QUOTES = tuple(map(standard_library, NLTKWordTokenizer.STARTING_QUOTES))
    PUNCTUATION = tuple(map(standard_library, NLTKWordTokenizer.PUNCTUATION))
    PARENS_BRACKETS = standard_library(NLTKWordTokenizer.PARENS_BRACKETS)
    DOUBLE_DASHES = standard_library(NLTKWordTokenizer.DOUBLE_DASHES)
    ENDING_QUOTES = tuple(map(standard_library, NLTKWordTokenizer.ENDING_QUOTES))


theirs = AuthorsTime().tokenize


def theirs_by_sentence(caption):
    """`word_tokenize` with a Punkt that knows our abbreviations and nothing else."""
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return [word for sentence in PunktSentenceTokenizer(parameters).tokenize(caption) for word in theirs(sentence)]


@pytest.fixture(scope="module")
def captions():
    if not FLICKR8K.is_file():
        pytest.skip(f"not run: {FLICKR8K} is not there")
    images = json.loads(FLICKR8K.read_text(encoding="utf-8"))["images"]
    return [caption for image in images for caption in image["captions"]]


def test_captions_of_flickr8k_as_nltk_has_them(captions):
    assert len(captions) == 5000
    assert [ours(caption) for caption in captions] == [
        word_tokenize(caption.lower(), preserve_line=True) for caption in captions
    ]


def test_sentences_of_flickr8k_as_punkt_has_them(captions):
    """Written as people write them, two together: their captions come with spaces before every mark."""
    written = [re.sub(r" ([.,;:!])", r"\1", caption) for caption in captions]
    pairs = [f"{one} {two}" for one, two in zip(written[::2], written[1::2], strict=True)]
    differ = [pair for pair in captions + pairs if ours_by_sentence(pair) != theirs_by_sentence(pair.lower())]
    assert not differ
    assert sum(ours(pair) != ours_by_sentence(pair) for pair in pairs) > 500


def test_captions_of_scenes():
    for caption in open_dataset("scenes").captions[:500]:
        assert ours(caption) == word_tokenize(caption.lower(), preserve_line=True)


WORDS = "a b can cannot gonna gotta gimme lemme wanna more'n d'ye 'tis 'twas n't don't it's 're 'll 've 'd 'm 's can't dogs' man's"
NUMBERS = "1 2 3,000 10:30 .5 U.S. p.m. mr. t-shirt \xbd \xb2 \u0663"  # a half, a small two, an Arabic three
MARKS = "' '' \" ` `` ``` . .. ... , ,, : ; - -- --- ( ) [ ] { } < > ! ? * @ # $ % & / _ \\ ~ ^ | + ="
QUOTES_AND_DASHES = "\xab \xbb \u201c \u201d \u2018 \u2019 \u201e \u2012 \u2013 \u2014 \u2015 \u2026"
LETTERS = "caf\xe9 \xc9 \u0130 e\u0301 \xf1 \u4e2d\u6587 \xdf \xc6 \U0001f600 <unk> <start>"
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u200b", "\u200d"]
PIECES = [*f"{WORDS} {NUMBERS} {MARKS} {QUOTES_AND_DASHES} {LETTERS}".split(), *SPACES]
written_text = st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join)


@settings(max_examples=1500, deadline=None)
@given(written_text)
@example('"a dog," he said.')
@example("a,,b:,c, ,1,,")
@example("the end.' ) \"  ")
@example("gimme'tis")
@example("the dog's' bone")
@example("a dog .\x1c")
def test_text_of_marks_and_contractions(text):
    assert ours(text) == theirs(text.lower())


# Left out: what the module names as different, letters whose lower case the libraries' versions of Unicode disagree on, and surrogates.
any_text = st.text(
    st.characters(exclude_categories=["Cs", "Cn", "Co"], exclude_characters="\u03a3\u017f\u0131", max_codepoint=0x2FFF),
    max_size=40,
)


@settings(max_examples=1500, deadline=None)
@given(any_text)
def test_any_text(text):
    assert ours(text) == theirs(text.lower())


ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


@settings(max_examples=1000, deadline=None)
@given(ASCII)
def test_ascii_as_nltk_has_it_today(text):
    assert ours(text) == word_tokenize(text.lower(), preserve_line=True)


def test_the_differences_named_are_all_there_is_to_them():
    assert ours("ΟΔΟΣ") != theirs("ΟΔΟΣ".lower())
    assert ours("a dog\ufdd0") == ["a", "dog"]


SENTENCES = "a dog man. dogs. dr. mr. u.s. p.m. sits? no! it's 4.5 3. x. ... .. , man, boy: t-shirt. he end."


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(SENTENCES.split()), min_size=1, max_size=10).map(" ".join))
def test_sentences_of_words_and_abbreviations(text):
    assert ours_by_sentence(text) == theirs_by_sentence(text)


@pytest.mark.parametrize(
    ("caption", "whole", "sentences"),
    [
        ("A man. A dog.", ["a", "man.", "a", "dog", "."], ["a", "man", ".", "a", "dog", "."]),
        ("Mr. Smith runs.", ["mr.", "smith", "runs", "."], ["mr.", "smith", "runs", "."]),
        ("(a man.) a dog", ["(", "a", "man.", ")", "a", "dog"], ["(", "a", "man", ".", ")", "a", "dog"]),
        ("say 'hi.' now", ["say", "'hi", ".", "'", "now"], ["say", "'", "hi", ".", "'", "now"]),
        ("number 3. on it", ["number", "3.", "on", "it"], ["number", "3.", "on", "it"]),
    ],
)
def test_periods_inside_a_caption(caption, whole, sentences):
    assert ours(caption) == theirs(caption.lower())
    assert ours_by_sentence(caption) == theirs_by_sentence(caption.lower())
    assert ours_by_sentence(caption) == sentences
    if whole[1] != "'hi":
        assert ours(caption) == whole


def test_served_ids(tmp_path):
    vocabulary = {**SPECIALS, "a": 4, "is": 5, "n't": 6, "dog": 7, "``": 8, "''": 9, "<": 10, ">": 11}
    save_tokenizer(treebank_tokenizer(vocabulary), tmp_path / "tokenizer.json")
    served = CaptionTokenizer(tmp_path / "tokenizer.json", WORD_OPTIONS)
    assert served.vocabulary_size == 12
    assert served.ids(['A "dog" ISN\'T cat', "<pad> <end>"]) == [
        [1, 4, 8, 7, 9, 5, 6, 3, 2],
        [1, 10, 3, 11, 10, 3, 11, 2],
    ]
    assert len(served.ids(["dog " * 300])[0]) == 302


def test_a_vocabulary_without_special_words_is_refused():
    with pytest.raises(DualmatchError, match=r"lacks <start>, <end>"):
        treebank_tokenizer({"<pad>": 0, "<unk>": 3})


def test_abbreviations_of_nltk_data(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(DualmatchError, match=r"nltk\.downloader punkt_tab"):
        punkt_abbreviations()
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("dr\nu.s\n")
    nltk.data.clear_cache()
    assert punkt_abbreviations() == {"dr", "u.s"}
