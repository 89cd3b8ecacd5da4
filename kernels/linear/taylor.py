"""Linear attention on second-order Taylor features (Based) without ever writing them: registered operators, and what is built from them.

With ``phi(x) = [1, x, x_i x_c / sqrt(2)]`` a weight is ``1 + s + s^2 / 2``, ``s = q.k``. A state T holds the sums of y, ``x y^T`` and ``x_i x y^T``; values carry a
column of ones, which becomes the denominator. Causal calls add, per chunk, a read of the state before it and the polynomial of the chunk's own scores.

``zoo::taylor_state`` and ``zoo::taylor_read`` are each other's gradients together with ``zoo::taylor_slope`` (see ``taylor_triton.py``), which needs a symmetric
square part: sums have one. A backward under ``create_graph=True`` recomputes from torch, with features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear.ops import _differentiable
from kernels.linear.torch import align

# Tokens per chunk of a causal call, and per partial sum of a global one.
CHUNK, SPLIT = 128, 1024


@torch.library.custom_op("zoo::taylor_state", mutates_args=())
def taylor_state(x: Tensor, y: Tensor) -> Tensor:
    """x [G, L, D], y [G, L, E] -> T [G, 1 + D + D D, E], float32."""
    from kernels.linear import taylor_launch

    return taylor_launch.state(x, y)


@taylor_state.register_fake
def _(x, y):
    d = x.shape[2]
    return x.new_empty(x.shape[0], 1 + d + d * d, y.shape[2], dtype=torch.float32)


@torch.library.custom_op("zoo::taylor_read", mutates_args=())
def taylor_read(x: Tensor, state: Tensor, coefficients: list[float]) -> Tensor:
    """``c0 T_0 + c1 x T_1 + c2 sum_i x_i (x T_2i)``; x [G, L, D] -> [G, L, E], float32."""
    from kernels.linear import taylor_launch

    return taylor_launch.read(x, state, coefficients)


@taylor_read.register_fake
def _(x, state, coefficients):
    return x.new_empty(*x.shape[:2], state.shape[2], dtype=torch.float32)


@torch.library.custom_op("zoo::taylor_slope", mutates_args=())
def taylor_slope(x: Tensor, up: Tensor, state: Tensor, coefficients: list[float]) -> Tensor:
    """``c1 up T_1^T + c2 sum_i x_i (up T_2i^T)``; x [G, L, D], up [G, L, E] -> [G, L, D], float32."""
    from kernels.linear import taylor_launch

    return taylor_launch.slope(x, up, state, coefficients)


@taylor_slope.register_fake
def _(x, up, state, coefficients):
    return x.new_empty(x.shape, dtype=torch.float32)


def _expanded(x: Tensor) -> Tensor:
    """[G, L, D] to [G, L, 1 + D + D D]."""
    x = x.float()
    return torch.cat((torch.ones_like(x[..., :1]), x, (x[..., :, None] * x[..., None, :]).flatten(-2)), -1)


def _scaled(state: Tensor, coefficients: list[float], d: int) -> Tensor:
    c0, c1, c2 = coefficients
    return torch.cat((c0 * state[:, :1], c1 * state[:, 1 : 1 + d], c2 * state[:, 1 + d :]), 1)


def _state_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _state_backward(ctx, dstate):
    x, y = ctx.saved_tensors
    if torch.is_grad_enabled():
        return tuple(_differentiable(lambda x, y: _expanded(x).mT @ y.float(), [x, y], [dstate]))
    dx = taylor_slope(x, y, dstate, [1.0, 2.0]) if ctx.needs_input_grad[0] else None
    dy = taylor_read(x, dstate, [1.0, 1.0, 1.0]) if ctx.needs_input_grad[1] else None
    return None if dx is None else dx.to(x.dtype), None if dy is None else dy.to(y.dtype)


def _read_setup(ctx, inputs, output):
    x, state, ctx.coefficients = inputs
    ctx.save_for_backward(x, state)


def _read_backward(ctx, do):
    x, state = ctx.saved_tensors
    d = x.shape[2]
    if torch.is_grad_enabled():

        def again(x, state):
            return _expanded(x) @ _scaled(state, ctx.coefficients, d)

        return *_differentiable(again, [x, state], [do]), None
    _, c1, c2 = ctx.coefficients
    dx = taylor_slope(x, do, state, [c1, 2 * c2]).to(x.dtype) if ctx.needs_input_grad[0] else None
    dstate = _scaled(taylor_state(x, do), ctx.coefficients, d) if ctx.needs_input_grad[1] else None
    return dx, dstate, None


taylor_state.register_autograd(_state_backward, setup_context=_state_setup)
taylor_read.register_autograd(_read_backward, setup_context=_read_setup)

_SERIES = [1.0, 1.0, 0.5]


def _groups(t: Tensor, size: int) -> tuple[Tensor, tuple[int, int, int]]:
    """[B, H, N, *] to [B H C, size, *], zeros at the end, and (B, H, C)."""
    b, h, n = t.shape[:3]
    chunks = -(-n // size)
    t = F.pad(t, (0, 0, 0, chunks * size - n)).reshape(b * h * chunks, size, t.shape[3])
    return t, (b, h, chunks)


def _global(k: Tensor, y: Tensor) -> Tensor:
    """State of all keys, [B, H, R, E]."""
    size = max(1, min(SPLIT, k.shape[2]))
    (kc, shape), (yc, _) = _groups(k, size), _groups(y, size)
    return taylor_state(kc, yc).unflatten(0, shape).sum(2)


def _causal(q: Tensor, k: Tensor, y: Tensor, initial: Tensor | None) -> Tensor:
    """Query i reads keys up to i of the same axis, after ``initial``."""
    n = q.shape[2]
    if n == 0:
        return y.new_zeros(y.shape, dtype=torch.float32)
    size = min(CHUNK, n)
    (qc, shape), (kc, _), (yc, _) = (_groups(t, size) for t in (q, k, y))
    sums = taylor_state(kc, yc).unflatten(0, shape)
    first = torch.zeros_like(sums[:, :, :1]) if initial is None else initial[:, :, None]
    past = torch.cat((first, sums[:, :, :-1]), 2).cumsum(2)
    scores = qc.float() @ kc.float().mT
    own = (1 + scores + scores.square() / 2).tril() @ yc.float()
    out = taylor_read(qc, past.flatten(0, 2), _SERIES) + own
    return out.reshape(*shape[:2], -1, y.shape[3])[:, :, :n]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    *,
    key_mask: Tensor | None,
    causal: bool,
    before: Tensor | None,
    normalize: str,
    eps: float,
) -> Tensor:
    """[B, H, N, E] in float32, by the kernels; inputs in the type whose products they take.

    Args:
        q: [B, H, N, D].
        k: [B, H, M, D].
        v: [B, H, M, E].
        weight: Factor of each key, [B, H, M, 1].
        key_mask: bool [B, M].
        causal: Query i reads a prefix of the keys only.
        before: Length of that prefix, int [B|1, N]; None aligns the ends.
        normalize: "denom" or "none".
        eps: Added to the denominator.
    """
    y = torch.cat((v, torch.ones_like(v[..., :1])), -1) if normalize == "denom" else v
    if weight is not None:
        y = (y * weight).to(v.dtype)
    if key_mask is not None:
        drop = ~key_mask[:, None, :, None]
        k, y = k.masked_fill(drop, 0.0), y.masked_fill(drop, 0.0)
    if causal:
        (q,), (k, y), head, back = align([q], [k, y], before)
        out = back(_causal(q, k, y, None if head is None else _global(*head)))
    else:
        state = _global(k, y)
        out = taylor_read(q.flatten(0, 1), state.flatten(0, 1), _SERIES).unflatten(0, q.shape[:2])
    return out if normalize == "none" else out[..., :-1] / (out[..., -1:] + eps)
