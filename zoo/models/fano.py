"""Fourier attention neural operator: tokens are the function's pieces on patches, Q, K, V act on whole pieces.

Paper: Calvello, Kovachki, Levine, Stuart, arXiv:2406.06486. A patch's function is represented by its first cosine
coefficients (an orthonormal basis of the patch, good for functions that do not repeat at its ends), so inner products of
tokens are L2 integrals, linear maps of tokens are integral operators, and the resolution only enters the quadrature.
Differs from the paper in: cosine instead of Fourier modes, one-dimensional domains. The cosines are taken half a cell beside the nodes
(which keeps them orthogonal at every resolution), so the operator is that of the function moved by half a cell, and its answers
converge with first order as the grid is refined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.blocks import TransformerBlock
from zoo.models.registry import register_model


@register_model
class Fano(nn.Module):
    """Functions on [0, 1) at uniform nodes to functions at the same nodes.

    Args:
        attention: Factory of slot "encoder".
        patches: Patches P of the domain; must divide the number of nodes.
        modes: Cosine coefficients per patch; at most the nodes of a patch.
        dim: Width C.
        heads: Attention heads; must divide `dim`.
        depth: Blocks.
        mlp_ratio: Hidden width of the MLP over `dim`.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        patches: int = 8,
        modes: int = 8,
        dim: int = 64,
        heads: int = 4,
        depth: int = 3,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        if patches < 1 or modes < 1 or depth < 1:
            raise ConfigError(f"patches={patches}, modes={modes} and depth={depth} must be at least 1")
        self.patches, self.modes = patches, modes
        self.embed = nn.Linear(modes, dim)
        self.position = nn.Parameter(torch.empty(1, patches, dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(attention["encoder"], dim, heads, mlp_ratio=mlp_ratio, length=patches)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, modes)
        nn.init.normal_(self.position, std=0.02)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """Self-attention over the patches."""
        return {"encoder": Slot(Pattern.SELF, length_known=True)}

    def basis(self, nodes: int, like: Tensor) -> Tensor:
        """Cosines at the nodes of a patch, [nodes, modes], orthonormal under the mean over the patch."""
        # Nodes sit at j / nodes; half a cell is added so that the discrete basis is orthogonal at every resolution.
        place = (torch.arange(nodes, device=like.device, dtype=like.dtype) + 0.5) / nodes
        order = torch.arange(self.modes, device=like.device, dtype=like.dtype)
        return torch.cos(math.pi * place[:, None] * order) * torch.where(order == 0, 1.0, math.sqrt(2.0))

    def forward(self, u: Tensor, x: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Values [B, N] at uniform nodes to values [B, N]; `x` and `weights` are implied by uniformity."""
        nodes, rest = divmod(u.shape[1], self.patches)
        if rest or nodes < self.modes:
            raise ConfigError(
                f"{u.shape[1]} nodes do not make {self.patches} patches of at least {self.modes} nodes; change patches or modes"
            )
        basis = self.basis(nodes, u)
        pieces = u.unflatten(1, (self.patches, nodes))
        coefficients = pieces @ basis / nodes
        h = self.embed(coefficients) + self.position
        for block in self.blocks:
            h = block(h)
        change = self.head(self.norm(h)) - coefficients
        return (pieces + change @ basis.T).flatten(1)
