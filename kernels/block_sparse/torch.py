"""Attention under a mask rule on PyTorch's own kernels: tiles of neighbouring queries against the keys that any of them sees.

Short inputs, dense rules and calls with a bias take the dense mask instead, where one large product is faster than many gathers.
"""

import torch
from torch import Tensor

from kernels.block_sparse.lists import dense_mask, key_lists
from kernels.block_sparse.masks import Mask
from kernels.softmax.torch import _explicit, _sdpa

TILE_ROWS = 64
DENSE_TOKENS = 512
DENSE_SHARE = 0.4


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    explicit: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns O [B, H, N, E] and the log-sum-exp [B, H, N], or None on the SDPA path."""
    n = q.shape[2]
    if key_mask is not None:
        drop = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
    if bias is None and n > DENSE_TOKENS:
        lists = key_lists(mask, TILE_ROWS, q.device)
        if lists.pairs < DENSE_SHARE * n * n:
            return _tiles(q, k, v, lists, key_mask, scale, explicit)
    visible = dense_mask(mask, q.device)[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    return (_explicit if explicit else _sdpa)(q, k, v, visible, bias, scale, 0.0)


def _tiles(q, k, v, lists, key_mask, scale, explicit):
    batch, heads, n, _ = q.shape
    group = heads // k.shape[1]
    outs, lses, places = [], [], []
    for tiles, keys, visible in lists.buckets:
        rows = lists.order[tiles]  # [R, rows]
        count = len(tiles)
        # Tiles become the batch and [B, H] the heads, so that one mask per tile serves every sample and head.
        part_q = q[:, :, rows].permute(2, 0, 1, 3, 4)  # [R, B, H, rows, D]
        part_k, part_v = (t[:, :, keys].permute(2, 0, 1, 3, 4) for t in (k, v))
        if group > 1:
            part_k, part_v = (t.repeat_interleave(group, 2) for t in (part_k, part_v))
        if key_mask is None:
            part_q, part_k, part_v = (t.flatten(1, 2) for t in (part_q, part_k, part_v))
            seen = visible[:, None]
        else:
            part_q, part_k, part_v = (t.flatten(0, 1) for t in (part_q, part_k, part_v))
            seen = (visible[:, None] & key_mask[:, keys].transpose(0, 1)[:, :, None]).flatten(0, 1)[:, None]
        out, lse = (_explicit if explicit else _sdpa)(part_q, part_k, part_v, seen, None, scale, 0.0)
        out = out.reshape(count, batch, heads, -1, v.shape[-1]).permute(1, 2, 0, 3, 4)
        outs.append(out.flatten(2, 3))
        places.append(
            (tiles[:, None] * rows.shape[1] + torch.arange(rows.shape[1], device=q.device)).flatten()
        )
        if lse is not None:
            lses.append(lse.reshape(count, batch, heads, -1).permute(1, 2, 0, 3).flatten(2))
    where = torch.cat(places).argsort()[lists.place]  # token -> its row in the concatenation
    out = torch.cat(outs, 2)[:, :, where]
    return out, torch.cat(lses, 2)[:, :, where] if lses else None
