"""BVR: every grid point looks at a few key points of other box representations.

Paper: "RelationNet++: bridging visual representations for object detection via transformer decoder",
arXiv:2010.15831; official code: microsoft/RelationNet2, MIT. Kept from it: many queries and few keys, scores plus the
logarithm of a learned function of the offset between key point and query, `relu(query + attended)`.
Differs from it in: key points are the corners and centres of a model's best proposals, where the official code
trains a point head; the offset function is evaluated pair by pair, which is cheap for one small scale; one attention
over all representations instead of one for each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory
from zoo.layers.boxes import to_xyxy
from zoo.layers.position import sine_positions


class BridgeRepresentations(nn.Module):
    """Cross-attention from grid tokens to key points.

    Args:
        attention: Factory of a cross slot with full bias.
        dim: Width C, divisible by 4.
        num_heads: Heads H.
        proposals: Number of proposals K whose corners and centre are key points.
    """

    def __init__(self, attention: AttentionFactory, dim: int, num_heads: int, *, proposals: int) -> None:
        super().__init__()
        self.proposals, self.dim = proposals, dim
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.kind = nn.Parameter(torch.zeros(3, dim))
        self.attn = attention(dim, num_heads, length=3 * proposals)
        self.offset = nn.Linear(dim, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.offset.weight, std=0.01)
        nn.init.ones_(self.offset.bias)  # a bias of log 1 = 0: no preference at the start

    def forward(
        self, tokens: Tensor, places: Tensor, boxes: Tensor, size: Tensor, stride: int, grid: tuple[int, int]
    ) -> Tensor:
        """Refine grid tokens.

        Args:
            tokens: [B, M, C].
            places: Grid points (x, y) relative to the unpadded image, [B, M, 2].
            boxes: The K best proposals, cxcywh relative to the unpadded image, [B, K, 4]; no gradient goes back.
            size: Height and width without padding, [B, 2].
            stride: Pixels per grid cell.
            grid: Rows and columns.

        Returns:
            [B, M, C].
        """
        corners = to_xyxy(boxes.detach()).clamp(0, 1)
        points = torch.stack(
            (corners[..., :2], boxes.detach()[..., :2].clamp(0, 1), corners[..., 2:]), 2
        )  # [B, K, 3, 2]
        pixels = points * size.flip(1)[:, None, None].to(points)
        last = (size - 1).flip(1)[:, None, None].to(points)
        cell = (torch.minimum(pixels, last) / stride).long()
        index = (cell[..., 1] * grid[1] + cell[..., 0]).flatten(1)  # [B, 3K]
        normed = self.norm(tokens)
        keys = normed.gather(1, index[..., None].expand(-1, -1, self.dim))
        keys = keys + self.kind.repeat(boxes.shape[1], 1)
        away = points.flatten(1, 2)[:, None] - places[:, :, None]  # [B, M, 3K, 2]
        table = sine_positions(away * (2 * math.pi), self.dim // 2, base=100.0).flatten(-2)
        bias = self.offset(table).clamp(min=1e-6).log().permute(0, 3, 1, 2)
        return F.relu(tokens + self.attn(normed, keys, bias=bias))

    @property
    def no_weight_decay(self) -> set[str]:
        return {"kind"}
