"""The delta rule: DeltaNet, Gated DeltaNet (scalar decay) and Kimi Delta Attention (decay per channel).

B batch, H heads, N queries, M keys, D head size of queries and keys, E head size of values.

``S_t = (I - beta_t k_t k_t^T) diag(e^{log_g_t}) S_{t-1} + beta_t k_t v_t^T``, ``o_t = q_t S_t``: decay first, then replace what the memory
returns for k_t by a mixture with v_t. The exclusive read is ``q_t diag(e^{log_g_t}) S_{t-1}``.

Implementations: ``reference`` goes step by step; ``torch`` solves one triangular system per chunk and is differentiable any number of
times; ``triton`` makes the walk over the chunks one kernel (its gradient is the same walk backwards) and the products of a chunk another, multiplies in
the inputs' precision, solves the systems in float32, and reads the outputs with the kernels of ``kernels.decay``.

Sources: arXiv 2406.06484 (chunk form), arXiv 2412.06464 (gated), arXiv 2510.26692 (per channel). Reading at ``positions``, the exclusive
read and the final state for cross attention are this project's.
"""

from torch import Tensor

from kernels._common.checks import Positions, check_key_mask, check_qkv, check_shape, work_dtype
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels._common.prefix import drop_keys, merge_axes
from kernels._common.widths import width_gap
from kernels.delta import reference
from kernels.delta import torch as torch_path

__all__ = ["cost", "delta_read", "delta_scan", "delta_state"]


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_g: Tensor | None = None,
    read: str = "inclusive",
    reverse: bool = False,
    key_mask: Tensor | None = None,
    positions: Positions | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    chunk: int | None = None,
    impl: str | None = None,
):
    """Scan keys in their order (backwards if ``reverse``) and read the state at every query.

    Args:
        q: Queries, already scaled, [B, H, N, D].
        k: Keys, [B, H, M, D]; of length at most 1, else writes with ``beta`` near 1 overshoot and the state may grow without bound.
        v: Values, [B, H, M, E].
        beta: Strength of each write, [B, H, M], in [0, 1] (to 2 for negative eigenvalues).
        log_g: Log decay before each write, at most 0: None, [B, H, M], or [B, H, M, D].
        read: "inclusive" or "exclusive".
        reverse: Scan from the last key to the first. Not with ``positions``; N must equal M.
        key_mask: Keys to keep, bool [B, M]; others neither write nor decay.
        positions: Last key that each query reads, int [N] or [B, N] (below 0: none), or a pair of query and key positions. Left out:
            ``i + M - N``.
        initial_state: State before the first key, [B, H, D, E].
        return_state: Also return the state after the last key (the first one if reversed).
        chunk: Steps per chunk of the torch path.
        impl: "reference", "torch", "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E] in the dtype of ``v``; with ``return_state`` a pair with the state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes or options that do not fit.
        NotImplementedError: An explicit implementation lacks what was asked.
    """
    op = "delta_scan"
    check_qkv(op, q, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    _check(op, k, beta, log_g, read)
    if reverse and (positions is not None or q.shape[2] != k.shape[2]):
        raise ValueError(f"{op}: reverse=True reads every query at its own key; give N = M and no positions")
    impl = choose(op, impl, q, k, v, triton_gap=width_gap("delta", "key channels", k.shape[-1], k.dtype))
    dtype, work = v.dtype, work_dtype(v.dtype)
    q, k, v, beta, log_g = _work(work, key_mask, q, k, v, beta, log_g)
    initial_state = _start(op, initial_state, k, v)
    if reverse:
        q, k, v, beta, log_g = (None if t is None else t.flip(2) for t in (q, k, v, beta, log_g))
    (q,), (k, v, beta, log_g), back = merge_axes(
        op, [(q, 0.0)], [(k, 0.0), (v, 0.0), (beta, 0.0), (log_g, 0.0)], positions
    )
    if k.shape[2] == 0:
        o = v
        state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
    elif impl == "reference":
        o, state = reference.scan(q, k, v, beta, log_g=log_g, read=read, initial=initial_state)
    else:
        options = {}
        if impl == "triton":
            from kernels.delta import ops

            options["parts"] = ops.parts(str(dtype)[6:])
            chunk = chunk or (ops.CHUNK if log_g is None or log_g.dim() == 3 else None)
        if chunk is not None:
            options["chunk"] = chunk
        o, state = torch_path.scan(q, k, v, beta, log_g=log_g, read=read, initial=initial_state, **options)
    o = back(o)
    out = (o.flip(2) if reverse else o).to(dtype)
    return (out, state) if return_state else out


def delta_state(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_g: Tensor | None = None,
    key_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """State after all keys, [B, H, D, E]; arguments as in ``delta_scan``. One token at a time it is the decoding step."""
    op = "delta_state"
    check_qkv(op, k, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    _check(op, k, beta, log_g, "inclusive")
    _, k, v, beta, log_g = _work(work_dtype(v.dtype), key_mask, k, k, v, beta, log_g)
    initial_state = _start(op, initial_state, k, v)
    if k.shape[2] == 0:
        return k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
    if k.shape[2] == 1:
        return reference.scan(k, k, v, beta, log_g=log_g, read="inclusive", initial=initial_state)[1]
    return torch_path.scan(
        k,
        k,
        v,
        beta,
        log_g=log_g,
        read="inclusive",
        initial=initial_state,
        outputs=False,
    )[1]


def delta_read(q: Tensor, state: Tensor) -> Tensor:
    """Read one state with all queries [B, H, N, D]; [B, H, N, E] in the dtype of ``q``."""
    return (q.to(state.dtype) @ state).to(q.dtype)


def cost(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    value_dim: int | None = None,
    *,
    queries: int | None = None,
    scan: bool = True,
    backward: bool = False,
    itemsize: int = 4,
    chunk: int = torch_path.CHUNK,
) -> Cost:
    """FLOPs and bytes of a scan (``scan``) or of one final state read by ``queries``; the backward is 2.5 times the products.

    Per token: overlaps and the inverse of the triangular system ``2 T D + T^2 / 3``, its product ``2 T E``, correction and write ``4 D E``, and
    for outputs ``2 D E + 2 T (D + E)``.
    """
    e = dim if value_dim is None else value_dim
    n = tokens if queries is None else queries
    t = chunk
    flops = tokens * (2 * t * (dim + e) + t * t / 3 + 4 * dim * e)
    flops += n * (2 * dim * e + 2 * t * (dim + e)) if scan else 2 * n * dim * e
    moved = itemsize * (n * (dim + e) + tokens * (dim + e + 1))
    total = Cost(batch * heads * flops, batch * heads * moved, batch * heads * dim * e)
    return Cost(2.5 * total.flops, 2 * total.bytes, total.state) if backward else total


def _work(work, key_mask, q, k, v, beta, log_g):
    k, v, beta, log_g = drop_keys(key_mask, (k, 0.0), (v, 0.0), (beta, 0.0), (log_g, 0.0))
    return q.to(work), k.to(work), v.to(work), beta.to(work), None if log_g is None else log_g.to(work)


def _start(op: str, state: Tensor | None, k: Tensor, v: Tensor) -> Tensor | None:
    check_shape(op, "initial_state", state, *k.shape[:2], k.shape[3], v.shape[3])
    return None if state is None else state.to(v.dtype)


def _check(op: str, k: Tensor, beta: Tensor, log_g: Tensor | None, read: str) -> None:
    if read not in ("inclusive", "exclusive"):
        raise ValueError(f"{op}: read={read!r} is unknown; choose from inclusive, exclusive")
    b, h, m, d = k.shape
    if tuple(beta.shape) != (b, h, m):
        raise ValueError(f"{op}: beta must be [{b}, {h}, {m}], got {tuple(beta.shape)}")
    if log_g is not None and tuple(log_g.shape) not in ((b, h, m), (b, h, m, d)):
        raise ValueError(
            f"{op}: log_g must be [{b}, {h}, {m}] or [{b}, {h}, {m}, {d}], got {tuple(log_g.shape)}"
        )
