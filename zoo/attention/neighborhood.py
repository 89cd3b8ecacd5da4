"""Neighbourhood attention on sequences, images and volumes.

Papers: Neighborhood Attention Transformer, arXiv:2204.07143; dilation: arXiv:2209.15001; borders and stride as NATTEN has them
(arXiv:2403.04690). Per axis each query attends to its `window` nearest tokens of the same dilation group; at borders the window is
shifted inwards, not cut; an even window has one more key before the query; `stride` neighbouring queries share a window (stride = window:
separate windows, as Swin). Axes combine by "and". Causal sequences: the last `window` tokens up to the query, cut at the start.
Prefix tokens (class token, registers) see all and are seen by all.
Differs from NATTEN in: a window wider than an axis is clipped to it; a key mask leaves out keys, and on a sequence the border is each
sample's last kept token, so that padding equals deletion; biases are taken (dense path); no relative bias table of its own; no
axis-causal grids. Without a grid the tokens are a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import block_sparse as sparse
from kernels import softmax as kernel
from kernels.block_sparse.masks import axis_visible
from zoo.attention.base import Attention, BiasFactors, Grid, State, dense_bias, masked_softmax, scaled_scores
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self", "causal_self"},
    bias="full",
    grid_dims=(1, 2, 3),
    order_sensitive=True,
    streaming=True,
    has_map=True,
)
class NeighborhoodAttention(Attention):
    """Softmax attention to the nearest tokens of a grid.

    Args:
        window: Tokens per axis: one number for all axes or a list.
        dilation: Distance of neighbours per axis, likewise.
        stride: Queries per axis that share a window, likewise, at most `window`; 1 in causal patterns.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int | list[int] = 5,
        dilation: int | list[int] = 1,
        stride: int | list[int] = 1,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_heads, **common)
        self.window, self.dilation, self.stride = window, dilation, stride
        axes = 1 if self.grid is None or self.causal else len(self.grid.shape)
        w, d, s = self._per_axis(axes)
        if min(w + d + s) < 1 or any(a > b for a, b in zip(s, w, strict=True)):
            raise ConfigError(
                f"attention.window={window}, dilation={dilation}, stride={stride} must be at least 1, with stride <= window"
            )
        if self.causal and s != (1,):
            raise ConfigError(f"attention.stride={stride} must be 1 in causal patterns")

    def _per_axis(self, axes: int) -> tuple[tuple[int, ...], ...]:
        out = []
        for name in ("window", "dilation", "stride"):
            value = getattr(self, name)
            values = (value,) * axes if isinstance(value, int) else tuple(value)
            if len(values) != axes:
                raise ConfigError(f"attention.{name}={value} needs one number for each of the {axes} axes")
            out.append(values)
        return tuple(out)

    def _rule(self, tokens: int, grid: Grid | None) -> sparse.Neighborhood:
        """The mask rule, with windows clipped to their axes."""
        grid = Grid((tokens,)) if grid is None or self.causal else grid
        w, d, s = self._per_axis(len(grid.shape))
        d = tuple(min(a, length) for a, length in zip(d, grid.shape, strict=True))
        if not self.causal:  # causal windows are cut at the start anyway
            w = tuple(min(a, length // b) for a, b, length in zip(w, d, grid.shape, strict=True))
            s = tuple(min(a, b) for a, b in zip(s, w, strict=True))
        return sparse.Neighborhood(grid.shape, w, d, s, prefix=grid.prefix)

    def _visible(
        self,
        n: int,
        key_mask: Tensor | None,
        grid: Grid | None,
        positions: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """bool, broadcastable to [B, 1, N, N]."""
        i = torch.arange(n, device=device)
        if self.causal:
            w, d, _ = self._per_axis(1)
            back = i[:, None] - i
            seen = (back >= 0) & (back % d[0] == 0) & (back < w[0] * d[0])
            if positions is not None:
                seen = seen & (i <= positions[..., None])
            seen = seen if seen.dim() == 3 else seen[None]
            seen = seen[:, None]
        elif key_mask is not None and (grid is None or (len(grid.shape) == 1 and not grid.prefix)):
            # The axis ends at each sample's last kept token.
            length = torch.where(key_mask, i + 1, 0).amax(1).clamp(min=1)[:, None, None]
            (w,), (d,), (s,) = self._per_axis(1)
            spread = torch.minimum(length, torch.full_like(length, d))
            w = torch.minimum(length.div(spread, rounding_mode="floor"), torch.full_like(length, w))
            if s > 1 or bool((spread < d).any()):
                parts = []
                for b in range(len(length)):
                    size, reach = int(spread[b]), int(w[b])
                    p = i.clamp(max=int(length[b]) - 1)
                    parts.append(axis_visible(p[:, None], i, length[b, 0], reach, size, min(s, reach), False))
                seen = torch.stack(parts)[:, None]
            else:
                p = torch.minimum(i, length[:, :, 0] - 1)[:, :, None]
                seen = axis_visible(p, i, length, w, d, s, False)[:, None]
        else:
            seen = sparse.dense_mask(self._rule(n, grid), device)[None, None]
        return seen if key_mask is None else seen & key_mask[:, None, None]

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
        bias = dense_bias(bias)
        n, order = q.shape[2], {"higher_order": self.higher_order}
        sequence = grid is None or len(grid.shape) == 1
        if self.causal and positions is None and self._per_axis(1)[1] == (1,):
            reach = self._per_axis(1)[0][0] - 1
            return kernel.attention(
                q, k, v, key_mask=key_mask, bias=bias, causal=True, window=(reach, 0), **order
            )
        if self.causal or (key_mask is not None and sequence):
            seen = self._visible(n, key_mask, grid, positions, q.device)
            hide = q.new_zeros(()).masked_fill(~seen, -torch.inf)
            # The key mask travels along, so that masked rows of k and v are cleared.
            return kernel.attention(
                q, k, v, key_mask=key_mask, bias=hide if bias is None else bias + hide, **order
            )
        return sparse.attention(q, k, v, self._rule(n, grid), key_mask=key_mask, bias=bias, **order)

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
        seen = self._visible(q.shape[2], key_mask, grid, positions, q.device)
        return masked_softmax(scaled_scores(q, k, bias), seen)

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        state = super().init_state(batch_size, **inputs)
        return {"k": state["k"], "v": state["v"]}

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_streaming()
        (w,), (d,), _ = self._per_axis(1)
        q, k_t, v_t = self.project(x_t, x_t, x_t)
        kept = (w - 1) * d + 1
        k, v = (torch.cat((state[n], t), 2)[:, :, -kept:] for n, t in (("k", k_t), ("v", v_t)))
        group = slice((k.shape[2] - 1) % d, None, d)
        heads = kernel.attention(q, k[:, :, group], v[:, :, group])
        return self.output(heads, x_t), {"k": k, "v": v}

    def _keys(self, n: int) -> int:
        if self.causal:
            return min(n, self._per_axis(1)[0][0])
        rule = self._rule(n, self.grid if self.grid is not None and self.grid.tokens == n else None)
        keys = rule.prefix
        size = 1
        for w, length in zip(rule.window, rule.shape, strict=True):
            size *= min(w, length)
        return keys + size

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        cost = sparse.cost(1, self.num_heads, n, self._keys(n), self.head_dim, self.value_head_dim)
        return cost.flops, cost.bytes

    def state_size(self, m: int) -> int:
        if not self.causal:
            return super().state_size(m)
        (w,), (d,), _ = self._per_axis(1)
        return super().state_size(min(m, (w - 1) * d + 1))
