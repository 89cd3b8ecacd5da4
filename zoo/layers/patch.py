"""From images to tokens."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a square given by its side, or of a pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class _PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as one matrix product: on CPU the faster form.

    Still a convolution to hooks and weight files. [B, channels, height, width] -> [B, rows * columns, dim].
    """

    def forward(self, images: Tensor) -> Tensor:
        (b, c, height, width), (ph, pw) = images.shape, self.kernel_size
        rows, columns = height // ph, width // pw
        patches = images.reshape(b, c, rows, ph, columns, pw).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(b, rows * columns, c * ph * pw), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """A linear map of non-overlapping patches. The weight has the layout of a convolution, as in timm.

    Args:
        in_channels: Channels of the image.
        dim: Width of the tokens.
        patch_size: Side of a patch in pixels, or (height, width).
        bias: Whether the map has a bias.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: int | tuple[int, int],
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = as_pair(patch_size)
        self.proj = _PatchProjection(in_channels, dim, self.patch_size, self.patch_size, bias=bias)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image; raises where it does not divide."""
        return _grid(height, width, self.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, rows * columns, dim]."""
        self.grid_of(*images.shape[-2:])
        return self.proj(images)


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions with GELU between them, as many as halve `patch_size` down to 1.

    Small data sets need the locality that a single patch projection lacks. Widths double up to `dim`.

    Args:
        in_channels: Channels of the image.
        dim: Width of the tokens.
        patch_size: Pixels per token along each axis, a power of two from 2 on.

    Source: Xiao et al., "Early convolutions help transformers see better", arXiv:2106.14881, without its batch norm,
    so that a sample's output does not depend on its batch.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = as_pair(patch_size)
        side = self.patch_size[0]
        count = side.bit_length() - 1
        if self.patch_size[1] != side or side < 2 or 2**count != side:
            raise ConfigError(
                f"stem='conv' needs a square patch_size that is a power of two (2, 4, 8, 16), got {patch_size}; "
                "or use stem='patch'"
            )
        widths = [
            in_channels,
            *(max(8, dim >> (count - 1 - i)) for i in range(count - 1)),
            dim,
        ]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths[:-1]))
        self.proj = nn.Conv2d(widths[-2], dim, 3, stride=2, padding=1)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image; raises where it does not divide."""
        return _grid(height, width, self.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, rows * columns, dim]."""
        self.grid_of(*images.shape[-2:])
        x = images
        for conv in self.convs:
            x = F.gelu(conv(x))
        return self.proj(x).flatten(2).transpose(1, 2)


def _grid(height: int, width: int, patch: tuple[int, int]) -> tuple[int, int]:
    if height % patch[0] or width % patch[1] or height < patch[0] or width < patch[1]:
        side = patch[0] if patch[0] == patch[1] else patch
        raise ConfigError(
            f"image of {height} x {width} pixels does not divide into patches of {side}; change image_size or patch_size"
        )
    return height // patch[0], width // patch[1]
