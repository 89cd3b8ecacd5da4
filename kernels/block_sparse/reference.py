"""Attention under a mask rule, through the dense mask."""

from torch import Tensor

from kernels.block_sparse.lists import dense_mask
from kernels.block_sparse.masks import Mask
from kernels.softmax import reference as softmax


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    explicit: bool = True,
) -> tuple[Tensor, Tensor]:
    """``O_i = softmax_j(scale q_i.k_j + b_ij) v_j`` over j with ``mask.visible(i, j)``, and the log-sum-exp."""
    visible = dense_mask(mask, q.device)[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in (k, v))
    return softmax.attention(q, k, v, visible=visible, bias=bias, scale=scale)
