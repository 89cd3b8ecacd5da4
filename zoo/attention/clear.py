"""CLEAR: attention in a disc about each image token.

Paper: CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up, arXiv:2412.16112. Token i of an image sees token j if
``dx^2 + dy^2 < radius^2`` on the grid; tokens without a place (text in the paper, class token and registers here: `grid.prefix`)
see all and are seen by all. The disc is cut at the border, not shifted.
Differs from the official code in: no pooled keys and values (its down-sampled form), no scale that grows with the number of keys; sequences
and volumes are left to `neighborhood`. Radii there are 8 to 32 on grids of 64 to 512; the default suits grids of 8 to 14.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels import block_sparse as sparse
from zoo.attention.base import Attention, BiasFactors, Grid, dense_bias, masked_softmax, scaled_scores
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
    """

    def __init__(self, dim: int, num_heads: int, *, radius: float = 3.0, **common: Any) -> None:
        if radius <= 0:
            raise ConfigError(f"attention.radius={radius} must be positive")
        super().__init__(dim, num_heads, **common)
        self.radius = radius

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
        return sparse.attention(
            q,
            k,
            v,
            self._rule(grid or self.grid),
            key_mask=key_mask,
            bias=dense_bias(bias),
            higher_order=self.higher_order,
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
        seen = sparse.dense_mask(self._rule(grid or self.grid), q.device)[None, None]
        if key_mask is not None:
            seen = seen & key_mask[:, None, None]
        return masked_softmax(scaled_scores(q, k, bias), seen)

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        """Of interior tokens; the disc is cut at borders."""
        reach = int(self.radius)
        disc = sum(
            a * a + b * b < self.radius**2 for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)
        )
        keys = min(m, disc + self.grid.prefix)
        cost = sparse.cost(1, self.num_heads, n, keys, self.head_dim, self.value_head_dim)
        return cost.flops, cost.bytes
