"""FT-Transformer: every column of a table is a token.

Paper: Gorishniy et al., "Revisiting deep learning models for tabular data", arXiv:2106.11959. Official code:
yandex-research/rtdl-revisiting-models, MIT.
Differs from it in: piecewise-linear embeddings by default, several targets, one dropout rate for attention and feed
forward outputs, and none on the attention weights, which most variants do not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.layers.blocks import TransformerBlock
from zoo.layers.numerical_embedding import FeatureTokens
from zoo.models.registry import register_model


@register_model
class FTTransformer(nn.Module):
    """Column tokens and a class token, pre-norm blocks, a linear map of the class token.

    Args:
        attention: Factory for slot "encoder", over a set of columns.
        num_numerical: Numerical columns.
        cardinalities: Codes of each categorical column, 0 (never seen) included.
        bins: Edges of each numerical column, for `num_embedding="piecewise"`.
        outputs: Numbers predicted for each target.
        dim: Width C.
        depth: Number of blocks.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        activation: Of the MLP: reglu, gelu, relu, silu, tanh, swiglu, geglu.
        num_embedding: linear, piecewise or periodic.
        frequencies, frequency_std: Of the periodic embedding.
        unknown_rate: Share of categories hidden while training, so that "never seen" gets a sense.
        dropout: After projections and inside MLPs.
        drop_path: Rate of the last block.
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
        depth: int = 3,
        num_heads: int = 4,
        mlp_ratio: float = 4 / 3,
        activation: str = "reglu",
        num_embedding: str = "piecewise",
        frequencies: int = 24,
        frequency_std: float = 0.1,
        unknown_rate: float = 0.01,
        dropout: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
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
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.no_weight_decay = ("cls_token",)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                attention["encoder"],
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                activation=activation,
                norm_eps=1e-5,
                dropout=dropout,
                drop_path=drop_path * i / max(1, depth - 1),
                length=self.tokens.columns + 1,
            )
            for i in range(depth)
        )
        if depth:
            self.blocks[0].norm1 = nn.Identity()  # the embeddings' scale is information: the authors' choice
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, sum(outputs))
        self.reset_parameters()

    @classmethod
    def slots(cls, **options: object) -> dict[str, Slot]:
        """One slot: the attention of every block, over columns, which have no order."""
        return {"encoder": Slot(Pattern.SELF, ordered=False, length_known=True)}

    def reset_parameters(self) -> None:
        bound = self.cls_token.shape[-1] ** -0.5
        nn.init.uniform_(self.cls_token, -bound, bound)

    def forward(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            numerical: Normalised numbers, [B, Fn].
            categorical: Codes, int64 [B, Fc].
            missing: Numbers that are missing, bool [B, Fn].

        Returns:
            Logits or standardised values of all targets, [B, sum(outputs)].
        """
        x = self.tokens(numerical, categorical, missing)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]).relu())
