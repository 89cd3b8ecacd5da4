"""DIN: target attention over all behaviours in one shared table.

Paper: "Deep interest network for click-through rate prediction", arXiv:1706.06978.
With ``unit="mlp"`` the weights come from the paper's activation unit on [q, k, q - k, q * k], without a softmax; with
``unit="attention"`` from the slot's mechanism, as the comparison in arXiv:2410.02604 has it.
Differs from the paper in: PReLU instead of Dice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory
from zoo.errors import unknown
from zoo.models._ctr import ClickModel
from zoo.models.registry import register_model

UNITS = ("attention", "mlp")


@register_model
class Din(ClickModel):
    """All behaviours, one table.

    Args:
        attention: Factory for slot "target"; its mechanism is not used when `unit` is "mlp".
        num_items: Items in the catalogue.
        num_categories: Categories.
        max_length: Longest history M.
        width: Width of item, category and age.
        num_heads: Heads of the slot's mechanism.
        unit: "attention" or "mlp".
        unit_hidden: Hidden width of the activation unit.
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
        num_heads: int = 1,
        unit: str = "attention",
        unit_hidden: int = 36,
        hidden: tuple[int, ...] = (200, 80),
    ) -> None:
        if unit not in UNITS:
            raise unknown("model.unit", str(unit), UNITS)
        super().__init__(
            attention,
            num_items=num_items,
            num_categories=num_categories,
            max_length=max_length,
            width=width,
            attention_width=None,
            top_k=0,
            num_heads=num_heads,
            projections=False,
            hidden=hidden,
        )
        self.unit = None
        if unit == "mlp":
            self.target = None
            self.unit = nn.Sequential(
                nn.Linear(12 * width, unit_hidden), nn.PReLU(init=0.1), nn.Linear(unit_hidden, 1)
            )

    def aggregate(
        self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor, ages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.unit is None:
            return super().aggregate(item, category, items, categories, ages, mask)
        candidate = self.represent(item, category, torch.zeros_like(item))
        values = self.represent(items, categories, ages)
        weight = self._unit_weights(candidate, values).masked_fill(~mask, 0.0)
        return candidate, (weight[:, None] @ values)[:, 0]

    def _unit_weights(self, candidate: Tensor, values: Tensor) -> Tensor:
        query = candidate[:, None].expand_as(values)
        return self.unit(torch.cat((query, values, query - values, query * values), -1))[..., 0]

    def search_scores(self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor) -> Tensor:
        if self.unit is None:
            return super().search_scores(item, category, items, categories)
        zero, ages = self._ages(items)
        return self._unit_weights(
            self.represent(item, category, zero), self.represent(items, categories, ages)
        )
