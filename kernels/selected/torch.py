"""Scoring and selected-block attention in plain torch, in row blocks.

Three ways to attend: a mask over all keys handed to the softmax paths (work N M), the pairs of queries and chosen blocks sorted by block
(``streamed.py``, work N S block_size), or, where derivatives of higher order or forward mode are wanted, the chosen blocks gathered for each query
(the same work, bound by memory). The mask pays while the keys do not outnumber the chosen ones much.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels._common.choice import in_forward_mode
from kernels.selected import ops
from kernels.softmax.torch import _explicit, _sdpa

BLOCK_ELEMENTS = 1 << 24
# Scores at a time where they are only passed through: what stays in a core's cache.
CACHE_ELEMENTS = 1 << 19
# Price of a chosen key beside that of a key under a mask.
STREAM_PRICE, GATHER_PRICE = 4, 12


def block_scores(q: Tensor, k_cmp: Tensor, stencil: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """[B, Hk, N, Nb] float32; see ``kernels.selected.block_scores``."""
    batch, heads, n, d = q.shape
    key_heads, blocks = k_cmp.shape[1], k_cmp.shape[2]
    group = heads // max(key_heads, 1)
    if blocks == 0 or n == 0:
        return q.new_zeros(batch, key_heads, n, stencil.shape[1], dtype=torch.float32)
    rows = max(1, min(n, CACHE_ELEMENTS // max(1, batch * heads * blocks)))
    k_t = (scale * k_cmp.float()).mT.unsqueeze(2)  # [B, Hk, 1, D, Nc]
    through = _stencil_product(stencil)
    out = q.new_empty(batch, key_heads, n, stencil.shape[1], dtype=torch.float32)
    for start in range(0, n, rows):
        part = q[:, :, start : start + rows].float().unflatten(1, (key_heads, group))
        scores = part @ k_t  # [B, Hk, G, rows, Nc]
        if visible is not None:
            seen = visible[:, :, start : start + rows] if visible.shape[2] > 1 else visible
            scores = scores.masked_fill(~seen.unsqueeze(2), -torch.inf)
        p = scores.softmax(-1)
        if visible is not None:
            p = p.nan_to_num(0.0)
        out[:, :, start : start + rows] = through(p.squeeze(2) if group == 1 else p.sum(2))
    return out


def _stencil_product(stencil: Tensor) -> Callable[[Tensor], Tensor]:
    """``p -> p @ stencil``; a selection block overlaps few of many compressed ones."""
    if not torch.compiler.is_compiling() and stencil.numel():
        if torch.equal(stencil, torch.eye(len(stencil), device=stencil.device)):
            return lambda p: p
        overlaps = int((stencil != 0).sum(0).max())
        if 16 * overlaps < stencil.shape[0]:
            weight, at = stencil.topk(overlaps, dim=0)
            return lambda p: sum(p.index_select(-1, i) * w for w, i in zip(weight, at, strict=True))
    return lambda p: p @ stencil


def top(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best entries of each row, lowest first among equals, ascending; -1 for missing ones, -inf is never taken."""
    blocks = scores.shape[-1]
    count = min(count, blocks)
    if scores.numel() == 0:
        return scores.new_empty(*scores.shape[:-1], count, dtype=torch.int64)
    flat = scores.reshape(-1, blocks)
    out = [_top_rows(part, count) for part in flat.split(max(1, CACHE_ELEMENTS // max(1, blocks)))]
    return torch.cat(out).reshape(*scores.shape[:-1], count)


def _top_rows(scores: Tensor, count: int) -> Tensor:
    blocks = scores.shape[-1]
    best = None
    if scores.numel() and not torch.compiler.is_compiling():
        best, index = scores.topk(min(count + 1, blocks))
        # Which of several equal scores topk takes is not defined.
        last, next_one = best[:, count - 1], best[:, -1]
        if count < blocks and ((last == next_one) & (last > -torch.inf)).any():
            best = None
    if best is None:
        best, index = scores.sort(dim=-1, descending=True, stable=True)
    best, index = best[:, :count], index[:, :count]
    index = index.masked_fill(best == -torch.inf, blocks).sort(-1).values
    return index.masked_fill(index == blocks, -1)


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
    want_lse: bool,
    higher_order: bool,
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
    recorded = higher_order or in_forward_mode() or torch.compiler.is_exporting()
    if not recorded and chosen * STREAM_PRICE < m:
        places = (pos_q, pos_k) if pos_q is not None else (None, None)
        return ops.selected_fwd(
            q, k, v, index, key_mask, *places, block_size, pos_q is not None, scale, "torch"
        )
    explicit = higher_order or want_lse or q.dtype == torch.float64
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
