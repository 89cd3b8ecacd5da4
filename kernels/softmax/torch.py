"""Softmax attention on PyTorch's own kernels, cut into row blocks so that no [N, M] matrix of a long sequence exists.

SDPA serves first-order gradients. It has no double backward and no forward mode on CPU, and no differentiable log-sum-exp:
those calls take explicit softmax over row blocks, each block recomputed in the backward when there is more than one. A low-rank bias
becomes channels of q and k, score mods are built block by block, and windows run as a batch of overlapping blocks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels._common.checks import work_dtype
from kernels.softmax import mods, reference

# Elements of one block of scores (or of a mask handed to SDPA): 2^24 floats are 64 MiB.
BLOCK_ELEMENTS = 1 << 24
# Where `_tiny` was measured to be faster than SDPA, forward and backward together (1.2 to 2 times).
TINY_KEYS, TINY_QUERIES, TINY_SEQUENCES = 24, 64, 256
# Windows over longer sequences run as one batch of blocks of at least so many queries.
WINDOW_TOKENS, WINDOW_ROWS, WINDOW_SLAB = 256, 64, 2048


class Mod(NamedTuple):
    """A score mod and the positions [B|1, N] and [B|1, M] that it reads."""

    code: tuple[int, ...]
    tables: tuple[Tensor, ...]
    pos_q: Tensor
    pos_k: Tensor

    def block(self, start: int, stop: int, lo: int, hi: int) -> Tensor:
        places = self.pos_q[:, start:stop], self.pos_k[:, lo:hi]
        return mods.block(self.code, self.tables, slice(start, stop), *places)


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
    factors: tuple[Tensor, Tensor] | None = None,
    mod: Mod | None = None,
    post: Tensor | None = None,
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
    explicit = explicit or want_lse or softcap is not None or skip is not None or post is not None
    if n == 0 or m == 0 or batch == 0:
        return reference.attention(q, k, v, visible=None, bias=None, scale=scale)
    if factors is not None and softcap is None:
        dtype, (q, k, v) = q.dtype, _with_factors(q, k, v, factors, scale)
        out, lse = attention(
            q, k, v, key_mask=key_mask, bias=bias, pos_q=pos_q, pos_k=pos_k, aligned=aligned, window=window, scale=1.0,
            want_lse=want_lse, explicit=explicit, dropout=dropout, skip=skip, mod=mod, post=post, block_elements=block_elements,
        )  # fmt: skip
        return out.to(dtype), lse
    plain = not explicit and bias is None and mod is None and key_mask is None and dropout == 0.0
    if plain and pos_q is None:
        return unmasked(q, k, v, scale), None
    if plain and aligned and window == (None, 0) and _few(q, k):
        return _tiny(q, k, v, scale, causal=True), None
    free = torch.compiler.is_exporting()  # the batch is no number then, and nothing may depend on it
    plain_causal = aligned and n == m and window == (None, 0)
    if not explicit and bias is None and mod is None and key_mask is None and (pos_q is None or plain_causal):
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=plain_causal, scale=scale, enable_gqa=group > 1
        )
        return out, None
    if plain and aligned and None not in window and n == m > WINDOW_TOKENS:
        return _windowed(q, k, v, *window, scale), None
    # SDPA gets a mask per block; the explicit path holds a block of scores of every head.
    pairwise = (
        mod is not None or factors is not None or any(t is not None and t.shape[-2] > 1 for t in (bias, post))
    )
    width = batch * heads if explicit or bias is not None or mod is not None else batch
    whole = free or not (explicit or pos_q is not None or pairwise)
    rows = n if whole else max(1, min(n, block_elements // (width * m)))
    if skip is not None and rows < n:  # blocks of whole tiles
        rows = max(skip.rows, rows // skip.rows * skip.rows)
    if aligned and pos_q is not None and (window[0] is not None) and n > 256 and skip is None:
        rows = min(rows, max(64, window[0] + (window[1] or 0)))
    outs, lses = [], []
    for start in (0,) if rows is n else range(0, n, rows):  # a free length has no range
        stop = min(start + rows, n)
        lo, hi = 0, m
        if aligned and pos_q is not None and skip is None:
            shift = m - n
            lo = 0 if window[0] is None else min(max(start + shift - window[0], 0), m - 1)
            hi = m if window[1] is None else min(max(stop + shift + window[1], lo + 1), m)

        def call(q, k, v, start=start, stop=stop, lo=lo, hi=hi):
            visible = _visible(key_mask, pos_q, pos_k, window, start, stop, lo, hi)
            added = [] if bias is None else [_block(bias, start, stop, lo, hi)]
            if mod is not None:
                added.append(mod.block(start, stop, lo, hi))
            if factors is not None:
                wide = work_dtype(q.dtype)
                added.append(factors[0][:, :, start:stop].to(wide) @ factors[1][:, :, lo:hi].to(wide).mT)
            part = sum(added[1:], added[0]) if added else None
            if not explicit:
                return _sdpa(q, k, v, visible, part, scale, dropout)
            after = None if post is None else _block(post, start, stop, lo, hi)
            rule = None if skip is None else skip.between(start, stop)
            return _explicit(q, k, v, visible, part, scale, dropout, softcap, rule, after)

        args = (q[:, :, start:stop], k[:, :, lo:hi], v[:, :, lo:hi])
        # Masks that SDPA keeps for its backward are small in a band; elsewhere they would add up to N x M.
        again = rows < n and torch.is_grad_enabled() and (explicit or n * (hi - lo) * width > block_elements)
        out, lse = checkpoint(call, *args, use_reentrant=False) if again else call(*args)
        outs.append(out)
        lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, 2), torch.cat(lses, 2) if explicit else None


def _with_factors(
    q: Tensor, k: Tensor, v: Tensor, factors: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[scale q | phi_q] and [k | phi_k]: in float32 at least, because factors that hold places lose their units digit below."""
    if q.dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    phi_q, phi_k = (f.to(q.dtype).expand(q.shape[0], -1, -1, -1) for f in factors)
    return torch.cat((q * scale, phi_q), -1), torch.cat((k, phi_k), -1), v


def _windowed(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float) -> Tensor:
    """Self-attention within ``i - left ... i + right``: blocks of queries, each with a view of the keys in reach, as one batch.

    Long sequences go in slabs, whose temporaries stay in reach of the cache and of the allocator's reuse.
    """
    batch, heads, n, _ = q.shape
    rows = max(WINDOW_ROWS, (left + right) // 2)
    span, group = rows + left + right, heads // k.shape[1]
    per = min(-(-n // rows), max(WINDOW_SLAB, left, right) // rows + 1)
    slab = per * rows
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
    q, k, v = (F.pad(t, (0, 0, 0, -n % slab)).flatten(0, 1).split(slab, 1) for t in (q, k, v))
    row, key = torch.arange(rows, device=q[0].device)[:, None], torch.arange(span, device=q[0].device)
    near = (key >= row) & (key <= row + left + right)
    outs = []
    for i, q_i in enumerate(q):
        seen = near
        if i == 0 or (i + 1) * slab + right > n:
            token = i * slab + torch.arange(per, device=key.device)[:, None, None] * rows + key - left
            own = key == row + left  # kept even past the end, so that no row is empty
            seen = (near & ((token >= 0) & (token < n) | own))[None]
        k_i, v_i = (_with_halo(t, i, left, right).unfold(1, span, rows).mT for t in (k, v))
        q_i = q_i.unflatten(1, (per, rows))
        outs.append(F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask=seen, scale=scale).flatten(1, 2))
    return torch.cat(outs, 1)[:, :n].unflatten(0, (batch, heads))


def _with_halo(pieces: tuple[Tensor, ...], i: int, left: int, right: int) -> Tensor:
    """Piece i with the last ``left`` tokens before it and the first ``right`` after it, zeros where there are none."""
    piece = pieces[i]
    before = (
        pieces[i - 1][:, piece.shape[1] - left :]
        if i
        else piece.new_zeros(piece.shape[0], left, piece.shape[2])
    )
    last = i + 1 == len(pieces)
    after = piece.new_zeros(piece.shape[0], right, piece.shape[2]) if last else pieces[i + 1][:, :right]
    return torch.cat((before, piece, after), 1)


def unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Every query sees every key, and nothing else is asked for; [B, H, N, E]."""
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return reference.attention(q, k, v, visible=None, bias=None, scale=scale)[0]
    if _few(q, k):
        return _tiny(q, k, v, scale, causal=False)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _few(q: Tensor, k: Tensor) -> bool:
    """Whether `_tiny` serves: short sequences, and many of them."""
    if torch.compiler.is_exporting():  # the batch is no number then, and nothing may depend on it
        return False
    (batch, heads, n), m = q.shape[:3], k.shape[2]
    small = m <= TINY_KEYS and n <= TINY_QUERIES and batch * heads >= TINY_SEQUENCES
    return small and k.shape[1] == heads and q.dtype == torch.float32 and q.device.type == "cpu"


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
    post: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
        bias = None if bias is None else bias.float()
    out, lse = reference.attention(
        q,
        k,
        v,
        visible=visible,
        bias=bias,
        scale=scale,
        dropout=dropout,
        softcap=softcap,
        skip=skip,
        post=post,
    )
    return out.to(dtype), lse
