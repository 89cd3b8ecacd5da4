"""Linear attention with decay, step by step. B batch, H heads, M keys, D, E head sizes of queries/keys and values."""

import torch
from torch import Tensor


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_g: Tensor | None,
    log_i: Tensor | None,
    read: str,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S_t = diag(e^{log_g_t}) S_{t-1} + e^{log_i_t} k_t v_t^T``; ``o_t = q_t S_t``, or ``q_t diag(e^{log_g_t}) S_{t-1}`` if exclusive.

    Args:
        q: [B, H, M, D].
        k: [B, H, M, D].
        v: [B, H, M, E].
        log_g: None, [B, H, M] or [B, H, M, D].
        log_i: None or [B, H, M].
        read: "inclusive" or "exclusive".
        initial: S_0, [B, H, D, E].

    Returns:
        o [B, H, M, E] and the last state. Without a stabiliser: e^{log_i} must stay in range.
    """
    state = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if initial is None else initial
    rows = []
    for t in range(k.shape[2]):
        if log_g is not None:
            gate = log_g[:, :, t].exp()
            state = state * (gate[..., None, None] if log_g.dim() == 3 else gate[..., None])
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        if log_i is not None:
            write = write * log_i[:, :, t].exp()[..., None, None]
        after = state + write
        rows.append((q[:, :, t, None] @ (after if read == "inclusive" else state)).squeeze(2))
        state = after
    if not rows:
        return v, state
    return torch.stack(rows, 2), state
