"""Momentum attention: queries and keys sharpened by their own change.

Paper: Momentum Attention, arXiv:2602.04902, 2026. No official code found.
``q^_t = q_t + gamma (q_t - q_{t-1})``, keys alike, values untouched, then softmax attention: a filter with taps
``[1 + gamma, -gamma]``, unit gain for constant sequences and high-pass for gamma > 0.
Differs from the paper in: gamma is learned per head and starts at 0 (plain attention); optional rotary positions come before the
difference (``order=post``) or after it; on a 2-D grid the differences along rows and columns are averaged; ``difference=symmetric`` compares
with both neighbours; cross patterns sharpen the keys alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import local
from kernels import softmax as kernel
from zoo.attention.base import (
    Attention,
    BiasFactors,
    Grid,
    Pattern,
    State,
    append,
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
    grid_dims=(1, 2),
    order_sensitive=True,
    streaming=True,
    has_map=True,
)
class MomentumAttention(Attention):
    """Softmax attention on queries and keys that lean towards where they are heading.

    Args:
        gamma: Start value of the leaning, per head; the filter stays causal.
        learnable: Train gamma.
        difference: Neighbours compared with: "backward" (the previous token) or "symmetric" (self pattern only).
        rope: Rotary positions of self patterns: "none" or "1d" (even head width).
        order: Leaning "post" or "pre" rotation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gamma: float = 0.0,
        learnable: bool = True,
        difference: str = "backward",
        rope: str = "none",
        order: str = "post",
        **common: Any,
    ) -> None:
        for name, value, allowed in (
            ("difference", difference, ("backward", "symmetric")),
            ("rope", rope, ("none", "1d")),
            ("order", order, ("post", "pre")),
        ):
            if value not in allowed:
                raise ConfigError(f"attention.{name}={value!r} is unknown; choose from {', '.join(allowed)}")
        super().__init__(dim, num_heads, **common)
        if difference == "symmetric" and self.pattern is not Pattern.SELF:
            raise ConfigError(
                f"attention.difference='symmetric' looks ahead, which pattern {self.pattern.value!r} forbids; use backward"
            )
        if rope == "1d" and (self.head_dim % 2 or self.pattern.cross):
            raise ConfigError(
                "attention.rope='1d' needs self-attention and an even head width; use rope=none"
            )
        self.difference, self.order, self.rope = difference, order, rope == "1d"
        start = torch.full((num_heads, 1, 1), float(gamma))
        self.gamma = nn.Parameter(start) if learnable else None
        if not learnable:
            self.register_buffer("fixed_gamma", start)

    @property
    def _gamma(self) -> Tensor:
        return self.fixed_gamma if self.gamma is None else self.gamma

    def _rotate(self, x: Tensor, start: int = 0) -> Tensor:
        if not self.rope:
            return x
        places = torch.arange(start, start + x.shape[2], device=x.device)[:, None]
        frequencies = local.rope_frequencies(self.head_dim // 2).to(x.device)
        return local.rotate(x, local.rope_angles(places, frequencies))

    def _lean(self, x: Tensor, key_mask: Tensor | None, grid: Grid | None) -> Tensor:
        """``x + gamma p`` with p = 0 where the neighbour is missing or padded."""
        if grid is not None and len(grid.shape) == 2 and not self.pattern.cross and not self.causal:
            places = x[:, :, grid.prefix :].unflatten(2, grid.shape)
            mask = None if key_mask is None else key_mask[:, grid.prefix :].unflatten(1, grid.shape)
            p = 0.5 * (self._differences(places, mask, 0) + self._differences(places, mask, 1))
            p = F.pad(p.flatten(2, 3), (0, 0, grid.prefix, 0))
        else:
            skip = 0 if grid is None or self.pattern.cross else grid.prefix
            p = self._differences(x[:, :, skip:], None if key_mask is None else key_mask[:, skip:], 0)
            p = F.pad(p, (0, 0, skip, 0))
        return x + self._gamma * p

    def _differences(self, x: Tensor, mask: Tensor | None, axis: int) -> Tensor:
        """x [B, H, *places, D] less its neighbours along one axis of the places."""
        previous = _less_shifted(x, mask, axis, 1)
        if self.difference == "backward":
            return previous
        return 0.5 * (previous + _less_shifted(x, mask, axis, -1))

    def _sharpened(
        self, q: Tensor, k: Tensor, key_mask: Tensor | None, grid: Grid | None
    ) -> tuple[Tensor, Tensor]:
        if key_mask is not None:
            k = k.masked_fill(~key_mask[:, None, :, None], 0.0)
        if self.pattern.cross:
            return q, self._lean(k, key_mask, grid)
        if self.order == "post":
            q, k = (self._lean(self._rotate(t), key_mask, grid) for t in (q, k))
        else:
            q, k = (self._rotate(self._lean(t, key_mask, grid)) for t in (q, k))
        return q, k

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
        q, k = self._sharpened(q, k, key_mask, grid)
        return self._softmax(q, k, v, key_mask=key_mask, bias=bias, positions=positions)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, *, bias=None, **call: Any) -> Tensor:
        return kernel.attention(
            q,
            k,
            v,
            bias=dense_bias(bias),
            causal=self.causal,
            higher_order=self.higher_order,
            **call,
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
        q, k = self._sharpened(q, k, key_mask, grid)
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        return masked_softmax(scaled_scores(q, k, bias), seen)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_streaming()
        if self.pattern is Pattern.CROSS:
            return super().step(x_t, state)
        q, k, v = self.project(x_t, x_t, x_t)
        length = state["length"]
        before = state.get("last")
        if self.order == "post":
            q, k = self._rotate(q, length), self._rotate(k, length)
        following: State = {"last": torch.cat((q, k), -1)}
        if before is not None:
            last_q, last_k = before.chunk(2, -1)
            q, k = q + self._gamma * (q - last_q), k + self._gamma * (k - last_k)
        if self.order == "pre":
            q, k = self._rotate(q, length), self._rotate(k, length)
        length += 1
        keys, values = append(state["k"], k, length), append(state["v"], v, length)
        heads = self._softmax(q, keys[:, :, :length], values[:, :, :length])
        return self.output(heads, x_t), following | {"k": keys, "v": values, "length": length}

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        h, d = self.num_heads, self.head_dim
        cost = kernel.cost(1, h, n, m, d, self.value_head_dim, causal=self.causal)
        return cost.flops + 3 * h * d * (m if self.pattern.cross else n + m), cost.bytes

    def state_size(self, m: int) -> int:
        extra = 0 if self.pattern.cross else 2 * self.num_heads * self.head_dim
        return super().state_size(m) + extra


def _less_shifted(x: Tensor, mask: Tensor | None, axis: int, by: int) -> Tensor:
    """``x_t - x_{t - by}`` along axis `axis` of the places; zero at the border and where either place is padded."""
    axis += 2
    n = x.shape[axis]
    if n <= 1:
        return torch.zeros_like(x)
    here, there = x.narrow(axis, max(by, 0), n - 1), x.narrow(axis, max(-by, 0), n - 1)
    gap = here - there
    if mask is not None:
        both = mask.narrow(axis - 1, max(by, 0), n - 1) & mask.narrow(axis - 1, max(-by, 0), n - 1)
        gap = gap.masked_fill(~both[:, None, ..., None], 0.0)
    border = torch.zeros_like(x.narrow(axis, 0, 1))
    return torch.cat((border, gap) if by > 0 else (gap, border), axis)
