"""No mixing: the control that shows what attention buys.

Every token keeps its own value: ``y_i = W_o W_v x_i``; queries and keys do not exist. Its own definition, no paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, BiasFactors, Grid, State, split_heads
from zoo.attention.registry import register_attention


@register_attention(patterns={"self", "causal_self"}, bias="full", streaming=True, has_map=True)
class NoAttention(Attention):
    """Identity in place of attention. Masks and biases act on nothing, except that masked tokens give zeros."""

    def __init__(self, dim: int, num_heads: int, **common: Any) -> None:
        super().__init__(dim, num_heads, **common)
        source = self.v if self.separate_value else self.qkv
        bias = source.bias is not None
        for unused in ("qkv", "q", "k"):
            if hasattr(self, unused):
                delattr(self, unused)
        self.v = nn.Linear(source.in_features, num_heads * self.value_head_dim, bias=bias)

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = split_heads(self.v(value), self.num_heads)
        return v, v, v

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
        return v if key_mask is None else v.masked_fill(~key_mask[:, None, :, None], 0.0)

    def weights(self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, **call: Any) -> Tensor:
        eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        return eye if key_mask is None else eye * key_mask[:, None, None, :].to(k.dtype)

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        self._check_streaming()
        return {}

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        return self.output(split_heads(self.v(x_t), self.num_heads), x_t), state

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        return 0.0, 0.0

    def state_size(self, m: int) -> int:
        return 0
