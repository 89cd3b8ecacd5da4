"""The delta rule in chunks (WY / UT transform), in plain differentiable torch operations.

Inside a chunk with cumulative log decay c: ``A_ri = beta_r k_r.k_i e^{c_r - c_i}`` (i < r), ``[U W] = (I + A)^{-1} diag(beta) [V, K e^c]``; then
``S' = (diag(e^{c_T}) - Kd^T W) S + Kd^T U`` with ``Kd = K e^{c_T - c}``: one matrix product per chunk in the loop, everything else in parallel
over chunks. The triangular system is solved by substitution in float32 or float64 (powers of A lose accuracy for repeated keys).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels._common.gates import detached_gates, gated_products
from kernels._common.prefix import chunked, even_chunk, power_chunk

CHUNK = 64
VECTOR_CHUNK = 32


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_g: Tensor | None,
    read: str,
    initial: Tensor | None,
    chunk: int | None = None,
    outputs: bool = True,
    running: Callable | None = None,
    products: Callable = gated_products,
    least: int = 1,
) -> tuple[Tensor | None, Tensor]:
    """Arguments as in ``reference.scan``.

    Args:
        chunk: Steps per chunk.
        outputs: False computes the last state alone.
        running: What walks over the chunks; ``running_states`` here if left out.
        products: What computes the weights inside chunks for decay per channel.
        least: Fewest steps per chunk that ``products`` takes.

    Returns:
        o [B, H, L, E] (None without ``outputs``) and the last state [B, H, D, E].
    """
    running = running or running_states
    length, d, e = q.shape[2], k.shape[-1], v.shape[-1]
    vector = log_g is not None and log_g.dim() == 4
    if vector:
        chunk = max(
            least, power_chunk(length, 1 << ((chunk or VECTOR_CHUNK) - 1).bit_length())
        )  # halves must be whole
    else:
        chunk = even_chunk(length, chunk or CHUNK)
    gates, zero = detached_gates(log_g)
    if zero is not None and not vector:
        v = v * (-zero).exp()[..., None]
    qc, kc, vc = (chunked(t, chunk) for t in (q, k, v))
    bc = chunked(beta, chunk)[..., None]
    inclusive = read == "inclusive"
    mixed = None
    if log_g is None:
        overlap = (kc @ kc.mT).tril(-1)
        if outputs:
            mixed = (qc @ kc.mT).tril(0 if inclusive else -1)
        k_start, k_end, q_start, across = kc, kc, qc, None
    elif vector:
        cum = chunked(gates, chunk).cumsum(-2)
        total = cum[..., -1:, :]
        k_read = kc
        if zero is not None:
            ahead = chunked(zero, chunk)
            k_read, qc, kc = kc * ahead.exp(), qc * ahead.exp(), kc * (-ahead).exp()
        overlap = products(k_read, kc, cum, diagonal=False)
        if outputs:
            mixed = products(qc, kc, cum, diagonal=inclusive)
        from_start = cum.exp()
        k_start, q_start, k_end = k_read * from_start, qc * from_start, kc * (total - cum).exp()
        across = total.exp().mT
    else:
        cum = chunked(gates, chunk).cumsum(-1)
        total = cum[..., -1:]
        seen = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
        # Masked before exp: entries above the diagonal may be large, and inf * 0 would make gradients NaN.
        decay = (cum[..., :, None] - cum[..., None, :]).masked_fill_(~seen, float("-inf")).exp()
        overlap = ((kc @ kc.mT) * decay).tril(-1)
        if outputs:
            mixed = (qc @ kc.mT) * decay
            mixed = mixed if inclusive else mixed.tril(-1)
        from_start = cum.exp()[..., None]
        k_start, q_start, k_end = kc * from_start, qc * from_start, kc * (total - cum).exp()[..., None]
        across = total.exp()[..., None]
    system = overlap * bc  # strictly lower; the unit diagonal is implied
    solved = torch.linalg.solve_triangular(
        system, bc * torch.cat((vc, k_start), -1), upper=False, unitriangular=True
    )
    u, w = solved.split((e, d), -1)
    writes, erases = (k_end.mT @ solved).split((e, d), -1)  # [B, H, C, D, E], [B, H, C, D, D]
    eye = torch.eye(d, dtype=k.dtype, device=k.device)
    keeps = (eye if across is None else eye * across) - erases
    before, last = running(keeps, writes, initial)
    if zero is not None:
        end = zero[:, :, -1].exp()
        last = last * (end[..., None] if vector else end[..., None, None])
    if not outputs:
        return None, last
    o = (q_start @ before + mixed @ (u - w @ before)).flatten(2, 3)[:, :, :length]
    return o if zero is None or vector else o * zero.exp()[..., None], last


def running_states(keeps: Tensor, writes: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """``S_{c+1} = keeps_c S_c + writes_c``: states before each chunk [B, H, C, D, E] and the last one."""
    shape = writes[:, :, 0].shape
    state = (torch.zeros_like(writes[:, :, 0]) if initial is None else initial).flatten(0, 1)
    past = []
    for keep, write in zip(keeps.flatten(0, 1).unbind(1), writes.flatten(0, 1).unbind(1), strict=True):
        past.append(state)
        state = torch.baddbmm(write, keep, state)
    return torch.stack(past, 1).unflatten(0, shape[:2]), state.unflatten(0, shape[:2])
