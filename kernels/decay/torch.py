"""Linear scan with decay in chunks: products inside a chunk, a short loop over chunk states. Differentiable any number of times.

Only differences of cumulative log decays that are at most zero are ever exponentiated, so no gate, however strong, overflows. Results
are stacked, never written into slices of one tensor (autograd would copy the whole tensor for each write).
"""

import torch
from torch import Tensor

from kernels._common.gates import detached_gates, gated_products, running_states
from kernels._common.prefix import chunked, even_chunk, power_chunk

CHUNK = 64
VECTOR_CHUNK = 32


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_g: Tensor | None,
    inclusive: bool,
    initial: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in ``reference.scan``, without input gates; o [B, H, L, E] and the last state [B, H, D, E]."""
    gates, zero = detached_gates(log_g)
    if log_g is not None and log_g.dim() == 4:
        if zero is not None:
            q, k = q * zero.exp(), k * (-zero).exp()
        o, last = _vector(q, k, v, gates, inclusive, initial, chunk or VECTOR_CHUNK)
        return o, last if zero is None else last * zero[:, :, -1, :, None].exp()
    if zero is None:
        return _scalar(q, k, v, gates, inclusive, initial, chunk or CHUNK)
    o, last = _scalar(q, k, v * (-zero).exp()[..., None], gates, inclusive, initial, chunk or CHUNK)
    return o * zero.exp()[..., None], last * zero[:, :, -1, None, None].exp()


def _scalar(q, k, v, log_g, inclusive, initial, chunk):
    length = q.shape[2]
    chunk = even_chunk(length, chunk)
    qc, kc, vc = (chunked(t, chunk) for t in (q, k, v))
    scores = qc @ kc.mT  # [B, H, C, T, T]
    diagonal = 0 if inclusive else -1
    if log_g is None:
        past, last = running_states(None, kc.mT @ vc, initial)
        o = scores.tril(diagonal) @ vc + qc @ past
        return o.flatten(2, 3)[:, :, :length], last
    cum = chunked(log_g, chunk).cumsum(-1)  # [B, H, C, T]
    total = cum[..., -1:]
    own = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril(diagonal)
    # Masked before exp: entries above the diagonal may be large, and inf * 0 would make gradients NaN.
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill_(~own, float("-inf")).exp()
    states = (kc * (total - cum).exp()[..., None]).mT @ vc
    past, last = running_states(total.exp()[..., None], states, initial)
    o = (scores * decay) @ vc + (qc * cum.exp()[..., None]) @ past
    return o.flatten(2, 3)[:, :, :length], last


def _vector(q, k, v, log_g, inclusive, initial, chunk):
    length = q.shape[2]
    chunk = power_chunk(length, 1 << (chunk - 1).bit_length())  # halves must be whole
    qc, kc, vc, cum = (chunked(t, chunk) for t in (q, k, v, log_g))
    cum = cum.cumsum(-2)
    total = cum[..., -1:, :]
    weights = gated_products(qc, kc, cum, diagonal=inclusive)
    states = (kc * (total - cum).exp()).mT @ vc
    past, last = running_states(total.exp().mT, states, initial)
    o = weights @ vc + (qc * cum.exp()) @ past
    return o.flatten(2, 3)[:, :, :length], last
