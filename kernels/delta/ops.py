"""Registered operators ``zoo::delta_walk_fwd`` and ``zoo::delta_pairs``; torch only, Triton inside.

Gradients of both are made of the same operators (see ``triton.py``), so derivatives of every order are exact. Given the corrected values x, the rule is a
scan with decay over them, ``o = decay_scan(q, k, x)``: its operator computes the outputs.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.decay import ops as decay
from kernels.delta.torch import Parts

CHUNK = 64


@torch.library.custom_op("zoo::delta_walk_fwd", mutates_args=())
def delta_walk_fwd(
    u: Tensor,
    w: Tensor,
    k: Tensor,
    across: Tensor | None,
    extra: Tensor | None,
    initial: Tensor,
    adjoint: bool,
    dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``walk.delta_walk`` with L the identity, all float32; products run as for inputs of ``dtype``."""
    from kernels.delta import launch

    return launch.walk(u, w, k, across, extra, initial, adjoint, dtype)


@delta_walk_fwd.register_fake
def _(u, w, k, across, extra, initial, adjoint, dtype):
    met = u.new_empty(*u.shape[:2], w.shape[-1], u.shape[-1])
    return u.new_empty(u.shape), met, initial.new_empty(initial.shape)


def _walk_setup(ctx, inputs, output):
    _, w, k, across, extra, _, ctx.adjoint, ctx.dtype = inputs
    ctx.has_extra = extra is not None
    ctx.save_for_backward(w, k, across, *output[:2])


def _walk_backward(ctx, dx, dmet, dlast):
    w, k, across, x, met = ctx.saved_tensors
    sign = 1 if ctx.adjoint else -1
    dr, after, dinitial = delta_walk_fwd(dx, k, w, across, dmet, dlast, not ctx.adjoint, ctx.dtype)
    dw, dk = sign * pairs(dr, met, ctx.dtype), -sign * pairs(x, after, ctx.dtype)
    dacross = (after * met).sum_to_size(across.shape) if ctx.needs_input_grad[3] else None
    return dr, dw, dk, dacross, after if ctx.has_extra else None, dinitial, None, None


delta_walk_fwd.register_autograd(_walk_backward, setup_context=_walk_setup)


@torch.library.custom_op("zoo::delta_pairs", mutates_args=())
def delta_pairs(a: Tensor, b: Tensor, dtype: str) -> Tensor:
    """``a b^T``: a [L, R, W], b [L, S, W] float32 -> [L, R, S]; products run as for inputs of ``dtype``."""
    from kernels.delta import launch

    return launch.pairs(a, b, dtype)


@delta_pairs.register_fake
def _(a, b, dtype):
    return a.new_empty(*a.shape[:2], b.shape[1])


def _pairs_setup(ctx, inputs, output):
    *tensors, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _pairs_backward(ctx, grad):
    a, b = ctx.saved_tensors
    return delta_pairs(grad, b.mT, ctx.dtype), delta_pairs(grad.mT, a.mT, ctx.dtype), None


delta_pairs.register_autograd(_pairs_backward, setup_context=_pairs_setup)


def pairs(a: Tensor, b: Tensor, dtype: str) -> Tensor:
    """``a b^T`` over any leading axes."""
    return delta_pairs(a.flatten(0, -3), b.flatten(0, -3), dtype).unflatten(0, a.shape[:-2])


def walk(
    system: Tensor,
    u: Tensor,
    w: Tensor,
    k: Tensor,
    across: Tensor | None,
    initial: Tensor | None,
    dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``walk.walk``; the triangular system is solved in float32 for all chunks at once."""
    shape, (e, d) = u.shape[:2], (u.shape[-1], w.shape[-1])
    solved = torch.linalg.solve_triangular(system, torch.cat((u, w), -1), upper=False, unitriangular=True)
    u, w = solved.split((e, d), -1)
    if initial is None:
        initial = u.new_zeros(*shape, d, e)
    flat = [None if t is None else t.flatten(0, 1) for t in (u, w, k, across)]
    x, met, last = delta_walk_fwd(*flat, None, initial.flatten(0, 1), False, dtype)
    return x.unflatten(0, shape), met.unflatten(0, shape), last.unflatten(0, shape)


def read(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    log_g: Tensor | None,
    initial: Tensor | None,
    inclusive: bool,
    dtype: str,
) -> Tensor:
    """Outputs [B, H, L, E] in float32 from corrected values."""
    low = getattr(torch, dtype)
    return decay.scan(q.to(low), k.to(low), x, log_g, initial, inclusive, True)[0]


def parts(dtype: str) -> Parts:
    """The kernels for inputs of this type."""
    kernels = (walk, pairs, decay.gated_products, read)
    return Parts(*(partial(kernel, dtype=dtype) for kernel in kernels), least=decay.BLOCK)
