"""DETR's training step beside transformers' DETR at equal configuration, matching and loss included."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks._detection_losses import detection_losses
from tasks._matching import Weights
from zoo.bench.tasks import Contestants, training_step
from zoo.layers.boxes import to_cxcywh
from zoo.models import create_model

BATCH, SIDE, CLASSES, OBJECTS = 16, 64, 10, 3
DIM, DEPTH, HEADS, FFN, QUERIES = 64, 3, 4, 128, 20


def scenes() -> tuple[Tensor, Tensor, Tensor]:
    """Random images, class numbers [B, 3] and boxes cxcywh [B, 3, 4]."""
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(BATCH, OBJECTS, 2, generator=draw) * 0.6
    size = torch.rand(BATCH, OBJECTS, 2, generator=draw) * 0.3 + 0.1
    boxes = to_cxcywh(torch.cat((corner, corner + size), -1))
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=draw)
    return images, torch.randint(CLASSES, (BATCH, OBJECTS), generator=draw), boxes


def contestants(attention: str) -> Contestants:
    """64x64, 3 objects, 20 queries, width 64, 3 + 3 layers, 4 heads, FFN 128, stride 8, losses on every layer."""
    images, labels, boxes = scenes()
    torch.manual_seed(0)
    mine = create_model(
        "detr",
        attention=attention,
        image_size=SIDE,
        num_classes=CLASSES,
        dim=DIM,
        encoder_depth=DEPTH,
        decoder_depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=FFN / DIM,
        queries=QUERIES,
    )
    weights = Weights(classes=1.0, l1=5.0, giou=2.0)

    def loss() -> Tensor:
        return sum(detection_losses(mine(images), labels, boxes, weights, kind="softmax").values())

    peer = _peer()
    targets = [{"class_labels": n, "boxes": b} for n, b in zip(labels, boxes, strict=True)]
    return {
        f"zoo detr ({attention})": training_step(mine, loss),
        "transformers DETR": training_step(peer, lambda: peer(pixel_values=images, labels=targets).loss),
    }


def _peer() -> torch.nn.Module:
    """transformers' DETR on a small ResNet, every parameter trained (it freezes the first stage of a loaded one)."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        backbone_config=backbone,
        d_model=DIM,
        encoder_layers=DEPTH,
        decoder_layers=DEPTH,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        num_queries=QUERIES,
        num_labels=CLASSES,
        dropout=0.0,
        auxiliary_loss=True,
    )
    return DetrForObjectDetection(config).requires_grad_(True).train()
