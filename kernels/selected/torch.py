"""Scoring and selected-block attention in plain torch, in row blocks.

Two ways to attend: a mask over all keys handed to the softmax paths (matrix products at full speed, work N M), or the chosen blocks
gathered for each query (work N S block_size, bound by memory). The second pays once the keys outnumber the chosen ones many times.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.softmax.torch import _explicit, _sdpa

BLOCK_ELEMENTS = 1 << 24
# Gathering moves every chosen key once per query, about this many times the price of a masked product.
GATHER_PRICE = 12


def block_scores(q: Tensor, k_cmp: Tensor, stencil: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """[B, Hk, N, Nb] float32; see ``kernels.selected.block_scores``."""
    batch, heads, n, d = q.shape
    key_heads, blocks = k_cmp.shape[1], k_cmp.shape[2]
    group = heads // max(key_heads, 1)
    if blocks == 0 or n == 0:
        return q.new_zeros(batch, key_heads, n, stencil.shape[1], dtype=torch.float32)
    rows = max(1, min(n, BLOCK_ELEMENTS // max(1, batch * heads * blocks)))
    k_t = (scale * k_cmp.float()).mT.unsqueeze(2)  # [B, Hk, 1, D, Nc]
    out = []
    for start in range(0, n, rows):
        part = q[:, :, start : start + rows].float().unflatten(1, (key_heads, group))
        scores = part @ k_t  # [B, Hk, G, rows, Nc]
        if visible is not None:
            seen = visible[:, :, start : start + rows] if visible.shape[2] > 1 else visible
            scores = scores.masked_fill(~seen.unsqueeze(2), -torch.inf)
        p = scores.softmax(-1)
        if visible is not None:
            p = p.nan_to_num(0.0)
        out.append(p.sum(2) @ stencil)
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    block_size: int,
    *,
    key_mask: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    scale: float,
    explicit: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns O [B, H, N, E] and the log-sum-exp [B, H, N], or None on the SDPA path."""
    batch, heads, n, _ = q.shape
    key_heads, m = k.shape[1], k.shape[2]
    group = heads // max(key_heads, 1)
    if key_mask is not None:
        drop = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
    chosen = index.shape[-1] * block_size
    if 0 in (batch, heads, n, m) or index.shape[-1] == 0:
        empty = 0 * q.sum() + 0 * k.sum() + 0 * v.sum()
        return q.new_zeros(batch, heads, n, v.shape[-1]) + empty, q.new_full((batch, heads, n), -torch.inf)
    gather = chosen * GATHER_PRICE < m
    per_row = (
        heads * chosen * (k.shape[-1] + v.shape[-1]) if gather else (heads if explicit else key_heads) * m
    )
    rows = max(1, min(n, BLOCK_ELEMENTS // max(1, batch * per_row)))
    call = _gathered if gather else _masked
    outs, lses = [], []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        part = None if pos_q is None else pos_q[:, start:stop]
        args = (q[:, :, start:stop], k, v, index[:, :, start:stop], block_size, key_mask, part, pos_k, scale)
        if rows < n and torch.is_grad_enabled():
            out, lse = checkpoint(call, *args, group, explicit, use_reentrant=False)
        else:
            out, lse = call(*args, group, explicit)
        outs.append(out)
        lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, 2), None if lses[0] is None else torch.cat(lses, 2)


def _masked(q, k, v, index, block_size, key_mask, pos_q, pos_k, scale, group, explicit):
    batch, heads, n, d = q.shape
    key_heads, m = k.shape[1], k.shape[2]
    blocks = -(-m // block_size)
    # Column `blocks` swallows the -1 entries.
    taken = q.new_zeros(batch, key_heads, n, blocks + 1, dtype=torch.bool)
    taken.scatter_(3, index.where(index >= 0, blocks), True)
    visible = taken[..., :blocks].repeat_interleave(block_size, -1)[..., :m]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    if pos_q is not None:
        visible = visible & (pos_k[:, None, None] <= pos_q[:, None, :, None])
    # The group becomes the head axis, so that its heads share one mask.
    q = q.reshape(batch * key_heads, group, n, d)
    k, v = (t.reshape(batch * key_heads, 1, m, t.shape[-1]).expand(-1, group, -1, -1) for t in (k, v))
    out, lse = (_explicit if explicit else _sdpa)(q, k, v, visible.reshape(-1, 1, n, m), None, scale, 0.0)
    return out.reshape(batch, heads, n, -1), None if lse is None else lse.reshape(batch, heads, n)


def _gathered(q, k, v, index, block_size, key_mask, pos_q, pos_k, scale, group, explicit):
    batch, heads, n, d = q.shape
    key_heads, m = k.shape[1], k.shape[2]
    keys = index.clamp(min=0)[..., None] * block_size + torch.arange(block_size, device=q.device)
    visible = ((index >= 0)[..., None] & (keys < m)).flatten(3)  # [B, Hk, N, S * block_size]
    keys = keys.clamp(max=m - 1).flatten(3)
    rows = torch.arange(batch, device=q.device)[:, None, None, None]
    if key_mask is not None:
        visible = visible & key_mask[rows, keys]
    if pos_q is not None:
        at = pos_k.expand(batch, -1)[rows, keys]
        visible = visible & (at <= pos_q[:, None, :, None])
    hk = torch.arange(key_heads, device=q.device)[None, :, None, None]
    taken_k, taken_v = (t[rows, hk, keys].flatten(0, 2)[:, None] for t in (k, v))  # [B*Hk*N, 1, S*block, D]
    part = q.reshape(batch, key_heads, group, n, d).transpose(2, 3).reshape(-1, 1, group, d)
    out, lse = _explicit(part, taken_k, taken_v, visible.reshape(-1, 1, 1, keys.shape[-1]), None, scale, 0.0)
    back = lambda t, *tail: (
        t.reshape(batch, key_heads, n, group, *tail).transpose(2, 3).reshape(batch, heads, n, *tail)
    )  # noqa: E731
    return back(out, v.shape[-1]), back(lse)
