"""The graph attention layer and the gated fusion layer of DSRAN.

Shape suffixes: B batch, N nodes, D embedding width, H heads, C width of one head.
"""

from typing import Literal

import torch
from torch import Tensor, nn

# Added to the scores of padded nodes. exp() of it is exactly 0 in float32, and it is finite in float16, where -1e9 would be -inf and -inf * 0 NaN.
MASKED_SCORE = -30000.0


class NodeNorm(nn.Module):
    """BatchNorm or LayerNorm over node vectors, or nothing; BatchNorm's statistics skip masked nodes."""

    def __init__(self, dim: int, kind: Literal["batch", "layer", "none"]) -> None:
        super().__init__()
        kinds = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.norm: nn.Module = kinds[kind](dim) if kind in kinds else nn.Identity()

    def forward(self, nodes_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        if not isinstance(self.norm, nn.BatchNorm1d):
            return self.norm(nodes_BND)
        if self.training and mask_BN is not None:
            normalised_BND = torch.zeros_like(nodes_BND)
            normalised_BND[mask_BN] = self.norm(nodes_BND[mask_BN])
            return normalised_BND
        return self.norm(nodes_BND.flatten(0, 1)).view_as(nodes_BND)


class GraphAttention(nn.Module):
    """One graph attention layer over fully connected nodes (paper section III-C, eqs 2 to 8).

    Where the paper has multi-head attention, ReLU and BatchNorm, the authors' code computes a post-norm transformer layer with
    BatchNorm: two residual branches, the second a feed-forward of the same width, and no activation on the output. We follow the code.

    Args:
        dim: D, width of a node.
        num_heads: H; D must be a multiple of it.
        norm: `batch` (paper and code), `layer` or `none`.
        zero_residual: both residual branches start at zero, so that the layer starts as its norms alone.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        norm: Literal["batch", "layer", "none"] = "batch",
        attention_dropout: float = 0.2,
        residual_dropout: float = 0.2,
        zero_residual: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.merge = nn.Linear(dim, dim)  # W_o of eq 5
        self.norm_attention = NodeNorm(dim, norm)
        self.expand = nn.Linear(dim, dim)
        self.contract = nn.Linear(dim, dim)
        self.norm_output = NodeNorm(dim, norm)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.residual_dropout = nn.Dropout(residual_dropout)
        if zero_residual:
            for branch in (self.merge, self.contract):
                nn.init.zeros_(branch.weight)
                nn.init.zeros_(branch.bias)

    def forward(self, nodes_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Nodes (B, N, D) to nodes (B, N, D); where `mask_BN` is false, a node is seen by no other and enters no statistic."""
        nodes_BND = self.norm_attention(nodes_BND + self._attended(nodes_BND, mask_BN), mask_BN)
        return self.norm_output(nodes_BND + self._updated(nodes_BND), mask_BN)

    def _attended(self, nodes_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
        return self.residual_dropout(self.merge(self._attend(nodes_BND, mask_BN)))

    def _updated(self, nodes_BND: Tensor) -> Tensor:
        return self.residual_dropout(self.contract(torch.relu(self.expand(nodes_BND))))

    def _attend(self, nodes_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
        query_BHNC = self._split_heads(self.query(nodes_BND))
        key_BHNC = self._split_heads(self.key(nodes_BND))
        value_BHNC = self._split_heads(self.value(nodes_BND))
        # Scaled by the width of a head, as the authors do (eq 3 has the full width); before the product, which then stays small in float16.
        scores_BHNN = (query_BHNC * query_BHNC.shape[-1] ** -0.5) @ key_BHNC.transpose(2, 3)
        if mask_BN is not None:
            scores_BHNN = scores_BHNN.masked_fill(~mask_BN[:, None, None, :], MASKED_SCORE)
        weights_BHNN = self.attention_dropout(scores_BHNN.softmax(dim=-1))
        return (weights_BHNN @ value_BHNC).transpose(1, 2).flatten(2)

    def _split_heads(self, nodes_BND: Tensor) -> Tensor:
        batch, num_nodes, dim = nodes_BND.shape
        return nodes_BND.view(batch, num_nodes, self.num_heads, dim // self.num_heads).transpose(1, 2)


class GatedFusion(nn.Module):
    """Gated fusion of two vectors (eq 15), with the biases that the authors' code has and the equation has not."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed_a = nn.Linear(dim, dim)
        self.embed_b = nn.Linear(dim, dim)
        self.gate_a = nn.Linear(dim, dim)
        self.gate_b = nn.Linear(dim, dim)

    def forward(self, vector_a_BD: Tensor, vector_b_BD: Tensor) -> Tensor:
        embedded_a_BD = self.embed_a(vector_a_BD)
        embedded_b_BD = self.embed_b(vector_b_BD)
        gate_BD = torch.sigmoid(self.gate_a(embedded_a_BD) + self.gate_b(embedded_b_BD))
        return gate_BD * embedded_a_BD + (1 - gate_BD) * embedded_b_BD

    def carry(self, vectors: tuple[Tensor, Tensor], nodes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Nodes (B, N, D) of each side through the layer, at the gates that the two `vectors` (B, D) set.

        At fixed gates the layer is affine: where the vectors are the means of the nodes, the means of what comes out sum to `forward`'s.
        """
        (vector_a_BD, vector_b_BD), (nodes_a_BND, nodes_b_BND) = vectors, nodes
        gate_BD = torch.sigmoid(self.gate_a(self.embed_a(vector_a_BD)) + self.gate_b(self.embed_b(vector_b_BD)))
        gate_B1D = gate_BD[:, None]
        return gate_B1D * self.embed_a(nodes_a_BND), (1 - gate_B1D) * self.embed_b(nodes_b_BND)
