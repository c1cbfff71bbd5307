"""Pretrained word encoders from files that a user has: GloVe vectors for a GRU's words, a BERT's weights from its folder."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from dualmatch.models import DSRAN, VSRN
from dualmatch.models.config import TextConfig
from dualmatch.models.text import BertWords, GruWords
from dualmatch.runtime.errors import DualmatchError

from .checkpoint import load_state
from .glove import initialise_from_glove


def weights_path(word_weights: str, config: TextConfig) -> Path:
    """Where the recipe's word weights are.

    Raises:
        DualmatchError: the recipe does not say it, or nothing is there.
    """
    what = "a GloVe text file" if config.encoder == "gru" else "a folder with a BERT's model.safetensors and vocab.txt"
    if not word_weights:
        raise DualmatchError(
            f"the recipe's words start from pretrained weights: give {what} by --set word_weights=PATH, "
            "or start from random ones with --set model.text.pretrained=none."
        )
    path = Path(word_weights)
    if not (path.is_dir() if config.encoder == "bert" else path.is_file()):
        raise DualmatchError(f"word_weights names {path}, which is not {what}.")
    return path


def load_word_weights(model: DSRAN | VSRN, word_weights: str, tokenizer: Tokenizer) -> None:
    """Start the word encoder from the recipe's files, where its `text.pretrained` is `file`.

    Raises:
        DualmatchError: files are missing, damaged, or of another network.
    """
    config, words = model.config.text, model.text_encoder.words
    if config.pretrained != "file":
        return
    path = weights_path(word_weights, config)
    if isinstance(words, GruWords):
        initialise_from_glove(words.embed.weight, tokenizer.get_vocab(with_added_tokens=True), path)
        return
    assert isinstance(words, BertWords)
    file = path / "model.safetensors"
    if not file.is_file():
        raise DualmatchError(f"the folder {path} (word_weights) holds no model.safetensors.")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise DualmatchError(f"{file} is not a readable safetensors file ({error}).") from None
    load_state(words.bert, {_our_name(name): value for name, value in state.items() if _is_words(name)}, str(file))


def _is_words(name: str) -> bool:
    """Whether a tensor belongs to the word encoder: not to BERT's pooler or pretraining heads, nor a constant."""
    own = name.removeprefix("bert.")
    return own.startswith(("embeddings.", "encoder.")) and not own.endswith("position_ids")


def _our_name(name: str) -> str:
    """The first published BERTs call a LayerNorm's tensors gamma and beta."""
    return (
        name.removeprefix("bert.")
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias")
    )
