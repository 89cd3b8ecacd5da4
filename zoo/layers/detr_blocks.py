"""Blocks that DETR models share: decoder layers over sets of queries, box heads, anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.attention.base import BiasFactors, Grid
from zoo.attention.slots import AttentionFactory
from zoo.layers.mlp import Mlp


class QueryBlock(nn.Module):
    """Self-attention among queries, cross-attention to the image, an MLP.

    Queries may come in groups that must not see each other (one-to-one and one-to-many matching). Each group is a
    call of its own, which is what a block-diagonal mask means, for every attention variant.

    Args:
        self_attention: Factory of a self slot over a set.
        cross_attention: Factory of a cross slot.
        dim: Width C.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        norm: "pre" or "post".
        dropout: After projections and inside the MLP.
        activation: Of the MLP.
        queries: Number of queries when every call has the same, for variants that need it.
        grid: Layout of the image's tokens.
    """

    def __init__(
        self,
        self_attention: AttentionFactory,
        cross_attention: AttentionFactory,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 2.0,
        norm: str = "pre",
        dropout: float = 0.0,
        activation: str = "gelu",
        queries: int | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        # Positions go into queries and keys, not into values.
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = self_attention(dim, num_heads, value_dim=dim, length=queries, dropout=dropout)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
        self.cross = cross_attention(
            dim, num_heads, value_dim=dim, length=grid.tokens if grid else None, grid=grid, dropout=dropout
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation=activation, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        groups: Sequence[int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: Queries, [B, N, C].
            positions: Their positions, [B, N, C].
            keys: Image tokens with positions, [B, M, C].
            values: Image tokens, [B, M, C].
            groups: Sizes of the groups of queries; one group when left out.
            key_mask: Image tokens that are no padding, bool [B, M].
            bias: Of the cross-attention.
            grid: Layout of the image tokens.

        Returns:
            [B, N, C].
        """
        inner = self.norm1(x) if self.pre else x
        placed = inner + positions
        if groups is None or len(groups) == 1:
            out = self.attn(placed, None, inner)
        else:
            parts = zip(placed.split(list(groups), 1), inner.split(list(groups), 1), strict=True)
            out = torch.cat([self.attn(p, None, v) for p, v in parts], 1)
        x = x + out if self.pre else self.norm1(x + out)
        inner = self.norm_cross(x) if self.pre else x
        out = self.cross(inner + positions, keys, values, key_mask=key_mask, bias=bias, grid=grid)
        x = x + out if self.pre else self.norm_cross(x + out)
        if self.pre:
            return x + self.mlp(self.norm2(x))
        return self.norm2(x + self.mlp(x))


class BoxHead(nn.Sequential):
    """Three linear layers to four numbers; the last one starts at zero, so that boxes start at their reference."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def reset_last(self) -> None:
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)


def grid_anchors(grid: tuple[int, int], stride: int, size: Tensor, side: float) -> tuple[Tensor, Tensor]:
    """A square box around every grid point.

    Args:
        grid: Rows and columns.
        stride: Pixels per grid cell.
        size: Height and width of the images without padding, [B, 2].
        side: Side of the boxes as a share of the image.

    Returns:
        Boxes cxcywh relative to the unpadded image, [B, rows * columns, 4], and which of them lie inside it, bool.
    """
    rows, columns = grid
    y = (torch.arange(rows, device=size.device) + 0.5) * stride
    x = (torch.arange(columns, device=size.device) + 0.5) * stride
    cy = (y[None] / size[:, :1])[:, :, None].expand(-1, rows, columns).flatten(1)
    cx = (x[None] / size[:, 1:])[:, None, :].expand(-1, rows, columns).flatten(1)
    # A grid point belongs to the image if its first pixel does; its centre may lie just outside.
    inside = (cy - 0.5 * stride / size[:, :1] < 1) & (cx - 0.5 * stride / size[:, 1:] < 1)
    wide = torch.full_like(cx, side)
    return torch.stack((cx.clamp(max=1), cy.clamp(max=1), wide, wide), -1), inside
