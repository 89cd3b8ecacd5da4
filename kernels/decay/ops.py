"""Registered operator ``zoo::decay_scan_fwd``; torch only, Triton inside.

With weights ``w_rj = e^{c_r - c_j} q_r.k_j`` (c the cumulative log decay) every gradient is again a scan with scalar decay: that of q takes the
roles (dO, v, k); those of k and v run backwards with the gates one step later, in the roles (v, dO, q) and (k, q, dO); that of the log decay is the
reversed running sum of ``q.dq - k.dk``. The backward calls the same operator, so derivatives of every order are exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("zoo::decay_scan_fwd", mutates_args=())
def decay_scan_fwd(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, inclusive: bool) -> Tensor:
    """Scan over N steps: q, k [B, H, N, D], v [B, H, N, E], log_g [B, H, N] float32 or None -> [B, H, N, E]."""
    from kernels.decay import launch

    return launch.scan(q, k, v, log_g, inclusive)


@decay_scan_fwd.register_fake
def _(q, k, v, log_g, inclusive):
    return v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, log_g, inclusive = inputs
    ctx.save_for_backward(q, k, v, log_g)
    ctx.inclusive = inclusive


def _backward(ctx, do):
    q, k, v, log_g = ctx.saved_tensors
    later = None
    if log_g is not None:
        later = F.pad(log_g[:, :, 1:], (0, 1)).flip(2)

    def back(*parts: Tensor) -> Tensor:
        return decay_scan_fwd(*(p.flip(2) for p in parts), later, ctx.inclusive).flip(2)

    wants_gate = log_g is not None and ctx.needs_input_grad[3]
    dq = dk = dv = dg = None
    if ctx.needs_input_grad[0] or wants_gate:
        dq = decay_scan_fwd(do, v, k, log_g, ctx.inclusive)
    if ctx.needs_input_grad[1] or wants_gate:
        dk = back(v, do, q)
    if ctx.needs_input_grad[2]:
        dv = back(k, q, do)
    if wants_gate:
        gap = (q.float() * dq.float()).sum(-1) - (k.float() * dk.float()).sum(-1)
        dg = gap.flip(2).cumsum(2).flip(2)
    return dq, dk, dv, dg, None


decay_scan_fwd.register_autograd(_backward, setup_context=_setup)


def scan(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, inclusive: bool) -> Tensor:
    """Scan through the registered operator."""
    return decay_scan_fwd(q, k, v, log_g, inclusive)
