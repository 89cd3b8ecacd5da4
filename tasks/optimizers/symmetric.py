"""A dense symmetric matrix kept as its lower block rows, in plain lists that an optimiser's state can hold.

Quasi-Newton iterations on a few thousand numbers are bound by memory: every iteration multiplies the matrix and changes
it by rank two. Half the storage and one pass for both (change a block while it is in the cache, then multiply by it) take
a third of the traffic of two full passes, and half the bytes of a checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # a block of 64 x 5,000 doubles is 2.5 MB, about a core's second-level cache

Blocks = list[Tensor]


class Update(NamedTuple):
    """H <- scale * H + factors core factors^T, with factors [n, k] and a symmetric core [k, k]."""

    scale: float
    factors: Tensor
    core: Tensor


def scaled_identity(like: Tensor, scale: float) -> Blocks:
    """`scale` times the identity of the size of vector `like`: block b holds rows 64 b ... and the columns up to them."""
    blocks = []
    for start in range(0, len(like), ROWS):
        stop = min(start + ROWS, len(like))
        block = like.new_zeros(stop - start, stop)
        block[:, start:].fill_diagonal_(scale)
        blocks.append(block)
    return blocks


def multiply(blocks: Blocks, x: Tensor, update: Update | None = None) -> Tensor:
    """H x, after applying `update` to the blocks in place.

    Args:
        blocks: The matrix, changed in place where an update is given.
        x: Vector, [n].
        update: Change to make first.
    """
    y, start = torch.zeros_like(x), 0
    left = None if update is None else update.factors @ update.core
    for block in blocks:
        stop = start + len(block)
        if update is not None:
            torch.addmm(block, left[start:stop], update.factors[:stop].T, beta=update.scale, out=block)
        y[start:stop] += block @ x[:stop]
        y[:start] += x[start:stop] @ block[:, :start]
        start = stop
    return y
