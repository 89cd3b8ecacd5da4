"""Rules of `Jet` for functions that only move, copy or sum numbers: the same on every channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.layers.jet_arithmetic import matmul
from zoo.layers.jet_forward import forward_mode
from zoo.layers.jet_tensor import Jet, _axis, _value, _wide, lift, ring_of, rules


def _axes(dim: Any) -> Any:
    return _axis(dim) if isinstance(dim, int) else tuple(_axis(d) for d in dim)


def _reduce(function: Callable) -> Callable:
    def rule(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Jet:
        dim = axis if dim is None else dim
        dim = tuple(range(-x.ndim, 0)) if dim is None or dim == () else dim
        if x.ndim == 0:
            return x
        return Jet(function(x.c, _axes(dim), keepdim=keepdim), x.ring)

    return rule


rules("sum")(_reduce(torch.sum))
rules("mean")(_reduce(torch.mean))
rules("cumsum")(lambda x, dim, dtype=None: Jet(x.c.cumsum(_axis(dim)), x.ring))
rules("tril")(lambda x, diagonal=0: Jet(x.c.tril(diagonal), x.ring))
rules("triu")(lambda x, diagonal=0: Jet(x.c.triu(diagonal), x.ring))
rules("transpose", "swapaxes")(lambda x, a, b: Jet(x.c.transpose(_axis(a), _axis(b)), x.ring))
rules("contiguous")(lambda x, memory_format=None: Jet(x.c.contiguous(), x.ring))
rules("clone")(lambda x, memory_format=None: Jet(x.c.clone(), x.ring))
rules("unsqueeze")(lambda x, dim: Jet(x.c.unsqueeze(_axis(dim)), x.ring))
rules("flip")(lambda x, *dims: Jet(x.c.flip(_axes(_sizes(dims))), x.ring))
rules("pad")(lambda x, pad, mode="constant", value=None: Jet(_pad(x.c, pad, mode, value), x.ring))
rules("repeat_interleave")(lambda x, n, dim=None: Jet(x.c.repeat_interleave(n, _axis(dim)), x.ring))
rules("index_select")(lambda x, dim, index: Jet(x.c.index_select(_axis(dim), index), x.ring))
rules("narrow")(lambda x, dim, start, length: Jet(x.c.narrow(_axis(dim), start, length), x.ring))
rules("select")(lambda x, dim, index: Jet(x.c.select(_axis(dim), index), x.ring))
rules("getitem")(lambda x, key: x[key])
rules("detach")(lambda x: x.value.detach())
rules("diagonal")(
    lambda x, offset=0, dim1=0, dim2=1: Jet(x.c.diagonal(offset, _axis(dim1), _axis(dim2)), x.ring)
)
for _name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"):
    rules(_name)(lambda x, *a, _n=_name, **k: getattr(x.value, _n)(*a, **k))
for _name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
    rules(_name)(lambda x, *a, _n=_name, **k: getattr(torch, _n)(x.value, *a, **k))
for _name in (
    "isfinite",
    "isnan",
    "isinf",
    "sign",
    "argmax",
    "argsort",
    "argmin",
    "eq",
    "ne",
    "gt",
    "ge",
    "lt",
    "le",
):
    rules(_name)(lambda *a, _n=_name, **k: getattr(torch, _n)(*map(_value, a), **k))


def _pad(c: Tensor, pad: Any, mode: str, value: Any) -> Tensor:
    if not value:
        return F.pad(c, pad, mode)
    return torch.cat((F.pad(c[:1], pad, mode, value), F.pad(c[1:], pad, mode)))


def _sizes(sizes: tuple) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


@rules("squeeze")
def squeeze(x: Jet, dim: int | None = None) -> Jet:
    if dim is None:
        return Jet(x.c.reshape(x.c.shape[0], *(s for s in x.shape if s != 1)), x.ring)
    return Jet(x.c.squeeze(_axis(dim)), x.ring)


@rules("to", "float", "double", "type_as", "requires_grad", "type")
def cast(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.dtype, Tensor, Jet))]
    dtype = getattr(wanted[0], "dtype", wanted[0]) if wanted else x.dtype
    return x if dtype == x.dtype else Jet(x.c.to(dtype), x.ring)


@rules("reshape", "view")
def reshape(x: Jet, *sizes: Any) -> Jet:
    return Jet(x.c.reshape(x.c.shape[0], *_sizes(sizes)), x.ring)


@rules("expand", "broadcast_to")
def expand(x: Jet, *sizes: Any) -> Jet:
    sizes = _sizes(sizes)
    return Jet(_wide(x.c, len(sizes)).expand(x.c.shape[0], *sizes), x.ring)


@rules("expand_as")
def expand_as(x: Jet, other: Any) -> Jet:
    return expand(x, tuple(other.shape))


@rules("repeat")
def repeat(x: Jet, *sizes: Any) -> Jet:
    sizes = _sizes(sizes)
    return Jet(_wide(x.c, len(sizes)).repeat(1, *sizes), x.ring)


@rules("permute")
def permute(x: Jet, *dims: Any) -> Jet:
    return Jet(x.c.permute(0, *(d % x.ndim + 1 for d in _sizes(dims))), x.ring)


@rules("movedim", "moveaxis")
def movedim(x: Jet, source: int, destination: int) -> Jet:
    return Jet(x.c.movedim(_axis(source), _axis(destination)), x.ring)


@rules("unflatten")
def unflatten(x: Jet, dim: int, sizes: Any) -> Jet:
    return Jet(x.c.unflatten(_axis(dim), sizes), x.ring)


@rules("flatten")
def flatten(x: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    return Jet(x.c.flatten(_axis(start_dim), _axis(end_dim)), x.ring)


@rules("unfold")
def unfold(x: Jet, dim: int, size: int, step: int) -> Jet:
    return Jet(x.c.unfold(_axis(dim), size, step), x.ring)


@rules("split", "split_with_sizes")
def split(x: Jet, size: Any, dim: int = 0) -> tuple[Jet, ...]:
    return tuple(Jet(part, x.ring) for part in x.c.split(size, _axis(dim)))


@rules("chunk")
def chunk(x: Jet, chunks: int, dim: int = 0) -> tuple[Jet, ...]:
    return tuple(Jet(part, x.ring) for part in x.c.chunk(chunks, _axis(dim)))


@rules("unbind")
def unbind(x: Jet, dim: int = 0) -> tuple[Jet, ...]:
    return tuple(Jet(part, x.ring) for part in x.c.unbind(_axis(dim)))


def _lifted(items: Any) -> list[Tensor]:
    like = next(i for i in items if isinstance(i, Jet))
    return [lift(i, like).c for i in items]


@rules("cat", "concat", "concatenate")
def cat(items: Any, dim: int = 0, *, axis: int | None = None) -> Jet:
    return Jet(torch.cat(_lifted(items), _axis(dim if axis is None else axis)), ring_of(items))


@rules("stack")
def stack(items: Any, dim: int = 0) -> Jet:
    return Jet(torch.stack(_lifted(items), _axis(dim)), ring_of(items))


@rules("gather")
def gather(x: Jet, dim: int, index: Tensor, sparse_grad: bool = False) -> Jet:
    index = index.unsqueeze(0).expand(x.c.shape[0], *index.shape)
    return Jet(x.c.gather(_axis(dim), index), x.ring)


def _extreme(function: Callable, name: str) -> None:
    @rules(f"a{name}")
    def extreme(x: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
        """The largest (smallest) entry carries its derivatives with it."""
        if not isinstance(dim, int):
            x, dim = x.reshape(-1) if dim in (None, ()) else _merge(x, dim), -1
        index = function(x.value, dim=dim, keepdim=True)
        out = gather(x, dim, index)
        return out if keepdim else out.squeeze(dim)


def _merge(x: Jet, dims: tuple[int, ...]) -> Jet:
    if len(dims) != 1:
        raise NotImplementedError(f"Taylor mode: extreme over several axes {dims}")
    return x.movedim(dims[0], -1)


_extreme(torch.argmax, "max")
_extreme(torch.argmin, "min")


rules("clamp_max")(lambda x, max: clamp(x, max=max))


@rules("clamp", "clip", "clamp_min")
def clamp(x: Jet, min: Any = None, max: Any = None) -> Jet:
    inside = torch.ones_like(x.value, dtype=torch.bool)
    value = x.value
    if min is not None:
        inside, value = inside & (x.value >= min), value.clamp(min=min)
    if max is not None:
        inside, value = inside & (x.value <= max), value.clamp(max=max)
    return Jet(torch.cat((value[None], x.c[1:] * inside)), x.ring)


@rules("einsum")
def einsum(equation: str, *operands: Any) -> Jet:
    operands = (
        tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    )
    jets = [isinstance(o, Jet) for o in operands]
    ring = ring_of(operands)
    if sum(jets) > 2 or "..." in equation:
        return forward_mode("einsum", torch.einsum, (equation, *operands), {})
    rows = [o.c.unbind(0) if j else None for o, j in zip(operands, jets, strict=True)]
    first, *second = [n for n, j in enumerate(jets) if j]

    def at(i: int, j: int) -> Tensor:
        now = list(operands)
        now[first] = rows[first][i]
        if second:
            now[second[0]] = rows[second[0]][j]
        return torch.einsum(equation, *now)

    if not second:
        return Jet(torch.stack([at(n, 0) for n in range(ring.size)]), ring)
    out = [at(0, 0)]
    for n in range(1, ring.size):
        out.append(sum((at(i, j) * w for i, j, w in ring.pairs[n]), at(0, n) + at(n, 0)))
    return Jet(torch.stack(out), ring)


@rules("baddbmm", "addmm", "addbmm")
def addmm(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return x * beta + matmul(a, b) * alpha
