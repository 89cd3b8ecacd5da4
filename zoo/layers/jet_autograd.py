"""Backward passes of the operations on stacks of Taylor coefficients.

The differential of y = g(x) in the algebra of `zoo.layers.jet_algebra` is `dy = g'(x) dx`, so each backward is a multiplication by one
jet, transposed, and derivatives of the weights cost one ordinary backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from zoo.layers.jet_algebra import Algebra


class JetLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        y = x.reshape(-1, x.shape[-1]).mm(weight.t()).view(*x.shape[:-1], weight.shape[0])
        if bias is not None:
            y[0] += bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        gx = flat.mm(weight).view(x.shape) if ctx.needs_input_grad[0] else None
        gw = _outer(flat, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        gb = g[0].reshape(-1, g.shape[-1]).sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return gx, gw, gb


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of two tall matrices; the narrower one first is up to seven times faster."""
    return a.t().mm(b) if a.shape[1] <= b.shape[1] else b.t().mm(a).t()


class JetProduct(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, ring: Algebra) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.ring = ring
        return ring.product(*_same_rank(a, b))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        a, b = ctx.saved_tensors
        wide_a, wide_b = _same_rank(a, b)
        ga = (
            ctx.ring.transposed(g, wide_b).sum_to_size(wide_a.shape).view(a.shape)
            if ctx.needs_input_grad[0]
            else None
        )
        gb = (
            ctx.ring.transposed(g, wide_a).sum_to_size(wide_b.shape).view(b.shape)
            if ctx.needs_input_grad[1]
            else None
        )
        return ga, gb, None


def _same_rank(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give both stacks the same number of axes behind the channels."""
    if a.dim() < b.dim():
        a = a.reshape(a.shape[0], *(1,) * (b.dim() - a.dim()), *a.shape[1:])
    elif b.dim() < a.dim():
        b = b.reshape(b.shape[0], *(1,) * (a.dim() - b.dim()), *b.shape[1:])
    return a, b


class JetPointwise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Algebra, rule: Callable[[Tensor, int], list[Tensor]]) -> Tensor:
        powers = ring.powers(x)
        values = rule(x[0], ring.degree + 2)
        if ctx.needs_input_grad[0]:
            # Normalised derivatives of g' are (k + 1) times the next ones of g.
            slope = [values[1]] + [values[k] * k for k in range(2, ring.degree + 2)]
            ctx.save_for_backward(ring.compose(slope, x, powers))
            ctx.ring = ring
        return ring.compose(values, x, powers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        return ctx.ring.transposed(g, ctx.saved_tensors[0]), None, None


class JetTanh(Function):
    """Its slope is 1 - y^2, a square in the algebra, so that nothing but y is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Algebra, rule: Callable[[Tensor, int], list[Tensor]]) -> Tensor:
        y = ring.compose(rule(x[0], ring.degree + 1), x, ring.powers(x))
        ctx.save_for_backward(y)
        ctx.ring = ring
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        slope = ctx.ring.square(ctx.saved_tensors[0], -1.0)
        slope[0] += 1.0
        return ctx.ring.transposed(g, slope), None, None


class JetWave(Function):
    """y = w[0] sin x + w[1] cos x, PINNsFormer's activation; its slope z = w[0] cos x - w[1] sin x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ring: Algebra) -> Tensor:
        powers = ring.powers(x)
        s, c = x[0].sin(), x[0].cos()
        y, z = (s * w[0]).addcmul_(c, w[1]), (c * w[0]).addcmul_(s, -w[1])
        wave = ring.compose(_cycle(y, z, ring.degree), x, powers)
        ctx.save_for_backward(wave, ring.compose(_cycle(z, -y, ring.degree), x, powers), w)
        ctx.ring = ring
        return wave

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        wave, slope, w = ctx.saved_tensors
        gx = ctx.ring.transposed(g, slope)
        # <g, slope> is the sum of gx[0]; sin = (w0 y - w1 z) / |w|^2, cos = (w1 y + w0 z) / |w|^2 spare two stacks.
        along, across = g.reshape(-1).dot(wave.reshape(-1)), gx[0].sum()
        gw = torch.stack((w[0] * along - w[1] * across, w[1] * along + w[0] * across)) / (w * w).sum()
        return gx, gw, None


def _cycle(value: Tensor, slope: Tensor, degree: int) -> list[Tensor]:
    """Normalised derivatives of a function with g'' = -g."""
    out, pair = [], (value, slope)
    for k in range(degree + 1):
        sign = -1.0 if (k // 2) % 2 else 1.0
        factor = sign / math.factorial(k)
        out.append(pair[k % 2] if factor == 1.0 else pair[k % 2] * factor)
    return out
