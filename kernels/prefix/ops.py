"""Registered operator ``zoo::diag_scan_fwd``, and the prefix softmax on top of it; torch only, Triton inside.

Gradient of ``h_t = a_t h_{t-1} + x_t``: with ``l_t = dh_t + a_{t+1} l_{t+1}`` it is ``dx_t = l_t``, ``da_t = l_t h_{t-1}``: the same recurrence backwards.
The backward calls the same operator, so derivatives of every order are exact.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.prefix.torch import divide, floor_of, with_ones


@torch.library.custom_op("zoo::diag_scan_fwd", mutates_args=())
def diag_scan_fwd(a: Tensor, x: Tensor, start: Tensor | None) -> Tensor:
    """a [L, N, C] or [L, N, 1] (one factor for all channels), x [L, N, C], start [L, C] or None, float32 -> h [L, N, C]."""
    from kernels.prefix import launch

    return launch.scan(a, x, start)


@diag_scan_fwd.register_fake
def _(a, x, start):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    a, _, start = inputs
    ctx.save_for_backward(a, start, output)


def _backward(ctx, dh):
    a, start, h = ctx.saved_tensors
    later = F.pad(a[:, 1:], (0, 0, 0, 1))
    adjoint = diag_scan_fwd(later.flip(1), dh.flip(1), None).flip(1)
    da = dstart = None
    if ctx.needs_input_grad[0]:
        first = torch.zeros_like(h[:, :1]) if start is None else start[:, None]
        da = adjoint * torch.cat((first, h[:, :-1]), 1)
        da = da if a.shape[2] == da.shape[2] else da.sum(2, keepdim=True)
    if ctx.needs_input_grad[2]:
        dstart = (a[:, :1] * adjoint[:, :1]).sum(1)
    return da, adjoint, dstart


diag_scan_fwd.register_autograd(_backward, setup_context=_setup)


def diag_scan(a: Tensor, x: Tensor, h0: Tensor | None, segment: int | None) -> Tensor:
    """Arguments and result as in ``reference.diag_scan``."""
    if segment is not None:
        starts = torch.arange(x.shape[2], device=x.device) % segment == 0
        a = a.masked_fill(starts.reshape(-1, *(1 for _ in x.shape[3:])), 0.0)
    flat = [t.reshape(t.shape[0] * t.shape[1], t.shape[2], math.prod(t.shape[3:])) for t in (a, x)]
    start = None if h0 is None else h0.reshape(flat[1].shape[0], flat[1].shape[2])
    return diag_scan_fwd(*flat, start).reshape(x.shape)


def prefix_softmax(s: Tensor, v: Tensor, *, read: str) -> Tensor:
    """Arguments and result as in ``reference.prefix_softmax``.

    In units of the running maximum m numerators and denominators obey ``h_t = e^{m_{t-1} - m_t} h_{t-1} + e^{s_t - m_t} [v_t, 1]``.
    """
    with torch.no_grad():
        top = s.cummax(-1).values.clamp(min=floor_of(s.dtype))
        fall = (F.pad(top[..., :-1], (1, 0), value=floor_of(s.dtype)) - top).exp()
    x = (s - top).exp()[..., None] * with_ones(v)
    o = divide(diag_scan_fwd(fall.flatten(0, 1)[..., None], x.flatten(0, 1), None)).unflatten(0, s.shape[:2])
    return o if read == "inclusive" else F.pad(o[:, :, :-1], (0, 0, 1, 0))
