"""SASRec: the next item from causal self-attention over the last ones.

Paper: "Self-attentive sequential recommendation", arXiv:1808.09781. Trained with the softmax over all items or a
sample of them instead of one negative, as arXiv:2309.07602 recommends.
Differs from the paper in: pre-norm blocks by default, a bias per item, GELU, dropout on outputs instead of attention
weights, places counted from the latest item.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern, State
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.blocks import TransformerBlock
from zoo.models._sequence import SequenceRecommender
from zoo.models.registry import register_model


@register_model
class SasRec(SequenceRecommender):
    """Item embedding, causal blocks, a final norm; scores against the same item table.

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
    """

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
            num_items=num_items, max_length=max_length, dim=dim, dropout=dropout, position=position
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

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """One slot: every block looks back over the history, which is padded on the left."""
        return {"encoder": Slot(Pattern.CAUSAL_SELF, key_mask=True, length_known=True)}

    def encode(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        x, mask = self.embed(items)
        for block in self.blocks:
            x = block(x, key_mask=mask)
        return self.norm(x)

    # ---------------------------------------------------------------- one event at a time

    def init_state(self, batch_size: int) -> State:
        """State of users without events; `position` must not be "recency" and the variant must stream."""
        if self.position == "recency":
            raise ConfigError(
                "model.position=recency shifts with every event; train with model.position=order or none for a state "
                "that is updated step by step"
            )
        return {
            "blocks": tuple(block.init_state(batch_size) for block in self.blocks),
            "history": self.items.weight.new_zeros(batch_size, 0, dtype=torch.long),
        }

    def step(self, items: Tensor, state: State) -> tuple[Tensor, State]:
        """One event of each user in; equals `user_vector` on the whole history (its last L items).

        Args:
            items: Item numbers, int64 [B], all > 0.
            state: As `init_state` or the last `step` gave it.

        Returns:
            User vectors [B, C] and the next state. A history longer than L loses its oldest item, which changes
            every place, so the state is then computed anew.
        """
        history = torch.cat((state["history"], items[:, None]), 1)[:, -self.max_length :]
        if state["history"].shape[1] == self.max_length:
            fresh = self.init_state(len(items))
            for column in history.unbind(1):
                users, fresh = self.step(column, fresh)
            return users, fresh
        x = self.items(items[:, None])
        if self.places is not None:
            x = x + self.places.weight[history.shape[1] - 1]
        blocks = []
        for block, inner in zip(self.blocks, state["blocks"], strict=True):
            x, inner = block.step(x, inner)
            blocks.append(inner)
        return self.norm(x)[:, 0], {"blocks": tuple(blocks), "history": history}
