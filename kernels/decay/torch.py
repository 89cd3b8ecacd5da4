"""Linear scan with decay in chunks: products inside a chunk, a short loop over chunk states. Differentiable any number of times.

Only differences of cumulative log decays that are at most zero are ever exponentiated, so no gate, however strong, overflows. Results
are stacked, never written into slices of one tensor (autograd would copy the whole tensor for each write).
"""

import torch
from torch import Tensor

from kernels._common.gates import gated_products, running_states
from kernels._common.prefix import chunked, even_chunk, power_chunk

CHUNK = 64
VECTOR_CHUNK = 32


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_g: Tensor | None,
    log_i: Tensor | None,
    read: str,
    initial: Tensor | None,
    initial_max: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Arguments as in ``reference.scan``; with ``log_i`` results are scaled by e^-max.

    Returns:
        o [B, H, L, E], its exponents [B, H, L] (None without ``log_i``), last state [B, H, D, E], its exponent [B, H] (or None).
    """
    if log_g is not None and log_g.dim() == 4:
        o, state = _vector(q, k, v, log_g, read, initial, chunk or VECTOR_CHUNK)
        return o, None, state, None
    return _scalar(q, k, v, log_g, log_i, read, initial, initial_max, chunk or CHUNK)


def _scalar(q, k, v, log_g, log_i, read, initial, initial_max, chunk):
    length = q.shape[2]
    chunk = even_chunk(length, chunk)
    qc, kc, vc = (chunked(t, chunk) for t in (q, k, v))
    scores = qc @ kc.mT  # [B, H, C, T, T]
    exponents = None
    diagonal = 0 if read == "inclusive" else -1
    own = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril(diagonal)
    if log_g is None and log_i is None:
        o = scores.tril(diagonal) @ vc
        past, last = running_states(None, kc.mT @ vc, initial)
        o = o + qc @ past
        return o.flatten(2, 3)[:, :, :length], None, last, None
    gates = chunked(log_g if log_g is not None else torch.zeros_like(log_i), chunk)
    cum = gates.cumsum(-1)  # [B, H, C, T]
    total = cum[..., -1]
    between = cum[..., :, None] - cum[..., None, :]
    to_end = total[..., None] - cum
    from_start, across = cum, total
    if log_i is not None:
        inputs = chunked(log_i, chunk, float("-inf"))
        exponents, before, after = _stabilisers(gates, inputs, initial_max, read)
        between = between + inputs[..., None, :] - exponents[..., None]
        to_end = to_end + inputs - after[..., None]
        from_start = cum + before[..., None] - exponents
        across = total + before - after
        last_max = after[:, :, -1] if after.shape[2] else initial_max
    # Masked before exp: entries above the diagonal may be large, and inf * 0 would make gradients NaN.
    weights = scores * between.masked_fill(~own, float("-inf")).exp()
    states = (kc * to_end.exp()[..., None]).mT @ vc
    past, last = running_states(across.exp()[..., None, None], states, initial)
    o = weights @ vc + (qc * from_start.exp()[..., None]) @ past
    o = o.flatten(2, 3)[:, :, :length]
    if exponents is None:
        return o, None, last, None
    return o, exponents.flatten(2)[:, :, :length], last, last_max


def _stabilisers(gates: Tensor, inputs: Tensor, initial_max: Tensor | None, read: str):
    """Exponents of outputs [B, H, C, T], and of the states before and after each chunk [B, H, C].

    The largest visible ``c_t - c_j + log_i_j``, at least 0. They cancel in exact arithmetic, so no gradient passes through them.
    """
    with torch.no_grad():
        shape = gates.shape
        cum = gates.flatten(2).cumsum(-1)
        best = (inputs.flatten(2) - cum).cummax(-1).values
        start = gates.new_zeros(shape[:2]) if initial_max is None else initial_max
        best = torch.maximum(best, start[..., None])
        after = (cum + best).clamp(min=0).unflatten(-1, shape[2:])[..., -1]
        if read == "exclusive":
            best = torch.cat((start[..., None], best[..., :-1]), -1)
        exponents = (cum + best).clamp(min=0).unflatten(-1, shape[2:])
        before = torch.cat((start[..., None], after[..., :-1]), -1)
    return exponents, before, after


def _vector(q, k, v, log_g, read, initial, chunk):
    length = q.shape[2]
    chunk = power_chunk(length, 1 << (chunk - 1).bit_length())  # halves must be whole
    qc, kc, vc, cum = (chunked(t, chunk) for t in (q, k, v, log_g))
    cum = cum.cumsum(-2)
    total = cum[..., -1:, :]
    weights = gated_products(qc, kc, cum, diagonal=read == "inclusive")
    states = (kc * (total - cum).exp()).mT @ vc
    past, last = running_states(total.exp().mT, states, initial)
    o = weights @ vc + (qc * cum.exp()) @ past
    return o.flatten(2, 3)[:, :, :length], last
