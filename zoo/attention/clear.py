"""CLEAR: attention in a disc about each image token.

Paper: CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up, arXiv:2412.16112. Token i of an image sees token j if
``dx^2 + dy^2 < radius^2`` on the grid; tokens without a place (text in the paper, class token and registers here: `grid.prefix`)
see all and are seen by all. The disc is cut at the border, not shifted. With `downsample` s, image tokens also see the keys and values of
cells of s x s tokens, ``sum w_ab k_ab`` and ``sum w_ab v_ab`` with one learned w a layer that starts as a mean. With `train_tokens` T, scores are
scaled by ``sqrt(log_T(N) / D)`` for N tokens instead of ``sqrt(1 / D)``.
Differs from the official code in: cells that the border or the mask cuts count with the tokens they have, divided by their share; any number of
tokens without a place instead of 512; sequences and volumes are left to `neighborhood`. Radii there are 8 to 32 on grids of 64 to 512; the
default suits grids of 8 to 14.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import block_sparse as sparse
from kernels import softmax
from zoo.attention.base import (
    Attention,
    BiasFactors,
    Capabilities,
    Grid,
    dense_bias,
    masked_softmax,
    scaled_scores,
)
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self"},
    bias="full",
    grid_dims=(2,),
    needs_grid=True,
    order_sensitive=True,
    has_map=True,
)
class ClearAttention(Attention):
    """Softmax attention to the tokens within a circle.

    Args:
        radius: In tokens, > 0; at 1 or less an image token sees itself and the prefix.
        downsample: Side of the cells whose pooled keys and values image tokens see too, >= 1; None for none.
        train_tokens: Tokens in training, >= 2, from which the scale of the scores grows with more; None for a fixed scale.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        radius: float = 3.0,
        downsample: int | None = None,
        train_tokens: int | None = None,
        **common: Any,
    ) -> None:
        if radius <= 0:
            raise ConfigError(f"attention.radius={radius} must be positive")
        if downsample is not None and downsample < 1:
            raise ConfigError(f"attention.downsample={downsample} must be at least 1, or null for no cells")
        if train_tokens is not None and train_tokens < 2:
            raise ConfigError(
                f"attention.train_tokens={train_tokens} must be at least 2, or null for a fixed scale"
            )
        super().__init__(dim, num_heads, **common)
        self.radius, self.downsample, self.train_tokens = radius, downsample, train_tokens
        if downsample is not None:
            self.pool = nn.Parameter(torch.full((downsample, downsample), 1 / downsample**2))

    @classmethod
    def capabilities_with(cls, *, downsample: int | None = None, **options: Any) -> Capabilities:
        """Cells take no bias of their tokens, and their learned weights may be negative."""
        if downsample is None:
            return cls.capabilities
        return replace(cls.capabilities, bias=None, signed_map=True, note="with attention.downsample")

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, value)
        return (q if self.train_tokens is None else q * self._growth(k.shape[2])), k, v

    def _growth(self, tokens: int) -> float:
        return math.sqrt(math.log(max(tokens, 2)) / math.log(self.train_tokens))

    def _pooled(self, x: Tensor, grid: Grid, weights: Tensor) -> Tensor:
        """Weighted sums over cells of the tokens on the grid: [B, H, N, D] -> [B, H, cells, D]."""
        s, (height, width) = self.downsample, grid.shape
        x = x[:, :, grid.prefix :].unflatten(2, (height, width))
        x = F.pad(x, (0, 0, 0, -width % s, 0, -height % s)).unflatten(3, (-1, s)).unflatten(2, (-1, s))
        return torch.einsum("bhiajcd,ac->bhijd", x, weights).flatten(2, 3)

    def _cells(self, grid: Grid, key_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Which cells have a token, bool [B|1, cells], and tensors [B, H, N, D] pooled over what they have."""
        first = tensors[0]
        here = (
            first.new_ones(1, 1, first.shape[2], 1)
            if key_mask is None
            else key_mask[:, None, :, None].to(first.dtype)
        )
        share = self._pooled(here, grid, torch.full_like(self.pool, 1 / self.downsample**2))
        pooled = [self._pooled(t.masked_fill(here == 0, 0.0), grid, self.pool) for t in tensors]
        return share[:, 0, :, 0] > 0, [t / share.masked_fill(share == 0, 1.0) for t in pooled]

    def _rule(self, grid: Grid) -> sparse.Disc:
        return sparse.Disc(tuple(grid.shape), float(self.radius), grid.prefix)

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
        grid = grid or self.grid
        near = sparse.attention(
            q,
            k,
            v,
            self._rule(grid),
            key_mask=key_mask,
            bias=dense_bias(bias),
            return_lse=self.downsample is not None,
            higher_order=self.higher_order,
        )
        if self.downsample is None:
            return near
        there, (k_cells, v_cells) = self._cells(grid, key_mask, k, v)
        far = softmax.attention(
            q[:, :, grid.prefix :],
            k_cells,
            v_cells,
            key_mask=there.expand(len(q), -1),
            return_lse=True,
            higher_order=self.higher_order,
        )
        image = softmax.merge_lse([(near[0][:, :, grid.prefix :], near[1][:, :, grid.prefix :]), far])[0]
        return torch.cat((near[0][:, :, : grid.prefix], image), 2)

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
        grid = grid or self.grid
        seen = sparse.dense_mask(self._rule(grid), q.device)[None, None]
        if key_mask is not None:
            seen = seen & key_mask[:, None, None]
        scores = scaled_scores(q, k, bias)
        if self.downsample is None:
            return masked_softmax(scores, seen)
        m = k.shape[2]
        tokens = torch.eye(m, dtype=k.dtype, device=k.device)[None, None]
        there, (k_cells, shares) = self._cells(grid, key_mask, k, tokens)
        image = torch.arange(m, device=k.device) >= grid.prefix  # who sees cells
        cells = (there[:, None, None] & image[:, None]).expand(len(q), 1, -1, -1)
        scores = torch.cat((scores, scaled_scores(q, k_cells)), -1)
        found = masked_softmax(scores, torch.cat((seen.expand(len(q), 1, -1, -1), cells), -1))
        return found[..., :m] + found[..., m:] @ shares

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        """Of interior tokens; the disc is cut at borders."""
        reach = int(self.radius)
        disc = sum(
            a * a + b * b < self.radius**2 for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)
        )
        keys = min(m, disc + self.grid.prefix)
        if self.downsample is not None:
            keys += math.prod(-(-side // self.downsample) for side in self.grid.shape)
        cost = sparse.cost(1, self.num_heads, n, keys, self.head_dim, self.value_head_dim)
        return cost.flops, cost.bytes
