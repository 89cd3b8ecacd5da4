"""The sequential part of the delta rule in plain torch: from chunk to chunk with the state, forwards or backwards.

Per chunk, with ``L`` unit lower triangular: ``x = L^{-1} (u - w S)``, then ``S' = a S + k^T x + g``. The adjoint with upstream gradients of x and of
the states is the same walk in the other direction, with L transposed, w and k in each other's place and both signs turned:
``r = L^{-T} (dx + k s)``, then ``s' = a s - w^T r + dS``. So one operator whose backward calls it serves derivatives of every order, and nothing is
recorded or recomputed inside the loop. Registered as ``zoo::delta_walk``: torch.compile would unroll the loop.
"""

import torch
from torch import Tensor

from kernels._common.choice import in_forward_mode


@torch.library.custom_op("zoo::delta_walk", mutates_args=())
def delta_walk(
    u: Tensor,
    w: Tensor,
    system: Tensor,
    inverse: Tensor,
    k: Tensor,
    across: Tensor | None,
    extra: Tensor | None,
    initial: Tensor,
    adjoint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Z sequences (batch and heads), C chunks of T steps, D rows and E columns of the state.

    Args:
        u: [Z, C, T, E].
        w: [Z, C, T, D].
        system: L, [Z, C, T, T]; takes the gradient of its inverse and is not read.
        inverse: Of L, what the walk reads; without gradient.
        k: [Z, C, T, D].
        across: a, [Z, C, D|1, 1].
        extra: g, [Z, C, D, E].
        initial: State that the walk begins with, [Z, D, E].
        adjoint: From the last chunk to the first, with both signs turned.

    Returns:
        x [Z, C, T, E], the state that each chunk meets [Z, C, D, E] and the last one [Z, D, E].
    """
    sign = 1 if adjoint else -1
    x, met = torch.empty_like(u), u.new_empty(*u.shape[:2], k.shape[-1], u.shape[-1])
    absent = [None] * u.shape[1]
    chunks = list(
        zip(
            *(t.unbind(1) for t in (u, w, inverse, k.mT, x, met)),
            *(absent if t is None else t.unbind(1) for t in (across, extra)),
            strict=True,
        )
    )
    state = initial.clone()
    for u_c, w_c, inverse_c, k_c, x_c, met_c, across_c, extra_c in reversed(chunks) if adjoint else chunks:
        met_c.copy_(state)
        torch.bmm(inverse_c, torch.baddbmm(u_c, w_c, state, alpha=sign), out=x_c)
        if across_c is not None:
            state.mul_(across_c)
        if extra_c is not None:
            state.add_(extra_c)
        state.baddbmm_(k_c, x_c, alpha=-sign)
    return x, met, state


@delta_walk.register_fake
def _(u, w, system, inverse, k, across, extra, initial, adjoint):
    met = u.new_empty(*u.shape[:2], k.shape[-1], u.shape[-1])
    return torch.empty_like(u), met, torch.empty_like(initial)


def _setup(ctx, inputs, output):
    _, w, system, inverse, k, across, extra, _, ctx.adjoint = inputs
    ctx.has_extra = extra is not None
    ctx.save_for_backward(w, system, inverse, k, across, *output[:2])


def _backward(ctx, dx, dmet, dlast):
    w, system, inverse, k, across, x, met = ctx.saved_tensors
    sign = 1 if ctx.adjoint else -1
    dr, after, dinitial = delta_walk(dx, k, system.mT, inverse.mT, w, across, dmet, dlast, not ctx.adjoint)
    dacross = (after * met).sum_to_size(across.shape) if ctx.needs_input_grad[5] else None
    return (
        dr, _times(dr, met.mT, sign), _times(dr, x.mT, -1), None, _times(x, after.mT, -sign), dacross,
        after if ctx.has_extra else None, dinitial, None,
    )  # fmt: skip


delta_walk.register_autograd(_backward, setup_context=_setup)


def _times(a: Tensor, b: Tensor, sign: int) -> Tensor:
    """``sign a b`` for [Z, C, *, *], without a second pass for the sign."""
    out = torch.baddbmm(a.new_zeros(()), a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=sign)
    return out.unflatten(0, a.shape[:2])


def walk(
    system: Tensor, u: Tensor, w: Tensor, k: Tensor, across: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Corrected values and states of all chunks.

    Args:
        system: Strictly lower triangular part of L, [B, H, C, T, T].
        u: [B, H, C, T, E].
        w: [B, H, C, T, D].
        k: [B, H, C, T, D].
        across: Decay over each chunk, [B, H, C, D|1, 1], or None.
        initial: State before the first chunk, [B, H, D, E], or None.

    Returns:
        x [B, H, C, T, E], the states before each chunk [B, H, C, D, E] and the last state [B, H, D, E].
    """
    if not isinstance(u, Tensor) or in_forward_mode():
        return _recorded(system, u, w, k, across, initial)
    shape, size = u.shape[:2], u.shape[-2]
    with torch.no_grad():
        eye = torch.eye(size, dtype=u.dtype, device=u.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system.detach(), eye, upper=False, unitriangular=True)
    if initial is None:
        initial = u.new_zeros(*shape, k.shape[-1], u.shape[-1])
    flat = [None if t is None else t.flatten(0, 1) for t in (u, w, system, inverse, k, across)]
    x, met, last = delta_walk(*flat, None, initial.flatten(0, 1), False)
    return x.unflatten(0, shape), met.unflatten(0, shape), last.unflatten(0, shape)


def _recorded(
    system: Tensor, u: Tensor, w: Tensor, k: Tensor, across: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same walk, each operation recorded: for forward mode and for what is not a plain tensor."""
    unit = system + torch.eye(u.shape[-2], dtype=u.dtype, device=u.device)
    # Zeros that carry the tangents' type where no state is given.
    state = k[:, :, 0, :1].mT @ u[:, :, 0, :1] * 0.0 if initial is None else initial
    x, met = [], []
    for c in range(u.shape[2]):
        met.append(state)
        rest = u[:, :, c] - w[:, :, c] @ state
        x.append(torch.linalg.solve_triangular(unit[:, :, c], rest, upper=False, unitriangular=True))
        state = state if across is None else state * across[:, :, c]
        state = state + k[:, :, c].mT @ x[-1]
    return torch.stack(x, 2), torch.stack(met, 2), state
