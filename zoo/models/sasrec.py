"""SASRec: the next item from causal self-attention over the last ones.

Paper: "Self-attentive sequential recommendation", arXiv:1808.09781. Trained with the softmax over all items or a
sample of them instead of one negative, as arXiv:2309.07602 recommends.
Differs from the paper in: pre-norm blocks by default, a bias per item, GELU, dropout on outputs instead of attention
weights, places counted from the latest item.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.attention.base import Pattern, State
from zoo.attention.slots import Slot
from zoo.errors import ConfigError
from zoo.models._sequence import BlockRecommender
from zoo.models.registry import register_model


@register_model
class SasRec(BlockRecommender):
    """Causal blocks; scores against the item table of the inputs."""

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """One slot: every block looks back over the history, which is padded on the left."""
        return {"encoder": Slot(Pattern.CAUSAL_SELF, key_mask=True, length_known=True)}

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
