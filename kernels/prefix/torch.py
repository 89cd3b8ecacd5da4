"""Prefix softmax and the element-wise recurrence in chunks, in plain differentiable torch operations.

All exponentials are taken relative to the running maximum of the scores, which cancels and carries no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common.gates import running_states
from kernels._common.prefix import chunked

CHUNK = 64


def floor_of(dtype: torch.dtype) -> float:
    """Stands for "no key yet": below every score, and its differences stay finite."""
    return torch.finfo(dtype).min / 4


def with_ones(v: Tensor) -> Tensor:
    return torch.cat((v, v.new_ones(*v.shape[:-1], 1)), -1)


def divide(sums: Tensor) -> Tensor:
    """[..., E + 1] to [..., E]; zeros where the denominator is zero."""
    den = sums[..., -1:]
    return sums[..., :-1] / torch.where(den > 0, den, torch.ones_like(den))


def prefix_softmax(s: Tensor, v: Tensor, *, read: str, chunk: int = CHUNK) -> Tensor:
    """Arguments and result as in ``reference.prefix_softmax``."""
    length = s.shape[2]
    chunk = max(1, min(chunk, length))
    with torch.no_grad():
        top = chunked(s, chunk, float("-inf")).flatten(2).cummax(-1).values.clamp(min=floor_of(s.dtype))
        top = top.unflatten(-1, (-1, chunk))
        after = top[..., -1]
        before = F.pad(after[..., :-1], (1, 0), value=floor_of(s.dtype))
    sc, vc = chunked(s, chunk, float("-inf")), with_ones(chunked(v, chunk))
    own = torch.ones(chunk, chunk, dtype=torch.bool, device=s.device).tril(0 if read == "inclusive" else -1)
    weights = (sc[..., None, :] - top[..., :, None]).masked_fill(~own, float("-inf")).exp()
    sums = (sc - after[..., None]).exp()[..., None, :] @ vc  # [B, H, C, 1, E + 1]
    past, _ = running_states((before - after).exp()[..., None, None], sums, None)
    o = weights @ vc + (before[..., None] - top).exp()[..., None] * past
    return divide(o).flatten(2, 3)[:, :, :length]


def state(s: Tensor, v: Tensor, initial: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Sums over all keys [B, H, E + 1], relative to the largest score [B, H]."""
    floor = floor_of(s.dtype)
    with torch.no_grad():
        top = s.new_full(s.shape[:2], floor) if initial is None else initial[1]
        if s.shape[2]:
            top = torch.maximum(top, s.amax(-1))
    sums = ((s - top[..., None]).exp()[..., None, :] @ with_ones(v)).squeeze(2)
    if initial is not None:
        sums = sums + initial[0] * (initial[1] - top).exp()[..., None]
    return sums, top


def diag_scan(a: Tensor, x: Tensor, h0: Tensor | None, segment: int | None) -> Tensor:
    """About 2 sqrt(N) vectorised steps: first inside all chunks at once, then from chunk to chunk."""
    length = x.shape[2]
    if length == 0:
        return x
    chunk = segment or max(1, round(length**0.5))
    xc, ac = chunked(x, chunk), chunked(a, chunk, 1.0)  # [B, H, C, T, *]
    h, factor = torch.zeros_like(xc[:, :, :, 0]), torch.ones_like(xc[:, :, :, 0])
    rows, factors = [], []
    for x_t, a_t in zip(xc.unbind(3), ac.unbind(3), strict=True):
        h = torch.addcmul(x_t, a_t, h)
        factor = factor * a_t
        rows.append(h)
        factors.append(factor)
    local = torch.stack(rows, 3)
    if segment is None:
        past, _ = running_states(factors[-1], rows[-1], h0)
        local = torch.addcmul(local, torch.stack(factors, 3), past[:, :, :, None])
    return local.flatten(2, 3)[:, :, :length]
