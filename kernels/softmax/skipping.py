"""What skipping tiles (BLASST) needs around the Triton kernels: what they can do, and the limit of each row."""

import torch
from torch import Tensor

from kernels.softmax.reference import Skip


def widest(single: bool, dim: int) -> int:
    """Largest side of a tile in which the forward holds all it needs in registers, for float32 (``single``) or half precision."""
    if not single:
        return 64 if dim <= 128 else 32
    return 32 if dim <= 64 else 16


def gap(skip: Skip, q: Tensor, v: Tensor, shaped: bool) -> str | None:
    """Why the kernels cannot skip in this call: they drop whole tiles of theirs, and count a row's visible keys beforehand."""
    if shaped:
        return "skip_threshold beside a bias, factors, a score_mod or a post_mask"
    if torch.version.hip:
        return "skip_threshold on AMD, whose scalar registers do not hold it"
    side = widest(q.dtype == torch.float32, max(q.shape[-1], v.shape[-1]))
    sides = [s for s in (16, 32, 64) if s <= side]
    if any(s not in sides for s in (skip.rows, skip.keys)):
        return f"skip_tile={(skip.rows, skip.keys)} in {q.dtype} with these heads, only for sides of {sides}"
    return None


def log_limit(
    skip: Skip,
    k: Tensor,
    key_mask: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    window: tuple[int | None, int | None],
) -> Tensor:
    """``log2(threshold / visible keys)`` of every query, [B|1, N], or [B|1, 1] without a band."""
    m = k.shape[2]
    seen = torch.ones(1, m, device=k.device) if key_mask is None else key_mask.float()
    if pos_q is None:
        count = seen.sum(-1, keepdim=True)
    else:
        rows = max(seen.shape[0], pos_q.shape[0], pos_k.shape[0])
        (pos_k, order), pos_q = pos_k.expand(rows, -1).sort(-1), pos_q.expand(rows, -1).contiguous()
        before = torch.nn.functional.pad(seen.expand(rows, -1).gather(1, order).cumsum(-1), (1, 0))
        first, last = torch.zeros_like(pos_q), torch.full_like(pos_q, m)
        if window[0] is not None:
            first = torch.searchsorted(pos_k, pos_q - window[0])
        if window[1] is not None:
            last = torch.searchsorted(pos_k, pos_q + window[1], right=True)
        count = before.gather(1, last) - before.gather(1, first)
    return (skip.threshold / count.clamp(min=1)).log2()
