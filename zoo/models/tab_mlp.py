"""Multi-layer perceptron on embedded columns: the control without attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory, Slot
from zoo.layers.drop import dropout_or_none
from zoo.layers.numerical_embedding import FeatureTokens
from zoo.models.registry import register_model


@register_model
class TabularMLP(nn.Module):
    """Column embeddings side by side, then linear layers with ReLU.

    Args:
        attention: Not used; the model has no slot.
        num_numerical, cardinalities, bins, outputs: Set by the table, see `zoo.models.ft_transformer`.
        embedding_dim: Width of a column's embedding.
        dim: Hidden width.
        depth: Hidden layers.
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
        embedding_dim: int = 16,
        dim: int = 256,
        depth: int = 3,
        num_embedding: str = "piecewise",
        frequencies: int = 24,
        frequency_std: float = 0.1,
        unknown_rate: float = 0.01,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
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
        layers: list[nn.Module] = []
        width = self.tokens.columns * embedding_dim
        for _ in range(depth):
            layers += [nn.Linear(width, dim), nn.ReLU(), dropout_or_none(dropout)]
            width = dim
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, sum(outputs))

    @classmethod
    def slots(cls, **options: object) -> dict[str, Slot]:
        """None."""
        return {}

    def forward(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None = None) -> Tensor:
        """Numbers [B, Fn], codes [B, Fc], missing bool [B, Fn] -> [B, sum(outputs)]."""
        return self.head(self.layers(self.tokens(numerical, categorical, missing).flatten(1)))
