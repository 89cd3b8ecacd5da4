"""Linear attention in time and memory linear in the number of tokens, in plain differentiable torch operations.

Without causality the keys are summed into one state per head. Causal calls cut the sequence into chunks: a running sum of
chunk states gives every chunk its past, a small masked product its own keys. Chunk results are stacked, never written into slices of
one tensor (that would make the backward quadratic).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common.prefix import in_slabs, slab_length

CHUNK = 64


class LinearState(NamedTuple):
    """Sums over keys; states of disjoint key sets add up (``add_states``).

    Attributes:
        kv: ``sum_j k'_j v_j^T``, [B, H, F, E], with rotated features where rotation is used.
        ksum: ``sum_j phi(k_j)``, [B, H, F].
        vsum: ``sum_j v_j``, [B, H, E], or None.
        count: Number of kept keys, [B, 1, 1].
        ksum_rot: ``sum_j k'_j``, [B, H, F], or None without rotation.
    """

    kv: Tensor
    ksum: Tensor
    vsum: Tensor | None
    count: Tensor
    ksum_rot: Tensor | None = None


def drop_keys(key_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Zero the rows of masked keys, so that even NaN there stays out of sums and gradients."""
    if key_mask is None:
        return tensors
    drop = ~key_mask[:, None, :, None]
    return tuple(t.masked_fill(drop, 0.0) for t in tensors)


def key_count(key_mask: Tensor | None, v: Tensor) -> Tensor:
    if key_mask is None:
        return v.new_full((v.shape[0], 1, 1), float(v.shape[2]))
    return key_mask.sum(-1).to(v.dtype)[:, None, None]


def global_state(
    phi_k: Tensor, v: Tensor, key_mask: Tensor | None, want_v: bool, k_rot: Tensor | None
) -> LinearState:
    """Sums over all kept keys."""
    phi_k, v = drop_keys(key_mask, phi_k, v)
    rot = phi_k if k_rot is None else drop_keys(key_mask, k_rot)[0]
    return LinearState(
        kv=rot.mT @ v,
        ksum=phi_k.sum(-2),
        vsum=v.sum(-2) if want_v else None,
        count=key_count(key_mask, v),
        ksum_rot=None if k_rot is None else rot.sum(-2),
    )


def linear_read(phi_q: Tensor, state: LinearState, normalize: str, eps: float) -> Tensor:
    """``phi(q) S``, divided by ``phi(q).ksum + eps`` if asked."""
    num = phi_q @ state.kv
    if normalize == "none":
        return num
    return num * (phi_q @ state.ksum[..., None] + eps).reciprocal()


def mala_read(
    phi_q: Tensor, state: LinearState, q_rot: Tensor | None, key_norm: str, scale: float, eps: float
) -> Tensor:
    """MALA as linear attention plus a centred term.

    With means over the keys, ``C = mean(k' v^T) - mean(k') mean(v)^T`` is formed on the small state, so the difference of two
    near-equal numbers that the textbook form takes per query never appears:
    ``o = (q'C + r vbar) / (z + eps) + g (q'C + (r - z) vbar)``, ``z = q.kbar``, ``r = q'.k'bar``, g = 1 or the key count.
    """
    n = state.count.clamp(min=1)
    kbar, vbar = state.ksum * (scale / n), state.vsum / n
    kbar_rot = kbar if state.ksum_rot is None else state.ksum_rot * (scale / n)
    centred = state.kv * (scale / n)[..., None] - kbar_rot[..., None] * vbar[..., None, :]
    z = phi_q @ kbar[..., None]
    if key_norm == "sum":
        eps = eps / n[..., None]
    inverse = (z + eps).reciprocal()
    gain = n[..., None] if key_norm == "sum" else 1.0
    if q_rot is None:
        return torch.addcmul(z * inverse * vbar[..., None, :], phi_q @ centred, inverse + gain)
    r = q_rot @ kbar_rot[..., None]
    return torch.addcmul((r * inverse + gain * (r - z)) * vbar[..., None, :], q_rot @ centred, inverse + gain)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, H, N, D] to [B, H, ceil(N / chunk), chunk, D], zeros at the end."""
    pad = -x.shape[2] % chunk
    x = F.pad(x, (0, 0, 0, pad)) if pad else x
    return x.unflatten(2, (-1, chunk))


def prefix_product(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """``sum_{j <= i} (q_i.k_j) v_j + q_i initial`` for N = M, [B, H, N, E], and the sum after the last key."""
    length = q.shape[2]
    if length == 0:
        return v.new_zeros(v.shape), initial
    qc, kc, vc = (_chunks(t, chunk) for t in (q, k, v))
    own = (qc @ kc.mT).tril() @ vc
    sums = kc.mT @ vc  # [B, H, chunks, F, E]
    first = sums.new_zeros(*sums.shape[:2], 1, *sums.shape[3:]) if initial is None else initial[:, :, None]
    past = torch.cat((first, sums), 2).cumsum(2)
    out = own + qc @ past[:, :, :-1]
    return out.flatten(2, 3)[:, :, :length], past[:, :, -1]


def prefix_sum(x: Tensor, initial: Tensor | None) -> Tensor:
    """Running sums over tokens, [B, H, N, F]."""
    out = x.cumsum(2)
    return out if initial is None else out + initial[:, :, None]


def align(
    tensors_q: list[Tensor], tensors_k: list[Tensor], before: Tensor | None
) -> tuple[list, list, LinearState | None, object]:
    """Bring queries and keys onto one axis so that "key index <= query index" says what is visible.

    Args:
        tensors_q: Query-side tensors, [B, H, N, *].
        tensors_k: Key-side tensors, [B, H, M, *].
        before: Number of keys each query may read, int [B|1, N]; None means aligned at the end.

    Returns:
        Query-side and key-side tensors of equal length, the number of leading keys that every query sees and that were cut
        off (as key-side tensors, or None), and a function that takes a result on the common axis back to the N queries.
    """
    n, m = tensors_q[0].shape[2], tensors_k[0].shape[2]
    if before is None:
        if m >= n:
            head = [t[:, :, : m - n] for t in tensors_k] if m > n else None
            return tensors_q, [t[:, :, m - n :] for t in tensors_k], head, lambda out: out
        return (
            [t[:, :, n - m :] for t in tensors_q],
            tensors_k,
            None,
            lambda out: F.pad(out, (0, 0, n - m, 0)),
        )
    # Merge: query with L keys before it sits behind the first L keys. Keys get zero queries, queries zero keys.
    batch = tensors_q[0].shape[0]
    before = before.clamp(0, m).expand(batch, n)
    ordered, order = before.sort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=order.device).expand(batch, n))
    slot_q = before + rank  # [B, N]
    keys = torch.arange(m, device=order.device).expand(batch, m).contiguous()
    slot_k = keys + torch.searchsorted(ordered.contiguous(), keys, right=True)  # [B, M]

    def put(t: Tensor, slot: Tensor) -> Tensor:
        index = slot[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
        return t.new_zeros(batch, t.shape[1], n + m, t.shape[3]).scatter(2, index, t)

    def take(out: Tensor) -> Tensor:
        return out.gather(2, slot_q[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3]))

    return [put(t, slot_q) for t in tensors_q], [put(t, slot_k) for t in tensors_k], None, take


def _sum_states(k: Tensor, v: Tensor, count: Tensor, k_rot: Tensor | None, want_v: bool) -> LinearState:
    return LinearState(
        (k if k_rot is None else k_rot).mT @ v,
        k.sum(2),
        v.sum(2) if want_v else None,
        count.sum(2),
        None if k_rot is None else k_rot.sum(2),
    )


def add_states(a: LinearState | None, b: LinearState | None) -> LinearState | None:
    """State of the union of two disjoint key sets."""
    if a is None or b is None:
        return a if b is None else b
    return LinearState(*(None if x is None or y is None else x + y for x, y in zip(a, b, strict=True)))


def causal(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None,
    before: Tensor | None,
    initial: LinearState | None,
    read: str,
    normalize: str = "denom",
    key_norm: str = "mean",
    scale: float = 1.0,
    eps: float = 1e-6,
    rotated: tuple[Tensor, Tensor] | None = None,
    chunk: int = CHUNK,
    product: Callable[..., tuple[Tensor, Tensor | None]] = prefix_product,
) -> Tensor:
    """Causal linear attention (``read="linear"``) or MALA (``read="mala"``), each query over its own prefix of the keys.

    ``product`` has the arguments and results of ``prefix_product``, which it replaces.
    """
    wants_mala = read == "mala"
    phi_k, v = drop_keys(key_mask, phi_k, v)
    ones = v.new_ones(v.shape[0], 1, v.shape[2], 1)
    (ones,) = drop_keys(key_mask, ones)
    q_side, k_side = [phi_q], [phi_k, v, ones]
    if rotated is not None:
        q_side.append(rotated[0])
        k_side.append(drop_keys(key_mask, rotated[1])[0])
    q_side, k_side, head, back = align(q_side, k_side, before)
    if head is not None:
        initial = add_states(
            initial,
            _sum_states(head[0], head[1], head[2], head[3] if rotated is not None else None, wants_mala),
        )
    fq, fk, val, one = q_side[0], *k_side[:3]
    rq, rk = (q_side[1], k_side[3]) if rotated is not None else (None, None)

    def slab(fq, fk, val, one, rq, rk, start: LinearState | None) -> tuple[Tensor, LinearState]:
        """Reads of some steps, and the state after them."""
        kv, ksum, vsum, count, _ = start or (None,) * 5
        num, kv = product(fq if rq is None else rq, fk if rk is None else rk, val, kv, chunk)
        if read == "linear" and normalize == "none":
            return num, LinearState(kv, None, None, None)
        ksum = prefix_sum(fk, ksum)
        z = (fq * ksum).sum(-1, keepdim=True)
        if not wants_mala:
            return num / (z + eps), LinearState(kv, ksum[:, :, -1:].squeeze(2), None, None)
        count, vsum = prefix_sum(one, count), prefix_sum(val, vsum)
        state = LinearState(kv, *(t[:, :, -1:].squeeze(2) for t in (ksum, vsum, count)))
        n = count.clamp(min=1)
        vbar, num, z = vsum / n, num * (scale / n), z * (scale / n)
        if key_norm == "sum":
            return num / (z + eps / n) + n * (num - z * vbar), state
        return num / (z + eps) + (num - z * vbar), state

    steps = [fq, fk, val, one, rq, rk]
    if product is not prefix_product or not isinstance(fq, Tensor) or fq.shape[2] <= slab_length(fk):
        return back(slab(*steps, initial)[0])
    return back(in_slabs(slab, steps, initial, slab_length(fk))[0])
