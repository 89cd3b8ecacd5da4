"""Serving a recommender: padded histories, exact top-k over a large table in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ConfigError

BLOCK_ITEMS = 65_536


@torch.no_grad()
def blocked_top_k(
    users: Tensor,
    table: Tensor,
    bias: Tensor,
    k: int,
    *,
    excluded: Tensor | None = None,
    block_items: int = BLOCK_ITEMS,
) -> tuple[Tensor, Tensor]:
    """The k best items of each user, exactly, without all scores at once.

    Args:
        users: User vectors, [B, C].
        table: Item vectors, [I, C].
        bias: Item biases, [I].
        k: Length of the list, at most I.
        excluded: Items from 0 that must not appear, int64 [B, S], -1 = none.
        block_items: Items scored at a time.

    Returns:
        Scores and items from 0, [B, k] each, best first; equal scores go by item number. A user with fewer than k
        items left gets -inf at the end.
    """
    if not 1 <= k <= len(table):
        raise ConfigError(f"k={k} must lie between 1 and the {len(table)} items of the table")
    best_score = users.new_full((len(users), 0), float("-inf"))
    best_item = torch.zeros(len(users), 0, dtype=torch.long, device=users.device)
    for start in range(0, len(table), block_items):
        stop = min(start + block_items, len(table))
        scores = torch.addmm(bias[start:stop], users, table[start:stop].T)
        if excluded is not None and excluded.shape[1]:
            inside = (excluded >= start) & (excluded < stop)
            # A spare column takes what lies outside this block.
            scores = torch.cat((scores, scores.new_zeros(len(users), 1)), 1)
            scores.scatter_(1, torch.where(inside, excluded - start, stop - start), float("-inf"))
            scores = scores[:, :-1]
        item = torch.arange(start, stop, device=users.device).expand(len(users), -1)
        score = torch.cat((best_score, scores), 1)
        item = torch.cat((best_item, item), 1)
        # A stable sort keeps the smaller number first among equals; only the best k of a block can stay.
        order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
        best_score, best_item = score.gather(1, order), item.gather(1, order)
    return best_score, best_item


def pad_left(histories: list[list[int]], length: int) -> Tensor:
    """Item numbers, int64 [B, length]: the latest ones, zeros on the left."""
    rows = [[0] * (length - len(h[-length:])) + h[-length:] for h in histories]
    return torch.tensor(rows, dtype=torch.long)
