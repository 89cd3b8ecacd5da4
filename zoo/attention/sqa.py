"""Sparse query attention (SQA).

Paper: Sparse Query Attention, arXiv:2510.01817. Fewer *query* heads of unchanged width: H heads of width C / H become
``Hq = H / reduction``, so that scores and mixing cost 1 / reduction as much; ``W_Q`` is C x Hq D, ``W_O`` Hq D x C. Key/value heads:
as many (sSQA with reduction 2, xSQA with 4 or more) or fewer, as in grouped-query attention. A window gives SW-SQA.
Differs from the paper in: the default where 2 does not divide the heads; a bias for H heads is averaged over the heads that one query
head stands for; no "light" family.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import softmax as kernel
from zoo.attention.base import Attention, BiasFactors, Grid, masked_softmax, scaled_scores, visible_pairs
from zoo.attention.registry import register_attention
from zoo.errors import CapabilityError, ConfigError

log = logging.getLogger(__name__)


@cache  # said once
def default_reduction(num_heads: int) -> int:
    """2, or the least divisor of the heads above it; 1 for one head."""
    reduction = next((d for d in range(2, num_heads + 1) if num_heads % d == 0), 1)
    if reduction > 2:
        log.warning(
            "attention 'sqa': 2 does not divide %d heads; attention.reduction=%d instead, query heads: %d",
            num_heads, reduction, num_heads // reduction,
        )  # fmt: skip
    return reduction


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    bias="full",
    streaming=True,
    has_map=True,
)
class SqaAttention(Attention):
    """Softmax attention with a fraction of the query heads.

    Args:
        reduction: H / Hq, a divisor of the heads; 1 leaves all. None for 2, or the least divisor above it: 3 heads become one (said
            once), one head stays.
        num_kv_heads: Key/value heads, a divisor of Hq; None for Hq.
        window: Keys at most this far from the query (causal: behind it); None for all. Self patterns only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        reduction: int | None = None,
        num_kv_heads: int | None = None,
        window: int | None = None,
        **common: Any,
    ) -> None:
        divisors = [d for d in range(1, num_heads + 1) if num_heads % d == 0]
        if reduction is None:
            reduction = default_reduction(num_heads)
        elif reduction not in divisors:
            raise ConfigError(
                f"attention.reduction={reduction} must divide the {num_heads} heads: {', '.join(map(str, divisors))}; or null"
            )
        queries = num_heads // reduction
        if num_kv_heads is not None and (num_kv_heads < 1 or queries % num_kv_heads):
            raise ConfigError(f"attention.num_kv_heads={num_kv_heads} must divide the {queries} query heads")
        if common.get("head_dim") is None and dim % num_heads == 0:
            common["head_dim"] = dim // num_heads
        super().__init__(dim, queries, kv_heads=num_kv_heads, **common)
        if window is not None and (window < 0 or self.pattern.cross):
            raise ConfigError(f"attention.window={window} must be >= 0 and serves self patterns only")
        if window is not None and not self.ordered:
            raise CapabilityError("attention 'sqa': a window needs ordered tokens; set attention.window=null")
        self.model_heads, self.window = num_heads, window

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
            bias=self._fewer(bias),
            causal=self.causal,
            positions=positions if self.causal else None,
            window=None if self.window is None else (self.window, 0 if self.causal else self.window),
            higher_order=self.higher_order,
        )

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
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        if self.window is not None:
            ahead = (
                torch.arange(k.shape[2], device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None]
            )
            seen = seen & (ahead.abs() <= self.window)
        return masked_softmax(scaled_scores(q, k, self._fewer(bias)), seen)

    def _fewer(self, bias: Tensor | BiasFactors | None) -> Tensor | None:
        if isinstance(bias, BiasFactors):
            bias = bias.dense()
        if bias is None or bias.shape[1] in (1, self.num_heads):
            return bias
        return bias.unflatten(1, (self.num_heads, -1)).mean(2)

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        keys = m if self.window is None else min(m, (1 if self.causal else 2) * self.window + 1)
        cost = kernel.cost(
            1, self.num_heads, n, keys, self.head_dim, self.value_head_dim,
            causal=self.causal and self.window is None, key_heads=self.kv_heads,
        )  # fmt: skip
        return cost.flops, cost.bytes
