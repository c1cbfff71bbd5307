"""torch's GRU as the ONNX GRU operator, for export.

torch's exporter runs the recurrence step by step to learn shapes and so freezes the traced length in what follows (seen with torch
2.13). Here the operator and its symbolic shape are written down instead.
"""

import torch
from torch import Tensor, nn


class OnnxGru(nn.Module):
    """A one-layer, one-direction, batch-first `nn.GRU` that exports as one ONNX GRU node; its values are the same."""

    weight: Tensor
    recurrence: Tensor
    bias: Tensor

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        assert (gru.num_layers, gru.bidirectional, gru.batch_first, gru.bias) == (1, False, True, True)
        self.hidden_size = gru.hidden_size
        self.register_buffer("weight", _onnx_gates(gru.weight_ih_l0)[None])
        self.register_buffer("recurrence", _onnx_gates(gru.weight_hh_l0)[None])
        self.register_buffer("bias", torch.cat([_onnx_gates(gru.bias_ih_l0), _onnx_gates(gru.bias_hh_l0)])[None])

    def forward(self, words_BTW: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = words_BTW.shape
        states_T1BD, last_1BD = torch.onnx.ops.symbolic_multi_out(
            "GRU",
            [words_BTW.transpose(0, 1), self.weight, self.recurrence, self.bias],
            # torch applies the reset gate after the recurrent product.
            attrs={"hidden_size": self.hidden_size, "linear_before_reset": 1},
            dtypes=[words_BTW.dtype, words_BTW.dtype],
            shapes=[[length, 1, batch, self.hidden_size], [1, batch, self.hidden_size]],
            version=1,
        )
        return states_T1BD.squeeze(1).transpose(0, 1), last_1BD


def _onnx_gates(stacked: Tensor | nn.Module) -> Tensor:
    """torch stacks reset, update, new; ONNX stacks update, reset, new."""
    assert isinstance(stacked, Tensor)
    reset, update, new = stacked.detach().chunk(3)
    return torch.cat([update, reset, new])
