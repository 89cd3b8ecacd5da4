"""Registered operator ``zoo::delta_states_fwd``; torch only, Triton inside.

Gradient of ``S_{c+1} = P_c S_c + R_c``: with ``L_C = dS_C``, ``L_c = P_c^T L_{c+1} + dS_c`` it is ``dR_c = L_{c+1}``, ``dP_c = L_{c+1} S_c^T``, and ``L_0`` for the
initial state: the same recurrence backwards. The backward calls the same operator, so derivatives of every order are exact.
"""

import torch
from torch import Tensor

# Longer chunks than on a CPU: their matrices [D, D] are what the kernel walks over.
CHUNK = 64


@torch.library.custom_op("zoo::delta_states_fwd", mutates_args=())
def delta_states_fwd(keeps: Tensor, writes: Tensor, initial: Tensor | None) -> Tensor:
    """keeps [B, H, C, D, D], writes [B, H, C, D, E], initial [B, H, D, E] or None, all float32 -> states [B, H, C + 1, D, E]."""
    from kernels.delta import launch

    return launch.states(keeps, writes, initial)


@delta_states_fwd.register_fake
def _(keeps, writes, initial):
    b, h, c, d, e = writes.shape
    return writes.new_empty(b, h, c + 1, d, e)


def _setup(ctx, inputs, output):
    keeps, _, initial = inputs
    ctx.save_for_backward(keeps, output)
    ctx.has_initial = initial is not None


def _backward(ctx, grad):
    keeps, states = ctx.saved_tensors
    past = grad[:, :, :-1].flip(2)
    adjoint = delta_states_fwd(keeps.mT.flip(2), past, grad[:, :, -1]).flip(2)
    after = adjoint[:, :, 1:]
    return after @ states[:, :, :-1].mT, after, adjoint[:, :, 0] if ctx.has_initial else None


delta_states_fwd.register_autograd(_backward, setup_context=_setup)


def walk(
    system: Tensor, u: Tensor, w: Tensor, k: Tensor, across: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``walk.walk``, with one transition [D, D] and one write [D, E] per chunk, so that only one product per chunk is sequential."""
    e, d = u.shape[-1], w.shape[-1]
    solved = torch.linalg.solve_triangular(system, torch.cat((u, w), -1), upper=False, unitriangular=True)
    writes, erases = (k.mT @ solved).split((e, d), -1)  # [B, H, C, D, E], [B, H, C, D, D]
    eye = torch.eye(d, dtype=k.dtype, device=k.device)
    keeps = (eye if across is None else eye * across) - erases
    states = delta_states_fwd(keeps, writes, initial)
    before = states[:, :, :-1]
    value, key = solved.split((e, d), -1)
    return value - key @ before, before, states[:, :, -1]
