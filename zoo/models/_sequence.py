"""What sequence recommenders share: item table, positions, scoring, vectors of users.

Item numbers run from 1; 0 is padding, always on the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError, unknown
from zoo.layers.blocks import TransformerBlock
from zoo.layers.drop import dropout_or_none

POSITIONS = ("recency", "order", "none")


class SequenceRecommender(nn.Module):
    """Base of models that turn a user's items into a vector and score items against it.

    A subclass implements `encode`. Scores use the table of the inputs (tied weights) and a bias per item.

    Args:
        num_items: Items in the catalogue, >= 1.
        max_length: Longest history L.
        dim: Width C.
        dropout: After the embedding; the subclass' blocks take it too.
        position: "recency", places counted back from the latest item; "order", from the oldest, which a step by step
            state needs; "none".
        extra_tokens: Rows of the table beyond the items, such as a mask.
    """

    objective: ClassVar[str] = "next"  # "next": position i predicts item i + 1; "cloze": masked items

    def __init__(
        self,
        *,
        num_items: int,
        max_length: int,
        dim: int,
        dropout: float,
        position: str,
        extra_tokens: int = 0,
    ) -> None:
        super().__init__()
        if num_items < 1 or max_length < 1:
            raise ConfigError(f"num_items={num_items} and max_length={max_length} must be at least 1")
        if position not in POSITIONS:
            raise unknown("model.position", str(position), POSITIONS)
        self.num_items, self.max_length, self.dim, self.position = num_items, max_length, dim, position
        self.items = nn.Embedding(1 + num_items + extra_tokens, dim, padding_idx=0)
        self.item_bias = nn.Parameter(torch.zeros(num_items))
        self.places = nn.Embedding(max_length, dim) if position != "none" else None
        self.embed_drop = dropout_or_none(dropout)

    def reset_tables(self) -> None:
        """Small random tables; the row of the padding is zero."""
        nn.init.normal_(self.items.weight, std=self.dim**-0.5)
        with torch.no_grad():
            self.items.weight[0].zero_()
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=0.1 * self.dim**-0.5)

    def embed(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Item numbers [B, L] to tokens [B, L, C] (zero where padded) and the mask of real items, bool [B, L]."""
        length = items.shape[1]
        if length > self.max_length:
            raise ConfigError(
                f"{length} items are more than model.max_length={self.max_length}; give the latest ones"
            )
        mask = items > 0
        x = self.items(items)
        if self.places is not None:
            if self.position == "recency":
                place = torch.arange(self.max_length - length, self.max_length, device=items.device)
            else:
                place = (mask.cumsum(1) - 1).clamp_min(0)
            x = x + self.places(place)
        return self.embed_drop(x) * mask[..., None], mask

    def encode(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Hidden states.

        Args:
            items: Item numbers, int64 [B, L], 0 = padding on the left.
            times: Seconds relative to the latest item, float [B, L], <= 0; models without time ignore it.

        Returns:
            [B, L, C].
        """
        raise NotImplementedError

    def forward(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Alias of `encode`."""
        return self.encode(items, times)

    def user_vector(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """The user after the last item, [B, C]."""
        return self.encode(items, times)[:, -1]

    def item_table(self) -> tuple[Tensor, Tensor]:
        """Vectors [I, C] and biases [I] of all items, in the order of their numbers."""
        return self.items.weight[1 : self.num_items + 1], self.item_bias

    def scores(self, users: Tensor) -> Tensor:
        """Scores of all items for user vectors, [B, C] -> [B, I]; column i is item number i + 1."""
        table, bias = self.item_table()
        return torch.addmm(bias, users, table.T)


class BlockRecommender(SequenceRecommender):
    """Item embedding, transformer blocks and a final norm.

    Args:
        attention: Factory for slot "encoder".
        num_items: Items in the catalogue.
        max_length: Longest history L.
        dim: Width C.
        depth: Number of blocks.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        activation: Of the MLP, see `zoo.layers.mlp.ACTIVATIONS`.
        norm: "pre" or "post".
        dropout: After the embedding, the attention and both layers of the MLP.
        position: "recency", "order" or "none".

    Attributes:
        extra_tokens: Rows of the table beyond the items.
    """

    extra_tokens: ClassVar[int] = 0

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_items: int = 1000,
        max_length: int = 50,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        norm: str = "pre",
        dropout: float = 0.4,
        position: str = "recency",
    ) -> None:
        super().__init__(
            num_items=num_items,
            max_length=max_length,
            dim=dim,
            dropout=dropout,
            position=position,
            extra_tokens=self.extra_tokens,
        )
        if depth < 1:
            raise ConfigError(f"model.depth={depth} must be at least 1")
        self.blocks = nn.ModuleList(
            TransformerBlock(
                attention["encoder"],
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                activation=activation,
                norm=norm,
                dropout=dropout,
                length=max_length,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.reset_tables()

    def encode(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        x, mask = self.embed(items)
        for block in self.blocks:
            x = block(x, key_mask=mask)
        return self.norm(x)
