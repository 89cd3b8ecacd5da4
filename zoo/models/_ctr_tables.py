"""Tables of events: item, category and age, and products with many events at once.

Letters: B batch, M behaviours, W width of a part of an event, I items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AGES = 512  # ages up to here have a row of their own; older ones share rows by their logarithm
LONG = 2**15  # elements of a history from which on it is worth a call of its own


class EventTables(nn.Module):
    """Embeddings of item, category and age side by side.

    Args:
        num_items: Items in the catalogue.
        num_categories: Categories.
        width: Width of each of the three; an event is 3 * width wide.
        category_std: Spread of the categories at the start.
    """

    def __init__(self, num_items: int, num_categories: int, width: int, *, category_std: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.item = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.category = nn.Embedding(num_categories + 1, width, padding_idx=0)
        self.age = nn.Embedding(AGES + 32, width)
        for table, std in ((self.item, 0.1), (self.category, category_std), (self.age, 0.1)):
            nn.init.normal_(table.weight, std=std)
        with torch.no_grad():
            self.item.weight[0].zero_()
            self.category.weight[0].zero_()

    def forward(self, items: Tensor, categories: Tensor, ages: Tensor) -> Tensor:
        """Item and category numbers [...], ages broadcastable to them -> [..., 3 * width]."""
        age = self.age(_age_row(ages)).expand(*items.shape, -1)
        return torch.cat((self.item(items), self.category(categories), age), -1)

    def inner(self, query: Tensor, items: Tensor, categories: Tensor, ages: Tensor) -> Tensor:
        """Inner products of queries [B, 3 * width] with behaviours [B, M], ages [1, M], none of which is embedded whole.

        Categories and ages are few: their products are taken once per row of the table and then looked up.
        """
        by_item, by_category, by_age = query.split(self.width, 1)
        out = _row_products(self.item.weight, items, by_item)
        out += (by_category @ self.category.weight.T).gather(1, categories)
        return out.add_((by_age @ self.age.weight.T).index_select(1, _age_row(ages[0])))


def _row_products(table: Tensor, index: Tensor, query: Tensor) -> Tensor:
    """`table[index[b, m]] . query[b]`, [I, W], [B, M] and [B, W] -> [B, M]."""
    on_cpu = table.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if on_cpu and index.shape[1] * table.shape[1] >= LONG:
        # One candidate at a time: the rows picked are multiplied while they are still in the core's cache.
        return torch.stack([F.embedding(i, table) @ q for i, q in zip(index, query, strict=True)])
    return torch.bmm(F.embedding(index, table), query[:, :, None])[..., 0]


def _age_row(ages: Tensor) -> Tensor:
    over = (ages.clamp_min(1).float() / AGES).log2().clamp(0.0, 15.5) * 2
    return torch.where(ages < AGES, ages, AGES + over.long())
