"""Where cut-outs lie in a scene: their extent, places with little overlap, and the pixels they end up on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

_CANDIDATES = 12  # places tried for each object


def ink(images: Tensor) -> Tensor:
    """Centre x, y and half width, height of each image's ink (alpha > 0.5), pixels, [n, 4]."""
    x1, y1, x2, y2 = tight_boxes(images > 0.5).unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2), -1)


def tight_boxes(masks: Tensor) -> Tensor:
    """Smallest boxes around bool masks [..., H, W]: corners x1, y1, x2, y2 on pixel edges; zero when empty."""

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        hit = line.int()
        return hit.argmax(-1), line.shape[-1] - hit.flip(-1).argmax(-1)

    columns, rows = masks.any(-2), masks.any(-1)
    (x1, x2), (y1, y2) = ends(columns), ends(rows)
    boxes = torch.stack((x1, y1, x2, y2), -1).float()
    return boxes * columns.any(-1, keepdim=True)


def place_boxes(half: Tensor, present: Tensor, side: int, random: Generator) -> Tensor:
    """Centres [B, T, 2] of boxes with half sizes [B, T, 2] (x, y): of some candidates the one that overlaps least."""
    b, t, _ = half.shape
    low = half.clamp(max=side / 2)
    centres = torch.empty(b, t, 2)
    for k in range(t):
        room = (side - 2 * low[:, k]).clamp(min=0)
        tries = low[:, k, None] + torch.rand(b, _CANDIDATES, 2, generator=random) * room[:, None]  # [B, K, 2]
        cost = torch.zeros(b, _CANDIDATES)
        for j in range(k):
            reach = half[:, j, None] + half[:, k, None]
            overlap = (reach - (tries - centres[:, j, None]).abs()).clamp(min=0).prod(-1)
            cost = cost + overlap * present[:, j, None]
        centres[:, k] = tries[torch.arange(b), cost.argmin(1)]
    return centres


def render(cutouts: Tensor, centre: Tensor, place: Tensor, scale: Tensor, angle: Tensor, side: int) -> Tensor:
    """Paste [B, T, (4,) h, w] on canvases so that the point `centre` lands on `place`: [B, T, (4,) side, side]."""
    (b, t), (h, w) = cutouts.shape[:2], cutouts.shape[-2:]
    cos, sin = angle.cos() / scale, angle.sin() / scale  # canvas offset to cut-out offset
    fx, fy = 2 / w, 2 / h
    matrix = torch.stack(
        (
            torch.stack(
                (cos, sin, (cos * (side / 2 - place[..., 0]) + sin * (side / 2 - place[..., 1]))), -1
            ),
            torch.stack(
                (-sin, cos, (-sin * (side / 2 - place[..., 0]) + cos * (side / 2 - place[..., 1]))), -1
            ),
        ),
        -2,
    )  # [B, T, 2, 3] in pixels relative to the canvas centre
    matrix[..., 0, 2] += centre[..., 0] - w / 2
    matrix[..., 1, 2] += centre[..., 1] - h / 2
    matrix = matrix * torch.tensor([[side / 2, side / 2, 1.0]])
    matrix = matrix * torch.tensor([[fx], [fy]])
    grid = F.affine_grid(matrix.flatten(0, 1), [b * t, 1, side, side], align_corners=False)
    flat = cutouts.reshape(b * t, -1, h, w)
    out = F.grid_sample(flat, grid, padding_mode="zeros", align_corners=False)
    return out.view(*cutouts.shape[:-2], side, side)
