"""Rules of `Jet` for sums, products and quotients, matrix products among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.layers.jet_autograd import JetProduct
from zoo.layers.jet_tensor import Jet, _wide, rules


@rules("add", "iadd", "radd")
def add(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    if not isinstance(a, Jet):
        return add(b, a) if alpha == 1 else add(b * alpha, a)
    if isinstance(b, Jet):
        dims = max(a.ndim, b.ndim)
        return Jet(torch.add(_wide(a.c, dims), _wide(b.c, dims), alpha=alpha), a.ring)
    value = torch.add(a.c[0], b, alpha=alpha)
    if value.shape != a.shape:
        wide = _wide(a.c, value.dim()).expand(a.c.shape[0], *value.shape)
        return Jet(torch.cat((value[None], wide[1:])), a.ring)
    return Jet(torch.cat((value[None], a.c[1:])), a.ring)


@rules("sub", "isub", "subtract")
def sub(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    return add(a, -(b * alpha if alpha != 1 else b))


@rules("rsub")
def rsub(a: Any, b: Any) -> Jet:
    return add(-a, b)


@rules("neg", "negative")
def neg(a: Jet) -> Jet:
    return -a


@rules("mul", "multiply", "imul", "rmul")
def mul(a: Any, b: Any) -> Jet:
    if not isinstance(a, Jet):
        a, b = b, a
    if isinstance(b, Jet):
        return Jet(JetProduct.apply(a.c, b.c, a.ring), a.ring)
    dims = max(a.ndim, b.dim()) if isinstance(b, Tensor) else a.ndim
    return Jet(_wide(a.c, dims) * b, a.ring)


@rules("div", "true_divide", "truediv", "divide", "idiv")
def div(a: Any, b: Any) -> Jet:
    if isinstance(b, Jet):
        return mul(b.reciprocal(), a)
    return mul(a, 1.0 / b)


@rules("rdiv", "rtruediv")
def rdiv(a: Any, b: Any) -> Jet:
    return mul(a.reciprocal(), b)


@rules("addcmul")
def addcmul(a: Any, b: Any, c: Any, *, value: float = 1) -> Any:
    return a + (b * c) * value


@rules("square")
def square(a: Jet) -> Jet:
    return mul(a, a)


@rules("matmul", "bmm", "mm", "rmatmul")
def matmul(a: Any, b: Any) -> Jet:
    """Product of matrices; constant factors act on all channels at once."""
    if isinstance(a, Jet) and isinstance(b, Jet):
        ring, dims = a.ring, max(a.ndim, b.ndim)
        x, y = _wide(a.c, dims).unbind(0), _wide(b.c, dims).unbind(0)
        out = [x[0] @ y[0]]
        for n in range(1, ring.size):
            left = torch.cat([x[0], x[n], *(x[i] if w == 1 else x[i] * w for i, _, w in ring.pairs[n])], -1)
            right = torch.cat([y[n], y[0], *(y[j] for _, j, _ in ring.pairs[n])], -2)
            out.append(left @ right)
        return Jet(torch.stack(out), ring)
    jet, other = (a, b) if isinstance(a, Jet) else (b, a)
    dims = max(jet.ndim, other.dim())
    c = _wide(jet.c, dims)
    return Jet(c @ other if jet is a else other @ c, jet.ring)
