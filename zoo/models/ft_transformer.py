"""FT-Transformer: every column of a table is a token.

Paper: Gorishniy et al., "Revisiting deep learning models for tabular data", arXiv:2106.11959. Official code:
yandex-research/rtdl-revisiting-models, MIT.
Differs from it in: piecewise-linear embeddings by default, several targets, one dropout rate for attention and feed
forward outputs, and none on the attention weights, which most variants do not have. `members` carries the ensemble of
TabM, arXiv:2410.24210, over: scales and heads of their own, everything between them shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.blocks import TransformerBlock
from zoo.layers.members import MemberHeads
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
        members: Networks in one: each scales the tokens in its own way and has a head of its own; the blocks are shared.
            Trained on the mean of their losses, read as the mean of their predictions.
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
        members: int = 1,
    ) -> None:
        super().__init__()
        if members < 1:
            raise ConfigError(f"model.members={members} must be at least 1")
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
        self.no_weight_decay = ("cls_token", "scales")
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
        self.members = members
        self.head: nn.Module = nn.Linear(dim, sum(outputs))
        if members > 1:
            self.scales = nn.Parameter(torch.empty(members, self.tokens.columns + 1, dim))
            self.head = MemberHeads(members, dim, sum(outputs))
        self.reset_parameters()

    @classmethod
    def slots(cls, **options: object) -> dict[str, Slot]:
        """One slot: the attention of every block, over columns, which have no order."""
        return {"encoder": Slot(Pattern.SELF, ordered=False, length_known=True)}

    def reset_parameters(self) -> None:
        bound = self.cls_token.shape[-1] ** -0.5
        nn.init.uniform_(self.cls_token, -bound, bound)
        if self.members > 1:
            with torch.no_grad():
                self.scales.bernoulli_(0.5).mul_(2).sub_(1)  # random signs set the members apart

    def forward(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            numerical: Normalised numbers, [B, Fn].
            categorical: Codes, int64 [B, Fc].
            missing: Numbers that are missing, bool [B, Fn].

        Returns:
            Logits or standardised values of all targets, [B, sum(outputs)], or every member's [B, k, sum(outputs)].
        """
        x = self.tokens(numerical, categorical, missing)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        if self.members > 1:
            x = (x[:, None] * self.scales).flatten(0, 1)
        for i, block in enumerate(self.blocks):
            x = block(x, keep=1 if i == len(self.blocks) - 1 else None)  # only the class token is read
        x = self.norm(x[:, 0]).relu()
        return self.head(x.unflatten(0, (-1, self.members)) if self.members > 1 else x)
