"""Selected-block attention through a dense mask. B batch, H heads, Hk key heads, N queries, M keys, S chosen blocks."""

import torch
from torch import Tensor

from kernels.softmax import reference as softmax


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    block_size: int,
    *,
    key_mask: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``O_i = softmax_j(scale q_i.k_j) v_j`` over keys j with ``j // block_size`` among ``index_i``, and the log-sum-exp."""
    block = torch.arange(k.shape[2], device=k.device) // block_size
    visible = (index[..., None] == block).any(-2)  # [B, Hk, N, M]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in (k, v))
    if pos_q is not None:
        visible = visible & (pos_k[:, None, None] <= pos_q[:, None, :, None])
    visible = visible.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    return softmax.attention(q, k, v, visible=visible, bias=None, scale=scale)
