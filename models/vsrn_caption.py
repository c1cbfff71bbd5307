"""VSRN's captioning branch: from related regions to the caption's words (paper section 3.4, eq 9; Venugopalan et al., 2015).

Training adds its loss to the matching loss. No checkpoint of the authors and no bundle holds it.
Shape suffixes: B batch, N regions, E embedding width, H width of the decoder's state, W width of a word, T tokens, L labels, V words.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .text import PAD_ID
from .vsrn_config import CaptionConfig

START_ID, END_ID = 1, 2


def caption_targets(token_ids_BT: Tensor, *, max_length: int) -> tuple[Tensor, Tensor]:
    """Labels and mask of captions, by the authors' rule.

    Args:
        token_ids_BT: <start> words <end>, padded with 0.
        max_length: longer captions are cut to it, their last token becoming <end>.

    Returns:
        Labels, ids (B, max_length + 1) padded with 0; and a float mask of that shape: 1 on the caption and on the padding just behind it,
        whose prediction is thus learnt too.
    """
    labels_BL = F.pad(token_ids_BT[:, :max_length], (0, max(0, max_length - token_ids_BT.shape[1]) + 1), value=PAD_ID)
    lengths_B = (token_ids_BT != PAD_ID).sum(dim=1)
    labels_BL[lengths_B >= max_length, max_length - 1] = END_ID
    positions_L = torch.arange(max_length + 1, device=token_ids_BT.device)
    return labels_BL, (positions_L <= lengths_B.clamp(max=max_length)[:, None]).float()


class RegionReader(nn.Module):
    """Projection, dropout and a GRU over the regions."""

    def __init__(self, config: CaptionConfig, *, feature_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(feature_dim, config.hidden_dim)
        nn.init.xavier_normal_(self.project.weight)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(config.hidden_dim, config.hidden_dim, batch_first=True, bidirectional=config.bidirectional)

    def forward(self, nodes_BNE: Tensor) -> tuple[Tensor, Tensor]:
        """States after each region (B, N, H), and the last (directions, B, H / directions)."""
        states_BNH, last = self.gru(self.dropout(self.project(nodes_BNE)))
        return states_BNH, last


class RegionAttention(nn.Module):
    """Additive attention of the decoder's state to the regions (Bahdanau et al., 2015)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * dim, dim)
        self.score = nn.Linear(dim, 1, bias=False)

    def prepare(self, regions_BNH: Tensor) -> Tensor:
        """The regions' part of the hidden layer, the same in every step, (B, N, H)."""
        return F.linear(regions_BNH, self.hidden.weight[:, : regions_BNH.shape[2]], self.hidden.bias)

    def forward(self, regions_BNH: Tensor, prepared_BNH: Tensor, state_BH: Tensor) -> Tensor:
        """The regions' weighted sum (B, H)."""
        from_state_BH = F.linear(state_BH, self.hidden.weight[:, state_BH.shape[1] :])
        weights_BN1 = self.score(torch.tanh(prepared_BNH + from_state_BH[:, None])).softmax(dim=1)
        return (weights_BN1 * regions_BNH).sum(dim=1)


class CaptionDecoder(nn.Module):
    """A GRU that takes a word and the attended regions, and gives its state; `output` turns states into words."""

    def __init__(self, config: CaptionConfig, *, dim: int, vocabulary_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary_size, config.word_dim)
        self.attention = RegionAttention(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(config.word_dim + dim, dim, batch_first=True)
        self.output = nn.Linear(dim, vocabulary_size)
        nn.init.xavier_normal_(self.output.weight)

    def forward(self, word_BW: Tensor, state_BH: Tensor, regions_BNH: Tensor, prepared_BNH: Tensor) -> Tensor:
        """The next state (B, H)."""
        attended_BH = self.attention(regions_BNH, prepared_BNH, state_BH)
        inputs = self.dropout(torch.cat([word_BW, attended_BH], dim=1))
        return self.gru(inputs[:, None], state_BH[None])[1].squeeze(0)


class Captioner(nn.Module):
    """The whole branch.

    Args:
        config: the branch's options.
        feature_dim: E, width of the related regions.
        vocabulary_size: V, the text encoder's.
    """

    def __init__(self, config: CaptionConfig, *, feature_dim: int, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = RegionReader(config, feature_dim=feature_dim)
        dim = config.hidden_dim * (2 if config.bidirectional else 1)
        self.decoder = CaptionDecoder(config, dim=dim, vocabulary_size=vocabulary_size)

    def _read(self, nodes_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The regions for the decoder, their prepared attention, and its first state: the reader's last, directions side by side."""
        regions_BNH, last = self.encoder(nodes_BNE)
        return regions_BNH, self.decoder.attention.prepare(regions_BNH), last.transpose(0, 1).flatten(1)

    def forward(self, nodes_BNE: Tensor, words_BT: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of the word behind each given word (teacher forcing).

        Args:
            nodes_BNE: what `VsrnImageEncoder.relate` gives.
            words_BT: the captions' ids, from <start> on.
        """
        regions_BNH, prepared_BNH, state_BH = self._read(nodes_BNE)
        states = []
        for word_BW in self.decoder.embed(words_BT).unbind(dim=1):
            state_BH = self.decoder(word_BW, state_BH, regions_BNH, prepared_BNH)
            states.append(state_BH)
        return self.decoder.output(torch.stack(states, dim=1)).log_softmax(dim=2)

    def loss(self, nodes_BNE: Tensor, labels_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Negative log-likelihood of the captions, summed over their words and divided by the batch size, as the authors' code does.

        Args:
            labels_BL, mask_BL: see `caption_targets`.
        """
        # The mask's last column is behind the last target; and steps that nothing asks for are not computed.
        length = min(labels_BL.shape[1] - 1, int(mask_BL.sum(dim=1).max()))
        targets_BT = labels_BL[:, 1:length]
        log_probabilities_BTV = self(nodes_BNE, labels_BL[:, : length - 1])
        likelihood_BT = log_probabilities_BTV.gather(2, targets_BT[:, :, None]).squeeze(2)
        return -(likelihood_BT * mask_BL[:, 1:length]).sum() / len(labels_BL)

    @torch.no_grad()
    def decode_greedily(self, nodes_BNE: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest word at each step, without a stop at <end>.

        Returns:
            Ids behind <start>, and their log-probabilities, both (B, max_length - 2).
        """
        regions_BNH, prepared_BNH, state_BH = self._read(nodes_BNE)
        word_B = torch.full((len(nodes_BNE),), START_ID, device=nodes_BNE.device)
        chosen = []
        for _ in range(self.config.max_length - 2):
            state_BH = self.decoder(self.decoder.embed(word_B), state_BH, regions_BNH, prepared_BNH)
            log_probability_B, word_B = self.decoder.output(state_BH).log_softmax(dim=1).max(dim=1)
            chosen.append((word_B, log_probability_B))
        words, log_probabilities = zip(*chosen, strict=True)
        return torch.stack(words, dim=1), torch.stack(log_probabilities, dim=1)
