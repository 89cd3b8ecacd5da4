"""KArAt: a learned map of attention rows in place of the softmax.

Paper: Are We Truly Leveraging Kolmogorov-Arnold Networks in Vision Transformers? (Kolmogorov-Arnold attention), arXiv:2503.10632. Project
page: MaitySubhajit/KArAt. A row of scores ``a = scale q K^T`` in R^N becomes ``sigma(a) = W Phi[a]``: Phi has r rows of univariate
functions, ``Phi[a]_p = sum_j phi_pj(a_j)``, ``phi_pj(t) = b(t) + sum_m alpha_pjm cos(m t) + beta_pjm sin(m t)``, W is N x r; ``rank=null`` is the
regular form, N x N functions and no W. One operator per head (blockwise); `tie_operators` shares them across layers (universal).
Computed as ``O = Phi[A] (W^T V)``, so the N x N map is never built.
Differs from the paper in: coefficients start at N(0, 1) / (N sqrt(r G)), which keeps the output at the values' scale (the paper has N(0, 1)); the base is
divided by N likewise; no projection of rows onto the simplex; the extra 2 r N parameters behind its published counts are unconfirmed and absent.
Weights belong to token places: a fixed number of tokens, no mask (a hidden score has no neutral value) and no bias that could hide one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, BiasFactors, Grid
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self"},
    key_mask=False,
    fixed_length=True,
    order_sensitive=True,
    has_map=True,
    signed_map=True,
)
class KaratAttention(Attention):
    """Kolmogorov-Arnold attention with a Fourier basis.

    Args:
        modes: Harmonics G of each function, >= 1.
        rank: Rows r of functions; None for the regular form with as many as tokens.
        base: Added to each function: "none", "silu" or "identity".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        modes: int = 3,
        rank: int | None = 12,
        base: str = "none",
        **common: Any,
    ) -> None:
        if modes < 1 or (rank is not None and rank < 1):
            raise ConfigError(f"attention.modes={modes} and attention.rank={rank} must be at least 1")
        if base not in ("none", "silu", "identity"):
            raise ConfigError(f"attention.base={base!r} is unknown; choose from none, silu, identity")
        super().__init__(dim, num_heads, **common)
        n = self.length
        self.modes, self.rank, self.base = modes, rank or n, base
        self.cosine = nn.Parameter(torch.empty(num_heads, modes, n, self.rank))
        self.sine = nn.Parameter(torch.empty(num_heads, modes, n, self.rank))
        self.spread = nn.Parameter(torch.empty(num_heads, n, self.rank)) if rank is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # A sum over n tokens of G harmonics, spread over r rows and n values: each factor takes its share of the scale.
        n = self.length
        for parameter in (self.cosine, self.sine):
            nn.init.normal_(parameter, std=(n * self.modes) ** -0.5)
        if self.spread is not None:
            nn.init.normal_(self.spread, std=(n * self.rank) ** -0.5)
        else:
            for parameter in (self.cosine, self.sine):
                nn.init.normal_(parameter, std=(n * n * self.modes) ** -0.5)

    def rows(self, scores: Tensor) -> Tensor:
        """Phi of each row, [B, H, N, N] -> [B, H, N, r]."""
        out = scores.new_zeros(())
        if self.base != "none":
            plain = nn.functional.silu(scores) if self.base == "silu" else scores
            out = plain.sum(-1, keepdim=True) / self.length
        cosine, sine = self.cosine.to(scores.dtype), self.sine.to(scores.dtype)
        for m in range(self.modes):
            angle = (m + 1) * scores
            out = out + angle.cos() @ cosine[:, m] + angle.sin() @ sine[:, m]
        return out

    def _rows(self, q: Tensor, k: Tensor) -> Tensor:
        work = torch.promote_types(q.dtype, torch.float32)  # an angle in bf16 loses its harmonics
        return self.rows((q.to(work) * self.head_dim**-0.5) @ k.to(work).mT)

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
        rows = self._rows(q, k)
        values = v.to(rows.dtype)
        if self.spread is not None:
            values = self.spread.to(rows.dtype).mT @ values  # [B, H, r, E]
        return (rows @ values).to(v.dtype)

    def weights(self, q: Tensor, k: Tensor, **call: Any) -> Tensor:
        rows = self._rows(q, k)
        return rows if self.spread is None else rows @ self.spread.to(rows.dtype).mT

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        d, e, r, h = self.head_dim, self.value_head_dim, self.rank, self.num_heads
        spread = 0 if self.spread is None else 2 * m * r * e
        flops = h * (2 * n * m * d + n * m * self.modes * (4 * r + 20) + spread + 2 * n * r * e)
        return float(flops), 4.0 * h * ((n + m) * (d + e) + 2 * self.modes * m * r)


def tie_operators(layers: Iterable[KaratAttention]) -> None:
    """Share one operator per head among layers (the paper's universal mode)."""
    first, *others = layers
    for layer in others:
        if layer.cosine.shape != first.cosine.shape:
            raise ConfigError("tie_operators: layers must have the same heads, modes, length and rank")
        layer.cosine, layer.sine, layer.spread = first.cosine, first.sine, first.spread
