"""BERT4Rec: hidden items from bidirectional self-attention; the next one is a hidden one at the end.

Paper: "BERT4Rec: sequential recommendation with bidirectional encoder representations from transformer",
arXiv:1904.06690.
Differs from the paper in: pre-norm blocks, a bias per item but no further layer before the table, dropout on outputs
instead of attention weights; some training windows hide only their last item, as the test does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.blocks import TransformerBlock
from zoo.models._sequence import SequenceRecommender
from zoo.models.registry import register_model


@register_model
class Bert4Rec(SequenceRecommender):
    """Item embedding with a mask token, bidirectional blocks, a final norm.

    Args:
        attention: Factory for slot "encoder".
        num_items: Items in the catalogue.
        max_length: Longest history L, the mask at its end included.
        dim: Width C.
        depth: Number of blocks.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        activation: Of the MLP, see `zoo.layers.mlp.ACTIVATIONS`.
        norm: "pre" or "post".
        dropout: After the embedding, the attention and both layers of the MLP.
        position: "recency", "order" or "none".
    """

    objective: ClassVar[str] = "cloze"

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
        dropout: float = 0.2,
        position: str = "recency",
    ) -> None:
        super().__init__(
            num_items=num_items,
            max_length=max_length,
            dim=dim,
            dropout=dropout,
            position=position,
            extra_tokens=1,
        )
        if depth < 1:
            raise ConfigError(f"model.depth={depth} must be at least 1")
        self.mask_token = num_items + 1
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

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """One slot: every block sees the whole window, which is padded on the left."""
        return {"encoder": Slot(Pattern.SELF, key_mask=True, length_known=True)}

    def encode(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """As in the base class; an item number of `mask_token` hides an item."""
        x, mask = self.embed(items)
        for block in self.blocks:
            x = block(x, key_mask=mask)
        return self.norm(x)

    def user_vector(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        mask = items.new_full((items.shape[0], 1), self.mask_token)
        oldest = 1 if items.shape[1] == self.max_length else 0
        return self.encode(torch.cat((items[:, oldest:], mask), 1))[:, -1]
