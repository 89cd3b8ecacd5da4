"""FT-Transformer's training step beside rtdl_revisiting_models' at equal configuration: linear embeddings, ReGLU 4/3."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.bench.tasks import Contestants, training_step
from zoo.models import create_model

NUMERICAL, CARDINALITIES, BATCH = 6, [9, 16, 7, 15, 6, 5, 2, 42], 256
DIM, DEPTH, HEADS, DROPOUT = 64, 3, 4, 0.1


def contestants(attention: str) -> Contestants:
    """Adult's columns, batch 256, width 64, 3 blocks, 4 heads, dropouts 0.1."""
    from rtdl_revisiting_models import FTTransformer

    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(BATCH, NUMERICAL, generator=draw)
    codes = torch.stack([torch.randint(c, (BATCH,), generator=draw) for c in CARDINALITIES], 1)
    truth = torch.rand(BATCH, generator=draw).round()
    torch.manual_seed(0)
    mine = create_model(
        "ft_transformer",
        attention=attention,
        num_numerical=NUMERICAL,
        cardinalities=CARDINALITIES,
        dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        num_embedding="linear",
        unknown_rate=0.0,
        dropout=DROPOUT,
    )
    peer = FTTransformer(
        n_cont_features=NUMERICAL,
        cat_cardinalities=CARDINALITIES,
        d_out=1,
        n_blocks=DEPTH,
        d_block=DIM,
        attention_n_heads=HEADS,
        attention_dropout=DROPOUT,
        ffn_d_hidden=None,
        ffn_d_hidden_multiplier=4 / 3,
        ffn_dropout=DROPOUT,
        residual_dropout=0.0,
    )

    def loss(out: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(out[:, 0], truth)

    return {
        f"zoo ft_transformer ({attention})": training_step(mine, lambda: loss(mine(numbers, codes))),
        "rtdl_revisiting_models.FTTransformer": training_step(peer, lambda: loss(peer(numbers, codes))),
    }
