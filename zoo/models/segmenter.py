"""Semantic segmentation with a plain vision transformer and a choice of heads.

Papers: Segmenter (linear and mask transformer), arXiv:2105.05633; UPerNet, arXiv:1807.10221; EoMT, arXiv:2503.19108.
Differs from them in: a convolutional stem whose maps the pyramid head may use, for small images from scratch; or a
timm model in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError, unknown
from zoo.layers.backbones import make_backbone
from zoo.layers.blocks import TransformerBlock
from zoo.layers.drop import depth_rates
from zoo.layers.macmd import MacmdHead
from zoo.layers.patch import as_pair
from zoo.layers.position import resample_positions
from zoo.layers.pyramid import tokens_of
from zoo.layers.seg_heads import EncoderOnlyHead, LinearHead, MaskTransformerHead, UperNetHead, resize
from zoo.models.registry import register_model

HEADS = ("linear", "mask_transformer", "upernet", "eomt", "macmd")


@register_model
class Segmenter(nn.Module):
    """A convolutional stem, transformer blocks over its last map, a segmentation head.

    Args:
        attention: Factories for slots "encoder" and, with the mask transformer, "decoder".
        image_size: Side in pixels, or (height, width), that the position table is made for; other sizes are padded
            to whole tokens and get a resampled table.
        in_channels: Channels of the image.
        num_classes: Number of classes.
        head: linear, mask_transformer, upernet, eomt, macmd.
        patch_size: Pixels per token along each axis, a power of two from 2 on.
        backbone: timm's name of a model whose maps replace the stem; None for the stem.
        stem_width: Channels of the stem's first stage; they double up to `dim`.
        dim: Width C of the tokens.
        depth: Number of blocks, at least 1.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLPs over `dim`.
        head_width: Channels of the pyramid head.
        head_depth: Blocks of the mask transformer; last blocks that see EoMT's queries.
        head_queries: EoMT's queries.
        masked_queries: EoMT's masked attention in training; needs a variant that takes a bias.
        position_std: Standard deviation of the position table at the start.
        drop_path: Rate of the last block; rises linearly from 0.
        dropout: Dropout after projections and inside MLPs.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        image_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        num_classes: int = 11,
        head: str = "upernet",
        patch_size: int = 8,
        backbone: str | None = None,
        stem_width: int = 16,
        dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        head_width: int = 32,
        head_depth: int = 2,
        head_queries: int = 24,
        masked_queries: bool = False,
        position_std: float = 0.5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise unknown("segmentation head", head, HEADS)
        if num_classes < 2:
            raise ConfigError(f"num_classes={num_classes} must be at least 2")
        self.num_classes, self.in_channels, self.patch_size = num_classes, in_channels, patch_size
        height, width = as_pair(image_size)
        self.grid = Grid((-(-height // patch_size), -(-width // patch_size)))
        self.stem = make_backbone(
            backbone,
            in_channels,
            dim,
            stride=patch_size,
            stem_width=stem_width,
            image_size=image_size,
            stride_key="patch_size",
        )
        self.position_std = position_std
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid.tokens, dim))
        self.prefix = head_queries if head == "eomt" else 0
        if head == "eomt" and not 1 <= head_depth <= depth:
            raise ConfigError(f"head_depth={head_depth} must lie between 1 and depth={depth} for head eomt")
        if masked_queries and head != "eomt":
            raise ConfigError(f"masked_queries=true belongs to head eomt, not {head}")
        self.masked_queries, self.mask_shares = masked_queries, [0.0] * head_depth
        self.first_joint = depth - head_depth if head == "eomt" else depth
        joint = Grid(self.grid.shape, self.prefix)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                attention["encoder"],
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                drop_path=rate,
                length=(joint if i >= self.first_joint else self.grid).tokens,
                grid=joint if i >= self.first_joint else self.grid,
            )
            for i, rate in enumerate(depth_rates(drop_path, depth))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if head == "linear":
            self.head: nn.Module = LinearHead(dim, num_classes)
        elif head == "mask_transformer":
            self.head = MaskTransformerHead(
                dim,
                num_classes,
                attention["decoder"],
                num_heads=num_heads,
                depth=head_depth,
                mlp_ratio=mlp_ratio,
                length=self.grid.tokens,
            )
        elif head == "eomt":
            self.head = EncoderOnlyHead(
                dim, num_classes, queries=head_queries, steps=max(1, patch_size.bit_length() - 3)
            )
        elif head == "macmd":
            self.head = MacmdHead(dim, num_classes, width=head_width, stem=self.stem.widths)
        else:
            self.head = UperNetHead(
                dim, num_classes, width=head_width, stem=self.stem.widths, cell=max(1, patch_size // 4)
            )
        taps = sorted(max(0, -(-depth * k // 4) - 1) for k in (1, 2, 3, 4))
        self.taps = tuple(taps)
        self.reset_parameters()

    @classmethod
    def slots(cls, *, head: str = "upernet", masked_queries: bool = False, **options: Any) -> dict[str, Slot]:
        """The blocks over the grid; the mask transformer's blocks over patches and class tokens, a set."""
        bias = "full" if masked_queries else None
        slots = {"encoder": Slot(Pattern.SELF, grid_dims=2, bias=bias, length_known=True)}
        if head == "mask_transformer":
            slots["decoder"] = Slot(Pattern.SELF, ordered=False, length_known=True)
        return slots

    def reset_parameters(self) -> None:
        """Xavier for projections; variants and backbones keep what they gave theirs."""
        own = [self.stem, *(m for m in self.modules() if isinstance(m, Attention))]
        foreign = {id(layer) for module in own for layer in module.modules()}
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and id(layer) not in foreign:
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.pos_embed, std=self.position_std)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of every pixel.

        Args:
            images: [B, channels, height, width], any size.

        Returns:
            Logits, [B, num_classes, height, width].
        """
        outputs, _, shape, stem = self._features(images)
        logits = self.head(outputs, shape, stem)
        return self._crop(logits, images)

    def query_predictions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classes and masks of EoMT's queries, before each block that sees them and at the end.

        Args:
            images: [B, channels, height, width].

        Returns:
            Class scores [L, B, Q, K + 1] and mask scores [L, B, Q, h, w] over the whole image.
        """
        outputs, steps, shape, _ = self._features(images, each_block=True)
        steps.append(self.head.predict(outputs[-1], shape))
        logits, masks = (torch.stack(part) for part in zip(*steps, strict=True))
        if any(side % self.patch_size for side in images.shape[-2:]):
            masks = self._crop(masks.flatten(0, 1), images).unflatten(0, masks.shape[:2])
        return logits, masks

    def anneal(self, progress: float) -> None:
        """Set the shares of masked queries for a moment of the training, 0 at its begin and 1 at its end."""
        self.mask_shares = self.head.mask_shares(progress, len(self.mask_shares))

    def _features(
        self, images: Tensor, *, each_block: bool = False
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], tuple[int, int], list[Tensor]]:
        """Tokens of four depths, predictions before each block that sees queries, the grid, and the stem's maps."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ConfigError(
                f"images must be [B, {self.in_channels}, height, width], got {list(images.shape)}; in_channels sets "
                "the channels"
            )
        below, right = (-side % self.patch_size for side in images.shape[-2:])
        if below or right:
            images = nn.functional.pad(images, (0, right, 0, below))
        stem = self.stem(images)
        shape = tuple(stem[-1].shape[-2:])
        x = tokens_of(stem[-1]) + resample_positions(self.pos_embed, self.grid.shape, shape)
        grid = Grid(shape)
        outputs, steps = [], []
        for i, block in enumerate(self.blocks):
            if self.prefix and i == self.first_joint:
                x = torch.cat((self.head.queries.expand(len(x), -1, -1), x), 1)
                grid = Grid(shape, self.prefix)
            bias = None
            if i >= self.first_joint:
                share = self.mask_shares[i - self.first_joint] if self.training else 0.0
                if each_block or share:
                    steps.append(self.head.predict(self.norm(x), shape))
                if share:
                    bias = self.head.attention_bias(steps[-1][1], shape, share)
            x = block(x, grid=grid, bias=bias)
            outputs.extend([x] * self.taps.count(i))
        outputs[-1] = self.norm(outputs[-1])
        return outputs, steps, shape, stem

    def _crop(self, maps: Tensor, images: Tensor) -> Tensor:
        """Maps [B, K, h, w] of the padded picture at the resolution of `images`, without the padding."""
        height, width = images.shape[-2:]
        p = self.patch_size
        return resize(maps, (-(-height // p) * p, -(-width // p) * p))[..., :height, :width]

    @property
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}
