"""From a mask rule to lists of tiles (for kernels) and of keys per query tile (for the torch path). Built once per rule."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.block_sparse.masks import Mask

CHUNK_ELEMENTS = 1 << 23


class BlockLists(NamedTuple):
    """Tiles that hold a visible pair, in CSR form: key tiles of query tile t are ``col[row_ptr[t]:row_ptr[t + 1]]``, ascending.

    ``full`` marks tiles without a hidden pair. ``t_row_ptr``, ``t_col`` list the query tiles of each key tile; ``t_at`` says where in ``col``
    such a pair stands. ``order`` says which token stands in each place of a tile.
    """

    row_ptr: Tensor
    col: Tensor
    full: Tensor
    t_row_ptr: Tensor
    t_col: Tensor
    t_at: Tensor
    order: Tensor


class Bucket(NamedTuple):
    """Query tiles with key lists of one padded length: tile numbers [R], keys [R, L], visible pairs bool [R, rows, L]."""

    tiles: Tensor
    keys: Tensor
    visible: Tensor


class KeyLists(NamedTuple):
    """``order`` [tiles, rows] holds the query of each place (padding repeats the last); ``place`` [N] is its inverse."""

    order: Tensor
    place: Tensor
    buckets: tuple[Bucket, ...]
    pairs: int


def tile_order(mask: Mask, rows: int) -> Tensor:
    """Token numbers sorted so that ``rows`` consecutive ones are near each other: square tiles on a grid, else as they come."""
    tokens = torch.arange(mask.tokens)
    shape, prefix = getattr(mask, "shape", ()), getattr(mask, "prefix", 0)
    if len(shape) < 2:
        return tokens
    side = max(1, round(rows ** (1 / len(shape))))
    place, tile = (tokens - prefix).clamp(min=0), torch.zeros_like(tokens)
    factor = 1
    for size in reversed(shape):
        tile = tile + (place % size).div(side, rounding_mode="floor") * factor
        factor *= math.ceil(size / side)
        place = place.div(size, rounding_mode="floor")
    tile[:prefix] = -1
    return tile.sort(stable=True).indices


@lru_cache(maxsize=64)
def block_lists(mask: Mask, block_q: int, block_k: int, device: torch.device, near: int = 0) -> BlockLists:
    """Tiles of consecutive tokens, or of ``tile_order(mask, near)``; the last tile of either side may be short (its missing pairs do not make it partial)."""
    n = mask.tokens
    tiles_k = math.ceil(n / block_k)
    j = tile_order(mask, near) if near else torch.arange(n)
    rows, cols, fulls = [], [], []
    for i in j.split(block_q):
        seen = mask.visible(i[:, None], j[None]).expand(len(i), n)
        padded = lambda fill, s=seen: torch.nn.functional.pad(s, (0, tiles_k * block_k - n), value=fill)  # noqa: E731
        some = padded(False).unflatten(1, (tiles_k, block_k)).any(-1).any(0)
        whole = padded(True).unflatten(1, (tiles_k, block_k)).all(-1).all(0)
        found = some.nonzero().flatten()
        rows.append(len(found))
        cols.append(found)
        fulls.append(whole[found])
    row_ptr = torch.tensor([0, *rows]).cumsum(0)
    col, full = torch.cat(cols), torch.cat(fulls)
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    at = col.sort(stable=True).indices
    t_ptr = torch.nn.functional.pad(torch.bincount(col, minlength=tiles_k).cumsum(0), (1, 0))
    return BlockLists(
        *(t.to(device=device, dtype=torch.int32) for t in (row_ptr, col)), full.to(device),
        *(t.to(device=device, dtype=torch.int32) for t in (t_ptr, owner[at], at, j)),
    )  # fmt: skip


@lru_cache(maxsize=64)
def dense_mask(mask: Mask, device: torch.device) -> Tensor:
    """bool [N, N]."""
    token = torch.arange(mask.tokens, device=device)
    return mask.visible(token[:, None], token[None]).expand(mask.tokens, mask.tokens).contiguous()


@lru_cache(maxsize=64)
def key_lists(mask: Mask, rows: int, device: torch.device) -> KeyLists:
    """For each tile of ``rows`` queries the keys that any of them sees; tiles with lists of similar length share a bucket."""
    n = mask.tokens
    order = tile_order(mask, rows)
    tiles = math.ceil(n / rows)
    order = torch.cat((order, order[-1:].expand(tiles * rows - n))).view(tiles, rows)
    j = torch.arange(n)
    lists, seen_of = [], []
    step = max(1, CHUNK_ELEMENTS // (rows * n))
    for start in range(0, tiles, step):
        seen = mask.visible(order[start : start + step, :, None], j).expand(-1, rows, n)
        for s in seen:
            keys = s.any(0).nonzero().flatten()
            lists.append(keys)
            seen_of.append(s[:, keys])
    # Short lists first; a bucket is closed when its longest list would exceed its shortest by a quarter.
    by_length = sorted(range(tiles), key=lambda t: len(lists[t]))
    groups: list[list[int]] = []
    for t in by_length:
        if not groups or len(lists[t]) > 1.25 * len(lists[groups[-1][0]]) + 8:
            groups.append([])
        groups[-1].append(t)
    buckets = []
    for group in groups:
        length = max(1, len(lists[group[-1]]))
        keys = torch.zeros(len(group), length, dtype=torch.long)
        visible = torch.zeros(len(group), rows, length, dtype=torch.bool)
        for r, t in enumerate(group):
            keys[r, : len(lists[t])] = lists[t]
            visible[r, :, : len(lists[t])] = seen_of[t]
        buckets.append(Bucket(torch.tensor(group).to(device), keys.to(device), visible.to(device)))
    place = torch.empty(n, dtype=torch.long)
    place[order.flatten()[:n]] = torch.arange(n)
    return KeyLists(
        order.to(device), place.to(device), tuple(buckets), sum(rows * b.keys.numel() for b in buckets)
    )
