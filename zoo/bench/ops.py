"""Operations by length: forward and backward, at B 1, H 4, D 64, float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.bench import ops_sparse, scans
from zoo.bench.timing import Timing, take_turns

HEADS, WIDTH = 4, 64
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def elu1_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The linear attention that a user would write."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2)[..., None] + 1e-6)


PEERS: dict[str, Operation] = {
    "torch.SDPA": sdpa,
    "torch.SDPA causal": sdpa_causal,
    "elu+1 by hand": elu1_by_hand,
}


def operation(op: Operation, tokens: int) -> Callable[[], None]:
    """Forward and backward of an operation on [1, 4, tokens, 64]."""
    q, k, v = (torch.randn(1, HEADS, tokens, WIDTH, requires_grad=True) for _ in range(3))
    upstream = torch.randn(1, HEADS, tokens, WIDTH)

    def call() -> None:
        torch.autograd.grad(op(q, k, v), (q, k, v), upstream)

    return call


def ours() -> dict[str, Operation]:
    """The project's operations, by name."""
    from kernels import linear, softmax

    return {
        "softmax": softmax.attention,
        "softmax causal": lambda q, k, v: softmax.attention(q, k, v, causal=True),
        "softmax window 129": lambda q, k, v: softmax.attention(q, k, v, window=64),
        "linear": linear.linear_attention,
        "linear causal": lambda q, k, v: linear.linear_attention(q, k, v, causal=True),
        "mala": linear.mala,
        "mala causal": lambda q, k, v: linear.mala(q, k, v, causal=True),
        **scans.ours(),
        **ops_sparse.ours(),
    }


def names() -> list[str]:
    """Of the operations and peers at their shortest."""
    return [*PEERS, *scans.peers(), *ops_sparse.peers(1), *ours()]


def compare_at(tokens: int, names: list[str] | None = None, budget_s: float = 40.0) -> dict[str, Timing]:
    """All operations and peers at one length, as far as they go there; slow ones are still given three rounds."""
    operations = {**PEERS, **scans.peers(), **ops_sparse.peers(tokens), **ours()}
    chosen = {
        n: operation(f, tokens)
        for n, f in operations.items()
        if (names is None or n in names) and tokens <= scans.LONGEST.get(n, tokens)
    }
    return take_turns(chosen, rounds=20, warmup=2, budget_s=budget_s) if chosen else {}


def exponent(lengths: list[int], times_ms: list[float]) -> float:
    """Slope of log time over log length by least squares; 1 is linear, 2 quadratic."""
    x, y = [math.log(n) for n in lengths], [math.log(t) for t in times_ms]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
