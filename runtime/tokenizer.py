"""Captions to token ids, through the `tokenizers` library and the bundle's tokenizer.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import DualmatchError

PAD_ID = 0


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How ids are cut and padded.

    Attributes:
        max_length: most tokens of a caption, specials included; 0 for no limit.
        fixed_length: pad to exactly this many; 0 pads to the longest of the batch.
        keep_last_special: cutting keeps the closing token.
    """

    max_length: int = 64
    fixed_length: int = 0
    keep_last_special: bool = True


class CaptionTokenizer:
    """Captions to ids, int64 (captions, tokens), padded with 0 at the end.

    Args:
        source: a tokenizer.json of the `tokenizers` library whose padding id is 0: the file, or its bytes.

    Raises:
        DualmatchError: the file cannot be read.
    """

    def __init__(self, source: Path | bytes, options: TokenizerOptions) -> None:
        try:
            self._tokenizer = (
                Tokenizer.from_buffer(source) if isinstance(source, bytes) else Tokenizer.from_file(str(source))
            )
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
            name = "tokenizer.json" if isinstance(source, bytes) else source
            raise DualmatchError(f"the tokenizer {name} cannot be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A caption that spells "[PAD]" is text, not padding.
        self._tokenizer.encode_special_tokens = True
        self.options = options

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption, cut but not padded.

        Raises:
            DualmatchError: a caption that is empty or only white space.
        """
        for index, caption in enumerate(captions):
            if any("\ud800" <= character <= "\udfff" for character in caption):
                raise DualmatchError(f"caption {index} is not valid Unicode text.")
            if not caption.strip():
                raise DualmatchError(f"caption {index} is empty; every caption needs at least one word.")
        limit = self.options.max_length
        cut = []
        for encoding in self._tokenizer.encode_batch_fast(list(captions)):
            ids = encoding.ids
            if limit and len(ids) > limit:
                ids = [*ids[: limit - 1], ids[-1]] if self.options.keep_last_special else ids[:limit]
            cut.append(ids)
        return cut

    def pad(self, ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Ids of a batch as one array."""
        length = self.options.fixed_length or max(map(len, ids))
        padded = np.full((len(ids), length), PAD_ID, dtype=np.int64)
        for row, one in zip(padded, ids, strict=True):
            row[: len(one)] = one
        return padded

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Ids of a batch of captions, (captions, tokens)."""
        return self.pad(self.ids(captions))
