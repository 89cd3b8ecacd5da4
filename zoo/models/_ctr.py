"""What click models share: search, target attention without projections, the click head.

Letters: B batch, M behaviours, K selected behaviours, W width of an event. Item and category numbers run from 1; 0 is
padding, on the left. The age of a behaviour counts from 1 for the latest; 0 is the candidate itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.models._ctr_tables import EventTables


class TargetAttention(nn.Module):
    """The slot's mechanism with one query, the candidate, straight on embeddings.

    DARE shows that projections of a table do not replace a table of its own, so queries, keys and values go in as they
    are. A variant that needs its own projections (gates and the like), or `projections=True`, gets them.

    Args:
        factory: Of a cross slot.
        key_width: Width of queries and keys.
        value_width: Width of values and of the result.
        num_heads: Heads; must divide both widths.
        projections: Learn maps of queries, keys, values and result.
    """

    def __init__(
        self,
        factory: AttentionFactory,
        key_width: int,
        value_width: int,
        *,
        num_heads: int = 1,
        projections: bool = False,
        length: int | None = None,
    ) -> None:
        super().__init__()
        if key_width % num_heads or value_width % num_heads:
            raise ConfigError(
                f"model.num_heads={num_heads} must divide the widths {key_width} and {value_width} of an event"
            )
        self.attn = factory(
            key_width,
            num_heads,
            context_dim=key_width,
            value_dim=value_width,
            head_dim=key_width // num_heads,
            value_head_dim=value_width // num_heads,
            length=length,
        )
        kind = type(self.attn)
        bare = kind.mix is Attention.mix and kind.output is Attention.output
        bare = bare and all(
            isinstance(getattr(self.attn, n, None), nn.Linear) for n in ("q", "k", "v", "proj")
        )
        self.projected = projections or not bare
        if self.projected:
            self.lift = nn.Linear(key_width, value_width)
        else:
            for name in ("q", "k", "v", "proj"):
                setattr(self.attn, name, nn.Identity())
            self.lift = nn.Identity()
        # An event is three equal parts: meaning (item and category) and age. DARE scales their scores apart; the
        # mechanism divides by the root of the whole width, so the query makes up for the difference. Trained tables
        # are aligned: their products grow with the width, not with its root, and a narrow table would start at a
        # flatter softmax. The last factor undoes that; it is 1 where keys are as wide as values.
        scale = torch.full((key_width,), math.sqrt(1.5))
        scale[2 * key_width // 3 :] = math.sqrt(3.0)
        self.register_buffer("scale", scale * math.sqrt(value_width / key_width), persistent=False)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[B, W], [B, M, W], [B, M, V], bool [B, M] -> [B, V]."""
        out = self.attn((query * self.scale)[:, None], keys, values, key_mask=mask)
        return self.lift(out[:, 0])

    @property
    def maps(self) -> tuple[nn.Linear, nn.Linear] | None:
        """Maps of queries and keys into the space that attention compares in; None where that is the table's own.

        Variants with several sets of keys have no single space: the table's own serves.
        """
        q, k = (getattr(self.attn, name, None) for name in ("q", "k"))
        linear = isinstance(q, nn.Linear) and isinstance(k, nn.Linear)
        return (q, k) if linear and q.out_features == k.out_features else None

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Inner products in the space that attention compares in, [B, W] and [B, M, W] -> [B, M]."""
        query = query * self.scale
        if self.maps:
            query, keys = self.maps[0](query), self.maps[1](keys)
        return (keys @ query[:, :, None])[..., 0] / math.sqrt(query.shape[-1])


class ClickHead(nn.Module):
    """From candidate r and history o to the logit of a click: [r, o, r * o] through two hidden layers."""

    def __init__(self, width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (3 * width, *hidden)
        layers: list[nn.Module] = [nn.BatchNorm1d(3 * width)]
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(a, b), nn.PReLU(init=0.1)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, candidate: Tensor, history: Tensor) -> Tensor:
        """[B, V] and [B, V] -> [B]."""
        features = torch.cat((candidate, history, candidate * history), -1)
        return self.layers(features)[:, 0]


class ClickModel(nn.Module):
    """Search the behaviours, aggregate those found, judge the candidate.

    Args:
        attention: Factory for slot "target".
        num_items: Items in the catalogue.
        num_categories: Categories.
        max_length: Longest history M.
        width: Width of item, category and age in the table of representations.
        attention_width: The same in the table that attention compares in; None: both are one table.
        top_k: Behaviours that the search keeps; 0 keeps all.
        num_heads: Heads of the target attention.
        projections: Maps of queries, keys and values in the target attention.
        hidden: Widths of the head's hidden layers.

    Attributes:
        filters: The search hides some behaviours, whatever their number.
    """

    filters: bool = False

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_items: int,
        num_categories: int,
        max_length: int,
        width: int,
        attention_width: int | None,
        top_k: int,
        num_heads: int,
        projections: bool,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        if min(num_items, num_categories, max_length, width, attention_width or 1) < 1 or top_k < 0:
            raise ConfigError(
                f"model: num_items={num_items}, num_categories={num_categories}, max_length={max_length}, "
                f"width={width} and attention_width={attention_width} must be at least 1, top_k={top_k} at least 0"
            )
        self.num_items, self.max_length, self.top_k = num_items, max_length, top_k
        self.represent = EventTables(num_items, num_categories, width)
        own = attention_width is not None
        # At spread 1, as in DARE's code, a candidate attends to its category from the first step on. Items begin small,
        # other than there: so many random products would be noise to unlearn, and the more the narrower the table.
        self.compare = (
            EventTables(num_items, num_categories, attention_width, category_std=1.0)
            if own
            else self.represent
        )
        self.target = TargetAttention(
            attention["target"],
            3 * self.compare.width,
            3 * width,
            num_heads=num_heads,
            projections=projections,
            length=min(top_k, max_length) if top_k else max_length,
        )
        self.head = ClickHead(3 * width, tuple(hidden))

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """One slot: the candidate looks at the behaviours found."""
        return {"target": Slot(Pattern.CROSS, key_mask=True)}

    def search_scores(self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor) -> Tensor:
        """By what the search orders behaviours, [B, M]; by default the score of the attention itself."""
        zero, ages = self._ages(items)
        query = self.compare(item, category, zero)
        if self.target.maps:
            return self.target.scores(query, self.compare(items, categories, ages))
        query = query * (self.target.scale / math.sqrt(query.shape[-1]))
        return self.compare.inner(query, items, categories, ages)

    def search(
        self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Places [B, K] of the behaviours to keep and which of them are real, or None for all."""
        keep = min(self.top_k or items.shape[1], items.shape[1])
        if keep == items.shape[1] and not self.filters:
            return None
        with torch.no_grad():
            scores = self.search_scores(item, category, items, categories)
            return self.select(scores.masked_fill_(items == 0, float("-inf")), keep)

    @staticmethod
    def select(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Places [B, K] of the best scores [B, M] in time order, and which of them are above -inf."""
        best, place = scores.topk(keep, dim=1)
        place, order = place.sort(1)
        return place, best.gather(1, order) > float("-inf")

    def aggregate(
        self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor, ages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Candidate [B, V] and what the selected behaviours say about it [B, V]."""
        zero = torch.zeros_like(item)
        candidate, values = self.represent(item, category, zero), self.represent(items, categories, ages)
        if self.compare is self.represent:
            query, keys = candidate, values
        else:
            query, keys = self.compare(item, category, zero), self.compare(items, categories, ages)
        return candidate, self.target(query, keys, values, mask)

    def forward(self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor) -> dict[str, Tensor]:
        """Judge candidates.

        Args:
            item: Candidate, int64 [B].
            category: Its category, int64 [B].
            items: Behaviours, int64 [B, M], 0 = padding on the left.
            categories: Their categories, int64 [B, M].

        Returns:
            `logit` [B], and what a model adds, such as `auxiliary` [B].
        """
        self._check(items)
        _, ages = self._ages(items)
        mask = items > 0
        found = self.search(item, category, items, categories)
        if found is not None:
            place, mask = found
            items, categories = items.gather(1, place), categories.gather(1, place)
            ages = ages.expand(place.shape[0], -1).gather(1, place)
        candidate, history = self.aggregate(item, category, items, categories, ages, mask)
        return {"logit": self.head(candidate, history)}

    def _check(self, items: Tensor) -> None:
        if items.shape[1] > self.max_length:
            raise ConfigError(
                f"{items.shape[1]} behaviours are more than model.max_length={self.max_length}; give the latest ones"
            )

    @staticmethod
    def _ages(items: Tensor) -> tuple[Tensor, Tensor]:
        """Age 0 of the candidates [B] and ages of the behaviours [1, M]."""
        length = items.shape[1]
        ages = torch.arange(length, 0, -1, device=items.device)[None]
        return items.new_zeros(items.shape[0]), ages
