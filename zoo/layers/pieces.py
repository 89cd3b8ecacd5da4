"""Gradient of a sum of independent pieces, each on a core of its own.

The operations of a small network are too short to be worth splitting over cores: a transformer's step in Taylor mode takes
as long on two as on one. Its points are independent, so pieces of them run side by side instead, in threads that use one
core each. Sums are taken in the order of the pieces, whatever the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import lru_cache

import torch
from torch import Tensor

Piece = Callable[[], Tensor]
SMALLEST = 128  # points that are worth a piece of their own


def count_pieces(
    points: int, chunk: int, device: torch.device | str = "cpu", side_by_side: bool = True
) -> int:
    """Pieces of at most `chunk` points.

    Args:
        points: Number of points.
        chunk: Most points of a piece.
        device: Where they are.
        side_by_side: Take a multiple of the cores in use where there are enough points. A piece costs about 2 ms of
            Python, which runs on one core at a time: a transformer's 100 ms are worth that, a perceptron's 5 ms are not,
            and its operations are long enough to be split over cores by torch itself.
    """
    count = -(-points // chunk)
    if not side_by_side:
        return count
    cores = _cores(torch.device(device))
    shared = -(-count // cores) * cores
    return shared if points >= shared * SMALLEST else count


def each_gradient(
    pieces: Sequence[Piece], parameters: Sequence[Tensor], factors: Sequence[Tensor] | None = None
) -> Iterator[tuple[Tensor, tuple[Tensor | None, ...]]]:
    """Value and gradients of each piece, in order.

    Args:
        pieces: Functions that compute scalars and share nothing but the parameters.
        parameters: In what is differentiated; a piece may do without some, whose gradient is then None.
        factors: Of each piece's gradient, not of its value; 1 if left out.
    """

    def run(piece: Piece, factor: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        value = piece()
        return value.detach(), torch.autograd.grad(value, parameters, factor, allow_unused=True)

    factors = [None] * len(pieces) if factors is None else factors
    if min(_cores(parameters[0].device), len(pieces)) == 1:
        return map(run, pieces, factors)
    contexts = [copy_context() for _ in pieces]
    pool = _pool(os.getpid(), torch.get_num_threads())
    return pool.map(lambda context, *work: context.run(run, *work), contexts, pieces, factors)


def add_gradients(
    pieces: Sequence[Piece], parameters: Sequence[Tensor], factors: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Add the pieces' gradients to `.grad` of the parameters, see `each_gradient`; returns the pieces' values."""
    values = []
    for value, gradients in each_gradient(pieces, parameters, factors):
        values.append(value)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:  # autograd may hand the same tensor to two parameters
                parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
            else:
                parameter.grad += gradient
    return values


def _cores(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def _one_core() -> None:
    torch.get_num_threads()  # makes torch read the common number now, not at its first operation
    torch.set_num_threads(1)


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of one core each; those of a parent process do not survive a fork, hence its number in the key."""
    pool = ThreadPoolExecutor(threads, "pieces", initializer=_one_core)
    everyone = threading.Barrier(threads)
    list(pool.map(lambda _: everyone.wait(), range(threads)))
    torch.set_num_threads(threads)  # what threads to come start with, which the workers have just set to one
    return pool
