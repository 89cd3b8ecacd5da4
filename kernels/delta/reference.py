"""The delta rule, step by step. B batch, H heads, M keys, D, E head sizes of queries/keys and values."""

import torch
from torch import Tensor


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_g: Tensor | None,
    read: str,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S <- diag(e^{log_g_t}) S``, then ``S <- S + beta_t k_t (v_t - S^T k_t)^T``; ``o_t = q_t S`` after the write, or before it.

    Args:
        q: [B, H, M, D].
        k: [B, H, M, D].
        v: [B, H, M, E].
        beta: [B, H, M].
        log_g: None, [B, H, M] or [B, H, M, D].
        read: "inclusive" (after the write) or "exclusive" (after the decay, before the write).
        initial: S_0, [B, H, D, E].

    Returns:
        o [B, H, M, E] and the last state.
    """
    state = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if initial is None else initial
    rows = []
    for t in range(k.shape[2]):
        if log_g is not None:
            gate = log_g[:, :, t].exp()
            state = state * (gate[..., None, None] if log_g.dim() == 3 else gate[..., None])
        q_t, k_t = q[:, :, t, None], k[:, :, t, None]
        error = v[:, :, t, None] - k_t @ state
        after = state + k_t.mT @ (beta[:, :, t, None, None] * error)
        rows.append((q_t @ (after if read == "inclusive" else state)).squeeze(2))
        state = after
    if not rows:
        return v, state
    return torch.stack(rows, 2), state
