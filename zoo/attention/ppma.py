"""Polyline path masked attention (PPMA).

Paper: Polyline Path Masked Attention for Vision Transformer, arXiv:2506.15940, NeurIPS 2025. Official code: zhongchenzhao/PPMA, Apache-2.0.
Each pixel has decays a <= 0 along its row and b <= 0 along its column, ``a = -exp(A) softplus(t_a + dt)`` from a linear map of its head's
slice of the input. The log mask of two pixels is the decay along an L-shaped path: ``L[(h1,w1),(h2,w2)] = W_h1[w1,w2] + V_w2[h1,h2]`` with
``W_h[i,j] = sum of a over the steps between i and j`` and V likewise. Full mode: ``P = (softmax(S + L) + softmax(S + L^T)) / 2``, both path orders.
Axial mode: row softmax with W and column softmax with V one after the other, in both orders, averaged; a different operator, not a
factorisation of the full one. Then a depthwise 5x5 convolution of the values (LePE) is added. Queries and keys are rotated by the flattened place.
Differs from the official code in: tokens without a place (`grid.prefix`) have no decay (full mode only); masked pixels have decay 0 and
leave LePE out; head widths that cannot be rotated go without. A bias is refused: hiding a key by it would not take its decay away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from kernels import local
from kernels import softmax as kernel
from zoo.attention.base import Attention, BiasFactors, Grid, merge_heads, split_heads
from zoo.attention.registry import register_attention
from zoo.errors import CapabilityError, ConfigError


@register_attention(
    patterns={"self"},
    grid_dims=(2,),
    needs_grid=True,
    order_sensitive=True,
    has_map=True,
)
class PpmaAttention(Attention):
    """Softmax attention under a learned two-dimensional decay.

    Args:
        mode: "full" or "axial" (rows, then columns, and the other way round).
        rope: Rotate queries and keys by the flattened place.
        lepe: Add a depthwise 5x5 convolution of the values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mode: str = "full",
        rope: bool = True,
        lepe: bool = True,
        **common: Any,
    ) -> None:
        if mode not in ("full", "axial"):
            raise ConfigError(f"attention.mode={mode!r} is unknown; choose from full, axial")
        super().__init__(dim, num_heads, **common)
        if dim % num_heads:
            raise ConfigError(f"attention 'ppma': dim {dim} must be divisible by the {num_heads} heads")
        if mode == "axial" and self.grid.prefix:
            raise CapabilityError(
                f"attention 'ppma': axial mode has no place for {self.grid.prefix} prefix tokens; use mode=full or a "
                "model without class token"
            )
        self.mode = mode
        self.rope = rope and self.head_dim % 2 == 0
        self.step_size = nn.Linear(dim // num_heads, 2, bias=False)
        self.log_rate = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        width = num_heads * self.value_head_dim
        self.lepe = nn.Conv2d(width, width, 5, groups=width) if lepe else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.log_rate.uniform_(1.0, 1.1).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def decays(self, x: Tensor) -> Tensor:
        """Row and column decay of each token, [B, H, N, 2], <= 0."""
        t = self.step_size(split_heads(x, self.num_heads)) + self.dt_bias[:, None, None]
        return -self.log_rate.exp()[:, None, None] * softplus(t)

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys carry their decays along, [B, H, N, D + 2]."""
        q, k, v = super().project(x, context, value)
        return q, torch.cat((k, self.decays(x)), -1), v

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        q, k, v = self.project(x, context, value)
        heads = self.attend(q, k, v, **call)
        return heads if self.lepe is None else heads + self._lepe(v, call["key_mask"], call["grid"])

    def weights(self, q: Tensor, k: Tensor, **call: Any) -> Tensor:
        """The mixing is linear in the values, so unit values give the matrix; LePE is outside it."""
        n = q.shape[2]
        unit = torch.eye(n, dtype=q.dtype, device=q.device).expand(*q.shape[:2], n, n)
        return self.attend(q, k, unit, **call)

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
        decays: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`k` with its decays as `project` gives it, or without and `decays` [B, H, N] each; left out, none."""
        grid = grid or self.grid
        if k.shape[-1] > self.head_dim:
            k, own = k.split((self.head_dim, 2), -1)
            # The decays of masked tokens are no step on any path.
            decays = (own if key_mask is None else own.masked_fill(~key_mask[:, None, :, None], 0.0)).unbind(
                -1
            )
        if decays is None:
            decays = (q.new_zeros(q.shape[:3]),) * 2
        if self.rope:
            frequencies = local.rope_frequencies(self.head_dim // 2).to(q.device)
            place = torch.arange(q.shape[2], device=q.device)[:, None]
            angles = local.rope_angles(place, frequencies)
            q, k = local.rotate(q, angles), local.rotate(k, angles)
        rows, columns = path_tables(*(d[:, :, grid.prefix :].unflatten(2, grid.shape) for d in decays))
        if self.mode == "axial":
            if key_mask is not None:
                raise CapabilityError("attention 'ppma': axial mode takes no key mask; use mode=full")
            return self._axial(q, k, v, rows, columns, grid.shape)
        mask = polyline(rows, columns)
        if grid.prefix:
            mask = pad(mask, (grid.prefix, 0, grid.prefix, 0))
        options = {"key_mask": key_mask, "higher_order": self.higher_order}
        across = kernel.attention(q, k, v, bias=mask.to(q.dtype), **options)
        down = kernel.attention(q, k, v, bias=mask.mT.to(q.dtype), **options)
        return 0.5 * (across + down)

    def _axial(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        q, k, v = (t.unflatten(2, shape) for t in (q, k, v))

        def along(values: Tensor, table: Tensor, axis: int) -> Tensor:
            """Attention within each line of the grid; axis 3 runs along rows, 2 along columns."""
            lines = [t.movedim(5 - axis, 1).flatten(0, 1) for t in (q, k, values)]
            bias = table.transpose(1, 2).flatten(0, 1).to(q.dtype)
            out = kernel.attention(*lines, bias=bias, higher_order=self.higher_order)
            return out.unflatten(0, (q.shape[0], -1)).movedim(1, 5 - axis)

        down_last = along(along(v, rows, 3), columns, 2)
        across_last = along(along(v, columns, 2), rows, 3)
        return 0.5 * (down_last + across_last).flatten(2, 3)

    def _lepe(self, v: Tensor, key_mask: Tensor | None, grid: Grid | None) -> Tensor:
        grid = grid or self.grid
        flat = merge_heads(v)
        if key_mask is not None:
            flat = flat.masked_fill(~key_mask[..., None], 0.0)
        out = local.depthwise_grid(flat, grid.shape, self.lepe.weight, self.lepe.bias, grid.prefix)
        out = pad(out, (0, 0, grid.prefix, 0))
        if key_mask is not None:
            out = out.masked_fill(~key_mask[..., None], 0.0)
        return split_heads(out, self.num_heads)

    def linear_rows(self, child: str, n: int, m: int) -> int:
        return n * self.num_heads if child == "step_size" else super().linear_rows(child, n, m)

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        h, d, e = self.num_heads, self.head_dim, self.value_head_dim
        extra = 0.0 if self.lepe is None else 50.0 * n * h * e
        if self.mode == "axial":
            lines = sum(self.grid.shape)
            return 2 * h * n * lines * 2.0 * (d + e) + extra, 4.0 * h * n * (2 * (d + e) + lines)
        cost = kernel.cost(1, h, n, m, d, e)
        return 2 * cost.flops + extra, 2 * cost.bytes + 8.0 * h * n * m


def path_tables(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Decay sums within rows [B, H, rows, W, W] and within columns [B, H, W, rows, rows] from decays [B, H, rows, W].

    The steps from j to i > j take in the decays of j + 1 ... i: as decays have one sign, -|c_i - c_j| of their running sums c.
    """
    along = a.cumsum(3)
    down = b.cumsum(2).transpose(2, 3)
    return tuple(-(c[..., :, None] - c[..., None, :]).abs() for c in (along, down))


def polyline(rows: Tensor, columns: Tensor) -> Tensor:
    """The log mask of paths that first follow the query's row and then the key's column, [B, H, N, N]."""
    across = rows[:, :, :, :, None, :]  # [B, H, h1, w1, 1, w2]
    down = columns.permute(0, 1, 3, 4, 2)[:, :, :, None]  # [B, H, h1, 1, h2, w2]
    return (across + down).flatten(4, 5).flatten(2, 3)
