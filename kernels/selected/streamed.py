"""Selected-block attention in plain torch by blocks of keys: work and memory linear in queries and chosen blocks.

The pairs of a query and a block that it chose are sorted by block and cut into tiles of pairs that share one, so that every product is one of
matrices. A tile's outputs, in units of their own row maxima, go to the pair's place (its query, and the number among that one's blocks), where the
pairs of a query are joined. The gradients take the same tiles. One sample and key head at a time.

G query heads of a key head, N queries, M keys, S chosen blocks of L keys, R pairs of a tile, T tiles at a time, D, E head sizes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common.checks import work_dtype

# Pairs of a tile, and rows (pairs times heads of the group) at a time: what belongs to them stays in a core's cache.
PAIRS, ROWS = 64, 2048


class Tiles(NamedTuple):
    """Some tiles of one sample and key head.

    Attributes:
        block: Whose keys they meet, [T].
        query: Of each pair, [T R]; N for padding.
        seen: Which keys the pairs see, broadcastable to bool [T, R, 1, L]; None for all.
        at: Their rows among all pairs in this order.
    """

    block: Tensor
    query: Tensor
    seen: Tensor | None
    at: slice


class Head(NamedTuple):
    """One sample and key head: q [N + 1, G, D] (zeros last), k [blocks, L, D], v [blocks, L, E], index [N, S]; kept bool [blocks, L] and positions
    [N + 1] and [blocks, L], or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    kept: Tensor | None
    pos_q: Tensor | None
    pos_k: Tensor | None

    def order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks of all tiles, the queries of their pairs, and where each pair [N, S] stands among these (at the end if it has no block)."""
        (queries, chosen), blocks, device = self.index.shape, self.k.shape[0], self.index.device
        flat = self.index.flatten()
        order = flat.argsort(stable=True)  # the -1 entries come first
        counts = torch.bincount(flat[flat >= 0], minlength=blocks)
        missing = flat.numel() - counts.sum()
        each = (counts + PAIRS - 1) // PAIRS
        block = torch.arange(blocks, device=device).repeat_interleave(each)
        # Of the sorted pairs, the n-th of a block stands n places behind that block's first tile.
        ahead = (each.cumsum(0) - each) * PAIRS - (counts.cumsum(0) - counts)
        pairs = order[missing:]
        at = torch.arange(pairs.numel(), device=device) + ahead[flat[pairs]]
        query = at.new_full((block.numel() * PAIRS,), queries).index_put((at,), pairs // chosen)
        place = at.new_full((flat.numel(),), query.numel()).index_put((pairs,), at)
        return block, query, place

    def tiles(self, block: Tensor, query: Tensor) -> Iterator[Tiles]:
        step = max(1, ROWS // (PAIRS * self.q.shape[1]))
        for start in range(0, block.numel(), step):
            mine = block[start : start + step]
            at = slice(start * PAIRS, (start + mine.numel()) * PAIRS)
            seen = None if self.kept is None else self.kept[mine][:, None]
            if self.pos_q is not None:
                place = self.pos_q[query[at]].unflatten(0, (-1, PAIRS))
                near = self.pos_k[mine][:, None] <= place[:, :, None]
                seen = near if seen is None else seen & near
            yield Tiles(mine, query[at], None if seen is None else seen[:, :, None], at)

    def scores(self, t: Tiles, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [T, R, G, L], -inf where not seen, and the rows [T, R G, D] and keys [T, L, D] that they come from."""
        rows, keys = _rows(self.q, t.query), self.k.index_select(0, t.block)
        s = torch.bmm(rows, keys.mT).mul_(scale).unflatten(1, (PAIRS, self.q.shape[1]))
        return s if t.seen is None else s.masked_fill_(~t.seen, -torch.inf), rows, keys


def _rows(t: Tensor, query: Tensor) -> Tensor:
    """[N + 1, G, W] to the rows of tiles, [T, R G, W]."""
    return t.index_select(0, query).reshape(-1, PAIRS * t.shape[1], t.shape[2])


def _heads(q, k, v, index, key_mask, pos_q, pos_k, block_size: int, causal: bool) -> Iterator[tuple]:
    """Sample, query heads, key head, and what belongs to them."""
    (batch, heads, n), m, key_heads = q.shape[:3], k.shape[2], k.shape[1]
    group, blocks = heads // key_heads, -(-m // block_size)
    if causal and pos_q is None:
        pos_q, pos_k = (torch.arange(length, device=q.device)[None] for length in (n, m))
        pos_q = pos_q + (m - n)

    def cut(t: Tensor) -> Tensor:
        """Keys [M] or [M, *] to [blocks, L, *]."""
        return F.pad(t, (0, 0) * (t.dim() - 1) + (0, blocks * block_size - m)).unflatten(
            0, (blocks, block_size)
        )

    for b in range(batch):
        kept = None
        if key_mask is not None or m % block_size:
            kept = cut(torch.ones(m, dtype=torch.bool, device=q.device) if key_mask is None else key_mask[b])
        places = (None, None)
        if causal:
            places = F.pad(pos_q.expand(batch, -1)[b], (0, 1)), cut(pos_k.expand(batch, -1)[b])
        for h in range(key_heads):
            mine = slice(h * group, (h + 1) * group)
            keys, values = (cut(t[b, h].to(work_dtype(t.dtype))) for t in (k, v))
            yield b, mine, h, Head(_turned(q[b, mine]), keys, values, index[b, h], kept, *places)


def _turned(t: Tensor) -> Tensor:
    """[G, N, W] to [N + 1, G, W] in the working precision, zeros for padding."""
    return F.pad(t.transpose(0, 1).to(work_dtype(t.dtype)), (0, 0, 0, 0, 0, 1))


class _Places:
    """Memory for results of all pairs [rows, G, W], used again by every head."""

    def __init__(self, index: Tensor, blocks: int, group: int, *widths: int, like: Tensor) -> None:
        rows = (index.shape[2] * index.shape[3] // PAIRS + blocks) * PAIRS
        self.all = [like.new_empty(rows + 1, group, w, dtype=work_dtype(like.dtype)) for w in widths]

    def gather(self, number: int, place: Tensor, used: int, missing: float) -> Tensor:
        """[N S, G, W]: from the places of the pairs; ``missing`` for those without a block."""
        memory = self.all[number][: used + 1]
        memory[used] = missing
        return memory.index_select(0, place)


def fwd(q, k, v, index, key_mask, pos_q, pos_k, block_size, causal, scale) -> tuple[Tensor, Tensor]:
    """Arguments and results as in ``ops.selected_fwd``."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf, dtype=work_dtype(q.dtype), device=q.device)
    if 0 in (*out.shape, k.shape[2], index.shape[3]):
        return out, lse
    group, e = q.shape[1] // k.shape[1], v.shape[3]
    memory = _Places(index, -(-k.shape[2] // block_size), group, e, 1, 1, like=q)
    parts, top, total = memory.all
    for b, mine, _, head in _heads(q, k, v, index, key_mask, pos_q, pos_k, block_size, causal):
        block, query, place = head.order()
        for t in head.tiles(block, query):
            s, _, _ = head.scores(t, scale)
            high = s.amax(-1, keepdim=True)
            p = s.sub_(high.masked_fill(high == -torch.inf, 0.0)).exp_()
            top[t.at], total[t.at] = high.flatten(0, 1), p.sum(-1, keepdim=True).flatten(0, 1)
            parts[t.at] = torch.bmm(p.flatten(1, 2), head.v.index_select(0, t.block)).view(-1, group, e)
        joined = [
            memory.gather(i, place, query.numel(), missing).unflatten(0, head.index.shape)
            for i, missing in enumerate((0.0, -torch.inf, 0.0))
        ]
        peak = joined[1].amax(1, keepdim=True)
        weight = (joined[1] - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
        mass = (weight * joined[2]).sum(1)  # [N, G, 1]
        mixed = torch.einsum("nsge,nsg->gne", joined[0], weight.squeeze(-1))
        out[b, mine] = (mixed / mass.masked_fill(mass == 0, 1.0).transpose(0, 1)).to(out.dtype)
        lse[b, mine] = (peak[:, 0] + mass.log()).squeeze(-1).T
    return out, lse


def bwd(
    q, k, v, index, key_mask, pos_q, pos_k, block_size, causal, scale, lse, do, delta
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``ops.selected_bwd``."""
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if 0 in (*q.shape, k.shape[2], index.shape[3]):
        return dq, dk, dv
    m, group, d = k.shape[2], q.shape[1] // k.shape[1], q.shape[3]
    memory = _Places(index, -(-m // block_size), group, d, like=q)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # such rows see nothing
    for b, mine, h, head in _heads(q, k, v, index, key_mask, pos_q, pos_k, block_size, causal):
        upstream, rest = _turned(do[b, mine]), _turned(torch.stack((lse[b, mine], delta[b, mine]), -1))
        dkeys, dvalues = torch.zeros_like(head.k), torch.zeros_like(head.v)
        block, query, place = head.order()
        for t in head.tiles(block, query):
            s, rows, keys = head.scores(t, scale)
            up, (row_lse, row_delta) = _rows(upstream, t.query), _rows(rest, t.query).split(1, -1)
            p = s.flatten(1, 2).sub_(row_lse).exp_()
            dp = torch.bmm(up, head.v.index_select(0, t.block).mT)
            dvalues.index_add_(0, t.block, torch.bmm(p.mT, up))
            ds = dp.sub_(row_delta).mul_(p).mul_(scale)
            dkeys.index_add_(0, t.block, torch.bmm(ds.mT, rows))
            memory.all[0][t.at] = torch.bmm(ds, keys).view(-1, group, d)
        pairs = memory.gather(0, place, query.numel(), 0.0).unflatten(0, head.index.shape)
        dq[b, mine] = pairs.sum(1).transpose(0, 1).to(dq.dtype)
        dk[b, h], dv[b, h] = (g.flatten(0, 1)[:m].to(dk.dtype) for g in (dkeys, dvalues))
    return dq, dk, dv
