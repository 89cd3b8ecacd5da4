"""EoMT's training step beside transformers' EoMT at equal configuration, matched masks included."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks._mask_matching import MaskWeights, mask_set_losses
from zoo.bench.tasks import Contestants, training_step
from zoo.models import create_model

BATCH, SIDE, PATCH, CLASSES, OBJECTS = 16, 64, 8, 11, 4
DIM, DEPTH, JOINT, HEADS, QUERIES, POINTS = 64, 4, 2, 4, 20, 1024


def contestants(attention: str) -> Contestants:
    """64x64, patch 8, width 64, 4 blocks (2 with queries), 4 heads, 20 queries, 4 masks an image, 1,024 mask points."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=draw)
    target = torch.zeros(BATCH, SIDE, SIDE, dtype=torch.int64)
    labels = torch.stack([torch.randperm(CLASSES, generator=draw)[:OBJECTS] for _ in range(BATCH)])
    for k in range(OBJECTS):  # quarters of the image
        rows, columns = (slice(32 * i, 32 * i + 32) for i in divmod(k, 2))
        target[:, rows, columns] = labels[:, k, None, None]
    torch.manual_seed(0)
    mine = create_model(
        "segmenter",
        attention=attention,
        image_size=SIDE,
        num_classes=CLASSES,
        head="eomt",
        patch_size=PATCH,
        dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2.0,
        head_depth=JOINT,
        head_queries=QUERIES,
    )

    def loss() -> Tensor:
        terms = mask_set_losses(*mine.query_predictions(images), target, MaskWeights(), points=POINTS)
        return sum(terms.values())

    peer = _peer()
    masks = [(one == own[:, None, None]).float() for one, own in zip(target, labels, strict=True)]
    own_labels = list(labels)

    def peer_loss() -> Tensor:
        return peer(pixel_values=images, mask_labels=masks, class_labels=own_labels).loss

    return {
        f"zoo segmenter, eomt ({attention})": training_step(mine, loss),
        "transformers EoMT": training_step(peer, peer_loss),
    }


def _peer() -> torch.nn.Module:
    from transformers import EomtConfig, EomtForUniversalSegmentation

    config = EomtConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        mlp_ratio=2,
        num_blocks=JOINT,
        num_queries=QUERIES,
        num_labels=CLASSES,
        num_upscale_blocks=1,
        num_register_tokens=0,
        train_num_points=POINTS,
    )
    return EomtForUniversalSegmentation(config).train()
