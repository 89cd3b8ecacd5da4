"""TabM: an ensemble of perceptrons that share their weight matrices; the control without attention to beat.

Paper: Gorishniy et al., "TabM: advancing tabular deep learning with parameter-efficient ensembling", arXiv:2410.24210.
Official code: yandex-research/tabm, Apache-2.0.
Differs from it in: categorical columns are embedded like numerical ones instead of one-hot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.drop import dropout_or_none
from zoo.layers.members import MemberHeads
from zoo.layers.numerical_embedding import FeatureTokens
from zoo.models.registry import register_model


class EnsembleLinear(nn.Module):
    """A linear layer shared by k members, each with its own scales before and after and its own bias.

    y_i = s_i * (W (r_i * x_i)) + b_i.

    Args:
        in_dim, out_dim: Widths.
        members: k.
        first: r starts as random signs, which sets the members apart; otherwise r and s start as ones.

    Source: Wen et al., "BatchEnsemble", arXiv:2002.06715, in TabM's form.
    """

    def __init__(self, in_dim: int, out_dim: int, members: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.r = nn.Parameter(torch.empty(members, in_dim))
        self.s = nn.Parameter(torch.empty(members, out_dim))
        self.bias = nn.Parameter(torch.empty(members, out_dim))
        self.no_weight_decay = ("r", "s", "bias")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.ones_(self.r)
        nn.init.ones_(self.s)
        with torch.no_grad():
            if self.first:
                self.r.bernoulli_(0.5).mul_(2).sub_(1)
            # One bias for all members at the start, as for one perceptron.
            self.bias.copy_(torch.empty(self.bias.shape[1]).uniform_(-bound, bound).expand_as(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """[B, k, in_dim] or [B, 1, in_dim] -> [B, k, out_dim]."""
        return torch.addcmul(self.bias, nn.functional.linear(x * self.r, self.weight), self.s)

    def forward_flops(self, inputs: tuple, output: Tensor) -> float:
        """Of the products with `weight`."""
        return 2.0 * output.numel() * self.weight.shape[1]


@register_model
class TabM(nn.Module):
    """k perceptrons in one: train on the mean of their losses, predict the mean of their predictions.

    Args:
        attention: Not used; the model has no slot.
        num_numerical, cardinalities, bins, outputs: Set by the table, see `zoo.models.ft_transformer`.
        members: k.
        embedding_dim: Width of a column's embedding.
        dim: Hidden width.
        depth: Hidden layers, at least 1.
        num_embedding: linear, piecewise or periodic.
        frequencies, frequency_std: Of the periodic embedding.
        unknown_rate: Share of categories hidden while training.
        dropout: After each hidden layer.
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
        members: int = 32,
        embedding_dim: int = 12,
        dim: int = 128,
        depth: int = 3,
        num_embedding: str = "piecewise",
        frequencies: int = 24,
        frequency_std: float = 0.1,
        unknown_rate: float = 0.01,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if members < 1 or depth < 1:
            raise ConfigError(f"model.members={members} and model.depth={depth} must be at least 1")
        self.tokens = FeatureTokens(
            num_numerical,
            cardinalities,
            embedding_dim,
            unknown_rate=unknown_rate,
            kind=num_embedding,
            bins=bins,
            frequencies=frequencies,
            frequency_std=frequency_std,
        )
        widths = [self.tokens.columns * embedding_dim] + [dim] * depth
        self.layers = nn.ModuleList(
            EnsembleLinear(a, b, members, first=i == 0)
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.drop = dropout_or_none(dropout)
        self.head = MemberHeads(members, dim, sum(outputs))

    @classmethod
    def slots(cls, **options: object) -> dict[str, Slot]:
        """None."""
        return {}

    def forward(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None = None) -> Tensor:
        """Numbers [B, Fn], codes [B, Fc], missing bool [B, Fn] -> every member's [B, k, sum(outputs)]."""
        x = self.tokens(numerical, categorical, missing).flatten(1)[:, None]
        for layer in self.layers:
            x = self.drop(layer(x).relu())
        return self.head(x)
