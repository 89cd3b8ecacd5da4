"""MACMD: a convolutional decoder whose skip connections pass gates and whose scales modulate each other.

Paper: arXiv:2511.05803; official code: lalitmaurya47/MACMD.
Kept from it: dilated grouped convolutions that exchange channel groups, gates on skip connections, a softmax over
scales that pools them and modulates each, a channel and spatial gate at the end.
Differs from it in: levels come from a plain transformer's depths (as in the UPerNet head) instead of a pyramid
backbone; the pooling's resampling is a fixed bilinear one, where the official code draws new random weights at every
call; few channels. No token attention anywhere: the backbone's variants are what a comparison sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.pyramid import ConvUnit, map_of
from zoo.layers.seg_heads import resize


class DilatedExchange(nn.Module):
    """Four grouped 3x3 convolutions with dilation 1, 2, 3, 5; group i of the result sums one group of each, cyclically."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 4:
            raise ConfigError(f"head_width={channels} must be divisible by 4 for head macmd")
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=d, dilation=d, groups=4) for d in (1, 2, 3, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        groups = [branch(x).chunk(4, 1) for branch in self.branches]
        return torch.cat([sum(groups[k][(i + k) % 4] for k in range(4)) for i in range(4)], 1)


class Gate(nn.Module):
    """`g * sigmoid(norm(conv(relu(norm(exchange(g))))))`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            DilatedExchange(channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mix(x).sigmoid()


class ScalePooling(nn.Module):
    """Weights the scales against each other at every place and modulates each with the pooled map."""

    def __init__(self, channels: int, scales: int) -> None:
        super().__init__()
        self.score = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in range(scales))
        self.modulate = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(scales))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        size = maps[1].shape[-2:]
        same = [resize(m, size) for m in maps]
        share = torch.stack([s(m) for s, m in zip(self.score, same, strict=True)]).softmax(0)
        pooled = (share * torch.stack(same)).sum(0)
        return [
            m * (1 + resize(f(pooled), m.shape[-2:]).sigmoid())
            for f, m in zip(self.modulate, maps, strict=True)
        ]


class MacmdHead(nn.Module):
    """Gated decoder over four depths of the transformer and the stem's finer maps.

    Args:
        dim: Width of the tokens.
        classes: Number of logits.
        width: Channels of the decoder, divisible by 4.
        stem: Channels of the stem's maps from fine to coarse; the last one has the tokens' resolution.
    """

    def __init__(self, dim: int, classes: int, *, width: int, stem: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(dim, width, 1) for _ in range(4))
        self.levels = [2 - (len(stem) - 1 - i) for i in range(len(stem))]
        self.skip = nn.ModuleList(
            nn.Conv2d(c, width, 1, bias=False) if 0 <= level < 2 else nn.Identity()
            for c, level in zip(stem, self.levels, strict=True)
        )
        self.pool = ScalePooling(width, 4)
        self.gates = nn.ModuleList(Gate(width) for _ in range(3))
        self.fuse = nn.ModuleList(ConvUnit(2 * width, width) for _ in range(3))
        self.channel = nn.Sequential(
            nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, features: list[Tensor], grid: tuple[int, int], stem: list[Tensor]) -> Tensor:
        sizes = [
            (4 * grid[0], 4 * grid[1]),
            (2 * grid[0], 2 * grid[1]),
            grid,
            tuple(-(-g // 2) for g in grid),
        ]
        levels = [
            resize(project(map_of(f, grid)), size)
            for project, f, size in zip(self.project, features, sizes, strict=True)
        ]
        for skip, level, x in zip(self.skip, self.levels, stem, strict=True):
            if 0 <= level < 2:
                levels[level] = levels[level] + resize(skip(x), levels[level].shape[-2:])
        levels = self.pool(levels)
        out = levels[3]
        for i in (2, 1, 0):
            out = self.fuse[i](torch.cat((self.gates[i](levels[i]), resize(out, levels[i].shape[-2:])), 1))
        peak, mean = out.amax((2, 3), keepdim=True), out.mean((2, 3), keepdim=True)
        out = out * (self.channel(peak) + self.channel(mean)).sigmoid()
        summary = torch.cat((out.amax(1, keepdim=True), out.mean(1, keepdim=True)), 1)
        return self.classifier(out * self.spatial(summary).sigmoid())
