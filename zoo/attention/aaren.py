"""Aaren: softmax attention with a learned query, as a recurrent network.

Paper: Attention as an RNN, arXiv:2405.13956, 2024.
``s_t = D^-1/2 q.k_t`` with a learned query per head and layer, ``o_t = sum_{j<=t} e^{s_j} v_j / sum_{j<=t} e^{s_j}``; decoding keeps a
maximum, a denominator and a numerator.
Differs from the paper in: the learned token and its projection are one learned vector per head. Self, cross and causal_cross forms are
ours: self averages the softmax over the tokens up to and including the own one and the softmax over the tokens after it (where there
are any); cross gives every query the softmax pool over all keys; causal_cross the pool over the keys that it may see. The input of the
queries has no influence on the weights in any pattern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels import prefix as kernel
from zoo.attention.base import Attention, BiasFactors, Grid, Pattern, State, split_heads
from zoo.attention.registry import register_attention


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    bias="key",
    order_sensitive=True,
    order_free={"cross"},
    streaming=True,
    has_map=True,
)
class AarenAttention(Attention):
    """Running softmax pool of the values: constant state, one learned query per head.

    Args:
        query_std: Standard deviation of the learned queries' start values, >= 0.
    """

    def __init__(self, dim: int, num_heads: int, *, query_std: float = 1.0, **common: Any) -> None:
        super().__init__(dim, num_heads, **common)
        if hasattr(self, "qkv"):
            bias = self.qkv.bias is not None
            del self.qkv
            self.kv = nn.Linear(dim, num_heads * (self.head_dim + self.value_head_dim), bias=bias)
        else:
            del self.q
        self.query = nn.Parameter(query_std * torch.randn(num_heads, 1, self.head_dim))

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, d, e = self.num_heads, self.head_dim, self.value_head_dim
        if hasattr(self, "kv"):
            k, v = self.kv(context).split((h * d, h * e), dim=-1)
        else:
            k, v = self.k(context), self.v(value)
        q = self.query.to(k.dtype).expand(x.shape[0], h, x.shape[1], d)
        return q, split_heads(k, h), split_heads(v, h)

    def _scores(self, k: Tensor, bias: Tensor | BiasFactors | None = None) -> Tensor:
        """[B, H, M]."""
        s = (k * self.query).sum(-1) * self.head_dim**-0.5
        return s if bias is None else s + bias.squeeze(-2)

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
        s, n, m = self._scores(k, bias), q.shape[2], k.shape[2]
        if self.pattern is Pattern.CROSS:
            pool = kernel.prefix_read(kernel.prefix_state(s, v, key_mask=key_mask)).to(v.dtype)
            return pool.expand(-1, -1, n, -1)
        if self.causal:
            return kernel.prefix_softmax(s, v, key_mask=key_mask, positions=positions, queries=n)
        before = kernel.prefix_softmax(s, v, key_mask=key_mask)
        after = kernel.prefix_softmax(s, v, key_mask=key_mask, reverse=True, read="exclusive")
        keep = torch.ones(1, m, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        left = keep.cumsum(1) > 0
        right = keep.flip(1).cumsum(1).flip(1) - keep.long() > 0
        directions = (left.long() + right.long()).clamp(min=1)[:, None, :, None]
        return (before + after) / directions

    def weights(self, q: Tensor, k: Tensor, **call: Any) -> Tensor:
        m = k.shape[2]
        unit = torch.eye(m, dtype=k.dtype, device=k.device).expand(*k.shape[:2], m, m)
        return self.attend(q, k, unit, **call)

    def init_state(
        self,
        batch_size: int,
        *,
        context: Tensor | None = None,
        value: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> State:
        if self.pattern is Pattern.CROSS and context is not None:
            _, k, v = self.project(context[:, :0], context, context if value is None else value)
            return {"pool": kernel.prefix_state(self._scores(k), v, key_mask=key_mask)}
        if self.pattern is not Pattern.CAUSAL_SELF:
            return super().init_state(batch_size, context=context, value=value, key_mask=key_mask)
        empty = self.query.new_zeros(batch_size, self.num_heads, 0, self.value_head_dim)
        return {"pool": kernel.prefix_state(empty.sum(-1), empty)}

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_streaming()
        pool = state["pool"]
        if self.pattern is Pattern.CAUSAL_SELF:
            _, k, v = self.project(x_t, x_t, x_t)
            pool = kernel.prefix_state(self._scores(k), v, initial_state=pool)
        heads = kernel.prefix_read(pool).to(x_t.dtype)
        return self.output(heads, x_t), {"pool": pool}

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        cost = kernel.cost(1, self.num_heads, m, self.value_head_dim)
        sides = 2 if self.pattern is Pattern.SELF else 1
        return sides * cost.flops + 2 * self.num_heads * m * self.head_dim, sides * cost.bytes

    def state_size(self, m: int) -> int:
        return self.num_heads * (self.value_head_dim + 2)
