"""DETR: a fixed set of learned queries is decoded in parallel into boxes.

Paper: "End-to-end object detection with transformers", arXiv:2005.12872. Official code: facebookresearch/detr,
Apache-2.0. Kept from it: post-norm layers, sine positions added to queries and keys but not values, positions counted
over the unpadded image, a no-object class, boxes as sigmoids, auxiliary losses on every decoder layer.
Differs from it in: a convolutional stem instead of ResNet-50, small sizes; dropout 0 by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.backbones import make_backbone
from zoo.layers.detr_blocks import BoxHead, QueryBlock
from zoo.layers.mlp import Mlp
from zoo.layers.patch import as_pair
from zoo.layers.position import sine_positions
from zoo.layers.pyramid import tokens_of, valid_pixels
from zoo.models.registry import register_model


class _EncoderLayer(nn.Module):
    """Post-norm self-attention with positions in queries and keys only, and an MLP."""

    def __init__(
        self,
        attention: AttentionFactory,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        grid: Grid,
    ) -> None:
        super().__init__()
        self.attn = attention(dim, num_heads, value_dim=dim, length=grid.tokens, grid=grid, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation="relu", dropout=dropout)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, key_mask: Tensor | None, grid: Grid) -> Tensor:
        x = self.norm1(x + self.attn(x + positions, None, x, key_mask=key_mask, grid=grid))
        return self.norm2(x + self.mlp(x))


@register_model
class Detr(nn.Module):
    """Stem, encoder, decoder; class scores with a no-object class.

    Args:
        attention: Factories for slots "encoder" (with encoder layers), "decoder" and "cross".
        image_size: Side in pixels, or (height, width), of the batches.
        in_channels: Channels of the image.
        num_classes: Number of object classes.
        padded: Images may be smaller than the batch; attention then gets key masks.
        backbone: timm's name of a model whose maps replace the stem; None for the stem.
        stem_width: Channels of the stem's first stage; they double up to `dim`.
        stride: Pixels per token along each axis, a power of two from 2 on.
        dim: Width C, divisible by 4.
        encoder_depth: Encoder layers, >= 0.
        decoder_depth: Decoder layers.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLPs over `dim`.
        queries: Number of queries.
        dropout: Dropout after projections and inside MLPs.
    """

    name: ClassVar[str]
    softmax_classes = True
    box_form = "sigmoid"

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        image_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        num_classes: int = 10,
        padded: bool = False,
        backbone: str | None = None,
        stem_width: int = 24,
        stride: int = 8,
        dim: int = 96,
        encoder_depth: int = 2,
        decoder_depth: int = 3,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        queries: int = 12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ConfigError(f"dim={dim} must be divisible by 4 and by num_heads={num_heads}")
        if queries < 1 or decoder_depth < 1:
            raise ConfigError(f"queries={queries} and decoder_depth={decoder_depth} must be at least 1")
        height, width = as_pair(image_size)
        self.grid = Grid((-(-height // stride), -(-width // stride)))
        self.num_classes, self.in_channels, self.stride, self.dim = num_classes, in_channels, stride, dim
        self.padded = padded
        self.stem = make_backbone(
            backbone,
            in_channels,
            dim,
            stride=stride,
            stem_width=stem_width,
            image_size=image_size,
        )
        self.encoder = nn.ModuleList(
            _EncoderLayer(attention["encoder"], dim, num_heads, mlp_ratio, dropout, self.grid)
            for _ in range(encoder_depth)
        )
        self.decoder = nn.ModuleList(
            QueryBlock(
                attention["decoder"],
                attention["cross"],
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                norm="post",
                dropout=dropout,
                activation="relu",
                queries=queries,
                grid=self.grid,
            )
            for _ in range(decoder_depth)
        )
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, num_classes + 1)
        self.regress = BoxHead(dim)
        self.reset_parameters()

    @classmethod
    def slots(cls, *, encoder_depth: int = 2, padded: bool = False, **options: Any) -> dict[str, Slot]:
        """Encoder over the grid; queries are a set; no bias anywhere."""
        slots = {
            "decoder": Slot(Pattern.SELF, ordered=False, length_known=True),
            "cross": Slot(Pattern.CROSS, key_mask=padded, ordered=False, grid_dims=2, length_known=True),
        }
        if encoder_depth:
            slots = {"encoder": Slot(Pattern.SELF, key_mask=padded, grid_dims=2, length_known=True), **slots}
        return slots

    def reset_parameters(self) -> None:
        """Xavier for projections; variants and backbones keep what they gave theirs."""
        own = [self.stem, *(m for m in self.modules() if isinstance(m, Attention))]
        foreign = {id(layer) for module in own for layer in module.modules()}
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and id(layer) not in foreign:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.queries)

    def forward(self, images: Tensor, size: Tensor | None = None) -> dict[str, Tensor]:
        """Detect.

        Args:
            images: [B, channels, height, width].
            size: Height and width of each image without padding, [B, 2]; the whole picture when left out.

        Returns:
            "logits" [L, B, N, K + 1], the last class meaning no object, and "boxes" [L, B, N, 4] of every decoder
            layer, cxcywh relative to the unpadded image.
        """
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ConfigError(
                f"images must be [B, {self.in_channels}, height, width], got {list(images.shape)}; in_channels sets "
                "the channels"
            )
        height, width = images.shape[-2:]
        if size is None:
            size = torch.tensor((height, width), device=images.device).expand(images.shape[0], 2)
        valid = valid_pixels(size, height, width) if self.padded else None
        last = self.stem(images, valid)[-1]
        grid = Grid(tuple(last.shape[-2:]))
        key_mask = None if valid is None else valid[:, :: self.stride, :: self.stride].flatten(1)
        positions = self._positions(grid.shape, size).to(last.dtype)
        memory = tokens_of(last)
        for layer in self.encoder:
            memory = layer(memory, positions, key_mask, grid)
        keys = memory + positions
        place = self.queries.expand(images.shape[0], -1, -1)
        x = torch.zeros_like(place)
        out = []
        for block in self.decoder:
            x = block(x, place, keys, memory, key_mask=key_mask, grid=grid)
            out.append(self.norm(x))
        y = torch.stack(out)
        raw = self.regress(y)
        # Coordinates in half precision would be pixels off.
        boxes = raw.to(torch.promote_types(raw.dtype, torch.float32)).sigmoid()
        return {"logits": self.classify(y), "boxes": boxes}

    def _positions(self, grid: tuple[int, int], size: Tensor) -> Tensor:
        """Sine positions [B, rows * columns, C]; the unpadded image spans 0 .. 2 pi on both axes."""
        rows, columns = grid
        scale = 2 * math.pi * self.stride / size.float()
        y = (torch.arange(rows, device=size.device) + 0.5) * scale[:, :1]
        x = (torch.arange(columns, device=size.device) + 0.5) * scale[:, 1:]
        y = sine_positions(y, self.dim // 2)[:, :, None].expand(-1, rows, columns, -1)
        x = sine_positions(x, self.dim // 2)[:, None].expand(-1, rows, columns, -1)
        return torch.cat((y, x), -1).flatten(1, 2)

    @property
    def no_weight_decay(self) -> set[str]:
        return {"queries"}
