"""Nested forward mode for one function inside a jet: exact as well, only slower; what has no Taylor rule goes here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zoo.layers.jet_algebra import factorial
from zoo.layers.jet_tensor import Jet, ring_of

log = logging.getLogger("zoo.derivatives")


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    log.info(message)


def forward_mode(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Derivatives of one function by nested jvp along the curve that its arguments' jets describe."""
    ring = ring_of(args, tuple(kwargs.values()))
    full = ring.polynomials
    warn_once(f"no Taylor rule for {name!r}: nested forward mode is used for it")
    leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    jets = {n: ring.represent(leaf.c) for n, leaf in enumerate(leaves) if isinstance(leaf, Jet)}

    def curve(variables: tuple[Tensor, ...]) -> Any:
        now = list(leaves)
        for n, c in jets.items():
            total = c[0]
            for number, index in enumerate(full.keys[1:], 1):
                factor = 1.0
                for variable, order in zip(variables, index, strict=True):
                    for _ in range(order):
                        factor = factor * variable
                total = total + c[number] * factor
            now[n] = total
        a, k = torch.utils._pytree.tree_unflatten(now, spec)
        return func(*a, **k)

    like = next(iter(jets.values()))
    zero = tuple(like.new_zeros(()) for _ in range(ring.dims))
    shape: list[Any] = []

    def flat(variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out, out_spec = torch.utils._pytree.tree_flatten(curve(variables))
        shape[:] = [out_spec]
        return tuple(out)

    def derivative(index: tuple[int, ...]) -> Callable:
        function = flat
        for axis, order in enumerate(index):
            for _ in range(order):
                function = _directional(function, axis)
        return function

    columns = [derivative(index)(zero) for index in full.keys]
    outs = []
    for leaf in zip(*columns, strict=True):
        if not leaf[0].is_floating_point():
            outs.append(leaf[0])
            continue
        c = torch.stack([x / factorial(index) for x, index in zip(leaf, full.keys, strict=True)])
        outs.append(Jet(ring.project(c), ring))
    return torch.utils._pytree.tree_unflatten(outs, shape[0])


def _directional(function: Callable, axis: int) -> Callable:
    def pushed(variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tangents = tuple(
            torch.ones_like(v) if n == axis else torch.zeros_like(v) for n, v in enumerate(variables)
        )
        return torch.func.jvp(function, (variables,), (tangents,))[1]

    return pushed
