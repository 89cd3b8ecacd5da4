"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.dropout import FastDropout
from zoo.errors import ConfigError


class DropPath(nn.Module):
    """Drops the whole branch for random samples while training and rescales the others.

    Args:
        p: Probability of dropping, in [0, 1).

    Source: Huang et al., "Deep networks with stochastic depth", arXiv:1603.09382.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ConfigError(f"drop_path={p} is outside [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)
        return x * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"


def drop_path_or_none(p: float) -> DropPath | None:
    """`DropPath(p)`, or None where p is zero."""
    return DropPath(p) if p else None


def dropout_or_none(p: float) -> nn.Module:
    """Element-wise dropout, or the identity where p is zero, which saves the call's bookkeeping."""
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"dropout={p} is outside [0, 1)")
    return FastDropout(p) if p else nn.Identity()


def depth_rates(last: float, depth: int) -> list[float]:
    """Drop-path rates of `depth` blocks, rising linearly from 0 to `last`."""
    return [last * i / (depth - 1) for i in range(depth)] if depth > 1 else [last] * depth
