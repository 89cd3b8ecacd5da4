"""HSTU: gated pointwise attention over places and times, without feed-forward layers.

Paper: "Actions speak louder than words", arXiv:2402.17152; code: meta-recsys/generative-recommenders, Apache-2.0.
``y = x + W (LN(A V) * U)`` with U = SiLU of a projection; the paper's A is attention `hstu` with biases for the distance
in places and for the logarithm of the time between two events.
Differs from the code in: any causal variant fits the slot; time is counted to the attending event, not to the next;
scores are inner products without a temperature, with a bias per item.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention, Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.drop import dropout_or_none
from zoo.models._sequence import SequenceRecommender
from zoo.models.registry import register_model

TIME_BUCKETS = 64


class _GatedBlock(nn.Module):
    """Attention without an output map, its norm, times a gate, through one linear layer."""

    def __init__(
        self, factory: AttentionFactory, dim: int, num_heads: int, length: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = factory(dim, num_heads, length=length)
        proj = getattr(self.attn, "proj", None)
        bare = type(self.attn).output is Attention.output and isinstance(proj, nn.Linear)
        if bare and proj.in_features == dim:  # variants with fewer or wider heads keep their map
            self.attn.proj = nn.Identity()
        self.gate, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.drop = dropout_or_none(dropout)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        h = self.norm_in(x)
        mixed = self.attn(h, key_mask=mask, bias=bias)
        return x + self.out(self.drop(self.norm_out(mixed) * F.silu(self.gate(h))))


@register_model
class Hstu(SequenceRecommender):
    """Item embedding, gated causal blocks, a final norm.

    Args:
        attention: Factory for slot "encoder".
        num_items: Items in the catalogue.
        max_length: Longest history L.
        dim: Width C.
        depth: Number of blocks.
        num_heads: Heads; must divide `dim`.
        dropout: After the embedding and before each block's last layer.
        position: "recency", "order" or "none"; places are also in `relative_bias`.
        relative_bias: Learned biases for the distance in places and in time; needs a variant that takes any bias.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_items: int = 1000,
        max_length: int = 50,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        dropout: float = 0.2,
        position: str = "recency",
        relative_bias: bool = True,
    ) -> None:
        super().__init__(
            num_items=num_items, max_length=max_length, dim=dim, dropout=dropout, position=position
        )
        if depth < 1 or dim % num_heads:
            raise ConfigError(
                f"model.depth={depth} must be at least 1, and num_heads={num_heads} divide dim={dim}"
            )
        self.blocks = nn.ModuleList(
            _GatedBlock(attention["encoder"], dim, num_heads, max_length, dropout) for _ in range(depth)
        )
        self.place_bias = nn.Parameter(torch.zeros(max_length)) if relative_bias else None
        self.time_bias = nn.Parameter(torch.zeros(TIME_BUCKETS)) if relative_bias else None
        self.norm = nn.LayerNorm(dim)
        self.reset_tables()

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """One slot: every block looks back over the history, which is padded on the left."""
        bias = "full" if options.get("relative_bias", True) else None
        return {"encoder": Slot(Pattern.CAUSAL_SELF, key_mask=True, bias=bias, length_known=True)}

    def encode(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        x, mask = self.embed(items)
        bias = self._bias(items.shape[1], times)
        for block in self.blocks:
            x = block(x, mask, bias)
        return self.norm(x)

    def _bias(self, length: int, times: Tensor | None) -> Tensor | None:
        """[1 or B, 1, L, L]: by distance in places, and in time where times are given."""
        if self.place_bias is None:
            return None
        place = torch.arange(length, device=self.place_bias.device)
        bias = self.place_bias[(place[:, None] - place).clamp_min(0)][None]
        if times is not None:
            apart = (times[:, :, None] - times[:, None, :]).clamp_min(0)
            bucket = (
                (torch.log1p(apart) * 3).long().clamp_max(TIME_BUCKETS - 1)
            )  # three buckets each time by e
            bias = bias + self.time_bias[bucket]
        return bias[:, None]
