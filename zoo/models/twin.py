"""TWIN: the search uses the score of the attention that follows, so it cannot miss what attention wants.

Paper: "TWIN: two-stage interest network for lifelong user behavior modeling in CTR prediction", arXiv:2302.02352.
Differs from the paper in: no split into projected item features and scalar cross features.
"""

from __future__ import annotations

from collections.abc import Mapping

from zoo.attention.slots import AttentionFactory
from zoo.models._ctr import ClickModel
from zoo.models.registry import register_model


@register_model
class Twin(ClickModel):
    """One shared table, projected; search and attention score alike.

    Args:
        attention: Factory for slot "target".
        num_items: Items in the catalogue.
        num_categories: Categories.
        max_length: Longest history M.
        width: Width of item, category and age.
        top_k: Behaviours that the search keeps; 0 keeps all.
        num_heads: Heads; must divide 3 * width. The search adds their scores up.
        projections: Learn maps of queries, keys and values; without them it is DARE's shared-table baseline.
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
        top_k: int = 20,
        num_heads: int = 2,
        projections: bool = True,
        hidden: tuple[int, ...] = (200, 80),
    ) -> None:
        super().__init__(
            attention,
            num_items=num_items,
            num_categories=num_categories,
            max_length=max_length,
            width=width,
            attention_width=None,
            top_k=top_k,
            num_heads=num_heads,
            projections=projections,
            hidden=hidden,
        )
