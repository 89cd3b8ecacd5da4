"""HSTU's pointwise attention: SiLU in place of softmax, so that how much was seen is not lost.

Paper: "Actions speak louder than words: trillion-parameter sequential transducers for generative recommendations",
arXiv:2402.17152, eq. 2. Code: meta-recsys/generative-recommenders, Apache-2.0.
``o_i = (1/n) sum_j SiLU(q_i.k_j / sqrt(D) + b_ij) v_j``, with q, k, v themselves through SiLU; n is the longest length.
Differs from the code in: scores are scaled by sqrt(D); without a `length` n is the number of keys that a query sees.
The gate and the second norm belong to the block (zoo/models/hstu.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.base import Attention, BiasFactors, Grid, scaled_scores, visible_pairs
from zoo.attention.registry import register_attention


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    bias="full",
    streaming=True,
    has_map=True,
    signed_map=True,
    has_scores=True,
)
class HstuAttention(Attention):
    """Unnormalised attention with signed weights.

    Args:
        silu_inputs: Queries, keys and values go through SiLU after their projection.
    """

    def __init__(self, dim: int, num_heads: int, *, silu_inputs: bool = True, **common: Any) -> None:
        super().__init__(dim, num_heads, **common)
        self.silu_inputs = silu_inputs

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = super().project(x, context, value)
        return tuple(F.silu(t) for t in projected) if self.silu_inputs else projected

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if key_mask is not None:  # NaN or infinity in a masked row would survive a weight of zero
            drop = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
        return self.weights(q, k, key_mask=key_mask, bias=bias, positions=positions).to(v.dtype) @ v

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        scores = scaled_scores(q, k, bias)
        if (
            bias is not None
        ):  # -inf hides a key: its weight is SiLU's limit 0, which SiLU itself computes as -inf * 0
            scores = scores.masked_fill(scores == -torch.inf, 0.0)
        weights = F.silu(scores)
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        weights = weights.masked_fill(~seen, 0.0)
        if self.length is not None:
            return weights / self.length
        return weights / seen.sum(-1, keepdim=True).clamp_min(1).to(weights.dtype)

    def raw_scores(self, q: Tensor, k: Tensor, bias: Tensor | BiasFactors | None) -> Tensor:
        return scaled_scores(q, k, bias)

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        d, e = self.head_dim, self.value_head_dim
        flops = self.num_heads * n * m * (2.0 * (d + e) + 5.0) / (2.0 if self.causal else 1.0)
        return flops, 4.0 * self.num_heads * (n * (d + e) + m * (d + e) + 2 * n * m)
