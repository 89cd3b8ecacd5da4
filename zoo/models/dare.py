"""DARE: one table decides which behaviours matter, another what they say.

Paper: "Long-sequence recommendation models need decoupled embeddings", arXiv:2410.02604 (ICLR 2025). Code: thuml/DARE.
Stage 1 attends to all behaviours and feeds a small head of its own, so that every search score gets a gradient;
stage 2 takes the top k by that score, attends to them, and feeds the main head with r, o and r * o.
Differs from the code in: one logit instead of two classes, padded slots stay masked when fewer than k are real.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory
from zoo.models._ctr import ClickModel
from zoo.models.registry import register_model


@register_model
class Dare(ClickModel):
    """Decoupled attention and representation embeddings.

    Args:
        attention: Factory for slot "target".
        num_items: Items in the catalogue.
        num_categories: Categories.
        max_length: Longest history M.
        width: Width of item, category and age in the representation table.
        attention_width: The same in the attention table; the search costs this much.
        top_k: Behaviours that the search keeps; 0 keeps all.
        hidden: Widths of the main head's hidden layers.
        auxiliary_hidden: Width of stage 1's head; 0 leaves stage 1 out.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_items: int = 1000,
        num_categories: int = 10,
        max_length: int = 100,
        width: int = 16,
        attention_width: int = 16,
        top_k: int = 20,
        hidden: tuple[int, ...] = (200, 80),
        auxiliary_hidden: int = 200,
    ) -> None:
        super().__init__(
            attention,
            num_items=num_items,
            num_categories=num_categories,
            max_length=max_length,
            width=width,
            attention_width=attention_width,
            top_k=top_k,
            num_heads=1,
            projections=False,
            hidden=hidden,
        )
        wide = 3 * width
        self.auxiliary = (
            nn.Sequential(
                nn.Linear(3 * wide, auxiliary_hidden), nn.PReLU(init=0.1), nn.Linear(auxiliary_hidden, 1)
            )
            if auxiliary_hidden
            else None
        )

    def forward(self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor) -> dict[str, Tensor]:
        if self.auxiliary is None or not self.training:
            return super().forward(item, category, items, categories)
        self._check(items)
        _, ages = self._ages(items)
        r, o = self.aggregate(item, category, items, categories, ages, items > 0)
        auxiliary = self.auxiliary(torch.cat((r, o, r * o), -1))[:, 0]
        return {**super().forward(item, category, items, categories), "auxiliary": auxiliary}
