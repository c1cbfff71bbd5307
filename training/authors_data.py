"""What the authors' data code does between files and networks: order, padding, word pieces."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.tokenizer import PAD_ID, TokenizerOptions

UNKNOWN = "[UNK]"

# Exactly 32 ids: a longer caption is cut, its [SEP] with it; a shorter one is padded, and the padding attended.
BERT_OPTIONS = TokenizerOptions(max_length=32, fixed_length=32, keep_last_special=False)
# Words have no limit; the authors pad to the longest caption of the batch.
WORD_OPTIONS = TokenizerOptions(max_length=0)


@dataclass(frozen=True, kw_only=True)
class Collated:
    """A batch in the authors' order.

    Attributes:
        order: (captions,) int64: the place that each row had before sorting.
        token_ids: (captions, longest) int64, padded with 0 at the end.
        lengths: (captions,) int64, descending.
    """

    order: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]


def collate(captions: Sequence[Sequence[int]]) -> Collated:
    """Sort a batch by length, longest first, equal ones as they came, and pad to the longest, as both authors' GRU code does.

    Args:
        captions: token ids of each caption, specials included.

    Raises:
        DualmatchError: no captions.
    """
    if not captions:
        raise DualmatchError("a batch needs at least one caption.")
    order = sorted(range(len(captions)), key=lambda row: -len(captions[row]))
    lengths = [len(captions[row]) for row in order]
    token_ids = np.full((len(captions), lengths[0]), PAD_ID, dtype=np.int64)
    for row, source in enumerate(order):
        token_ids[row, : lengths[row]] = captions[source]
    return Collated(order=np.array(order), token_ids=token_ids, lengths=np.array(lengths))


def bert_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """WordPiece as DSRAN-BERT cuts captions: lower case, accents off, punctuation apart, at most 100 characters a word.

    Args:
        vocabulary: the lines of BERT's vocab.txt, whose place is the id.

    Raises:
        DualmatchError: a special piece is missing, or [PAD] is not the first.
    """
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    if missing := [special for special in (UNKNOWN, "[CLS]", "[SEP]") if special not in ids]:
        raise DualmatchError(f"the WordPiece vocabulary lacks {', '.join(missing)}.")
    if ids.get("[PAD]") != PAD_ID:
        raise DualmatchError(f"the WordPiece vocabulary must begin with [PAD]; it begins with {vocabulary[0]!r}.")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(piece, ids[piece]) for piece in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def read_pieces(path: Path) -> list[str]:
    """The lines of BERT's vocab.txt, whose place is the id.

    Raises:
        DualmatchError: no such file, or one that is not UTF-8.
    """
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise DualmatchError(f"there is no vocabulary {path}.") from None
    except (OSError, UnicodeDecodeError):
        raise DualmatchError(
            f"{path} is no vocab.txt of BERT, which a DSRAN-BERT needs: one piece a line, UTF-8."
        ) from None
    return [line.removesuffix("\r") for line in lines]
