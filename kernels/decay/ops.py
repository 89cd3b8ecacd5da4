"""Registered operators ``zoo::decay_scan_fwd``, ``zoo::gated_scores`` and ``zoo::gated_mix``; torch only, Triton inside.

With weights ``w_rj = sum_d q_rd k_jd e^{c_rd - c_jd}`` (c the cumulative log decay, per step or per key channel) every gradient is again a scan with
decay. That of q takes the roles (dO, v, k), so that gates per key channel become gates per value channel and the other way round; those of k and v
run backwards with the gates one step later, in the roles (v, dO, q) and (k, q, dO). An initial state enters that of q, the gradient of the last state
those of k and v; the gradient of the initial state is what the last of them ends with. That of the log decay is the reversed running sum
of ``q.dq - k.dk``. The backward calls the same operators, so derivatives of every order are exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the blocks inside a chunk whose gates per channel are taken relative to one row: the least a matrix product takes.
BLOCK = 16


@torch.library.custom_op("zoo::decay_scan_fwd", mutates_args=())
def decay_scan_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    initial: Tensor | None,
    inclusive: bool,
    values: bool,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Scan over N steps.

    Args:
        q: [B, H, N, D].
        k: [B, H, N, D].
        v: [B, H, N, E].
        log_g: None, [B, H, N], [B, H, N, D], or [B, H, N, E] with ``values``; float32.
        initial: State before the first step, [B, H, D, E] float32, or None.
        inclusive: Whether a step reads its own key.
        values: Gates per channel are those of the values.
        wide: Outputs in float32 instead of the dtype of ``v``.

    Returns:
        Outputs [B, H, N, E] and the last state [B, H, D, E], float32.
    """
    from kernels.decay import launch

    return launch.scan(q, k, v, log_g, initial, inclusive, values, wide)


@decay_scan_fwd.register_fake
def _(q, k, v, log_g, initial, inclusive, values, wide):
    dtype = torch.float32 if wide else v.dtype
    last = v.new_empty(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape, dtype=dtype), last


def _setup(ctx, inputs, output):
    q, k, v, log_g, initial, ctx.inclusive, ctx.values, _ = inputs
    ctx.save_for_backward(q, k, v, log_g, initial, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlast):
    q, k, v, log_g, initial, o, last = ctx.saved_tensors
    inclusive, values = ctx.inclusive, ctx.values
    do = torch.zeros_like(o) if do is None else do
    later = None
    if log_g is not None:
        later = F.pad(log_g[:, :, 1:], (0, 0) * (log_g.dim() - 3) + (0, 1)).flip(2)

    # Rounding to half precision before the running sum of the gates' gradient would add up over the steps.
    wants_gate = log_g is not None and ctx.needs_input_grad[3]

    def back(x: Tensor, y: Tensor, z: Tensor, start: Tensor | None, side: bool) -> tuple[Tensor, Tensor]:
        out, end = decay_scan_fwd(x.flip(2), y.flip(2), z.flip(2), later, start, inclusive, side, wants_gate)
        return out.flip(2), end

    def turned(state: Tensor | None) -> Tensor | None:
        return None if state is None else state.mT

    dq = dk = dv = dg = dinitial = None
    if ctx.needs_input_grad[0] or wants_gate:
        dq = decay_scan_fwd(do, v, k, log_g, turned(initial), inclusive, not values, wants_gate)[0]
    if ctx.needs_input_grad[1] or wants_gate:
        dk = back(v, do, q, turned(dlast), not values)[0]
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[4] or (wants_gate and values):
        dv, dinitial = back(k, q, do, dlast, values)
        if log_g is not None:
            first = log_g[:, :, 0].exp()
            dinitial = dinitial * (
                first[..., None, None]
                if first.dim() == 2
                else first[:, :, None]
                if values
                else first[..., None]
            )
    if wants_gate:
        gap = (
            o.float() * do.float() - v.float() * dv.float()
            if values
            else q.float() * dq.float() - k.float() * dk.float()
        )
        end = 0 if dlast is None else (last * dlast).sum(2 if values else 3)
        if log_g.dim() == 3:
            gap, end = gap.sum(-1), end if dlast is None else end.sum(-1, keepdim=True)
        elif dlast is not None:
            end = end[:, :, None]
        dg = gap.flip(2).cumsum(2).flip(2) + end
    dq, dk, dv = (None if g is None else g.to(t.dtype) for g, t in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, dg, dinitial if ctx.needs_input_grad[4] else None, None, None, None


decay_scan_fwd.register_autograd(_backward, setup_context=_setup)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    initial: Tensor | None,
    inclusive: bool,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state through the registered operator; gates per step or per key channel."""
    return decay_scan_fwd(q, k, v, log_g, initial, inclusive, False, wide)


@torch.library.custom_op("zoo::gated_scores", mutates_args=())
def gated_scores(q: Tensor, k: Tensor, cum: Tensor, diagonal: bool, dtype: str) -> Tensor:
    """``A_ri = sum_d q_rd k_id e^{cum_rd - cum_id}`` for i <= r (i < r without ``diagonal``); [L, T, D] float32 -> [L, T, T].

    Products run as for inputs of ``dtype``.
    """
    from kernels.decay import launch

    return launch.scores(q, k, cum, diagonal, dtype)


@gated_scores.register_fake
def _(q, k, cum, diagonal, dtype):
    return q.new_empty(q.shape[0], q.shape[1], q.shape[1])


@torch.library.custom_op("zoo::gated_mix", mutates_args=())
def gated_mix(weights: Tensor, v: Tensor, cum: Tensor, diagonal: bool, dtype: str) -> Tensor:
    """``o_re = sum_i w_ri v_ie e^{cum_re - cum_ie}`` over i <= r (i < r); weights [L, T, T], v, cum [L, T, E] float32 -> [L, T, E]."""
    from kernels.decay import launch

    return launch.mix(weights, v, cum, diagonal, dtype)


@gated_mix.register_fake
def _(weights, v, cum, diagonal, dtype):
    return v.new_empty(v.shape)


def _mix_back(weights: Tensor, x: Tensor, cum: Tensor, diagonal: bool, dtype: str) -> Tensor:
    """``sum_{r >= i} w_ri x_re e^{cum_re - cum_ie}``: in reversed order it is the forward again."""
    turned = gated_mix(weights.mT.flip(1, 2), x.flip(1), -cum.flip(1), diagonal, dtype)
    return turned.flip(1)


def _scores_setup(ctx, inputs, output):
    q, k, cum, *ctx.options = inputs
    ctx.save_for_backward(q, k, cum)


def _scores_backward(ctx, grad):
    q, k, cum = ctx.saved_tensors
    dq = gated_mix(grad, k, cum, *ctx.options)
    dk = _mix_back(grad, q, cum, *ctx.options)
    return dq, dk, q * dq - k * dk, None, None


def _mix_setup(ctx, inputs, output):
    weights, v, cum, *ctx.options = inputs
    ctx.save_for_backward(weights, v, cum, output)


def _mix_backward(ctx, do):
    weights, v, cum, o = ctx.saved_tensors
    dv = _mix_back(weights, do, cum, *ctx.options)
    return gated_scores(do, v, cum, *ctx.options), dv, o * do - v * dv, None, None


gated_scores.register_autograd(_scores_backward, setup_context=_scores_setup)
gated_mix.register_autograd(_mix_backward, setup_context=_mix_setup)


def gated_products(q: Tensor, k: Tensor, cum: Tensor, *, diagonal: bool, dtype: str) -> Tensor:
    """As ``_common.gates.gated_products``, [..., T, D], by the kernels."""
    flat = [t.flatten(0, -3) for t in (q, k, cum)]
    return gated_scores(*flat, diagonal, dtype).unflatten(0, k.shape[:-2])
