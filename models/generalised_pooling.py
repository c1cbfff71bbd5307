"""Generalised pooling: a learned way between the mean and the maximum (GPO, VSE∞; Chen et al., CVPR 2021, section 3).

Each channel's values are sorted over the items, largest first, and summed with one coefficient per place. The coefficients depend on the
number of items alone: a bidirectional GRU reads sinusoidal encodings of the places, its two directions are averaged, and a softmax runs
over what a linear layer makes of them.
Shape suffixes: B batch, N items, L longest number of items, U different numbers of items, D embedding width, P places' encoding, H state.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .graph_attention import MASKED_SCORE

# The authors' code: encodings and states of 32, and a softmax ten times as sharp as the plain one.
PLACE_DIM, STATE_DIM, TEMPERATURE = 32, 32, 0.1


class GeneralisedPooling(nn.Module):
    """Pools up to `longest` items into one vector.

    In training the coefficients are computed in every step. In evaluation they are read from a table with a row for each number of
    items, which `eval()` and loading weights fill: a bidirectional GRU does not export with a free length, a table does.

    Args:
        longest: L, the greatest number of items.
    """

    table: Tensor
    places: Tensor

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.register_buffer("places", place_encodings(longest, PLACE_DIM), persistent=False)
        self.gru = nn.GRU(PLACE_DIM, STATE_DIM, batch_first=True, bidirectional=True)
        self.score = nn.Linear(STATE_DIM, 1, bias=False)
        # Row n - 1 is for n items; the last column, always 0, stands for every place past the longest.
        self.register_buffer("table", torch.zeros(longest, longest + 1), persistent=False)
        self.register_load_state_dict_post_hook(_refill)  # type: ignore[no-untyped-call]

    def coefficients(self, counts_U: Tensor) -> Tensor:
        """Coefficients (U, L + 1) for these numbers of items (1 … L), largest value first; each row sums to 1."""
        places_ULP = self.places.expand(len(counts_U), -1, -1)
        with torch.autocast(places_ULP.device.type, enabled=False):
            packed = pack_padded_sequence(places_ULP, counts_U.cpu(), batch_first=True, enforce_sorted=False)
            states_ULH, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=self.longest)
            forwards, backwards = states_ULH.chunk(2, dim=2)
            scores_UL = self.score((forwards + backwards) / 2).squeeze(2) / TEMPERATURE
            present_UL = torch.arange(self.longest, device=scores_UL.device) < counts_U[:, None]
            weights_UL = scores_UL.masked_fill(~present_UL, -math.inf).softmax(dim=1)
            return nn.functional.pad(weights_UL, (0, 1))

    def forward(self, items_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """One vector (B, D) of the items that `mask_BN` keeps, at most L; all of them where it is None."""
        batch, num_items, _ = items_BND.shape
        if mask_BN is None:
            counts_B = torch.full((batch,), num_items, device=items_BND.device)
        else:
            counts_B = mask_BN.sum(dim=1).clamp(min=1)
            items_BND = items_BND.masked_fill(~mask_BN[:, :, None], MASKED_SCORE)
        if self.training:
            different_U, row_B = torch.unique(counts_B, return_inverse=True)
            weights_BL = self.coefficients(different_U)[row_B]
        else:
            weights_BL = self.table[counts_B - 1]
        column_N = torch.arange(num_items, device=items_BND.device).clamp(max=self.longest)
        sorted_BND = items_BND.sort(dim=1, descending=True).values
        return (sorted_BND * weights_BL[:, column_N, None].to(sorted_BND.dtype)).sum(dim=1)

    def train(self, mode: bool = True) -> "GeneralisedPooling":
        """As usual; for evaluation the table is made from the weights as they are now."""
        super().train(mode)
        if not mode:
            with torch.no_grad():
                self.table = self.coefficients(torch.arange(1, self.longest + 1, device=self.table.device))
        return self


def _refill(pooling: nn.Module, _: object) -> None:
    """Called when weights have been loaded: in evaluation the table is theirs."""
    pooling.train(pooling.training)


def place_encodings(count: int, dim: int) -> Tensor:
    """Sinusoidal encodings (count, dim) of the places 0, 1, 2, …: sines in even channels, cosines in odd ones (Vaswani et al., 2017)."""
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angles = torch.arange(count, dtype=torch.float32)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
