"""The delta rule in chunks (WY / UT transform), in plain differentiable torch operations.

Inside a chunk with cumulative log decay c: ``A_ri = beta_r k_r.k_i e^{c_r - c_i}`` (i < r). Against the state S that the chunk meets, its
values become ``X = (I + A)^{-1} diag(beta) (V - K e^c S)``; then ``S' = diag(e^{c_T}) S + Kd^T X`` with ``Kd = K e^{c_T - c}``. ``walk.py`` goes from
chunk to chunk, everything else runs in parallel over chunks. The triangular system is inverted by substitution in float32 or float64 (powers of A
lose accuracy for repeated keys).

Chunks are short: on a CPU the products inside them, which grow with their length, cost more than the additional steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels._common.gates import detached_gates, gated_products
from kernels._common.prefix import chunked, even_chunk, in_slabs, power_chunk, slab_length
from kernels.delta.walk import walk

CHUNK = 32


class Parts(NamedTuple):
    """What an implementation brings.

    Attributes:
        walk: From chunk to chunk; arguments and results of ``walk.walk``.
        pairs: ``a b^T`` over the last two axes.
        gated: Weights inside chunks for decay per channel, as ``gated_products``.
        read: Outputs from queries, keys, corrected values [B, H, L, E], gates, initial state and whether inclusive; None reads the walk's states.
        least: Fewest steps per chunk that ``gated`` takes.
    """

    walk: Callable
    pairs: Callable
    gated: Callable
    read: Callable | None = None
    least: int = 1


IN_TORCH = Parts(walk, lambda a, b: a @ b.mT, gated_products)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_g: Tensor | None,
    read: str,
    initial: Tensor | None,
    chunk: int = CHUNK,
    outputs: bool = True,
    parts: Parts = IN_TORCH,
) -> tuple[Tensor | None, Tensor]:
    """Arguments as in ``reference.scan``.

    Args:
        chunk: Steps per chunk.
        outputs: False computes the last state alone.
        parts: Products and the walk.

    Returns:
        o [B, H, L, E] (None without ``outputs``) and the last state [B, H, D, E].
    """
    length, inclusive = q.shape[2], read == "inclusive"
    vector = log_g is not None and log_g.dim() == 4
    if vector and isinstance(q, Tensor) and parts is IN_TORCH and length > slab_length(k):
        options = dict(read=read, chunk=chunk, outputs=outputs)
        slab = lambda q, k, v, beta, log_g, start: scan(q, k, v, beta, log_g=log_g, initial=start, **options)
        return in_slabs(slab, [q, k, v, beta, log_g], initial, slab_length(k))
    if vector:
        chunk = max(parts.least, power_chunk(length, 1 << (chunk - 1).bit_length()))  # halves must be whole
    else:
        chunk = even_chunk(length, chunk)
    gates, zero = detached_gates(log_g)
    kb = k * beta[..., None]
    if zero is not None and vector:
        kb, q, k = kb * zero.exp(), q * zero.exp(), k * (-zero).exp()
    elif zero is not None:
        v = v * (-zero).exp()[..., None]
    qc, kc, kb, vb = (chunked(t, chunk) for t in (q, k, kb, v * beta[..., None]))
    cum = None if gates is None else chunked(gates, chunk).cumsum(3)
    from_start = to_end = across = None
    if cum is None:
        weigh = lambda rows, diagonal: parts.pairs(rows, kc).tril(diagonal)
    elif vector:
        total = cum[..., -1:, :]
        from_start, to_end, across = cum.exp(), (total - cum).exp(), total.exp().mT
        weigh = lambda rows, diagonal: parts.gated(rows, kc, cum, diagonal=diagonal == 0)
    else:
        total = cum[..., -1:]
        from_start, to_end, across = (t.exp()[..., None] for t in (cum, total - cum, total))
        seen = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
        # Masked before exp: entries above the diagonal may be large, and inf * 0 would make gradients NaN.
        decay = (cum[..., :, None] - cum[..., None, :]).masked_fill_(~seen, float("-inf")).exp()
        weigh = lambda rows, diagonal: parts.pairs(rows, kc) * (decay if diagonal == 0 else decay.tril(-1))
    faded = lambda t, factor: t if factor is None else t * factor
    x, before, last = parts.walk(weigh(kb, -1), vb, faded(kb, from_start), faded(kc, to_end), across, initial)
    if zero is not None:
        end = zero[:, :, -1].exp()
        last = last * (end[..., None] if vector else end[..., None, None])
    if not outputs:
        return None, last
    if parts.read is None:
        o = faded(qc, from_start) @ before + weigh(qc, 0 if inclusive else -1) @ x
        o = o.flatten(2, 3)[:, :, :length]
    else:
        o = parts.read(q, k, x.flatten(2, 3)[:, :, :length], gates, initial, inclusive)
    return o if zero is None or vector else o * zero.exp()[..., None], last
