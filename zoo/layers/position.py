"""Position embeddings: sine tables in one and two dimensions, and resampling a learned grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError


def sine_positions(positions: int | Tensor, dim: int, *, base: float = 10000.0) -> Tensor:
    """Sine and cosine of each position at `dim / 2` geometric frequencies, sines first.

    Args:
        positions: Number of positions, or the positions themselves, [...], fractions allowed.
        dim: Width, even.
        base: Ratio of the longest to the shortest wavelength.

    Returns:
        [..., dim], float32 (float64 for float64 positions).
    """
    if dim % 2:
        raise ConfigError(f"sine positions need an even width, got {dim}")
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions)
    if positions.dtype != torch.float64:
        positions = positions.float()
    half = dim // 2
    steps = torch.arange(half, dtype=positions.dtype, device=positions.device)
    angle = positions[..., None] * torch.exp(steps * (-math.log(base) / half))
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def sine_positions_2d(rows: int, columns: int, dim: int, *, base: float = 10000.0) -> Tensor:
    """Sine tables of row and column side by side, [rows * columns, dim] in row-major order; dim divisible by 4."""
    if dim % 4:
        raise ConfigError(f"2-D sine positions need a width divisible by 4, got {dim}")
    y = sine_positions(rows, dim // 2, base=base)[:, None].expand(rows, columns, -1)
    x = sine_positions(columns, dim // 2, base=base)[None].expand(rows, columns, -1)
    return torch.cat((y, x), dim=-1).flatten(0, 1)


def resample_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], *, prefix: int = 0
) -> Tensor:
    """Resample a learned position table to another grid, bicubic with antialiasing.

    Args:
        table: [1, prefix + old rows * old columns, C]; the first `prefix` rows are kept as they are.
        old: Rows and columns that `table` was made for.
        new: Rows and columns wanted.
        prefix: Number of tokens before the grid.

    Returns:
        [1, prefix + new rows * new columns, C], dtype of `table`.
    """
    if tuple(old) == tuple(new):
        return table
    if table.shape[1] != prefix + old[0] * old[1]:
        raise ConfigError(
            f"position table of {table.shape[1]} rows is not a grid of {old[0]} x {old[1]} after {prefix} other tokens"
        )
    grid = table[:, prefix:].unflatten(1, tuple(old)).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", antialias=True)
    grid = grid.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat((table[:, :prefix], grid), dim=1)
