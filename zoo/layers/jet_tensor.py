"""`Jet`: a stack of Taylor coefficients that passes through a network as if it were a tensor.

Torch functions reach `Jet.__torch_function__`, which applies the rule of the polynomial algebra. A function without a
rule is differentiated by nested forward mode on the spot (exact as well, only slower), so any attention variant whose
operations have forward derivatives works; in-place writes do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.errors import CapabilityError
from zoo.layers.jet_algebra import Algebra

RULES: dict[Any, Callable[..., Any]] = {}


def _operator(name: str) -> Callable[[Jet, Any], Jet]:
    return lambda self, other: RULES[name](self, other)


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

    # Operators go by the rules of the same names, which `jet_arithmetic` registers.
    __add__ = __radd__ = _operator("add")
    __sub__, __rsub__ = _operator("sub"), _operator("rsub")
    __mul__ = __rmul__ = _operator("mul")
    __truediv__, __rtruediv__ = _operator("div"), _operator("rdiv")
    __pow__, __matmul__ = _operator("pow"), _operator("matmul")

    def __rmatmul__(self, other: Any) -> Jet:
        return RULES["matmul"](other, self)

    def __neg__(self) -> Jet:
        return Jet(-self.c, self.ring)

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
    from zoo.layers.jet_forward import forward_mode

    return forward_mode(name, func, args, kwargs)


def rules(*names: Any) -> Callable[[Callable], Callable]:
    """Register a function as the rule of torch functions by name; kernels are named with their module."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


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


def _axis(dim: int) -> int:
    return dim if dim < 0 else dim + 1
