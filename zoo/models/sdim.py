"""SDIM model: hash signatures over the whole history, target attention over its end.

Paper: "Sampling is all you need on modeling long-term user behaviors for CTR prediction", arXiv:2205.10249. The long
part is attention `sdim`; a user's behaviours become one table (the paper's behaviour sequence encoding), which a
server makes once and reads for every candidate. Short part as in FuxiCTR's model.
Differs from the paper in: nothing known.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern, split_heads
from zoo.attention.registry import create_attention
from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError
from zoo.models._ctr import ClickModel
from zoo.models.registry import register_model


@register_model
class SdimModel(ClickModel):
    """Long history by hashing, short history by the slot's mechanism.

    Args:
        attention: Factory for slot "target", used on the last `short_length` behaviours.
        num_items: Items in the catalogue.
        num_categories: Categories.
        max_length: Longest history M.
        width: Width of item, category and age.
        hashes: Random projections, a multiple of `bits`.
        bits: Signs in one signature.
        short_length: Latest behaviours of the short part.
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
        hashes: int = 48,
        bits: int = 3,
        short_length: int = 50,
        hidden: tuple[int, ...] = (200, 80),
    ) -> None:
        if short_length < 1:
            raise ConfigError(f"model.short_length={short_length} must be at least 1")
        super().__init__(
            attention,
            num_items=num_items,
            num_categories=num_categories,
            max_length=max_length,
            width=width,
            attention_width=None,
            top_k=0,
            num_heads=1,
            projections=False,
            hidden=hidden,
        )
        wide = 3 * width
        self.short_length = short_length
        self.long = create_attention(
            "sdim", wide, 1, pattern=Pattern.CROSS, hashes=hashes, bits=bits, value_dim=wide, head_dim=wide
        )
        for name in ("q", "k", "v", "proj"):
            setattr(self.long, name, nn.Identity())
        self.join = nn.Linear(2 * wide, wide)

    def search_scores(self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor) -> Tensor:
        """Share of the signatures that each behaviour has in common with the candidate: what it counts in the long part."""
        zero, ages = self._ages(items)
        own = self.long.signatures(self.represent(item, category, zero)[:, None, None])
        theirs = self.long.signatures(self.represent(items, categories, ages)[:, None])
        return (own == theirs).to(self.join.weight.dtype).mean(-1)[:, 0]

    def user_table(self, items: Tensor, categories: Tensor) -> Tensor:
        """All a server keeps of the long history, [B, 1, G, 2**bits, V]."""
        events = split_heads(self.represent(items, categories, self._ages(items)[1]), 1)
        return self.long.table(events, events, items > 0)

    def aggregate(
        self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor, ages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        recent = slice(-self.short_length, None)
        candidate, short = super().aggregate(
            item, category, items[:, recent], categories[:, recent], ages[:, recent], mask[:, recent]
        )
        return candidate, self.combine(candidate, short, self.user_table(items, categories))

    def combine(self, candidate: Tensor, short: Tensor, table: Tensor) -> Tensor:
        """Candidate [B, V], short part [B, V] and table -> [B, V]."""
        long = self.long.read(candidate[:, None, None], table)[:, 0, 0]
        return self.join(torch.cat((short, long), -1))
