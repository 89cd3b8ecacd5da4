"""The delta rule in chunks (WY / UT transform), in plain differentiable torch operations.

Inside a chunk with cumulative log decay c: ``A_ri = beta_r k_r.k_i e^{c_r - c_i}`` (i < r). Against the state S that the chunk meets, its
values become ``X = (I + A)^{-1} diag(beta) (V - K e^c S)``; then ``S' = diag(e^{c_T}) S + Kd^T X`` with ``Kd = K e^{c_T - c}``. ``walk.py`` goes from
chunk to chunk, everything else runs in parallel over chunks. The triangular system is inverted by substitution in float32 or float64 (powers of A
lose accuracy for repeated keys).

Chunks are short: on a CPU the products inside them, which grow with their length, cost more than the additional steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels._common.gates import detached_gates, gated_products
from kernels._common.prefix import chunked, even_chunk, power_chunk
from kernels.delta.walk import walk as walk_in_torch

CHUNK = 32


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
    walk: Callable = walk_in_torch,
    products: Callable = gated_products,
    least: int = 1,
) -> tuple[Tensor | None, Tensor]:
    """Arguments as in ``reference.scan``.

    Args:
        chunk: Steps per chunk.
        outputs: False computes the last state alone.
        walk: What goes from chunk to chunk, with the arguments and results of ``walk.walk``.
        products: What computes the weights inside chunks for decay per channel.
        least: Fewest steps per chunk that ``products`` takes.

    Returns:
        o [B, H, L, E] (None without ``outputs``) and the last state [B, H, D, E].
    """
    length = q.shape[2]
    vector = log_g is not None and log_g.dim() == 4
    if vector:
        chunk = max(least, power_chunk(length, 1 << (chunk - 1).bit_length()))  # halves must be whole
    else:
        chunk = even_chunk(length, chunk)
    gates, zero = detached_gates(log_g)
    if zero is not None and not vector:
        v = v * (-zero).exp()[..., None]
    qc, kc, vc = (chunked(t, chunk) for t in (q, k, v))
    bc = chunked(beta, chunk)[..., None]
    kb = kc * bc
    inclusive = read == "inclusive"
    mixed = None
    if log_g is None:
        system = (kb @ kc.mT).tril(-1)
        if outputs:
            mixed = (qc @ kc.mT).tril(0 if inclusive else -1)
        k_start, k_end, q_start, across = kb, kc, qc, None
    elif vector:
        cum = chunked(gates, chunk).cumsum(-2)
        total = cum[..., -1:, :]
        if zero is not None:
            ahead = chunked(zero, chunk)
            kb, qc, kc = kb * ahead.exp(), qc * ahead.exp(), kc * (-ahead).exp()
        system = products(kb, kc, cum, diagonal=False)
        if outputs:
            mixed = products(qc, kc, cum, diagonal=inclusive)
        from_start = cum.exp()
        k_start, q_start, k_end = kb * from_start, qc * from_start, kc * (total - cum).exp()
        across = total.exp().mT
    else:
        cum = chunked(gates, chunk).cumsum(-1)
        total = cum[..., -1:]
        seen = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
        # Masked before exp: entries above the diagonal may be large, and inf * 0 would make gradients NaN.
        decay = (cum[..., :, None] - cum[..., None, :]).masked_fill_(~seen, float("-inf")).exp()
        earlier = decay.tril(-1)
        system = (kb @ kc.mT) * earlier
        if outputs:
            mixed = (qc @ kc.mT) * (decay if inclusive else earlier)
        from_start = cum.exp()[..., None]
        k_start, q_start, k_end = kb * from_start, qc * from_start, kc * (total - cum).exp()[..., None]
        across = total.exp()[..., None]
    x, before, last = walk(system, vc * bc, k_start, k_end, across, initial)
    if zero is not None:
        end = zero[:, :, -1].exp()
        last = last * (end[..., None] if vector else end[..., None, None])
    if not outputs:
        return None, last
    o = (q_start @ before + mixed @ x).flatten(2, 3)[:, :, :length]
    return o if zero is None or vector else o * zero.exp()[..., None], last
