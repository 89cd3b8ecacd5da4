"""ETA: search by the Hamming distance of hash codes, then attend to the nearest.

Paper: "End-to-end user behavior retrieval in click-through rate prediction model", arXiv:2108.04468.
Codes are the signs of fixed random projections of the very embeddings that attention uses, so they follow training.
Differs from the paper in: nothing known.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError
from zoo.models._ctr import ClickModel
from zoo.models.registry import register_model


@register_model
class Eta(ClickModel):
    """SimHash search in the shared table, then multi-head target attention with projections.

    Args:
        attention: Factory for slot "target".
        num_items: Items in the catalogue.
        num_categories: Categories.
        max_length: Longest history M.
        width: Width of item, category and age.
        hash_bits: Signs in a code.
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
        hash_bits: int = 64,
        top_k: int = 20,
        num_heads: int = 2,
        hidden: tuple[int, ...] = (200, 80),
    ) -> None:
        if hash_bits < 1:
            raise ConfigError(f"model.hash_bits={hash_bits} must be at least 1")
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
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("planes", torch.randn(3 * width, hash_bits, generator=draw))

    def codes(self, items: Tensor, categories: Tensor, ages: Tensor) -> Tensor:
        """Signs -1 and 1 of each event, [..., hash_bits]; a server keeps those of the behaviours."""
        projected = self.represent(items, categories, ages) @ self.planes
        return (projected > 0).to(projected.dtype) * 2 - 1

    def search_scores(self, item: Tensor, category: Tensor, items: Tensor, categories: Tensor) -> Tensor:
        zero, ages = self._ages(items)
        own, theirs = self.codes(item, category, zero), self.codes(items, categories, ages)
        return (theirs @ own[:, :, None])[..., 0]  # bits - 2 * Hamming distance

    @staticmethod
    def select(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """As for all; of equal distances, which are many, the later behaviours are kept, whatever padding there is."""
        later = torch.arange(scores.shape[1], device=scores.device, dtype=torch.float64) / scores.shape[1]
        return ClickModel.select(scores + later, keep)
