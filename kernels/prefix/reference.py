"""Prefix softmax with the full matrix, and the recurrence step by step."""

import torch
from torch import Tensor


def prefix_softmax(s: Tensor, v: Tensor, *, read: str) -> Tensor:
    """s [B, H, M], v [B, H, M, E] -> [B, H, M, E]; zeros where nothing is seen."""
    m = s.shape[2]
    seen = torch.ones(m, m, dtype=torch.bool, device=s.device).tril(0 if read == "inclusive" else -1)
    scores = s[:, :, None, :].masked_fill(~seen, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights @ v


def diag_scan(a: Tensor, x: Tensor, h0: Tensor | None, segment: int | None) -> Tensor:
    """h_t = a_t h_{t-1} + x_t along axis 2."""
    h = torch.zeros_like(x[:, :, 0]) if h0 is None else h0
    rows = []
    for t in range(x.shape[2]):
        if segment is not None and t % segment == 0:
            h = torch.zeros_like(h)
        h = a[:, :, t] * h + x[:, :, t]
        rows.append(h)
    return torch.stack(rows, 2) if rows else x
