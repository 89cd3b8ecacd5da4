"""SASRec's training step beside the same network written with torch's own modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.bench.tasks import Contestants, training_step
from zoo.layers.item_losses import full_softmax_loss
from zoo.models import create_model

ITEMS, LENGTH, BATCH, DIM, HEADS, DEPTH, DROPOUT = 1682, 50, 128, 64, 2, 2, 0.2


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(
            nn.Linear(DIM, 4 * DIM),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(4 * DIM, DIM),
            nn.Dropout(DROPOUT),
        )
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return x + self.mlp(self.norm2(x))


class PlainSasRec(nn.Module):
    """Item and place embedding, pre-norm blocks with a causal and a padding mask, tied output table."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(ITEMS + 1, DIM, padding_idx=0), nn.Embedding(LENGTH, DIM)
        self.bias, self.drop = nn.Parameter(torch.zeros(ITEMS)), nn.Dropout(DROPOUT)
        self.blocks, self.norm = nn.ModuleList(_Block() for _ in range(DEPTH)), nn.LayerNorm(DIM)

    def loss(self, items: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy over all items at every real position."""
        allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (items > 0)[:, None, None]
        allowed = allowed | torch.eye(LENGTH, dtype=torch.bool)  # padded rows see themselves: no NaN
        x = self.drop(self.items(items) + self.places.weight)
        for block in self.blocks:
            x = block(x, allowed)
        asked = targets > 0
        logits = F.linear(self.norm(x)[asked], self.items.weight[1:], self.bias)
        return F.cross_entropy(logits, targets[asked] - 1)


def windows() -> tuple[Tensor, Tensor]:
    """Random items in windows of random length, padded on the left; the next item as target."""
    draw = torch.Generator().manual_seed(0)
    items = torch.randint(1, ITEMS + 1, (BATCH, LENGTH + 1), generator=draw)
    length = torch.randint(5, 2 * LENGTH, (BATCH, 1), generator=draw).clamp_max(LENGTH)
    items[:, :-1][torch.arange(LENGTH) < LENGTH - length] = 0
    targets = items[:, 1:].clone()
    targets[items[:, :-1] == 0] = 0
    return items[:, :-1].contiguous(), targets


def contestants(attention: str) -> Contestants:
    """MovieLens-100K's catalogue, 50 items, width 64, 2 blocks, 2 heads, dropout 0.2, full softmax, batch 128."""
    torch.manual_seed(0)
    items, targets = windows()
    shape = {"num_items": ITEMS, "max_length": LENGTH, "dim": DIM, "num_heads": HEADS, "depth": DEPTH}
    mine = create_model("sasrec", attention=attention, dropout=DROPOUT, **shape)
    peer = PlainSasRec()

    def loss() -> Tensor:
        asked = targets > 0
        return full_softmax_loss(mine(items)[asked], *mine.item_table(), targets[asked] - 1)

    return {
        f"zoo sasrec ({attention})": training_step(mine, loss),
        "plain torch SASRec": training_step(peer, lambda: peer.loss(items, targets)),
    }
