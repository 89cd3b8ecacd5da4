"""Softmax and short-row attention on stacks of Taylor coefficients, forward and backward written out.

Rows of a pseudo-sequence have a handful of tokens, so all channel pairs of queries and keys go through one batched product
instead of one product per pair. Letters: P channels, B batch, H heads, N queries, M keys, D and E head widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from zoo.layers.jet_algebra import Algebra


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
    p0 = (
        s[0] - s[0].amax(-1, keepdim=True)
    ).exp_()  # torch's softmax takes five times as long on rows of five
    p0.div_(p0.sum(-1, keepdim=True))
    # e / e[0]: exp of the non-constant part; q = p0 * that sums to 1 + z, and p = q / (1 + z).
    ones = [1.0 / math.factorial(k) for k in range(ring.degree + 1)]
    p = torch.empty_like(s)
    p[0] = p0
    torch.mul(s[1:], p0, out=p[1:])
    for k, channels in ring.powers(s):
        for n, tensor, factor in channels:
            p[n].addcmul_(tensor, p0, value=factor * ones[k])
    z = p.sum(-1, keepdim=True)
    for n in range(1, ring.size):
        # p (1 + z) = q, solved from low orders up; p[n] = q[n] - sum p[i] z[j].
        p[n].addcmul_(p0, z[n], value=-1.0)
        for i, j, factor in ring.pairs[n]:
            p[n].addcmul_(p[i], z[j], value=-factor)
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
        for i, j, factor in ring.pairs[a]:
            out[a].add_(full[:, :, i, :, j], alpha=factor)
    return out


def toeplitz(ring: Algebra, p: Tensor, outer: bool = False) -> Tensor:
    """Matrix [B H, P N, P M] of the product with p.

    Row a, column c holds p[a - c]; with `outer`, row b, column c holds p[b + c], the transpose that gradients of a
    bilinear form need.
    """
    size, (b, h, n, m) = ring.size, p.shape[1:]
    out = p.new_zeros(b, h, size, n, size, m)
    for a, i, j, factor in triples(ring):
        if outer:
            out[:, :, i, :, j].add_(p[a], alpha=factor)
        else:
            out[:, :, a, :, j].add_(p[i], alpha=factor)
    return out.view(b * h, size * n, size * m)


def fold_transposed(ring: Algebra, full: Tensor, p: Tensor) -> Tensor:
    """Gradient of the product in p from all pairs <g[a], v[c]>: entry b sums over a - c = b."""
    size, (b, h, n, m) = ring.size, p.shape[1:]
    full = full.view(b, h, size, n, size, m)
    out = full.new_zeros(p.shape)
    for a, i, j, factor in triples(ring):
        out[i].add_(full[:, :, a, :, j], alpha=factor)
    return out


def triples(ring: Algebra) -> Iterator[tuple[int, int, int, float]]:
    """All (a, i, j, factor) with a product of channels i and j in channel a."""
    yield 0, 0, 0, 1.0
    for a in range(1, ring.size):
        yield from ((a, i, j, factor) for i, j, factor in [(0, a, 1.0), (a, 0, 1.0), *ring.pairs[a]])
