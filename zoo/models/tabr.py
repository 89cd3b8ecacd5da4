"""TabR: a row attends to the training rows nearest to it, whose targets it sees.

Paper: Gorishniy et al., "TabR: tabular deep learning meets nearest neighbors", arXiv:2307.14338. Official code:
yandex-research/tabular-dl-tabr, MIT.

    x = E(row),  k = K(x),  s_i = -|k - k_i|^2                       over all training rows i but the row itself
    y = x + sum_i softmax(s)_i (W_Y y_i + T(k - k_i))                over the `neighbors` largest s_i
    out = P(y)

Differs from it in: categorical columns are embedded like numerical ones instead of one-hot; several targets, whose label
embeddings are added; at most `bank_size` training rows are kept. The rows travel with the weights: whoever has the file
can read them. Every call encodes all of them once: the FLOPs of a single row, which runs report, are nearly all of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.drop import dropout_or_none
from zoo.layers.numerical_embedding import FeatureTokens
from zoo.layers.row_bank import RowBank
from zoo.models.registry import register_model


class LabelEmbedding(nn.Module):
    """W_Y: the targets of a row as one vector.

    Args:
        outputs: Of each target; 1 (a value, or 0 and 1 of two classes) is mapped linearly, K classes have a vector each.
        dim: Width C.
    """

    def __init__(self, outputs: Sequence[int], dim: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(1, dim) if o == 1 else nn.Embedding(o, dim) for o in outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for label in self.maps:
            if isinstance(label, nn.Embedding):
                nn.init.uniform_(label.weight, -1.0, 1.0)
            else:
                bound = 1 / math.sqrt(2)
                nn.init.uniform_(label.weight, -bound, bound)
                nn.init.uniform_(label.bias, -bound, bound)

    def forward(self, targets: Tensor) -> Tensor:
        """Targets [M, T] (class numbers, standardised values) -> [M, C]."""
        columns = zip(self.maps, targets.unbind(1), strict=True)
        return sum(m(y.long()) if isinstance(m, nn.Embedding) else m(y[:, None]) for m, y in columns)


class NeighborAttention(nn.Module):
    """Attention of rows to the nearest rows of a bank, by squared distance of keys.

    Args:
        dim: Width C.
        hidden: Hidden width of T, which turns the difference of two keys into a part of the value.
        neighbors: Rows that are looked at.
        dropout: Inside T, after its ReLU.
        context_dropout: Of the attention weights.
    """

    def __init__(
        self, dim: int, hidden: int, neighbors: int, *, dropout: float, context_dropout: float
    ) -> None:
        super().__init__()
        self.neighbors = neighbors
        self.difference = nn.Linear(dim, hidden)
        self.shift = nn.Linear(hidden, dim, bias=False)
        self.drop, self.context_drop = dropout_or_none(dropout), dropout_or_none(context_dropout)

    def forward(self, keys: Tensor, bank: Tensor, labels: Tensor, own: Tensor | None = None) -> Tensor:
        """Look up.

        Args:
            keys: Of the rows, [B, C].
            bank: Keys of the rows looked at, [M, C].
            labels: Their embedded targets, [M, C].
            own: Each row's own place in the bank, int64 [B], not looked at; places beyond it are harmless.

        Returns:
            [B, C].
        """
        nearest = self.nearest(keys.detach(), bank.detach(), own)
        distance = (keys[:, None] - bank[nearest]).square().sum(-1)
        weights = self.context_drop((-distance).softmax(-1))[:, None]
        # T is linear on both sides of its ReLU: once for each key instead of each pair before it, and on the sum after it.
        inner = F.linear(bank, self.difference.weight)
        inner = self.drop((self.difference(keys)[:, None] - inner[nearest]).relu())
        return (weights @ labels[nearest] + self.shift(weights @ inner))[:, 0]

    def nearest(self, keys: Tensor, bank: Tensor, own: Tensor | None) -> Tensor:
        """Places of the nearest rows, nearest first, int64 [B, min(neighbors, M)], or of one fewer than M rows where `own` is given."""
        closeness = 2 * keys @ bank.mT - bank.square().sum(-1)
        if own is not None:
            places = torch.arange(len(bank), device=bank.device)
            closeness = closeness.masked_fill(own[:, None] == places, -math.inf)
        return closeness.topk(min(self.neighbors, len(bank) - (own is not None)), dim=-1).indices


@register_model
class TabR(nn.Module):
    """Embedded columns, a lookup among the training rows, residual blocks.

    Args:
        attention: Not used; the lookup, attention by distance over labelled rows, is the model's own and fills no slot.
        num_numerical, cardinalities, bins, outputs: Set by the table, see `zoo.models.ft_transformer`.
        embedding_dim: Width of a column's embedding.
        dim: Width C of a row.
        encoder_depth: Residual blocks before the lookup (E).
        depth: Residual blocks after it (P).
        neighbors: Training rows that a row looks at.
        bank_size: Most training rows kept for that.
        num_embedding: linear, piecewise or periodic. Distances are what counts here, and the bins of piecewise-linear
            embeddings blur them: on California housing an RMSE of 0.41 with linear ones, 0.44 with piecewise ones.
        frequencies, frequency_std: Of the periodic embedding.
        unknown_rate: Share of categories hidden while training.
        dropout: Inside the blocks and the lookup's values.
        context_dropout: Of the lookup's weights.
    """

    name: ClassVar[str]
    hides_own: ClassVar[bool] = (
        True  # in training, `forward` must be told which row of the bank is the row itself
    )

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_numerical: int = 8,
        cardinalities: Sequence[int] = (),
        bins: Sequence[Sequence[float]] | None = None,
        outputs: Sequence[int] = (1,),
        embedding_dim: int = 16,
        dim: int = 128,
        encoder_depth: int = 0,
        depth: int = 1,
        neighbors: int = 96,
        bank_size: int = 16_384,
        num_embedding: str = "linear",
        frequencies: int = 24,
        frequency_std: float = 0.1,
        unknown_rate: float = 0.01,
        dropout: float = 0.2,
        context_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if neighbors < 1 or bank_size < 2:
            raise ConfigError(
                f"model.neighbors={neighbors} must be at least 1 and model.bank_size={bank_size} at least 2"
            )
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
        self.first = nn.Linear(self.tokens.columns * embedding_dim, dim)
        self.encoder = nn.ModuleList(_block(dim, dropout, norm=i > 0) for i in range(encoder_depth))
        self.key = nn.Sequential(nn.LayerNorm(dim) if encoder_depth else nn.Identity(), nn.Linear(dim, dim))
        self.label = LabelEmbedding(outputs, dim)
        self.lookup = NeighborAttention(
            dim, 2 * dim, neighbors, dropout=dropout, context_dropout=context_dropout
        )
        self.blocks = nn.ModuleList(_block(dim, dropout, norm=True) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, sum(outputs)))
        self.bank_size = bank_size
        self.bank = RowBank(bank_size, num_numerical, len(cardinalities), num_targets=len(outputs))

    @classmethod
    def slots(cls, **options: object) -> dict[str, Slot]:
        """None."""
        return {}

    def set_bank(
        self,
        numerical: Tensor,
        categorical: Tensor,
        missing: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Fix the training rows that are looked at, no more than `bank_size`.

        Args:
            numerical, categorical, missing: As in `forward`.
            targets: Class numbers and standardised values, [M, T].
        """
        if targets is None or len(numerical) < 2:
            raise ConfigError(
                f"tabr looks at training rows and their targets: set_bank needs both, of 2 rows or more, got {len(numerical)} rows "
                f"and {'no targets' if targets is None else 'targets'}"
            )
        self.bank.fill(numerical, categorical, missing, targets)

    def _encode(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None) -> Tensor:
        x = self.first(self.tokens(numerical, categorical, missing).flatten(1))
        for block in self.encoder:
            x = x + block(x)
        return x

    def banked(self) -> tuple[Tensor, Tensor]:
        """Keys and embedded targets of the rows looked at."""
        *columns, targets = self.bank()
        return self.key(self._encode(*columns)), self.label(targets)

    def forward(
        self,
        numerical: Tensor,
        categorical: Tensor,
        missing: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            numerical: Normalised numbers, [B, Fn].
            categorical: Codes, int64 [B, Fc].
            missing: Numbers that are missing, bool [B, Fn].
            own: Numbers of these rows in what `set_bank` was given, int64 [B], in training: a row must not see its own
                target. Numbers beyond the bank are harmless.

        Returns:
            [B, sum(outputs)].
        """
        x = self._encode(numerical, categorical, missing)
        x = x + self.lookup(self.key(x), *self.banked(), own)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _block(dim: int, dropout: float, *, norm: bool) -> nn.Sequential:
    """Norm, linear, ReLU, dropout, linear, dropout."""
    return nn.Sequential(
        nn.LayerNorm(dim) if norm else nn.Identity(),
        nn.Linear(dim, 2 * dim),
        nn.ReLU(),
        dropout_or_none(dropout),
        nn.Linear(2 * dim, dim),
        dropout_or_none(dropout),
    )
