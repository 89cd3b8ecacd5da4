"""TabNSA: sparse attention over columns beside an MLP mixer.

Paper: "TabNSA: native sparse attention for efficient tabular data learning", arXiv:2503.09850, Neurocomputing 2026.
Official code: aseslamian/TabNSA (no licence file seen).
Differs from it in: columns have embeddings of their own, attention is not causal, any variant fills the slot, several
blocks are possible. `paper_code=true` goes back to what was released: one map shared by all columns, category codes
read as numbers, attention causal in column order; but for rotary positions of the columns, which no variant here adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.drop import dropout_or_none
from zoo.layers.mlp import Mlp
from zoo.layers.numerical_embedding import FeatureTokens
from zoo.models.registry import register_model


class TabMixer(nn.Module):
    """Mixes over columns and over channels and multiplies the two.

    out = x + SiLU(LN(GELU(mlp_columns(LN x)) * mlp_channels(LN x))).

    Args:
        columns: Number of tokens, fixed.
        dim: Width C.
        hidden: Hidden width of both MLPs.
        dropout: Inside the MLPs.
    """

    def __init__(self, columns: int, dim: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.over_columns = Mlp(columns, hidden, activation="relu", dropout=dropout)
        self.over_channels = Mlp(dim, hidden, activation="relu", dropout=dropout)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, C] -> [B, F, C]."""
        y = self.norm(x)
        a = F.gelu(self.over_columns(y.transpose(1, 2)).transpose(1, 2))
        return x + F.silu(self.norm_out(a * self.over_channels(y)))


class TabNSABlock(nn.Module):
    """Attention and mixer side by side on the same tokens: attn(norm x) + mixer(x)."""

    def __init__(
        self, attention: AttentionFactory, columns: int, dim: int, num_heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.attn = attention(dim, num_heads, dropout=dropout, length=columns)
        self.mixer = TabMixer(columns, dim, hidden, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, C] -> [B, F, C]."""
        return self.attn(self.norm(x)) + self.mixer(x)


@register_model
class TabNSA(nn.Module):
    """Column tokens, blocks of attention beside a mixer, mean over columns, a two-layer head.

    Args:
        attention: Factory for slot "encoder", over the columns.
        num_numerical, cardinalities, bins, outputs: Set by the table, see `zoo.models.ft_transformer`.
        dim: Width C.
        depth: Number of blocks; 1 was released.
        num_heads: Heads; must divide `dim`.
        mixer_hidden: Hidden width of the mixer's MLPs.
        head_hidden: Hidden width of the head.
        num_embedding: linear, piecewise or periodic.
        frequencies, frequency_std: Of the periodic embedding.
        unknown_rate: Share of categories hidden while training.
        dropout: After projections and inside MLPs.
        paper_code: The released form: shared column map, causal attention in column order.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_numerical: int = 8,
        cardinalities: Sequence[int] = (),
        bins: Sequence[Sequence[float]] | None = None,
        outputs: Sequence[int] = (1,),
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mixer_hidden: int = 128,
        head_hidden: int = 32,
        num_embedding: str = "piecewise",
        frequencies: int = 24,
        frequency_std: float = 0.1,
        unknown_rate: float = 0.01,
        dropout: float = 0.1,
        paper_code: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigError(f"model.depth={depth} must be at least 1")
        columns = num_numerical + len(cardinalities)
        self.shared = nn.Linear(1, dim) if paper_code else None
        self.tokens = None
        if not paper_code:
            self.tokens = FeatureTokens(
                num_numerical,
                cardinalities,
                dim,
                unknown_rate=unknown_rate,
                kind=num_embedding,
                bins=bins,
                frequencies=frequencies,
                frequency_std=frequency_std,
            )
        self.blocks = nn.ModuleList(
            TabNSABlock(attention["encoder"], columns, dim, num_heads, mixer_hidden, dropout)
            for _ in range(depth)
        )
        self.head = nn.Sequential(
            nn.Linear(dim, head_hidden),
            nn.GELU(),
            dropout_or_none(dropout),
            nn.Linear(head_hidden, sum(outputs)),
        )

    @classmethod
    def slots(cls, *, paper_code: bool = False, **options: object) -> dict[str, Slot]:
        """One slot over the columns in their pinned order: non-causal, or causal as released.

        The order is part of this model whatever fills the slot: the mixer has weights for each place.
        """
        pattern = Pattern.CAUSAL_SELF if paper_code else Pattern.SELF
        return {"encoder": Slot(pattern, length_known=True)}

    def forward(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None = None) -> Tensor:
        """Numbers [B, Fn], codes [B, Fc], missing bool [B, Fn] -> [B, sum(outputs)]."""
        if self.shared is not None:
            x = self.shared(torch.cat((numerical, categorical.to(numerical.dtype)), 1)[..., None])
        else:
            x = self.tokens(numerical, categorical, missing)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))
