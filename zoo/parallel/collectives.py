"""Collectives that carry gradients of any order, with a count of what they send."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What this process sent: bytes over the wire in a ring, and collective calls."""

    bytes: int = 0
    calls: int = 0


_open: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what the collectives of this module send inside the block, backward passes included."""
    traffic = Traffic()
    _open.append(traffic)
    try:
        yield traffic
    finally:
        _open.remove(traffic)


def _count(piece: Tensor, group: dist.ProcessGroup | None) -> None:
    # A ring passes each of the W pieces over W - 1 links, for gathering as for reducing and scattering.
    for traffic in _open:
        traffic.bytes += piece.numel() * piece.element_size() * (dist.get_world_size(group) - 1)
        traffic.calls += 1


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every process's `x`, stacked: [W, *x.shape]. Shapes must be equal; gradients flow back to their owners.

    Args:
        x: This process's part.
        group: Process group; the default one when left out.
    """
    return _AllGather.apply(x, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        _count(x, group)
        out = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(out, x.contiguous(), group=group)
        return torch.stack(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Sum over processes of part r, on process r: the transpose of gathering."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[1:])
        _count(out, group)
        scatter = (
            getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        )  # renamed in 2.14
        scatter(out, x.contiguous().flatten(0, 1), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grad, ctx.group), None
