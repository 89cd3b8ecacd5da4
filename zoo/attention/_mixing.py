"""Small tensor functions that variants share: heads, biases, masks, caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.attention.types import BiasFactors, State


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, E] -> [B, N, H*E]."""
    return x.transpose(1, 2).flatten(2)


def dense_bias(bias: Tensor | BiasFactors | None) -> Tensor | None:
    """The bias as a tensor, broadcastable to [B, H, N, M]."""
    return bias.dense() if isinstance(bias, BiasFactors) else bias


def scaled_scores(q: Tensor, k: Tensor, bias: Tensor | BiasFactors | None = None) -> Tensor:
    """``D^-1/2 q k^T + bias``: [B, H, N, D], [B, H, M, D] -> [B, H, N, M]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores if bias is None else scores + dense_bias(bias)


def visible_keys(n: int, m: int, positions: Tensor | None, device: torch.device | None = None) -> Tensor:
    """Causal visibility, bool [N, M] or [B, 1, N, M]: True where query i may see key j."""
    keys = torch.arange(m, device=device)
    if positions is None:
        return keys[None, :] <= torch.arange(n, device=device)[:, None] + (m - n)
    visible = keys <= positions[..., None].to(keys.device)
    return visible if positions.dim() == 1 else visible[:, None]


def visible_pairs(
    q: Tensor, k: Tensor, *, causal: bool, key_mask: Tensor | None, positions: Tensor | None
) -> Tensor:
    """Which query may see which key, bool broadcastable to [B, H, N, M]."""
    n, m = q.shape[2], k.shape[2]
    seen = visible_keys(n, m, positions, q.device) if causal else q.new_ones(n, m, dtype=torch.bool)
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the seen keys, [B, H, N, M]; a row without any is zero."""
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)


def append(cache: Tensor, item: Tensor, length: int) -> Tensor:
    """Write `item` at `length - 1` of a buffer [B, H, capacity, D] that doubles when it is full."""
    if cache.shape[2] < length:
        room = cache.new_zeros(*cache.shape[:2], max(16, cache.shape[2]), cache.shape[3])
        cache = torch.cat((cache, room), dim=2)
    elif torch.is_grad_enabled():
        cache = cache.clone()
    cache[:, :, length - 1 : length] = item
    return cache


def reorder_state(state: State, index: Tensor) -> State:
    """Pick batch rows of a decoding state, as beam search does; nested states too."""

    def pick(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.index_select(0, index)
        if isinstance(item, dict):
            return reorder_state(item, index)
        if isinstance(item, tuple):
            parts = [pick(part) for part in item]
            return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
        return [pick(part) for part in item] if isinstance(item, list) else item

    return {key: pick(item) for key, item in state.items()}
