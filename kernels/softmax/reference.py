"""Softmax attention written out. B batch, H heads, Hk key heads, N queries, M keys, D, E head sizes."""

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``O = softmax(scale q k^T + bias) v`` over visible keys and ``lse = log sum_j exp(S_ij)``.

    Args:
        q: [B, H, N, D].
        k: [B, Hk, M, D]; query head h reads key head ``h // (H / Hk)``.
        v: [B, Hk, M, E].
        visible: bool, broadcastable to [B, H, N, M]; a row without any gives O = 0 and lse = -inf.
        bias: Added to the scaled scores.
        scale: Factor of the scores.
        dropout: Probability of zeroing a weight.

    Returns:
        [B, H, N, E] and [B, H, N].
    """
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * (q @ k.mT)
    if bias is not None:
        scores = scores + bias
    if visible is None:
        visible = torch.ones((), dtype=torch.bool, device=q.device)
    visible = (visible & (scores > -torch.inf)).expand(scores.shape)
    some = visible.any(-1, keepdim=True)
    # Rows without a key are given harmless scores before and zeros after the softmax: no NaN in value or gradient.
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    if scores.shape[-1] == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1]) + 0 * q.sum(), q.new_full(q.shape[:3], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~some, 0.0)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ v, scores.logsumexp(-1).masked_fill(~some[..., 0], -torch.inf)
