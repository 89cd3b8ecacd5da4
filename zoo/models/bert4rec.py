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
from torch import Tensor

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.models._sequence import BlockRecommender
from zoo.models.registry import register_model


@register_model
class Bert4Rec(BlockRecommender):
    """Bidirectional blocks over items and masks; an item number of `mask_token` hides an item.

    Args:
        attention: Factory for slot "encoder".
        dropout: After the embedding, the attention and both layers of the MLP.
        options: Those of `BlockRecommender`; `max_length` counts the mask at the end.
    """

    objective: ClassVar[str] = "cloze"
    extra_tokens: ClassVar[int] = 1

    def __init__(
        self, attention: Mapping[str, AttentionFactory], *, dropout: float = 0.2, **options: Any
    ) -> None:
        super().__init__(attention, dropout=dropout, **options)
        self.mask_token = self.num_items + 1

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """One slot: every block sees the whole window, which is padded on the left."""
        return {"encoder": Slot(Pattern.SELF, key_mask=True, length_known=True)}

    def user_vector(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        mask = items.new_full((items.shape[0], 1), self.mask_token)
        oldest = 1 if items.shape[1] == self.max_length else 0
        return self.encode(torch.cat((items[:, oldest:], mask), 1))[:, -1]
