"""Heads that turn the tokens of a plain vision transformer into one score per class and pixel.

Every head takes `(features, grid, stem)`: token features [B, N, C] of four depths (the last one normalised), rows and
columns of the tokens, and the stem's maps from fine to coarse; it returns logits [B, K, h, w] at its own resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory
from zoo.layers.blocks import TransformerBlock
from zoo.layers.pyramid import ChannelNorm, ConvUnit, map_of


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resampling of a map [B, C, H, W]; the map itself where the size is right already."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class LinearHead(nn.Module):
    """One linear map per token (Segmenter's linear decoder): what it scores is the backbone's work alone."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, classes)

    def forward(self, features: list[Tensor], grid: tuple[int, int], stem: list[Tensor]) -> Tensor:
        return map_of(self.classifier(features[-1]), grid)


class MaskTransformerHead(nn.Module):
    """Class tokens join the patch tokens for some blocks; logits are cosines between both.

    Paper: Segmenter, arXiv:2105.05633. Differs from it in: a learned temperature in front of the norm over classes
    is left out, as that norm has a gain.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        attention: AttentionFactory,
        *,
        num_heads: int,
        depth: int,
        mlp_ratio: float,
        length: int,
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, dim)
        self.classes = nn.Parameter(torch.randn(1, classes, dim) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(attention, dim, num_heads, mlp_ratio=mlp_ratio, length=length + classes)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.patch = nn.Linear(dim, dim, bias=False)
        self.label = nn.Linear(dim, dim, bias=False)
        self.mask_norm = nn.LayerNorm(classes)

    def forward(self, features: list[Tensor], grid: tuple[int, int], stem: list[Tensor]) -> Tensor:
        x = self.inner(features[-1])
        count = self.classes.shape[1]
        x = torch.cat((x, self.classes.expand(x.shape[0], -1, -1)), 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches = F.normalize(self.patch(x[:, :-count]), dim=-1)
        labels = F.normalize(self.label(x[:, -count:]), dim=-1)
        return map_of(self.mask_norm(patches @ labels.transpose(1, 2)), grid)

    def forward_flops(self, inputs: tuple, output: Tensor) -> float:
        """Of the cosines between patches and classes."""
        return 2.0 * output.numel() * self.classes.shape[-1]

    @property
    def no_weight_decay(self) -> set[str]:
        return {"classes"}


class PyramidPooling(nn.Module):
    """Averages over 1, 2x2, 3x3 and 6x6 cells beside the map itself. Paper: PSPNet, arXiv:1612.01105."""

    def __init__(self, dim: int, out: int, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.bins = tuple(bins)
        # One cell of one image has no batch statistics.
        self.project = nn.ModuleList(ConvUnit(dim, out, kernel=1, norm="layer") for _ in bins)
        self.fuse = ConvUnit(dim + out * len(self.bins), out)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [
            resize(project(F.adaptive_avg_pool2d(x, bins)), x.shape[-2:])
            for bins, project in zip(self.bins, self.project, strict=True)
        ]
        return self.fuse(torch.cat((x, *pooled), 1))


class UperNetHead(nn.Module):
    """A feature pyramid over four depths of the transformer and the stem's finer maps.

    Features of four depths are resampled to four, two, one and one half times the tokens' resolution, the coarsest
    is pooled (PSPNet), and levels are added from coarse to fine. Paper: UPerNet, arXiv:1807.10221.
    Differs from it in: stem maps join the level of their resolution; levels are convolved at their own resolution
    and added (as in Panoptic FPN, arXiv:1901.02446) instead of being concatenated at the finest one, where one
    convolution would cost more than the transformer; the classifier gives each pixel of a cell its own logits
    (sub-pixel convolution, arXiv:1609.05158) instead of interpolating between cells; no auxiliary head.

    Args:
        dim: Width of the tokens.
        classes: Number of logits.
        width: Channels of the pyramid.
        stem: Channels of the stem's maps from fine to coarse; the last one has the tokens' resolution.
        cell: Pixels of the image per place of the finest level, along each axis.
    """

    def __init__(self, dim: int, classes: int, *, width: int, stem: Sequence[int], cell: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(dim, width, 2, 2),
            ChannelNorm(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, 2),
        )
        self.up2 = nn.ConvTranspose2d(dim, width, 2, 2)
        self.same = nn.Conv2d(dim, width, 1)
        self.pool = PyramidPooling(dim, width)
        # Level 0 has four times the resolution of the tokens; stem maps are counted from the tokens' one.
        self.levels = [2 - (len(stem) - 1 - i) for i in range(len(stem))]
        self.skip = nn.ModuleList(
            nn.Conv2d(c, width, 1, bias=False) if 0 <= level < 2 else nn.Identity()
            for c, level in zip(stem, self.levels, strict=True)
        )
        self.smooth = nn.ModuleList(ConvUnit(width, width) for _ in range(3))
        self.classifier = nn.Conv2d(width, classes * cell**2, 1)
        self.cell = cell

    def forward(self, features: list[Tensor], grid: tuple[int, int], stem: list[Tensor]) -> Tensor:
        maps = [map_of(f, grid) for f in features]
        coarse = (
            F.avg_pool2d(maps[3], 2, ceil_mode=True, count_include_pad=False) if min(grid) > 1 else maps[3]
        )
        levels = [self.up4(maps[0]), self.up2(maps[1]), self.same(maps[2]), self.pool(coarse)]
        for skip, level, x in zip(self.skip, self.levels, stem, strict=True):
            if 0 <= level < 2:
                levels[level] = levels[level] + resize(skip(x), levels[level].shape[-2:])
        out = levels[3]
        total = None
        for i in (2, 1, 0):
            out = levels[i] + resize(out, levels[i].shape[-2:])
            smooth = self.smooth[i](out)
            total = smooth if total is None else smooth + resize(total, smooth.shape[-2:])
        return F.pixel_shuffle(self.classifier(total), self.cell)


class EncoderOnlyHead(nn.Module):
    """Queries that the backbone's last blocks process beside the patches; each gives a class and a mask.

    Paper: "Your ViT is secretly an image segmentation model" (EoMT), arXiv:2503.19108; official code: tue-mps/eomt,
    MIT. Masked attention in training (`attention_bias`) is annealed away block by block (`mask_shares`), so inference
    needs no mask. Differs from it in: the masks are a choice, as most attention variants take none; training goes through
    matched masks or through the semantic read-out (the mixture of all queries' masks), as the task says.

    Args:
        dim: Width of the tokens.
        classes: Number of classes K; every query may also be none of them.
        queries: Number of queries Q.
        steps: How often masks are doubled in resolution.
    """

    def __init__(self, dim: int, classes: int, *, queries: int, steps: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, dim))
        self.classify = nn.Linear(dim, classes + 1)
        self.embed = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.up = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim, 2, 2),
                    nn.GELU(),
                    nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
                    ChannelNorm(dim),
                )
                for _ in range(steps)
            )
        )

    def predict(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Class scores [B, Q, K + 1] (the last class means none) and mask scores [B, Q, h, w] of the queries.

        Args:
            tokens: Queries and patches, normalised, [B, Q + rows * columns, C].
            grid: Rows and columns.
        """
        count = self.queries.shape[1]
        maps = self.up(map_of(tokens[:, count:], grid))
        queries = self.embed(tokens[:, :count]) * maps.shape[1] ** -0.5
        return self.classify(tokens[:, :count]), torch.einsum("bqc,bchw->bqhw", queries, maps)

    @staticmethod
    def attention_bias(masks: Tensor, grid: tuple[int, int], share: float) -> Tensor:
        """Scores' bias that lets queries see only the patches of their own mask, [B, 1, Q + P, Q + P].

        Args:
            masks: Mask scores before the block, [B, Q, h, w].
            grid: Rows and columns of the P patches.
            share: Probability that a query is held to its mask; the others see everything, as patches always do.
        """
        batch, count = masks.shape[:2]
        hidden = resize(masks.detach(), grid).flatten(2) <= 0
        hidden &= torch.rand(batch, count, 1, device=masks.device) < share
        tokens = count + hidden.shape[-1]
        bias = masks.new_zeros(batch, 1, tokens, tokens)
        bias[:, 0, :count, count:].masked_fill_(hidden, -torch.inf)
        return bias

    @staticmethod
    def mask_shares(progress: float, blocks: int) -> list[float]:
        """Share of masked queries in each of the blocks: 1, then falling as (1 - t)^0.9 through the block's window, then 0.

        Windows take a fifth of the training each and begin between 0.2 and 0.8 of it, earlier blocks first; with three blocks
        these are the official Cityscapes numbers.
        """
        fifths = [1 + 3 * i / max(1, blocks - 1) for i in range(blocks)]
        return [(1 - min(1.0, max(0.0, 5 * progress - begin))) ** 0.9 for begin in fifths]

    def forward(self, features: list[Tensor], grid: tuple[int, int], stem: list[Tensor]) -> Tensor:
        classes, masks = self.predict(features[-1], grid)
        share = classes.softmax(-1)[..., :-1]  # [B, Q, K]
        scores = torch.einsum("bqk,bqhw->bkhw", share, masks.sigmoid())
        # Logits whose softmax is the mixture, normalised over classes.
        return scores.clamp(min=1e-6).log()

    def forward_flops(self, inputs: tuple, output: Tensor) -> float:
        """Of the masks, and of their mixture."""
        _, queries, dim = self.queries.shape
        batch, classes, height, width = output.shape
        return 2.0 * batch * queries * height * width * (dim + classes)

    @property
    def no_weight_decay(self) -> set[str]:
        return {"queries"}
