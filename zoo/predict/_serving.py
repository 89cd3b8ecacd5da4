"""Serving a recommender: exact top-k over a large table in blocks, user states, export of its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


class UserState:
    """A user whose vector follows one event at a time; equals computing it from the whole history.

    Models with a step form keep the variant's state (constant size for recurrent variants), others the last items.

    Args:
        model: A sequence recommender in evaluation mode.
        history: Item numbers from 1, oldest first.
    """

    def __init__(self, model: nn.Module, history: list[int] | None = None) -> None:
        self.model = model
        self.history: list[int] = []
        self.vector: Tensor | None = None
        self.state: Any = None
        streams = hasattr(model, "step") and model.position != "recency"
        blocks = getattr(model, "blocks", [])
        if streams and all(block.attn.capabilities.streaming for block in blocks):
            self.state = model.init_state(1)
        for item in history or []:
            self.update(item)

    @property
    def incremental(self) -> bool:
        """Whether an event costs one step instead of a pass over the history."""
        return self.state is not None

    @torch.no_grad()
    def update(self, item: int) -> Tensor:
        """One event, item number from 1; returns the user's vector [1, C]."""
        self.history = [*self.history, item][-self.model.max_length :]
        if self.incremental:
            self.vector, self.state = self.model.step(torch.tensor([item]), self.state)
        else:
            self.vector = self.model.user_vector(pad_left([self.history], self.model.max_length))
        return self.vector


def pad_left(histories: list[list[int]], length: int) -> Tensor:
    """Item numbers, int64 [B, length]: the latest ones, zeros on the left."""
    rows = [[0] * (length - len(h[-length:])) + h[-length:] for h in histories]
    return torch.tensor(rows, dtype=torch.long)


class _UserEncoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor, times: Tensor) -> Tensor:
        return self.model.user_vector(items, times)


def export_recommender(
    model: nn.Module, card: dict[str, Any], folder: Path, *, batch_size: int = 1
) -> dict[str, Path]:
    """Write what a server needs: `user_encoder.pt2`, `items.safetensors` (table, bias) and `catalogue.json`.

    The encoder takes `items` int64 [B, L] and `times` float32 [B, L] and gives [B, C], with B the `batch_size`: the
    blocks that attention is cut into depend on it.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    table, bias = model.item_table()
    paths = {n: folder / n for n in ("user_encoder.pt2", "items.safetensors", "catalogue.json")}
    items = pad_left([[1]] * batch_size, model.max_length)
    program = torch.export.export(_UserEncoder(model.eval()), (items, torch.zeros(items.shape)))
    torch.export.save(program, paths["user_encoder.pt2"])
    parts = {"table": table.detach().contiguous().clone(), "bias": bias.detach().clone()}
    save_file(parts, paths["items.safetensors"])
    paths["catalogue.json"].write_text(json.dumps(card["preprocessing"]))
    return paths
