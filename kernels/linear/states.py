"""States of linear attention by hand: sums over keys, their reads, and what a call costs."""

from torch import Tensor

from kernels._common.checks import check_key_mask, work_dtype
from kernels._common.cost import Cost
from kernels.linear import torch as torch_path
from kernels.linear.options import check_option
from kernels.linear.torch import LinearState


def global_state(
    phi_k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    k_rot: Tensor | None = None,
    want_v: bool = True,
) -> LinearState:
    """Sum keys into a state; for one token at a time, ``add_states(state, global_state(phi_k_t, v_t))``.

    Args:
        phi_k: Key features, [B, H, M, F].
        v: Values, [B, H, M, E].
        key_mask: Keys to keep, bool [B, M].
        k_rot: Rotated key features for the matrix part, [B, H, M, F].
        want_v: Also sum the values (MALA needs that).

    Returns:
        Sums in float32 (float64 for float64 inputs).
    """
    check_key_mask("global_state", key_mask, v.shape[0], v.shape[2])
    dtype = work_dtype(v.dtype)
    k_rot = None if k_rot is None else k_rot.to(dtype)
    return torch_path.global_state(phi_k.to(dtype), v.to(dtype), key_mask, want_v, k_rot)


def linear_read(phi_q: Tensor, state: LinearState, *, normalize: str = "denom", eps: float = 1e-6) -> Tensor:
    """Read a state with query features [B, H, N, F]; returns [B, H, N, E] in the dtype of ``phi_q``."""
    check_option("linear_read", "normalize", normalize, ("denom", "none"))
    return torch_path.linear_read(phi_q.to(state.kv.dtype), state, normalize, eps).to(phi_q.dtype)


def mala_read(
    phi_q: Tensor,
    state: LinearState,
    *,
    q_rot: Tensor | None = None,
    key_norm: str = "mean",
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """MALA's read of a state that has ``vsum``; arguments as in ``mala``. Returns [B, H, N, E] in the dtype of ``phi_q``."""
    check_option("mala_read", "key_norm", key_norm, ("mean", "sum"))
    if state.vsum is None or (state.ksum_rot is None) != (q_rot is None):
        raise ValueError(
            "mala_read: the state needs vsum (want_v=True), and k_rot exactly when q_rot is given"
        )
    dtype = state.kv.dtype
    scale = phi_q.shape[-1] ** -0.5 if scale is None else scale
    q_rot = None if q_rot is None else q_rot.to(dtype)
    return torch_path.mala_read(phi_q.to(dtype), state, q_rot, key_norm, scale, eps).to(phi_q.dtype)


def cost(
    op: str,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    value_dim: int | None = None,
    *,
    causal: bool = False,
    backward: bool = False,
    itemsize: int = 4,
    chunk: int = torch_path.CHUNK,
) -> Cost:
    """FLOPs and bytes of ``op`` = "linear" or "mala" for feature size ``dim``; the backward alone is 2.5 times the products.

    A read or a sum costs 2 F E per token; causal calls add the masked products inside chunks.
    """
    e = dim if value_dim is None else value_dim
    per_query = 2 * dim * e + 2 * dim + (8 * e if op == "mala" else 2 * e)
    per_key = 2 * dim * e + dim + (e if op == "mala" else 0)
    flops = batch * heads * (queries * per_query + keys * per_key)
    if causal:
        flops += batch * heads * queries * chunk * 2 * (dim + e)
    moved = batch * heads * itemsize * ((queries + keys) * dim + (queries + keys) * e)
    state = batch * heads * (dim * e + dim + (e + 1 if op == "mala" else 0))
    if backward:
        # dS, dphi(q), dphi(k), dv and the recomputed forward product of the read; q, k, v, dO in, dq, dk, dv out.
        return Cost(2.5 * flops, 2 * moved, state)
    return Cost(flops, moved, state)
