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
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Index = tuple[int, ...]


class Algebra:
    """Polynomials in `dims` variables, truncated to the multi-indices below the wanted ones.

    Args:
        dims: Number of coordinates.
        wanted: Multi-indices that must be there; lower ones are added.

    Attributes:
        indices: All multi-indices, the value first.
        pairs: For each index number a, the pairs (b, c) of numbers with b + c = a, c = 0 excluded, b = 0 excluded.
    """

    def __init__(self, dims: int, wanted: Iterable[Index]) -> None:
        closed = {(0,) * dims}
        for index in wanted:
            below: set[Index] = {()}
            for order in index:
                below = {(*b, k) for b in below for k in range(order + 1)}
            closed |= below
        self.dims = dims
        self.indices = sorted(closed, key=lambda i: (sum(i), tuple(-o for o in i)))
        self.number = {index: n for n, index in enumerate(self.indices)}
        self.degree = max(sum(i) for i in self.indices)
        self.size = len(self.indices)
        self.pairs: list[list[tuple[int, int]]] = [[] for _ in self.indices]
        for b, left in enumerate(self.indices):
            for c, right in enumerate(self.indices):
                total = tuple(x + y for x, y in zip(left, right, strict=True))
                if b and c and total in self.number:
                    self.pairs[self.number[total]].append((b, c))

    def factorial(self, n: int) -> int:
        """a! of index number n: derivative over coefficient."""
        return math.prod(math.factorial(o) for o in self.indices[n])

    # ------------------------------------------------------------ on stacks of channels, no autograd

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Coefficients of a * b."""
        out = a[0] * b
        for n in range(1, self.size):
            out[n].addcmul_(a[n], b[0])
            for i, j in self.pairs[n]:
                out[n].addcmul_(a[i], b[j])
        return out

    def transposed(self, g: Tensor, b: Tensor) -> Tensor:
        """Gradient of <g, a * b> in a."""
        out = g * b[0]
        for n in range(1, self.size):
            out[0].addcmul_(g[n], b[n])
            for i, j in self.pairs[n]:
                out[i].addcmul_(g[n], b[j])
        return out

    def powers(self, x: Tensor) -> list[tuple[int, list[tuple[int, Tensor]]]]:
        """For k >= 2 the channels of (x - x[0])^k that are not zero: [(k, [(index number, coefficient)])]."""
        found, last = [], {n: x[n] for n in range(1, self.size)}
        for k in range(2, self.degree + 1):
            power: dict[int, Tensor] = {}
            for n in range(1, self.size):
                for i, j in self.pairs[n]:
                    if i in last:
                        if k == 2 and i > j:
                            continue
                        factor = 2.0 if k == 2 and i < j else 1.0
                        if n in power:
                            power[n].addcmul_(last[i], x[j], value=factor)
                        else:
                            power[n] = last[i] * x[j] if factor == 1.0 else (last[i] * x[j]).mul_(factor)
            found.append((k, list(power.items())))
            last = power
        return found

    def compose(self, values: Sequence[Tensor], x: Tensor, powers: list) -> Tensor:
        """Coefficients of g(x) from `values[k] = g^(k)(x[0]) / k!`."""
        out = torch.empty_like(x)
        out[0] = values[0]
        if self.size > 1:
            torch.mul(x[1:], values[1], out=out[1:])
        for k, channels in powers:
            for n, coefficient in channels:
                out[n].addcmul_(coefficient, values[k])
        return out


@lru_cache(maxsize=64)
def algebra(dims: int, wanted: tuple[Index, ...]) -> Algebra:
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
        gw = flat.t().mm(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        gb = g[0].reshape(-1, g.shape[-1]).sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return gx, gw, gb


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
        flat = g.reshape(-1)
        along, across = flat.dot(wave.reshape(-1)), flat.dot(slope.reshape(-1))
        # sin = (w0 y - w1 z) / |w|^2 and cos = (w1 y + w0 z) / |w|^2 spare two stacks of channels.
        gw = torch.stack((w[0] * along - w[1] * across, w[1] * along + w[0] * across)) / (w * w).sum()
        return ctx.ring.transposed(g, slope), gw, None


def _cycle(value: Tensor, slope: Tensor, degree: int) -> list[Tensor]:
    """Normalised derivatives of a function with g'' = -g."""
    out, pair = [], (value, slope)
    for k in range(degree + 1):
        sign = -1.0 if (k // 2) % 2 else 1.0
        factor = sign / math.factorial(k)
        out.append(pair[k % 2] if factor == 1.0 else pair[k % 2] * factor)
    return out


class _Softmax(Function):
    """Softmax over the last axis, in the algebra: p = e / sum(e) with e = exp(s)."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, ring: Algebra) -> Tensor:
        p = softmax_stack(ring, s)
        ctx.save_for_backward(p)
        ctx.ring = ring
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        return softmax_gradient(ctx.ring, ctx.saved_tensors[0], g), None


def softmax_stack(ring: Algebra, s: Tensor) -> Tensor:
    """Softmax of score channels [P, ..., M], by p = e / sum(e)."""
    p0 = s[0].softmax(-1)
    # e / e[0]: exp of the non-constant part; q = p0 * that sums to 1 + z, and p = q / (1 + z).
    ones = [1.0 / math.factorial(k) for k in range(ring.degree + 1)]
    p = torch.empty_like(s)
    p[0] = p0
    torch.mul(s[1:], p0, out=p[1:])
    for k, channels in ring.powers(s):
        for n, coefficient in channels:
            p[n].addcmul_(coefficient, p0, value=ones[k])
    z = p.sum(-1, keepdim=True)
    for n in range(1, ring.size):
        # p (1 + z) = q, solved from low orders up; p[n] = q[n] - sum p[i] z[j].
        p[n].addcmul_(p0, z[n], value=-1.0)
        for i, j in ring.pairs[n]:
            p[n].addcmul_(p[i], z[j], value=-1.0)
    return p


def softmax_gradient(ring: Algebra, p: Tensor, g: Tensor) -> Tensor:
    """Adjoint of ds -> p (ds - sum(p ds))."""
    r = ring.transposed(g, p)
    return r.sub_(ring.transposed(r.sum(-1, keepdim=True).expand_as(p), p))


class _Attend(Function):
    """softmax(scale q k^T + bias) v for short rows, every channel pair in one small product."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, ring: Algebra
    ) -> Tensor:
        qs, ks, vs = (stack_tokens(t) for t in (q, k, v))  # [B, P N, D]
        s = fold(ring, torch.bmm(qs * scale, ks.mT), q, k)
        if bias is not None:
            s[0] += bias
        p = softmax_stack(ring, s)
        block = toeplitz(ring, p)  # [B, P N, P M]
        ctx.save_for_backward(qs, ks, vs, p, block)
        ctx.ring, ctx.scale = ring, scale
        return unstack_tokens(torch.bmm(block, vs), ring.size, q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        qs, ks, vs, p, block = ctx.saved_tensors
        ring = ctx.ring
        gs = stack_tokens(g)
        gv = torch.bmm(block.mT, gs)
        gp = fold_transposed(ring, torch.bmm(gs, vs.mT), p)
        g_scores = softmax_gradient(ring, p, gp)
        spread = toeplitz(ring, g_scores, outer=True)
        gq = torch.bmm(spread, ks).mul_(ctx.scale)
        gk = torch.bmm(spread.mT, qs).mul_(ctx.scale)
        gbias = None
        if ctx.needs_input_grad[3]:
            gbias = g_scores[0]
        lead = g.shape[1:3]
        out = [t.view(*lead, ring.size, -1, t.shape[-1]).permute(2, 0, 1, 3, 4) for t in (gq, gk, gv)]
        return (*out, gbias, None, None)


def stack_tokens(x: Tensor) -> Tensor:
    """[P, B, H, N, D] -> [B H, P N, D]."""
    return x.permute(1, 2, 0, 3, 4).reshape(x.shape[1] * x.shape[2], -1, x.shape[-1])


def unstack_tokens(x: Tensor, size: int, like: Tensor) -> Tensor:
    """[B H, P N, E] -> [P, B, H, N, E]."""
    return x.view(like.shape[1], like.shape[2], size, like.shape[3], x.shape[-1]).permute(2, 0, 1, 3, 4)


def fold(ring: Algebra, full: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """All channel pairs [B H, P N, P M] summed into product channels [P, B, H, N, M]."""
    size, n, m = ring.size, q.shape[3], k.shape[3]
    full = full.view(q.shape[1], q.shape[2], size, n, size, m)
    out = full.new_empty(size, q.shape[1], q.shape[2], n, m)
    out[0] = full[:, :, 0, :, 0]
    for a in range(1, size):
        torch.add(full[:, :, 0, :, a], full[:, :, a, :, 0], out=out[a])
        for i, j in ring.pairs[a]:
            out[a] += full[:, :, i, :, j]
    return out


def toeplitz(ring: Algebra, p: Tensor, outer: bool = False) -> Tensor:
    """Matrix [B H, P N, P M] of the product with p.

    Row a, column c holds p[a - c]; with `outer`, row b, column c holds p[b + c], the transpose that gradients of a
    bilinear form need.
    """
    size, (b, h, n, m) = ring.size, p.shape[1:]
    out = p.new_zeros(b, h, size, n, size, m)
    for a in range(size):
        for i, j in [(0, a), (a, 0), *ring.pairs[a]] if a else [(0, 0)]:
            if outer:
                out[:, :, i, :, j] = p[a]
            else:
                out[:, :, a, :, j] = p[i]
    return out.view(b * h, size * n, size * m)


def fold_transposed(ring: Algebra, full: Tensor, p: Tensor) -> Tensor:
    """Gradient of the product in p from all pairs <g[a], v[c]>: entry b sums over a - c = b."""
    size, (b, h, n, m) = ring.size, p.shape[1:]
    full = full.view(b, h, size, n, size, m)
    out = full.new_zeros(p.shape)
    for a in range(size):
        for i, j in [(0, a), (a, 0), *ring.pairs[a]] if a else [(0, 0)]:
            out[i] += full[:, :, a, :, j]
    return out
