"""Pieces of chunked scans: products with a decay per channel between two tokens, and the running state over chunks."""

import torch
from torch import Tensor


def detached_gates(log_g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gates [B, H, M] or [B, H, M, D] without gradient, and ``C - C.detach()`` for their running sum C over all steps.

    The second is zero but carries the derivative. A scan's weights depend on the gates as ``e^{C_r - C_i}`` only, so e^{+-zero} on
    queries and keys (on outputs and values for one gate per step) gives derivatives of every order exactly, and nothing inside the chunks,
    least of all the matrices of pairs, needs a gradient of its gates. (None, None) or (gates, None) where none is wanted.
    """
    if log_g is None or not log_g.requires_grad:
        return log_g, None
    cum = log_g.cumsum(2)
    return log_g.detach(), cum - cum.detach()


def gated_products(q: Tensor, k: Tensor, cum: Tensor, *, diagonal: bool) -> Tensor:
    """``A_ri = sum_d q_rd k_id exp(cum_rd - cum_id)`` for i <= r (i < r without ``diagonal``), zero above; [..., T, T].

    T is a power of two. Blocks are joined pairwise, beginning with single rows: at a split before row m both factors are taken relative to
    ``cum_{m-1}``, so that both exponents are at most zero whatever the gates.

    Args:
        q: [..., R, T, D] or [..., T, D]; R query sets that share the keys.
        k: [..., T, D].
        cum: Cumulative log decays, [..., T, D].
        diagonal: Keep i = r.
    """
    size, base = k.shape[-2], 1
    out = (q * k).sum(-1)[..., None, None] if diagonal else q.new_zeros(*q.shape[:-1], 1, 1)
    while base < size:
        qp, kp, cp = (t.unflatten(-2, (-1, 2, base)) for t in (q, k, cum))
        middle = cp[..., 0, -1:, :]
        upper = qp[..., 1, :, :] * (cp[..., 1, :, :] - middle).exp()
        lower = kp[..., 0, :, :] * (middle - cp[..., 0, :, :]).exp()
        left_below = upper @ lower.mT
        pairs = out.unflatten(-3, (-1, 2))
        top = torch.cat((pairs[..., 0, :, :], torch.zeros_like(left_below)), -1)
        out = torch.cat((top, torch.cat((left_below, pairs[..., 1, :, :]), -1)), -2)
        base *= 2
    return out.squeeze(-3)


def running_states(gate: Tensor | None, states: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """``S_{c+1} = gate_c S_c + states_c`` over axis 2: the states before each chunk, stacked, and the last one."""
    state = torch.zeros_like(states[:, :, 0]) if initial is None else initial
    if gate is None:
        ends = torch.cat((state[:, :, None], states), 2).cumsum(2)
        return ends[:, :, :-1], ends[:, :, -1]
    past = []
    for g, s in zip(gate.unbind(2), states.unbind(2), strict=True):
        past.append(state)
        state = torch.addcmul(s, g, state)
    return torch.stack(past, 2), state
