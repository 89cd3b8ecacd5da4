"""TransTEE: a treatment asks the covariates for its outcome.

Paper: Zhang et al., "Exploring transformer backbones for heterogeneous treatment effect estimation", arXiv:2202.01336.
Official code: hlzhang109/TransTEE.
Differs from it in: one treatment token, so its self-attention is left out (it would be the identity mixing); the
propensity head reads the mean covariate token through a reversed gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.layers.blocks import TransformerBlock
from zoo.layers.mlp import Mlp
from zoo.layers.numerical_embedding import NumericalEmbedding
from zoo.models.registry import register_model


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class TreatmentBlock(nn.Module):
    """The treatment token looks at the covariates, then an MLP."""

    def __init__(
        self, attention: AttentionFactory, dim: int, num_heads: int, mlp_ratio: float, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention(dim, num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout=dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, 1, C] looks at [B, M, C] -> [B, 1, C]."""
        x = x + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


@register_model
class TransTEE(nn.Module):
    """Covariate tokens through self-attention; the treatment's token reads them and predicts the outcome.

    Args:
        attention: Factories for slots "encoder" (covariates) and "cross" (treatment to covariates).
        num_covariates: Covariates, all numbers.
        treatments: Number of treatments.
        dim: Width C.
        depth: Blocks of encoder and of decoder.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLPs over `dim`.
        dropout: After projections and inside MLPs.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_covariates: int = 25,
        treatments: int = 2,
        dim: int = 32,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens = NumericalEmbedding(num_covariates, dim, kind="linear")
        self.treatment = nn.Embedding(treatments, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                attention["encoder"],
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                length=num_covariates,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.readers = nn.ModuleList(
            TreatmentBlock(attention["cross"], dim, num_heads, mlp_ratio, dropout) for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))
        self.propensity = nn.Linear(dim, treatments)

    @classmethod
    def slots(cls, **options: object) -> dict[str, Slot]:
        """Covariates are a set; one query per row reads them."""
        return {
            "encoder": Slot(Pattern.SELF, ordered=False, length_known=True),
            "cross": Slot(Pattern.CROSS, ordered=False),
        }

    def encode(self, covariates: Tensor) -> Tensor:
        """[B, M] -> covariate tokens [B, M, C]."""
        x = self.tokens(covariates)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def outcome(self, context: Tensor, treatment: Tensor) -> Tensor:
        """Tokens [B, M, C] and treatments int64 [B] -> standardised outcome [B]."""
        x = self.treatment(treatment)[:, None]
        for reader in self.readers:
            x = reader(x, context)
        return self.head(x)[:, 0, 0]

    def treatment_logits(self, context: Tensor) -> Tensor:
        """What the tokens say about who was treated, [B, treatments]; trains them to say nothing."""
        return self.propensity(_Reverse.apply(context.mean(1)))

    def forward(self, covariates: Tensor, treatment: Tensor) -> Tensor:
        """Covariates [B, M], treatments int64 [B] -> standardised outcome [B]."""
        return self.outcome(self.encode(covariates), treatment)
