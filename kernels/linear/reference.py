"""Linear attention and MALA written out with the full [N, M] matrix. B batch, H heads, N queries, M keys, D, E head sizes."""

import torch
from torch import Tensor

from kernels.linear.features import Feature, apply_feature


def visible_matrix(key_mask: Tensor | None, visible: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """bool [B|1, 1, N, M]."""
    out = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if visible is not None:
        out = out & visible
    return out if key_mask is None else out & key_mask[:, None, None, :]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Feature,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    visible: Tensor | None,
    normalize: str,
    eps: float,
) -> Tensor:
    """``o_i = sum_j w_ij v_j``, ``w_ij = phi(q_i).phi(k_j) e^{b_j}``, divided by ``sum_j w_ij + eps`` if ``normalize="denom"``."""
    if key_mask is not None:
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in (k, v))
    fq, fk = apply_feature(feature, q), apply_feature(feature, k, side="k", key_mask=key_mask)
    w = (fq @ fk.mT).masked_fill(~visible_matrix(key_mask, visible, q, k), 0.0)
    if key_bias is not None:
        w = w * key_bias.exp()[:, :, None, :]
    if normalize == "denom" and feature != "softmax":
        w = w / (w.sum(-1, keepdim=True) + eps)
    return w @ v


def mala(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Feature,
    rotated: tuple[Tensor, Tensor] | None,
    key_mask: Tensor | None,
    visible: Tensor | None,
    key_norm: str,
    scale: float,
    eps: float,
) -> Tensor:
    """``w_ij = (1 + 1/(z_i + eps)) s'_ij / n_i - z_i / n_i`` over the n_i visible keys.

    ``s_ij = scale phi(q_i).phi(k_j)``, ``z_i`` its mean (``key_norm="mean"``) or its sum over the visible keys; ``s'`` is the same
    product of the rotated features. With ``key_norm="sum"`` the first term is not divided by n_i.
    """
    if key_mask is not None:
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in (k, v))
    see = visible_matrix(key_mask, visible, q, k)
    n = see.sum(-1, keepdim=True).clamp(min=1).to(q.dtype)
    fq, fk = apply_feature(feature, q), apply_feature(feature, k)
    rq, rk = (fq, fk) if rotated is None else rotated
    s = (scale * fq @ fk.mT).masked_fill(~see, 0.0)
    s_rot = (scale * rq @ rk.mT).masked_fill(~see, 0.0)
    if key_norm == "mean":
        s, s_rot = s / n, s_rot / n
    z = s.sum(-1, keepdim=True)
    w = (1 + 1 / (z + eps)) * s_rot - z / n
    return w.masked_fill(~see, 0.0) @ v
