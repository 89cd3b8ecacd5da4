"""Truncated Taylor polynomials of a network's values in its coordinates, pushed forward through every layer at once.

A `Jet` holds, for each multi-index a of a set closed downwards, the coefficient `D^a f / a!` as one channel of a stacked
tensor [P, *shape]; channel 0 is the value. Linear layers act on the stack in one product, nonlinear ones by the rules of
the polynomial algebra. The differential of y = g(x) in that algebra is `dy = g'(x) dx`, so each backward is a
multiplication by one jet, transposed, and derivatives of the weights cost one ordinary backward.

Letters: P channels, N points, K tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Index = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """A sum of derivatives with constant factors, such as u_t - nu u_xx.

    Attributes:
        terms: Multi-indices and their factors.
    """

    terms: tuple[tuple[Index, float], ...]


Key = Index | Operator


def below(index: Index) -> set[Index]:
    """All multi-indices that divide this one, itself among them."""
    found: set[Index] = {()}
    for order in index:
        found = {(*b, k) for b in found for k in range(order + 1)}
    return found


class Algebra:
    """Polynomials in `dims` variables, truncated to the multi-indices below the wanted ones.

    An operator gets one channel in place of one for each of its terms where no product needs these: the differences
    dropped are an ideal, so the quotient is an algebra as well, with factors on its products. Burgers' equation then has
    three channels (u, u_x, u_t - nu u_xx) instead of four, Navier-Stokes in the plane four instead of six.

    Args:
        dims: Number of coordinates.
        wanted: Multi-indices and operators that must be there; lower ones are added.

    Attributes:
        keys: Multi-index or operator of each channel, the value first.
        number: Channel of each key.
        pairs: For each channel a, the (b, c, factor) whose products add to it, b = 0 and c = 0 excluded.
        polynomials: The algebra in which no operator is merged; itself where none is.
    """

    def __init__(self, dims: int, wanted: Iterable[Key]) -> None:
        wanted = list(wanted)
        operators = [key for key in wanted if isinstance(key, Operator)]
        plain = {key for key in wanted if not isinstance(key, Operator)}
        terms = [index for op in operators for index, _ in op.terms]
        closed = set().union({(0,) * dims}, *(below(index) for index in (*plain, *terms)))
        lower = set().union(*(below(index) - {index} for index in closed))
        merged = [
            op
            for op in operators
            if all(a not in lower and a not in plain and terms.count(a) == 1 for a, _ in op.terms)
        ]
        gone = {index for op in merged for index, _ in op.terms}
        indices = sorted(closed, key=lambda i: (sum(i), tuple(-o for o in i)))
        self.dims, self.degree = dims, max(sum(i) for i in indices)
        self.keys: list[Key] = [*(i for i in indices if i not in gone), *merged]
        self.number = {key: n for n, key in enumerate(self.keys)}
        self.size = len(self.keys)
        self.polynomials = Algebra(dims, indices) if merged else self
        self.pairs = [self._pairs(key) for key in self.keys]

    def _pairs(self, key: Key) -> list[tuple[int, int, float]]:
        if isinstance(key, Operator):
            factors: dict[tuple[int, int], float] = {}
            for index, factor in key.terms:
                for b, c, _ in self._pairs(index):
                    factors[b, c] = factors.get((b, c), 0.0) + factor * factorial(index)
            return [(b, c, factor) for (b, c), factor in factors.items() if factor]
        halves = [(b, tuple(o - p for o, p in zip(key, b, strict=True))) for b in sorted(below(key))]
        return [(self.number[b], self.number[c], 1.0) for b, c in halves if any(b) and any(c)]

    def derivative(self, c: Tensor, key: Key) -> Tensor:
        """A derivative or an operator's value from coefficients [P, ...]."""
        if key in self.number:
            found = c[self.number[key]]
            scale = 1 if isinstance(key, Operator) else factorial(key)
            return found if scale == 1 else found * scale
        return sum(self.derivative(c, index) * factor for index, factor in key.terms)

    def project(self, c: Tensor) -> Tensor:
        """Coefficients of `polynomials` to coefficients here."""
        if self.polynomials is self:
            return c
        full = self.polynomials
        rows = [
            full.derivative(c, key) if isinstance(key, Operator) else c[full.number[key]] for key in self.keys
        ]
        return torch.stack(rows)

    def represent(self, c: Tensor) -> Tensor:
        """Some coefficients of `polynomials` that project to these."""
        if self.polynomials is self:
            return c
        out = c.new_zeros(self.polynomials.size, *c.shape[1:])
        for key, row in zip(self.keys, c, strict=True):
            index, factor = key.terms[0] if isinstance(key, Operator) else (key, 1.0 / factorial(key))
            out[self.polynomials.number[index]] = row / (factor * factorial(index))
        return out

    # ------------------------------------------------------------ on stacks of channels, no autograd

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Coefficients of a * b."""
        out = a[0] * b
        for n in range(1, self.size):
            out[n].addcmul_(a[n], b[0])
            for i, j, factor in self.pairs[n]:
                out[n].addcmul_(a[i], b[j], value=factor)
        return out

    def transposed(self, g: Tensor, b: Tensor) -> Tensor:
        """Gradient of <g, a * b> in a."""
        out = g * b[0]
        for n in range(1, self.size):
            out[0].addcmul_(g[n], b[n])
            for i, j, factor in self.pairs[n]:
                out[i].addcmul_(g[n], b[j], value=factor)
        return out

    def square(self, a: Tensor, scale: float = 1.0) -> Tensor:
        """Coefficients of scale * a * a."""
        out = a * (a[0] * (2.0 * scale))
        out[0] *= 0.5
        for n in range(1, self.size):
            for i, j, factor in _unordered(self.pairs[n]):
                out[n].addcmul_(a[i], a[j], value=scale * factor)
        return out

    def powers(self, x: Tensor) -> list[tuple[int, list[tuple[int, Tensor, float]]]]:
        """For k >= 2 the channels of (x - x[0])^k that are not zero: [(k, [(index number, tensor, its factor)])]."""
        found, last = [], {n: (x[n], 1.0) for n in range(1, self.size)}
        for k in range(2, self.degree + 1):
            power: dict[int, tuple[Tensor, float]] = {}
            for n in range(1, self.size):
                for i, j, factor in _unordered(self.pairs[n]) if k == 2 else self.pairs[n]:
                    if i not in last:
                        continue
                    tensor, scale = last[i]
                    if n in power:
                        power[n][0].addcmul_(tensor, x[j], value=factor * scale / power[n][1])
                    else:
                        power[n] = tensor * x[j], factor * scale
            found.append((k, [(n, *scaled) for n, scaled in power.items()]))
            last = power
        return found

    def compose(self, values: Sequence[Tensor], x: Tensor, powers: list) -> Tensor:
        """Coefficients of g(x) from `values[k] = g^(k)(x[0]) / k!`."""
        out = torch.empty_like(x)
        out[0] = values[0]
        if self.size > 1:
            torch.mul(x[1:], values[1], out=out[1:])
        for k, channels in powers:
            for n, tensor, factor in channels:
                out[n].addcmul_(tensor, values[k], value=factor)
        return out


def _unordered(pairs: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """The pairs of a product of equal factors, each once."""
    return [(i, j, factor if i == j else 2.0 * factor) for i, j, factor in pairs if i <= j]


def factorial(index: Index) -> int:
    """a! of a multi-index a: derivative over coefficient."""
    return math.prod(map(math.factorial, index))


@lru_cache(maxsize=64)
def algebra(dims: int, wanted: tuple[Key, ...]) -> Algebra:
    """The algebra for `wanted`, made once."""
    return Algebra(dims, wanted)


class _Linear(Function):
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


class _Product(Function):
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


class _Pointwise(Function):
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


class _Tanh(Function):
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


class _Wave(Function):
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
