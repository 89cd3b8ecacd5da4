"""Image preparation shared by training and prediction, and batch augmentation for small images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def random_affine(
    images: Tensor,
    generator: Generator,
    *,
    rotate_deg: float = 0.0,
    shift_px: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
) -> Tensor:
    """Rotate, shift, scale and shear each image of a batch by its own random amount; the outside is zero.

    Args:
        images: [B, C, H, W].
        generator: Source of the amounts, on the CPU.
        rotate_deg: Largest angle either way, degrees.
        shift_px: Largest shift either way and along either axis, pixels.
        scale: Largest relative change of size, 0.1 for 0.9 .. 1.1.
        shear: Largest shear either way, as a slope.

    Returns:
        [B, C, H, W].
    """
    count, _, height, width = images.shape
    draw = torch.rand(5, count, generator=generator) * 2 - 1  # always five rows: one option moves no other
    angle = draw[0] * math.radians(rotate_deg)
    zoom = 1 / (1 + draw[1] * scale)
    slope = draw[2] * shear
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    aspect = width / height  # grid coordinates run from -1 to 1 along both axes
    matrix = torch.stack(
        [
            torch.stack([cos, (cos * slope - sin) / aspect, draw[3] * 2 * shift_px / width], -1),
            torch.stack([sin * aspect, sin * slope + cos, draw[4] * 2 * shift_px / height], -1),
        ],
        dim=1,
    )  # [B, 2, 3]
    grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
