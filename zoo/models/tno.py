"""Transformer neural operator: attention as an integral over a function's domain.

Paper: Calvello, Kovachki, Levine, Stuart, arXiv:2406.06486; code: EdoardoCalvello/TransformerNeuralOperators.
A(u)(x) = int p(y; u, x) V u(y) dy with p proportional to exp <Q u(x), K u(y)>. On nodes y_j with quadrature weights w_j this is
softmax over j of (<q_i, k_j> + log w_j), so weights enter as a per-key bias, refining the grid converges, and splitting a
node in two halves changes nothing.
Differs from the paper in: coordinates enter as harmonics, and only one-dimensional periodic domains are served.
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
class Tno(nn.Module):
    """Functions on [0, 1) at any nodes to functions at the same nodes.

    Args:
        attention: Factory of slot "encoder".
        dim: Width C.
        heads: Attention heads; must divide `dim`.
        depth: Blocks.
        mlp_ratio: Hidden width of the MLP over `dim`.
        harmonics: Harmonics of the coordinate among the inputs, >= 0.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        dim: int = 48,
        heads: int = 4,
        depth: int = 3,
        mlp_ratio: float = 2.0,
        harmonics: int = 4,
    ) -> None:
        super().__init__()
        if depth < 1 or harmonics < 0:
            raise ConfigError(f"depth={depth} must be at least 1 and harmonics={harmonics} at least 0")
        self.harmonics = harmonics
        self.embed = nn.Linear(1 + 2 * harmonics, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(attention["encoder"], dim, heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """Self-attention over the nodes, weighted by a per-key bias; nodes are a set."""
        return {"encoder": Slot(Pattern.SELF, bias="key", ordered=False)}

    def forward(self, u: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Apply the operator.

        Args:
            u: Values of the input function, [B, N].
            x: Nodes in [0, 1), [N].
            weights: Quadrature weights of the nodes, positive, [N]; equal ones when left out.

        Returns:
            Values of the output function at the nodes, [B, N].
        """
        if u.dim() != 2 or x.shape != u.shape[1:]:
            raise ConfigError(f"u must be [B, N] and x [N], got {list(u.shape)} and {list(x.shape)}")
        if weights is None:
            weights = torch.full_like(x, 1.0 / len(x))
        elif weights.shape != x.shape or not bool((weights > 0).all()):
            raise ConfigError(f"quadrature weights must be {len(x)} positive numbers")
        # Times the count, so that equal weights give a bias of zero.
        bias = (weights * (len(x) / weights.sum())).log()[None, None, None]
        angle = 2 * math.pi * x[:, None] * torch.arange(1, self.harmonics + 1, device=x.device)
        places = torch.cat((angle.cos(), angle.sin()), -1).expand(u.shape[0], -1, -1)
        h = self.embed(torch.cat((u[..., None], places), -1))
        for block in self.blocks:
            h = block(h, bias=bias)
        return self.head(self.norm(h))[..., 0]
