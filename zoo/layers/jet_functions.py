"""Rules of `Jet` for functions of one number, layers, softmax and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import CapabilityError
from zoo.layers.jet_arithmetic import mul
from zoo.layers.jet_attention import _Attend, _Softmax
from zoo.layers.jet_autograd import JetLinear, JetPointwise, JetTanh, JetWave
from zoo.layers.jet_tensor import Jet, _axis, _value, _wide, lift, rules


def pointwise(x: Jet, rule: Callable[[Tensor, int], list[Tensor]]) -> Jet:
    """g(x) from `rule(value, count)`: the first `count` derivatives of g over their factorials."""
    return Jet(JetPointwise.apply(x.c, x.ring, rule), x.ring)


def _exp(x: Tensor, count: int) -> list[Tensor]:
    e = x.exp()
    return [e / math.factorial(k) if k > 1 else e for k in range(count)]


def _tanh(x: Tensor, count: int) -> list[Tensor]:
    y = x.tanh()
    if count > 4:
        return _logistic_family(y, count, 1.0, 0.0, -1.0)
    # Closed forms y, 1 - y^2, -y (1 - y^2), (1 - y^2) (y^2 - 1/3) spare the recurrence its sums.
    square = y * y
    slope = 1.0 - square
    return [y, slope, (y * slope).neg_(), (square - 1.0 / 3.0).mul_(slope)][:count]


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
tanh = rules("tanh")(lambda x: Jet(JetTanh.apply(x.c, x.ring, _tanh), x.ring))
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
    return Jet(JetWave.apply(x.c, weights, x.ring), x.ring)


# ---------------------------------------------------------------- layers


@rules("linear")
def linear(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    return Jet(JetLinear.apply(x.c, weight, bias), x.ring)


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
    if options["return_lse"] or options["dropout"]:
        raise CapabilityError(
            "Taylor mode of softmax attention has no log-sum-exp output and no dropout; use 'jvp'"
        )
    window = options["window"]
    left, right = (window, window) if window is None or isinstance(window, int) else window
    if options["causal"]:
        right = 0 if right is None else min(right, 0)
    banded = left is not None or right is not None
    q, k, v = (lift(t, next(j for j in (q, k, v) if isinstance(j, Jet))) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (Jet(t.c.repeat_interleave(group, 2), t.ring) for t in (k, v))
    bias = options["bias"]
    pos_q = pos_k = None
    if banded:
        pos_q, pos_k = query_key_positions("attention", options["positions"], q.shape[0], n, m, q.device)
    if banded or options["key_mask"] is not None:
        visible = _visible(options["key_mask"], pos_q, pos_k, (left, right), 0, n, 0, m)
        hidden = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~visible, -math.inf)
        bias = hidden if bias is None else bias + hidden
    scale = options["scale"] or q.shape[-1] ** -0.5
    return attend(q, k, v, scale, bias)


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
