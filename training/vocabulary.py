"""Tokenizers for training: a word-level vocabulary from captions, or a pretrained WordPiece one, as tokenizer.json."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dualmatch.models.config import TextConfig
from dualmatch.models.text import minilm_folder

from .authors_data import bert_tokenizer, read_pieces
from .word_weights import weights_path

SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")  # ids 0 to 3, as in the authors' vocabularies


def word_level_tokenizer(captions: Iterable[str], *, min_count: int) -> Tokenizer:
    """A lower-case word vocabulary, most frequent words first, ties alphabetical; captions become <start> words <end>.

    Args:
        captions: the training captions.
        min_count: words that occur less often become <unk>.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    counts = Counter(
        word for caption in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    )
    words = sorted(
        (word for word, count in counts.items() if count >= min_count and word not in SPECIALS),
        key=lambda w: (-counts[w], w),
    )
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS[3]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return tokenizer


def build_tokenizer(
    config: TextConfig, captions: Iterable[str], *, min_count: int, word_weights: str = ""
) -> Tokenizer:
    """The tokenizer that goes with a text encoder: the pretrained weights' own, or words counted in `captions`.

    Raises:
        DualmatchError: the pretrained weights' vocabulary is not there.
    """
    if config.pretrained == "file" and config.encoder == "bert":
        return bert_tokenizer(read_pieces(weights_path(word_weights, config) / "vocab.txt"))
    if config.pretrained == "minilm":
        tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    return word_level_tokenizer(captions, min_count=min_count)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json."""
    from dualmatch.runtime.files import write_atomically

    write_atomically(path, tokenizer.to_str(pretty=True))
