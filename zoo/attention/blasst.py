"""BLASST: softmax attention that skips tiles of negligible scores.

Paper: BLASST: Dynamic Blocked Attention Sparsity via Softmax Thresholding, arXiv:2512.12087. In the loop over key tiles a tile is
skipped when in every row of the query tile ``max_tile(s) - running_max(s) < ln(lambda)``, with ``lambda = factor / visible keys``; the running
maximum includes the tile. Skipped entries have weight below lambda, and the row's largest entry stays, so the weight lost by a row is
below `factor`, and ``|O - O_exact| <= 2 factor max|v|``.
Differs from the paper in: `factor` counts the visible keys of each row, and padded queries keep no tile, so that padding behind the end
equals deletion (elsewhere it moves the tiles' borders, within that bound); causal and cross patterns decide
row by row (`block_q` 1), since the rows of a tile would otherwise depend on each other's future and a query decoded alone would differ; the CPU
path applies the rule but saves no time. What is skipped depends on the order of the keys, within that bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import softmax as kernel
from kernels.softmax.reference import Skip, skipped
from zoo.attention.base import (
    Attention,
    BiasFactors,
    Grid,
    Pattern,
    dense_bias,
    masked_softmax,
    scaled_scores,
    visible_pairs,
)
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    bias="full",
    smooth=False,
    streaming=True,
    has_map=True,
)
class BlasstAttention(Attention):
    """Softmax attention without the tiles that hardly count.

    Args:
        factor: Most weight that a row may lose, >= 0; 0 skips nothing.
        block_q: Queries of a tile in self-attention; causal and cross patterns use 1.
        block_k: Keys of a tile.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        factor: float = 0.1,
        block_q: int = 16,
        block_k: int = 8,
        **common: Any,
    ) -> None:
        if factor < 0 or min(block_q, block_k) < 1:
            raise ConfigError(
                f"attention.blasst: factor={factor} must be >= 0, block_q={block_q} and block_k={block_k} >= 1"
            )
        super().__init__(dim, num_heads, **common)
        self.factor, self.tile = factor, (block_q if self.pattern is Pattern.SELF else 1, block_k)

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
        return kernel.attention(
            q,
            k,
            v,
            key_mask=key_mask,
            bias=dense_bias(bias),
            causal=self.causal,
            positions=positions,
            skip_threshold=self.factor,
            skip_tile=self.tile,
            skip_voting=self._voting(key_mask),
            higher_order=self.higher_order,
        )

    def _voting(self, key_mask: Tensor | None) -> Tensor | None:
        """Queries for whose sake a tile stays, bool [B, N]: in self-attention those that the key mask keeps."""
        return key_mask if self.pattern is Pattern.SELF else None

    def _kept(
        self, q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Any, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B, H, N, M], visible entries, and visible entries in tiles that stay."""
        scores = scaled_scores(q, k, bias)
        visible = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        visible = visible.expand_as(scores)
        kept = visible & (scores > -torch.inf)
        if self.factor:
            kept = kept & ~skipped(scores, kept, Skip(self.factor, *self.tile, self._voting(key_mask)))
        return scores, visible, kept

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
        scores, _, kept = self._kept(q, k, key_mask, bias, positions)
        return masked_softmax(scores, kept)

    def sparsity(self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, bias: Any = None) -> float:
        """Share of the visible entries that the rule skips for these queries and keys."""
        _, visible, kept = self._kept(q, k, key_mask, bias, None)
        return float(1 - kept.sum() / visible.sum().clamp(min=1))

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        """Of a pass that skips nothing; scores are always paid, values and mixing by the share of tiles that stay."""
        cost = kernel.cost(1, self.num_heads, n, m, self.head_dim, self.value_head_dim, causal=self.causal)
        return cost.flops, cost.bytes
