"""SIM: search the behaviours first, then attend to those found with several heads.

Paper: "Search-based user interest modeling with lifelong sequential behavior data", arXiv:2006.05639.
Hard search keeps the latest behaviours of the candidate's category, soft search the largest inner products.
Differs from the paper in: the soft search has no pre-trained table of its own but uses the shared one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.attention.slots import AttentionFactory
from zoo.errors import unknown
from zoo.models._ctr import ClickModel
from zoo.models.registry import register_model

SEARCHES = ("hard", "soft")


@register_model
class Sim(ClickModel):
    """Search by category or inner product, then multi-head target attention with projections.

    Args:
        attention: Factory for slot "target".
        num_items: Items in the catalogue.
        num_categories: Categories.
        max_length: Longest history M.
        width: Width of item, category and age.
        search: "hard" or "soft".
        top_k: Behaviours that the search keeps; 0 keeps all.
        num_heads: Heads; must divide 3 * width.
        hidden: Widths of the head's hidden layers.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_items: int = 1000,
        num_categories: int = 10,
        max_length: int = 100,
        width: int = 16,
        search: str = "hard",
        top_k: int = 20,
        num_heads: int = 2,
        hidden: tuple[int, ...] = (200, 80),
    ) -> None:
        if search not in SEARCHES:
            raise unknown("model.search", str(search), SEARCHES)
        super().__init__(
            attention,
            num_items=num_items,
            num_categories=num_categories,
            max_length=max_length,
            width=width,
            attention_width=None,
            top_k=top_k,
            num_heads=num_heads,
            projections=True,
            hidden=hidden,
        )
        self.kind = search
        self.filters = search == "hard"

    def search_scores(self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor) -> Tensor:
        zero, ages = self._ages(items)
        if self.kind == "soft":
            query, keys = self.represent(item, category, zero), self.represent(items, categories, ages)
            return (keys @ query[:, :, None])[..., 0]
        # Later ones first; another category is as good as padding.
        same = (categories == category[:, None]) & (categories > 0)
        return torch.where(same, -ages.float(), float("-inf"))
