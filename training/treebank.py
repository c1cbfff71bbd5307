"""The authors' words as a tokenizer.json: NLTK's `word_tokenize` of the lower-cased caption, so that serving needs no NLTK.

NLTK rewrites a caption by a list of regular expressions (Penn Treebank conventions: clitics, closing periods, quotes and brackets
stand alone) and splits it at white space. A `Replace` of the `tokenizers` library inserts fixed text and knows no groups, so most
rules here match between two characters, where NLTK's match the characters and put them back.

What differs from NLTK 3.9: a capital sigma that ends a word; the long s and the dotless i, which Python takes for s and i inside
English clitics and contractions; and the noncharacter U+FDD0, which is dropped. From 3.10 on NLTK counts combining marks as letters
and fractions as none; here it is as in the NLTK of the authors' time.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from dualmatch.runtime.errors import DualmatchError

from .vocabulary import SPECIALS

WORD = r"[\p{L}\p{N}_]"  # Python's \w; Oniguruma's also holds combining marks
SPACE = r"[\s\x1c-\x1f]"  # Python's \s
OPENING_QUOTES = "\u00ab\u201c\u2018\u201e"  # guillemet, double and single turned comma, low double comma
CLOSING_QUOTES = "\u00bb\u201d\u2019"
DASHES = "\u2012\u2013\u2014\u2015"
MARK = "\ufdd0"


def _around(characters: str) -> str:
    """Before and after each of these characters."""
    return f"(?=[{characters}])|(?<=[{characters}])"


# In NLTK's order: where it matches in lower-cased text, and what is put there.
_QUOTES = (
    (_around(OPENING_QUOTES) + r"|(?<!`)(?=`)|(?<=`)(?!`)", " "),
    (r'\A"', "``"),
    (r"``", " `` "),
    (r"(?<=[ (\[{<])(?:\"|'')", " `` "),
    (rf"(?<!{WORD})'(?!(?:re|ve|ll|m|t|s|d|n)(?!{WORD}))(?={WORD})", "' "),
)
_LAST_PERIOD = rf"(?<=[^.])\.(?=[\])}}>\"' {CLOSING_QUOTES}]*+{SPACE}*\z)"
_PUNCTUATION = (
    # NLTK's match takes the character after the comma with it, so of two commas only the first is set apart: the mark says where a
    # match ended.
    (r"[:,]\P{Nd}\K", MARK),
    (rf"(?=[:,][^{MARK}]{MARK})|(?<=[:,])(?=[^{MARK}]{MARK})", " "),
    (MARK, ""),
    (r"(?=[:,]\n?\z)|(?<=[:,])(?=\n?\z)", " "),
    (r"(?<!\.)(?=\.\.)|(?<=\.\.)(?!\.)", " "),
    (_around(f";@#$%&?!{DASHES}"), " "),
    (r"(?<=[^'])(?=' )", " "),
    (_around(r"*\[\](){}<>"), " "),
    (r"--", " -- "),
    (r"\A|\z", " "),
    (_around(CLOSING_QUOTES), " "),
    (r"''", " '' "),
    (r'"', " '' "),
    (rf"{SPACE}+", " "),
    (r"(?<=[^' ])(?='[smd]? )", " "),
    (r"(?<=[^' ])(?=(?:'ll|'re|'ve|n't) )", " "),
)
_CONTRACTIONS = ("can not", "d 'ye", "gim me", "gon na", "got ta", "lem me", "more 'n")


def treebank_tokenizer(word2idx: Mapping[str, int], *, abbreviations: Collection[str] | None = None) -> Tokenizer:
    """NLTK's words of the lower-cased caption as ids between <start> and <end>, others as <unk>.

    Args:
        word2idx: ids by word, as `models.authors_files.read_vocabulary` gives them.
        abbreviations: None takes a caption for one sentence, as `word_tokenize(preserve_line=True)` does: of its periods only the last
            stands alone. Else every sentence's does; a sentence ends at a period that follows none of these abbreviations (without
            their last period), as in Punkt, NLTK's sentence splitter, whose own list is `punkt_abbreviations()`.

    Raises:
        DualmatchError: the vocabulary lacks a special word.
    """
    if missing := [special for special in SPECIALS if special not in word2idx]:
        raise DualmatchError(f"the vocabulary lacks {', '.join(missing)}; the authors' hold them as ids 0 to 3.")
    tokenizer = Tokenizer(models.WordLevel(dict(word2idx), unk_token=SPECIALS[3]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *(normalizers.Replace(Regex(where), what) for where, what in _rules(abbreviations))]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(word, word2idx[word]) for word in SPECIALS[1:3]]
    )
    return tokenizer


def punkt_abbreviations() -> frozenset[str]:
    """The English abbreviations of Punkt, from NLTK's data on this machine.

    Raises:
        DualmatchError: NLTK is not installed, or its data set `punkt_tab` is not.
    """
    try:
        import nltk
    except ImportError:
        raise DualmatchError("Punkt's abbreviations need NLTK: pip install 'dualmatch[authors]'.") from None
    try:
        text = nltk.data.load("tokenizers/punkt_tab/english/abbrev_types.txt", format="text")
    except LookupError:
        raise DualmatchError(
            "NLTK's data set punkt_tab is not on this machine: python -m nltk.downloader punkt_tab."
        ) from None
    return frozenset(text.splitlines())


def _rules(abbreviations: Collection[str] | None) -> Iterable[tuple[str, str]]:
    period = _LAST_PERIOD if abbreviations is None else f"{_LAST_PERIOD}|{_sentence_period(abbreviations)}"
    yield from _QUOTES
    yield period, " . "
    yield from _PUNCTUATION
    for parts in _CONTRACTIONS:
        yield rf"(?<!{WORD}){parts.replace(' ', '')}(?!{WORD})", f" {parts} "
    yield rf"(?<!{WORD})wanna(?= )", " wan na "
    yield rf" 'tis(?!{WORD})", " 't is "
    yield rf" 'twas(?!{WORD})", " 't was "


def _sentence_period(abbreviations: Collection[str]) -> str:
    """Where Punkt ends a sentence at a period inside a lower-case caption.

    Before a lower-case word Punkt takes a single letter or a number for an abbreviation, unless its statistics know that word from
    sentences that begin in lower case; here it always is one, and so is any word that ends in a digit. Punkt ends a sentence at an
    abbreviation after all where the next word closes with a period inside a quote or bracket (`dr. "no."`); here it does not. Nor is
    an abbreviation one word with a curly quote before it, as it is for Punkt.
    """
    before = r"[\s(\"`{\[:;&#*@)}\]\-,]"  # what Punkt cuts off the front of a word
    known = "".join(rf"|\A{re.escape(one)}\.|{before}{re.escape(one)}\." for one in sorted(abbreviations))
    short = rf"(?!(?<=\p{{Nd}}\.|\A\p{{L}}\.|{before}\p{{L}}\.){SPACE}+(?:[\p{{Ll}};:,!?]|\.(?!\.)))"
    # A quote between spaces goes to the sentence before it, where NLTK takes it for an opening one: no period is last then.
    opening = rf"(?!{SPACE}+`` (?:{SPACE}|\z))"
    return rf"(?<=[^.])\.(?<!\.\.{known}){short}{opening}(?=[)\";}}\]*:@'({{\[?!{OPENING_QUOTES}{CLOSING_QUOTES}]|{SPACE}+[^\s])"
