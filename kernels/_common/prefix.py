"""Bring queries and keys of a causal scan onto one time axis.

A scan reads its state after each step. Queries that sit elsewhere than on their own key (cross attention with a prefix, more keys than
queries ...) become steps that write nothing, keys become steps that nobody reads; an order of these steps then says who sees what.
B batch, H heads, N queries, M keys, L steps of the common axis.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common.checks import Positions, query_key_positions

Side = list[tuple[Tensor | None, float]]


def merge_axes(
    op: str, q_side: Side, k_side: Side, positions: Positions | None
) -> tuple[list[Tensor | None], list[Tensor | None], Callable[[Tensor], Tensor]]:
    """Put queries and keys on one axis on which step t reads what steps up to t have written.

    Args:
        op: Name for messages.
        q_side: Query-side tensors [B, H, N] or [B, H, N, *] with the number that steps without a query get.
        k_side: Key-side tensors [B, H, M] or [B, H, M, *] (or None) with the number that makes a step write nothing.
        positions: Last key of each query, int [N] or [B, N] (negative: none), or a pair of query and key positions. None aligns the
            ends: query i reads keys up to ``i + M - N``.

    Returns:
        Both sides on the common axis and a function that takes a result [B, H, L, *] back to the N queries.
    """
    q, k = q_side[0][0], k_side[0][0]
    n, m = q.shape[2], k.shape[2]
    if positions is None:
        if n == m:
            return [t for t, _ in q_side], [t for t, _ in k_side], lambda out: out
        length = max(n, m)
        front = [[_front(t, length, fill) for t, fill in side] for side in (q_side, k_side)]
        return front[0], front[1], lambda out: out[:, :, length - n :]
    batch, device = q.shape[0], q.device
    pos_q, pos_k = query_key_positions(op, positions, batch, n, m, device)
    pos_q, pos_k = pos_q.expand(batch, n).contiguous(), pos_k.expand(batch, m).contiguous()
    if isinstance(positions, (tuple, list)):
        pos_k, order = pos_k.sort(dim=1, stable=True)
        k_side = [(None if t is None else t.gather(2, _index(order, t)), fill) for t, fill in k_side]
    before = torch.searchsorted(pos_k, pos_q, right=True)  # keys that each query reads, [B, N]
    ordered, by = before.sort(dim=1, stable=True)
    rank = torch.empty_like(by).scatter_(1, by, torch.arange(n, device=device).expand(batch, n))
    keys = torch.arange(m, device=device).expand(batch, m).contiguous()
    slot_q, slot_k = before + rank, keys + torch.searchsorted(ordered.contiguous(), keys, right=True)
    sides = [
        [_put(t, slot, n + m, fill) for t, fill in side]
        for side, slot in ((q_side, slot_q), (k_side, slot_k))
    ]
    return sides[0], sides[1], lambda out: out.gather(2, _index(slot_q, out))


def _front(t: Tensor | None, length: int, fill: float) -> Tensor | None:
    """Fill up at the front of axis 2."""
    if t is None or t.shape[2] == length:
        return t
    return F.pad(t, (0, 0) * (t.dim() - 3) + (length - t.shape[2], 0), value=fill)


def _index(slot: Tensor, t: Tensor) -> Tensor:
    """[B, N] as an index into axis 2 of ``t``."""
    shape = (slot.shape[0], 1, slot.shape[1], *(1 for _ in t.shape[3:]))
    return slot.reshape(shape).expand(-1, t.shape[1], -1, *t.shape[3:])


def _put(t: Tensor | None, slot: Tensor, length: int, fill: float) -> Tensor | None:
    if t is None:
        return None
    t = t.expand(slot.shape[0], *t.shape[1:])
    base = t.new_full((t.shape[0], t.shape[1], length, *t.shape[3:]), fill)
    return base.scatter(2, _index(slot, t), t)


def drop_keys(key_mask: Tensor | None, *pairs: tuple[Tensor | None, float]) -> list[Tensor | None]:
    """Replace masked keys' entries of [B, H, M] or [B, H, M, *] tensors, so that not even NaN there is felt."""
    if key_mask is None:
        return [t for t, _ in pairs]
    out = []
    for t, fill in pairs:
        if t is not None:
            drop = ~key_mask[:, None]
            t = t.masked_fill(drop if t.dim() == 3 else drop[..., None], fill)
        out.append(t)
    return out


def chunked(t: Tensor, chunk: int, fill: float = 0.0) -> Tensor:
    """[B, H, L, *] to [B, H, ceil(L / chunk), chunk, *], filled up at the end."""
    pad = -t.shape[2] % chunk
    if pad:
        t = F.pad(t, (0, 0) * (t.dim() - 3) + (0, pad), value=fill)
    return t.unflatten(2, (-1, chunk))


def even_chunk(length: int, chunk: int) -> int:
    """Steps per chunk, at most ``chunk``, such that the last chunk is nearly full too: 65 steps are 2 x 33, not 64 + 1."""
    return -(-length // -(-length // chunk)) if length else 1


def power_chunk(length: int, chunk: int) -> int:
    """``chunk`` or its half, both powers of two, whichever fills up less (and no more than ``length`` needs)."""
    need = 1 << max(0, length - 1).bit_length()
    if need <= chunk:
        return need
    half = max(1, chunk // 2)
    return half if -(-length // half) * half < -(-length // chunk) * chunk else chunk


def slab_length(t: Tensor) -> int:
    """Steps of [B, H, L, D] that a scan takes at a time: temporaries of longer pieces leave the cache, and the allocator asks for new pages for them."""
    return max(2048, (1 << 20) // max(1, t.shape[0] * t.shape[1] * t.shape[3]))


def in_slabs(
    scan: Callable[..., tuple[Tensor | None, Any]], steps: list[Tensor | None], initial: Any, slab: int
) -> tuple[Tensor | None, Any]:
    """Outputs and last state of ``scan(*steps, initial)`` for tensors of steps along axis 2, ``slab`` steps after the other."""
    count = -(-steps[0].shape[2] // slab)
    outs = []
    for parts in zip(*([None] * count if t is None else t.split(slab, 2) for t in steps), strict=True):
        o, initial = scan(*parts, initial)
        outs.append(o)
    return (None if outs[0] is None else torch.cat(outs, 2)), initial
