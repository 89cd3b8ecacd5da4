"""From tokens to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.attention.base import BiasFactors
from zoo.attention.slots import AttentionFactory


def mean_pool(x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Mean of the tokens kept by `key_mask` (bool [B, N]), [B, N, C] -> [B, C]; zeros where none is kept."""
    if key_mask is None:
        return x.mean(dim=1)
    keep = key_mask.unsqueeze(-1)
    return x.masked_fill(~keep, 0.0).sum(dim=1) / keep.sum(dim=1).clamp(min=1).to(x.dtype)


class AttentionPool(nn.Module):
    """Learned queries read the tokens through any cross attention.

    Args:
        attention: Factory of a cross slot.
        dim: Width C of the tokens.
        num_heads: Heads of the attention.
        queries: Number Q of learned queries.
        geometry: Passed on to the attention's constructor.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        dim: int,
        num_heads: int,
        *,
        queries: int = 1,
        **geometry: object,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, queries, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, num_heads, **geometry)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
    ) -> Tensor:
        """[B, N, C] -> [B, Q, C]."""
        query = self.query.expand(x.shape[0], -1, -1)
        return self.attn(query, self.norm(x), key_mask=key_mask, bias=bias)
