"""BoxRPB: a bias on cross-attention that knows where a query's box lies.

Paper: "DETR does not need multi-scale or locality design", arXiv:2308.01904 (Plain-DETR, impiga/Plain-DETR, MIT).
For query n with corners (x1, y1, x2, y2) and the grid point with column centre u and row centre v

    bias[n, (v, u), h] = MLP_x(x1 - u, x2 - u)[h] + MLP_y(y1 - v, y2 - v)[h].

`box_bias_reference` is this line over every pair. `BoxRPB` evaluates the MLPs per query and column, and per query and
row, and hands the sum over as factors of rank rows + columns: the MLPs cost (rows + columns) / (rows * columns) of the
pairwise form, and a kernel that takes factors never sees the full bias.
Differs from the official code in: offsets are in units of grid cells before the logarithm; default hidden width 32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.attention.base import BiasFactors
from zoo.errors import unknown

OFFSETS = ("log", "linear")


class BoxRPB(nn.Module):
    """Factors of the box bias of one cross-attention.

    Args:
        num_heads: Heads H.
        hidden: Hidden width of the two MLPs.
        offsets: "log": sign(d) log2(|d| + 1) / 3; "linear": d, unbounded. d is in grid cells.
    """

    def __init__(self, num_heads: int, *, hidden: int = 32, offsets: str = "log") -> None:
        super().__init__()
        if offsets not in OFFSETS:
            raise unknown("box_offsets", offsets, OFFSETS)
        self.offsets = offsets
        self.mlp_x = _mlp(hidden, num_heads)
        self.mlp_y = _mlp(hidden, num_heads)

    def forward(self, boxes: Tensor, grid: tuple[int, int]) -> BiasFactors:
        """Bias of queries over a grid.

        Args:
            boxes: Corners in units of grid cells, [B, N, 4]; no gradient goes back to them.
            grid: Rows and columns.

        Returns:
            Factors of rank rows + columns: query [B, H, N, rank], key [1, 1, rows * columns, rank].
        """
        rows, columns = grid
        boxes = boxes.detach()
        u = torch.arange(columns, device=boxes.device, dtype=boxes.dtype) + 0.5
        v = torch.arange(rows, device=boxes.device, dtype=boxes.dtype) + 0.5
        x = boxes[..., None, 0::2] - u[:, None]  # [B, N, columns, 2]
        y = boxes[..., None, 1::2] - v[:, None]
        query = torch.cat((self.mlp_y(self._scale(y)), self.mlp_x(self._scale(x))), -2)  # [B, N, rank, H]
        row = torch.eye(rows, device=boxes.device, dtype=boxes.dtype).repeat_interleave(columns, 0)
        column = torch.eye(columns, device=boxes.device, dtype=boxes.dtype).repeat(rows, 1)
        return BiasFactors(query.permute(0, 3, 1, 2), torch.cat((row, column), -1)[None, None])

    def _scale(self, offsets: Tensor) -> Tensor:
        return offsets.sign() * (offsets.abs() + 1).log2() / 3 if self.offsets == "log" else offsets


def box_bias_reference(layer: BoxRPB, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """The definition, pair by pair: [B, H, N, rows * columns] from corners [B, N, 4] in grid cells."""
    rows, columns = grid
    out = boxes.new_zeros(boxes.shape[0], boxes.shape[1], rows, columns, layer.mlp_x[2].out_features)
    for j in range(rows):
        for i in range(columns):
            x = torch.stack((boxes[..., 0] - (i + 0.5), boxes[..., 2] - (i + 0.5)), -1)
            y = torch.stack((boxes[..., 1] - (j + 0.5), boxes[..., 3] - (j + 0.5)), -1)
            out[:, :, j, i] = layer.mlp_x(layer._scale(x)) + layer.mlp_y(layer._scale(y))
    return out.flatten(2, 3).permute(0, 3, 1, 2)


def _mlp(hidden: int, heads: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, heads, bias=False))
