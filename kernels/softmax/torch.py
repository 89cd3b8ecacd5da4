"""Softmax attention on PyTorch's own kernels, cut into row blocks so that no [N, M] matrix of a long sequence exists.

SDPA serves first-order gradients. It has no double backward and no forward mode on CPU, and no differentiable log-sum-exp:
those calls take explicit softmax over row blocks, each block recomputed in the backward when there is more than one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.softmax import reference

# Elements of one block of scores (or of a mask handed to SDPA): 2^24 floats are 64 MiB.
BLOCK_ELEMENTS = 1 << 24
# Where `_tiny` was measured to be faster than SDPA, forward and backward together (1.2 to 2 times).
TINY_KEYS, TINY_QUERIES, TINY_SEQUENCES = 24, 64, 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None,
    bias: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    aligned: bool,
    window: tuple[int | None, int | None],
    scale: float,
    want_lse: bool,
    explicit: bool,
    dropout: float = 0.0,
    softcap: float | None = None,
    skip: reference.Skip | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Returns O [B, H, N, E] and the log-sum-exp [B, H, N] or None.

    ``pos_q`` [B|1, N] and ``pos_k`` [B|1, M] are given when visibility depends on position: key j is visible if
    ``pos_q - window[0] <= pos_k <= pos_q + window[1]``. ``aligned`` says that they are consecutive integers, which lets a block of rows
    skip keys outside its band.
    """
    batch, heads, n = q.shape[:3]
    m, group = k.shape[2], heads // max(k.shape[1], 1)
    if key_mask is not None:
        # NaN or infinity in a masked value row would survive a weight of zero.
        drop = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
    explicit = explicit or want_lse or softcap is not None or skip is not None
    if n == 0 or m == 0 or batch == 0:
        return reference.attention(q, k, v, visible=None, bias=None, scale=scale)
    plain = not explicit and bias is None and key_mask is None and dropout == 0.0 and group == 1
    few = m <= TINY_KEYS and n <= TINY_QUERIES and batch * heads >= TINY_SEQUENCES
    if plain and few and q.dtype == torch.float32 and q.device.type == "cpu":
        if pos_q is None or (aligned and window == (None, 0)):
            return _tiny(q, k, v, scale, causal=pos_q is not None), None
    plain_causal = aligned and bias is None and key_mask is None and n == m and window == (None, 0)
    if not explicit and (pos_q is None or plain_causal) and (bias is None and key_mask is None):
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=plain_causal, scale=scale, enable_gqa=group > 1
        )
        return out, None
    # SDPA gets a mask per block; the explicit path holds a block of scores of every head.
    needs_rows = pos_q is not None or (bias is not None and bias.shape[-2] > 1)
    width = batch * heads if explicit or (bias is not None) else batch
    rows = n if not (explicit or needs_rows) else max(1, min(n, block_elements // max(1, width * m)))
    if skip is not None and rows < n:  # blocks of whole tiles
        rows = max(skip.rows, rows // skip.rows * skip.rows)
    if aligned and pos_q is not None and (window[0] is not None) and n > 256 and skip is None:
        rows = min(rows, max(64, window[0] + (window[1] or 0)))
    outs, lses = [], []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        lo, hi = 0, m
        if aligned and pos_q is not None and skip is None:
            shift = m - n
            lo = 0 if window[0] is None else min(max(start + shift - window[0], 0), m - 1)
            hi = m if window[1] is None else min(max(stop + shift + window[1], lo + 1), m)
        visible = _visible(key_mask, pos_q, pos_k, window, start, stop, lo, hi)
        part = None if bias is None else _block(bias, start, stop, lo, hi)
        call = _explicit if explicit else _sdpa
        args = (q[:, :, start:stop], k[:, :, lo:hi], v[:, :, lo:hi], visible, part, scale, dropout)
        if explicit:
            args = (*args, softcap, skip)
        if explicit and rows < n and torch.is_grad_enabled():
            out, lse = checkpoint(call, *args, use_reentrant=False)
        else:
            out, lse = call(*args)
        outs.append(out)
        lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, 2), torch.cat(lses, 2) if explicit else None


def _tiny(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    """Many short sequences: batched products around a softmax over the second last axis.

    torch's CPU softmax over a last axis of 12 takes seven times as long as over the axis before it (11.6 against 1.6 ms
    for 2,688 matrices of 12 x 12, one thread), so the scores are kept transposed.
    """
    scores = k @ (q * scale).mT  # [B, H, M, N]
    if causal:
        m, n = scores.shape[-2:]
        hidden = torch.ones(m, n, dtype=torch.bool).tril(n - m - 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        if n > m:  # the first queries lie before every key
            return (scores.softmax(-2).nan_to_num(0.0)).mT @ v
    return scores.softmax(-2).mT @ v


def _block(bias: Tensor, start: int, stop: int, lo: int, hi: int) -> Tensor:
    bias = bias[:, :, start:stop] if bias.shape[2] > 1 else bias
    return bias[..., lo:hi] if bias.shape[3] > 1 else bias


def _visible(
    key_mask: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    window: tuple[int | None, int | None],
    start: int,
    stop: int,
    lo: int,
    hi: int,
) -> Tensor | None:
    """bool [B|1, 1, rows|1, keys] of one block, or None if everything is visible."""
    out = None if key_mask is None else key_mask[:, None, None, lo:hi]
    if pos_q is not None:
        distance = pos_k[:, None, None, lo:hi] - pos_q[:, None, start:stop, None]
        for bound, inside in ((window[1], lambda b: distance <= b), (window[0], lambda b: distance >= -b)):
            if bound is not None:
                out = inside(bound) if out is None else out & inside(bound)
    return out


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, None]:
    mask, some = visible, None
    if bias is not None:
        mask = bias.to(q.dtype)
        if visible is not None:
            mask = mask.masked_fill(~visible, -torch.inf)
        some = (mask > -torch.inf).any(-1, keepdim=True)
        mask = mask.masked_fill(~some, 0.0)
    elif visible is not None:
        some = visible.any(-1, keepdim=True)
        mask = visible | ~some
    if mask is not None:
        mask = mask.expand(mask.shape[0], mask.shape[1], q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    # Empty rows saw every key above; zeroing them afterwards zeroes their gradient as well.
    return (out if some is None else out.masked_fill(~some, 0.0)), None


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None = None,
    skip: reference.Skip | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
        bias = None if bias is None else bias.float()
    out, lse = reference.attention(
        q, k, v, visible=visible, bias=bias, scale=scale, dropout=dropout, softcap=softcap, skip=skip
    )
    return out.to(dtype), lse
