"""`Jet`: a stack of Taylor coefficients that passes through a network as if it were a tensor.

Torch functions reach `Jet.__torch_function__`, which applies the rule of the polynomial algebra. A function without a
rule is differentiated by nested forward mode on the spot (exact as well, only slower), so any attention variant whose
operations have forward derivatives works; in-place writes do not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zoo.errors import CapabilityError
from zoo.layers.jets import Algebra, _Product

log = logging.getLogger("zoo.derivatives")
RULES: dict[Any, Callable[..., Any]] = {}


class Jet:
    """Coefficients [P, *shape] of a quantity of shape `shape` in the coordinates of `ring`."""

    __slots__ = ("c", "ring")
    __array_priority__ = 1000

    def __init__(self, c: Tensor, ring: Algebra) -> None:
        self.c, self.ring = c, ring

    # What modules ask of a tensor.
    shape = property(lambda self: self.c.shape[1:])
    dtype = property(lambda self: self.c.dtype)
    device = property(lambda self: self.c.device)
    ndim = property(lambda self: self.c.dim() - 1)
    requires_grad = property(lambda self: self.c.requires_grad)
    is_cuda = property(lambda self: self.c.is_cuda)
    mT = property(lambda self: Jet(self.c.mT, self.ring))
    T = property(lambda self: Jet(self.c.transpose(-1, -2), self.ring))

    def dim(self) -> int:
        return self.c.dim() - 1

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.c[0].numel()

    def is_floating_point(self) -> bool:
        return True

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        return self.c.is_contiguous()

    def element_size(self) -> int:
        return self.c.element_size()

    @property
    def value(self) -> Tensor:
        """Channel 0: what the plain network computes."""
        return self.c[0]

    def detach(self) -> Tensor:
        """The value as a constant."""
        return self.c[0].detach()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Jet:
        key = key if isinstance(key, tuple) else (key,)
        return Jet(self.c[(slice(None), *key)], self.ring)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"Jet has no {name!r}")
        function = getattr(torch.Tensor, name)
        if not callable(function):
            raise AttributeError(f"Jet has no {name!r}")
        return lambda *args, **kwargs: apply(name, function, (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return apply(getattr(func, "__name__", str(func)), func, args, kwargs or {})

    def __add__(self, other: Any) -> Jet:
        return add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Jet:
        return add(self, -other)

    def __rsub__(self, other: Any) -> Jet:
        return add(-self, other)

    def __neg__(self) -> Jet:
        return Jet(-self.c, self.ring)

    def __mul__(self, other: Any) -> Jet:
        return mul(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Jet:
        return div(self, other)

    def __rtruediv__(self, other: Any) -> Jet:
        return mul(self.reciprocal(), other)

    def __pow__(self, exponent: Any) -> Jet:
        return self.pow(exponent)

    def __matmul__(self, other: Any) -> Jet:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Jet:
        return matmul(other, self)

    __hash__ = object.__hash__

    def __eq__(self, other: Any) -> Any:
        return self.value == _value(other)

    def __ne__(self, other: Any) -> Any:
        return self.value != _value(other)

    def __gt__(self, other: Any) -> Tensor:
        return self.value > _value(other)

    def __ge__(self, other: Any) -> Tensor:
        return self.value >= _value(other)

    def __lt__(self, other: Any) -> Tensor:
        return self.value < _value(other)

    def __le__(self, other: Any) -> Tensor:
        return self.value <= _value(other)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Jet) else x


def apply(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run `func` by its rule, or by nested forward mode."""
    rule = RULES.get(name.strip("_")) or RULES.get(f"{getattr(func, '__module__', None)}.{name}")
    if rule is not None:
        return rule(*args, **kwargs)
    if name.endswith("_") and not name.startswith("__"):
        raise CapabilityError(
            f"Taylor mode cannot follow the in-place operation {name!r}; use model derivatives 'jvp' or 'forward_reverse'"
        )
    return forward_mode(name, func, args, kwargs)


def rules(*names: Any) -> Callable[[Callable], Callable]:
    """Register a function as the rule of torch functions by name; kernels are named with their module."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# ---------------------------------------------------------------- arithmetic


def ring_of(*items: Any) -> Algebra:
    """The algebra of the first jet among `items`, sequences included."""
    for item in items:
        if isinstance(item, Jet):
            return item.ring
        if isinstance(item, (list, tuple)):
            found = ring_of(*item)
            if found is not None:
                return found
    return None


def lift(x: Any, like: Jet) -> Jet:
    """A constant as a jet."""
    if isinstance(x, Jet):
        return x
    x = torch.as_tensor(x, dtype=like.dtype, device=like.device)
    zeros = x.new_zeros(like.ring.size - 1, *x.shape)
    return Jet(torch.cat((x[None], zeros)), like.ring)


def _wide(c: Tensor, dims: int) -> Tensor:
    """Stack with `dims` axes behind the channels."""
    return c.reshape(c.shape[0], *(1,) * (dims + 1 - c.dim()), *c.shape[1:])


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
        return Jet(_Product.apply(a.c, b.c, a.ring), a.ring)
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
            left = torch.cat([x[0], x[n], *(x[i] for i, _ in ring.pairs[n])], -1)
            right = torch.cat([y[n], y[0], *(y[j] for _, j in ring.pairs[n])], -2)
            out.append(left @ right)
        return Jet(torch.stack(out), ring)
    jet, other = (a, b) if isinstance(a, Jet) else (b, a)
    dims = max(jet.ndim, other.dim())
    c = _wide(jet.c, dims)
    return Jet(c @ other if jet is a else other @ c, jet.ring)


def _axis(dim: int) -> int:
    return dim if dim < 0 else dim + 1


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    log.info(message)


def forward_mode(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Derivatives of one function by nested jvp along the curve that its arguments' jets describe."""
    ring = ring_of(args, tuple(kwargs.values()))
    warn_once(f"no Taylor rule for {name!r}: nested forward mode is used for it")
    leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    jets = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Jet)]

    def curve(variables: tuple[Tensor, ...]) -> Any:
        now = list(leaves)
        for n in jets:
            c, total = leaves[n].c, leaves[n].c[0]
            for number, index in enumerate(ring.indices[1:], 1):
                factor = 1.0
                for variable, order in zip(variables, index, strict=True):
                    for _ in range(order):
                        factor = factor * variable
                total = total + c[number] * factor
            now[n] = total
        a, k = torch.utils._pytree.tree_unflatten(now, spec)
        return func(*a, **k)

    zero = tuple(leaves[jets[0]].c.new_zeros(()) for _ in range(ring.dims))
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

    columns = [derivative(index)(zero) for index in ring.indices]
    outs = []
    for leaf in zip(*columns, strict=True):
        if not leaf[0].is_floating_point():
            outs.append(leaf[0])
            continue
        outs.append(Jet(torch.stack([x / ring.factorial(n) for n, x in enumerate(leaf)]), ring))
    return torch.utils._pytree.tree_unflatten(outs, shape[0])


def _directional(function: Callable, axis: int) -> Callable:
    def pushed(variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tangents = tuple(
            torch.ones_like(v) if n == axis else torch.zeros_like(v) for n, v in enumerate(variables)
        )
        return torch.func.jvp(function, (variables,), (tangents,))[1]

    return pushed
