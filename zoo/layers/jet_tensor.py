"""`Jet`: a stack of Taylor coefficients that passes through a network as if it were a tensor.

Torch functions reach `Jet.__torch_function__`, which applies the rule of the polynomial algebra. A function without a
rule is differentiated by nested forward mode on the spot (exact as well, only slower), so any attention variant whose
operations have forward derivatives works; in-place writes do not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import CapabilityError
from zoo.layers.jets import Algebra, _Attend, _Linear, _Pointwise, _Product, _Softmax, _Wave

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
        return mul(reciprocal(self), other)

    def __pow__(self, exponent: Any) -> Jet:
        return power(self, exponent)

    def __matmul__(self, other: Any) -> Jet:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Jet:
        return matmul(other, self)

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
        return mul(reciprocal(b), a)
    return mul(a, 1.0 / b)


@rules("rdiv", "rtruediv")
def rdiv(a: Any, b: Any) -> Jet:
    return mul(reciprocal(a), b)


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


# ---------------------------------------------------------------- functions of one number


def pointwise(x: Jet, rule: Callable[[Tensor, int], list[Tensor]]) -> Jet:
    """g(x) from `rule(value, count)`: the first `count` derivatives of g over their factorials."""
    return Jet(_Pointwise.apply(x.c, x.ring, rule), x.ring)


def _exp(x: Tensor, count: int) -> list[Tensor]:
    e = x.exp()
    return [e / math.factorial(k) if k > 1 else e for k in range(count)]


def _tanh(x: Tensor, count: int) -> list[Tensor]:
    return _logistic_family(x.tanh(), count, 1.0, 0.0, -1.0)


def _sigmoid(x: Tensor, count: int) -> list[Tensor]:
    return _logistic_family(x.sigmoid(), count, 0.0, 1.0, -1.0)


def _logistic_family(y: Tensor, count: int, a: float, b: float, c: float) -> list[Tensor]:
    """Derivatives of a solution of y' = a + b y + c y^2, by its Taylor recurrence."""
    out = [y]
    for k in range(count - 1):
        new = b * out[k] + c * sum(out[i] * out[k - i] for i in range(k + 1))
        out.append((new + a if k == 0 else new) / (k + 1))
    return out


def _power(exponent: float) -> Callable[[Tensor, int], list[Tensor]]:
    def rule(x: Tensor, count: int) -> list[Tensor]:
        out, factor = [], 1.0
        for k in range(count):
            # A whole exponent ends its series; 0 * x^negative at x = 0 would be NaN.
            out.append(x ** (exponent - k) * factor if factor else torch.zeros_like(x))
            factor *= (exponent - k) / (k + 1)
        return out

    return rule


def _log(x: Tensor, count: int) -> list[Tensor]:
    return [x.log(), *(-((-x.reciprocal()) ** k) / k for k in range(1, count))]


def _sin(x: Tensor, count: int) -> list[Tensor]:
    s, c = x.sin(), x.cos()
    cycle = (s, c, -s, -c)
    return [cycle[k % 4] / math.factorial(k) for k in range(count)]


def _cos(x: Tensor, count: int) -> list[Tensor]:
    s, c = x.sin(), x.cos()
    cycle = (c, -s, -c, s)
    return [cycle[k % 4] / math.factorial(k) for k in range(count)]


def _erf(x: Tensor, count: int) -> list[Tensor]:
    """Derivatives of erf: 2/sqrt(pi) exp(-x^2) times Hermite polynomials."""
    base = (2 / math.sqrt(math.pi)) * (-x * x).exp()
    out, older, newer = [x.erf()], torch.zeros_like(x), torch.ones_like(x)
    for k in range(1, count):
        out.append(base * newer * ((-1.0) ** (k - 1) / math.factorial(k)))
        older, newer = newer, 2 * x * newer - 2 * (k - 1) * older
    return out


exp = rules("exp")(lambda x: pointwise(x, _exp))
tanh = rules("tanh")(lambda x: pointwise(x, _tanh))
sigmoid = rules("sigmoid")(lambda x: pointwise(x, _sigmoid))
reciprocal = rules("reciprocal")(lambda x: pointwise(x, _power(-1.0)))
rules("sqrt")(lambda x: pointwise(x, _power(0.5)))
rsqrt = rules("rsqrt")(lambda x: pointwise(x, _power(-0.5)))
rules("log")(lambda x: pointwise(x, _log))
rules("sin")(lambda x: pointwise(x, _sin))
rules("cos")(lambda x: pointwise(x, _cos))
erf = rules("erf")(lambda x: pointwise(x, _erf))
rules("silu")(lambda x, inplace=False: x * sigmoid(x))


@rules("gelu")
def gelu(x: Jet, approximate: str = "none") -> Jet:
    if approximate == "tanh":
        return 0.5 * x * (tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))) + 1.0)
    return 0.5 * x * (erf(x * math.sqrt(0.5)) + 1.0)


@rules("softplus")
def softplus(x: Jet, beta: float = 1.0, threshold: float = 20.0) -> Jet:
    def rule(v: Tensor, count: int) -> list[Tensor]:
        s = _sigmoid(v * beta, count)
        return [F.softplus(v, beta, threshold), *(s[k - 1] * (beta ** (k - 1) / k) for k in range(1, count))]

    return pointwise(x, rule)


@rules("elu")
def elu(x: Jet, alpha: float = 1.0, inplace: bool = False) -> Jet:
    def rule(v: Tensor, count: int) -> list[Tensor]:
        low, positive = _exp(v.clamp(max=0.0), count), v > 0
        zeros = torch.zeros_like(v)
        slopes = [torch.ones_like(v)] + [zeros] * count
        return [
            F.elu(v, alpha),
            *(torch.where(positive, slopes[k - 1], alpha * low[k]) for k in range(1, count)),
        ]

    return pointwise(x, rule)


@rules("relu")
def relu(x: Jet, inplace: bool = False) -> Jet:
    return Jet(x.c * (x.c[0] > 0), x.ring)


@rules("abs", "absolute")
def absolute(x: Jet) -> Jet:
    return Jet(x.c * x.c[0].sign(), x.ring)


@rules("pow")
def power(x: Jet, exponent: Any) -> Jet:
    if exponent == 2:
        return mul(x, x)
    return pointwise(x, _power(float(exponent)))


def wave(x: Jet, weights: Tensor) -> Jet:
    """weights[0] sin x + weights[1] cos x."""
    return Jet(_Wave.apply(x.c, weights, x.ring), x.ring)


# ---------------------------------------------------------------- layers


@rules("linear")
def linear(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    return Jet(_Linear.apply(x.c, weight, bias), x.ring)


@rules("softmax")
def softmax(x: Jet, dim: int = -1, dtype: torch.dtype | None = None, **_: Any) -> Jet:
    last = dim in (-1, x.ndim - 1)
    c = x.c if last else x.c.transpose(_axis(dim), -1)
    p = _Softmax.apply(c.contiguous(), x.ring)
    return Jet(p if last else p.transpose(_axis(dim), -1), x.ring)


@rules("logsumexp")
def logsumexp(x: Jet, dim: int = -1, keepdim: bool = False) -> Jet:
    peak = x.value.detach().amax(dim, keepdim=True)
    total = pointwise(exp(x - peak).sum(dim, keepdim=True), _log) + peak
    return total if keepdim else total.squeeze(dim)


@rules("layer_norm")
def layer_norm(
    x: Jet,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Jet:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    out = centred * rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@rules("rms_norm")
def rms_norm(x: Jet, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Jet:
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * rsqrt((x * x).mean(dims, keepdim=True) + eps)
    return out if weight is None else out * weight


@rules("dropout", "dropout1d")
def dropout(x: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    return x if not training or p == 0 else x * F.dropout(torch.ones_like(x.value), p, True)


@rules("normalize")
def normalize(x: Jet, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Jet:
    norm2 = (x * x).sum(dim, keepdim=True)
    safe = norm2.value > eps * eps
    return where(safe, x * rsqrt(where(safe, norm2, torch.ones_like(norm2.value))), x * (1.0 / eps))


def attend(q: Jet, k: Jet, v: Jet, scale: float, bias: Tensor | None = None) -> Jet:
    """softmax(scale q k^T + bias) v for [B, H, N, D] jets with as many key as query heads."""
    return Jet(_Attend.apply(q.c, k.c, v.c, bias, scale, q.ring), q.ring)


@rules("kernels.softmax.attention")
def _softmax_kernel(q: Jet, k: Jet, v: Jet, **options: Any) -> Any:
    from kernels.softmax import query_key_positions
    from kernels.softmax.torch import _visible

    n, m = q.shape[2], k.shape[2]
    if options["window"] is not None or options["return_lse"] or options["dropout"]:
        raise CapabilityError(
            "Taylor mode of softmax attention has no window, log-sum-exp or dropout; use 'jvp'"
        )
    q, k, v = (lift(t, next(j for j in (q, k, v) if isinstance(j, Jet))) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (Jet(t.c.repeat_interleave(group, 2), t.ring) for t in (k, v))
    bias = options["bias"]
    pos_q = pos_k = None
    if options["causal"]:
        pos_q, pos_k = query_key_positions("attention", options["positions"], q.shape[0], n, m, q.device)
    if options["causal"] or options["key_mask"] is not None:
        visible = _visible(
            options["key_mask"], pos_q, pos_k, (None, 0 if options["causal"] else None), 0, n, 0, m
        )
        hidden = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~visible, -math.inf)
        bias = hidden if bias is None else bias + hidden
    scale = options["scale"] or q.shape[-1] ** -0.5
    return attend(q, k, v, scale, bias)


def _axis(dim: int) -> int:
    return dim if dim < 0 else dim + 1


@rules("where")
def where(condition: Any, a: Any, b: Any) -> Jet:
    like = a if isinstance(a, Jet) else b
    a, b = lift(a, like), lift(b, like)
    dims = max(a.ndim, b.ndim, condition.dim())
    return Jet(torch.where(_value(condition), _wide(a.c, dims), _wide(b.c, dims)), like.ring)


@rules("masked_fill")
def masked_fill(x: Jet, mask: Tensor, value: Any) -> Jet:
    filled = x.c[0].masked_fill(mask, value)
    return Jet(torch.cat((filled[None], x.c[1:].masked_fill(mask, 0.0))), x.ring)


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
