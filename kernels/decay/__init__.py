"""Linear attention with decay: a scan with scalar or per-channel gates, and mLSTM's exponential input gate.

B batch, H heads, N queries, M keys, D head size of queries and keys, E head size of values.

``S_t = diag(e^{log_g_t}) S_{t-1} + e^{log_i_t} k_t v_t^T``, ``o_t = q_t S_t`` (inclusive) or ``q_t diag(e^{log_g_t}) S_{t-1}`` (exclusive: all
but the key's own term). With ``normalizer="denom"`` divided by the same sum of weights, with "mlstm" by the larger of its size and 1.

The exponential input gate needs no scan of its own: in units of a running maximum it becomes a smaller decay and smaller keys
(``_stabilise``).

Implementations: ``reference`` goes step by step; ``torch`` works in chunks and is differentiable any number of times; ``triton`` has
kernels whose gradients are scans again (see ``triton.py`` and ``ops.py``).

Sources: GLA, arXiv 2312.06635 (vector gates, chunk form); mLSTM, arXiv 2405.04517 and 2503.14376 (``log_i``, stabiliser). Reading at
``positions``, the exclusive read and the final state for cross attention are this project's.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, cat, maximum, no_grad, zeros_like

from kernels._common.checks import Positions, check_key_mask, check_qkv, check_shape, work_dtype
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels._common.prefix import drop_keys, merge_axes
from kernels.decay import reference
from kernels.decay import torch as torch_path

__all__ = ["DecayState", "cost", "decay_read", "decay_scan", "decay_state", "normalise"]

NORMALIZERS = ("none", "denom", "mlstm", "raw")
DENOM_EPS = 1e-6


class DecayState(NamedTuple):
    """What a scan carries.

    Attributes:
        kv: [B, H, D, E], or [B, H, D, E + 1] with the running sum of keys as last column if the scan is normalised.
        exponent: With an input gate, ``kv`` is scaled by e^-exponent; [B, H] or None.
    """

    kv: Tensor
    exponent: Tensor | None = None


def decay_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_g: Tensor | None = None,
    log_i: Tensor | None = None,
    normalizer: str = "none",
    read: str = "inclusive",
    reverse: bool = False,
    key_mask: Tensor | None = None,
    positions: Positions | None = None,
    initial_state: DecayState | None = None,
    return_state: bool = False,
    chunk: int | None = None,
    impl: str | None = None,
):
    """Scan keys in their order (backwards if ``reverse``) and read the state at every query.

    Args:
        q: Queries, already scaled, [B, H, N, D].
        k: Keys, [B, H, M, D].
        v: Values, [B, H, M, E].
        log_g: Log decay before each write, at most 0: None, [B, H, M], or [B, H, M, D].
        log_i: Log input gate, [B, H, M]; any size, kept in range by a running maximum. Not with vector decay.
        normalizer: "none"; "denom" divides by ``sum of weights + 1e-6`` (weights must not be negative); "mlstm" by ``max(|sum of
            weights|, 1)``; "raw" returns (numerator, sum of weights, exponent) for joining directions, see ``normalise``.
        read: "inclusive" or "exclusive".
        reverse: Scan from the last key to the first. Not with ``positions``; N must equal M.
        key_mask: Keys to keep, bool [B, M]; others neither write nor decay.
        positions: Last key that each query reads, int [N] or [B, N] (below 0: none), or a pair of query and key positions. Left out:
            ``i + M - N``.
        initial_state: State before the first key.
        return_state: Also return the state after the last key (the first one if reversed).
        chunk: Steps per chunk of the torch path.
        impl: "reference", "torch", "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E] in the dtype of ``v``, the raw triple for "raw"; with ``return_state`` a pair with ``DecayState``.

    Raises:
        ValueError: Shapes or options that do not fit.
        NotImplementedError: An explicit implementation lacks what was asked.
    """
    op = "decay_scan"
    check_qkv(op, q, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    _check(op, q, k, log_g, log_i, normalizer, read)
    if reverse and (positions is not None or q.shape[2] != k.shape[2]):
        raise ValueError(f"{op}: reverse=True reads every query at its own key; give N = M and no positions")
    impl = choose(op, impl, q, k, v)
    dtype, work = v.dtype, work_dtype(v.dtype)
    k, v, log_g, log_i = drop_keys(key_mask, (k, 0.0), (v, 0.0), (log_g, 0.0), (log_i, float("-inf")))
    if impl != "triton":
        q, k, v = q.to(work), k.to(work), v.to(work)
    log_g, log_i = (None if t is None else t.to(work) for t in (log_g, log_i))
    if reverse:
        q, k, v, log_g, log_i = (None if t is None else t.flip(2) for t in (q, k, v, log_g, log_i))
    if normalizer != "none":
        v = cat((v, v.new_ones(*v.shape[:3], 1)), -1)
        (v,) = drop_keys(key_mask.flip(1) if reverse and key_mask is not None else key_mask, (v, 0.0))
    (q,), (k, v, log_g, log_i), back = merge_axes(
        op, [(q, 0.0)], [(k, 0.0), (v, 0.0), (log_g, 0.0), (log_i, float("-inf"))], positions
    )
    start, start_max = _start(op, initial_state, k, v, log_i)
    exponent = state_max = None
    if k.shape[2] == 0:
        o, exponent = v, log_i
        state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=work) if start is None else start
        state_max = start_max
    elif impl == "reference":
        # Unscaled: the reference keeps no maximum. An incoming state is brought to its true size.
        if start is not None and start_max is not None:
            start = start * start_max.exp()[..., None, None]
        o, state = reference.scan(q, k, v, log_g=log_g, log_i=log_i, read=read, initial=start)
        if log_i is not None:
            exponent, state_max = zeros_like(log_i), zeros_like(log_i[:, :, 0])
    else:
        steps = k.shape[2]
        if log_i is not None:
            if read == "exclusive":
                q, k, v, log_g, log_i = _one_later(q, k, v, log_g, log_i)
            k, log_g, exponent = _stabilise(k, log_g, log_i, start_max)
            state_max = exponent[:, :, -1]
        inclusive = read == "inclusive" or log_i is not None
        if impl == "triton":
            from kernels.decay import ops

            wide = normalizer != "none" or log_i is not None
            o, state = ops.scan(q, k, v, log_g, start, inclusive, wide)
        else:
            o, state = torch_path.scan(q, k, v, log_g=log_g, inclusive=inclusive, initial=start, chunk=chunk)
        o, exponent = o[:, :, :steps], None if exponent is None else exponent[:, :, :steps]
    o = back(o)
    exponent = None if exponent is None else back(exponent[..., None])
    if reverse:
        o = o.flip(2)
        exponent = None if exponent is None else exponent.flip(2)
    out = _finish(o, exponent, normalizer, dtype)
    return (out, DecayState(state, state_max)) if return_state else out


def _start(op: str, state: DecayState | None, k: Tensor, v: Tensor, log_i: Tensor | None):
    """Sums [B, H, D, E] (a column more if normalised, as ``v`` then has) and exponent of an initial state, checked, in the type of sums."""
    if state is None:
        return None, None
    b, h, _, d = k.shape
    work = work_dtype(v.dtype)
    check_shape(op, "initial_state.kv (with this normalizer)", state.kv, b, h, d, v.shape[3])
    check_shape(op, "initial_state.exponent", state.exponent, b, h)
    if log_i is None and state.exponent is not None:
        raise ValueError(
            f"{op}: initial_state has an exponent, which only a scan with log_i goes on from; give log_i (zeros for none)"
        )
    return state.kv.to(work), None if state.exponent is None else state.exponent.to(work)


def _one_later(q, k, v, log_g, log_i):
    """An exclusive read as an inclusive one: every key is written a step later, decayed by that step's gate. One step longer."""
    behind = lambda t: None if t is None else F.pad(t, (0, 0) * (t.dim() - 3) + (0, 1))
    q, log_g = behind(q), behind(log_g)
    k, v = (F.pad(t, (0, 0, 1, 0)) for t in (k, v))
    log_i = F.pad(log_i, (1, 0), value=float("-inf"))
    return q, k, v, log_g, log_i if log_g is None else log_i + log_g


def _stabilise(k: Tensor, log_g: Tensor | None, log_i: Tensor, start_max: Tensor | None):
    """Keys and gates of the scan in units of e^m, and m [B, H, M].

    m_t, the largest ``c_t - c_j + log_i_j`` so far and at least 0, obeys ``m_t >= log_g_t + m_{t-1}``: the new gate
    ``log_g_t + m_{t-1} - m_t`` and the new input gate ``log_i_t - m_t`` are at most zero. m cancels in exact arithmetic, so no
    gradient passes through it.
    """
    with no_grad():
        cum = zeros_like(log_i) if log_g is None else log_g.cumsum(-1)
        start = log_i.new_zeros(log_i.shape[:2]) if start_max is None else start_max
        best = maximum((log_i - cum).cummax(-1).values, start[..., None])
        top = (cum + best).clamp(min=0)
        fall = cat((start[..., None], top[..., :-1]), -1) - top
    return (k * (log_i - top).exp()[..., None]).to(k.dtype), fall if log_g is None else log_g + fall, top


def _finish(o: Tensor, exponent: Tensor | None, normalizer: str, dtype):
    if normalizer == "none":
        return (o if exponent is None else o * exponent.exp()).to(dtype)
    num, den = o[..., :-1], o[..., -1:]
    if normalizer == "raw":
        return num, den, exponent
    return normalise([(num, den, exponent)], normalizer).to(dtype)


def normalise(parts: list[tuple[Tensor, Tensor, Tensor | None]], normalizer: str) -> Tensor:
    """Join raw results of scans over disjoint keys and divide once.

    Args:
        parts: Numerators [B, H, N, E], sums of weights [B, H, N, 1], exponents [B, H, N, 1] or None.
        normalizer: "none", "denom" or "mlstm".
    """
    top = None
    for _, _, exponent in parts:
        if exponent is not None:
            top = exponent if top is None else maximum(top, exponent)
    num = den = 0
    for part_num, part_den, exponent in parts:
        factor = 1 if exponent is None else (exponent - top).exp()
        num, den = num + part_num * factor, den + part_den * factor
    if normalizer == "none":
        return num if top is None else num * top.exp()
    if normalizer == "denom":
        return num / (den + DENOM_EPS)
    bound = den.new_ones(()) if top is None else (-top).exp()
    return num / maximum(den.abs(), bound)


def decay_state(
    k: Tensor,
    v: Tensor,
    *,
    log_g: Tensor | None = None,
    log_i: Tensor | None = None,
    normalizer: str = "none",
    key_mask: Tensor | None = None,
    initial_state: DecayState | None = None,
) -> DecayState:
    """State after all keys, in one product; arguments as in ``decay_scan``. One token at a time it is the decoding step."""
    op = "decay_state"
    check_qkv(op, k, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    _check(op, k, k, log_g, log_i, normalizer, "inclusive")
    work = work_dtype(v.dtype)
    if normalizer != "none":
        v = cat((v, v.new_ones(*v.shape[:3], 1)), -1)
    k, v, log_g, log_i = drop_keys(key_mask, (k, 0.0), (v, 0.0), (log_g, 0.0), (log_i, float("-inf")))
    k, v = k.to(work), v.to(work)
    to_end = across = None
    if log_g is not None:
        cum = log_g.to(work).cumsum(2)
        across = cum[:, :, -1:] if cum.shape[2] else cum.sum(2, keepdim=True)
        to_end = across - cum
    start, start_max = _start(op, initial_state, k, v, log_i)
    if log_i is not None:
        to_end = log_i.to(work) if to_end is None else to_end + log_i.to(work)
        across = to_end.new_zeros(*to_end.shape[:2], 1) if across is None else across
        begin = across.new_zeros(across.shape) if start_max is None else start_max[..., None]
        end_max = cat((to_end, across + begin), -1).amax(-1, keepdim=True).clamp(min=0).detach()
        to_end, across = to_end - end_max, across + begin - end_max
        end_max = end_max.squeeze(-1)
    else:
        end_max = None
    if to_end is not None:
        k = k * (to_end[..., None] if to_end.dim() == 3 else to_end).exp()
    state = k.mT @ v
    if start is not None:
        if across is not None:
            start = start * (across[..., None] if across.dim() == 3 else across.mT).exp()
        state = state + start
    return DecayState(state, end_max)


def decay_read(q: Tensor, state: DecayState, *, normalizer: str = "none") -> Tensor:
    """Read one state with all queries [B, H, N, D]; [B, H, N, E] in the dtype of ``q``."""
    o = q.to(state.kv.dtype) @ state.kv
    exponent = None if state.exponent is None else state.exponent[..., None, None].expand(*o.shape[:3], 1)
    return _finish(o, exponent, normalizer, q.dtype)


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
    """FLOPs and bytes of a scan (``scan``) or of one final state read by ``queries``; the backward is 2.5 times the products."""
    e = dim if value_dim is None else value_dim
    n = tokens if queries is None else queries
    flops = 2 * dim * e * (tokens + n) + (tokens * chunk * 2 * (dim + e) if scan else 0)
    moved = itemsize * (n * (dim + e) + tokens * (dim + e))
    total = Cost(batch * heads * flops, batch * heads * moved, batch * heads * dim * e)
    return Cost(2.5 * total.flops, 2 * total.bytes, total.state) if backward else total


def _check(op, q, k, log_g, log_i, normalizer, read) -> None:
    for name, value, allowed in (
        ("normalizer", normalizer, NORMALIZERS),
        ("read", read, ("inclusive", "exclusive")),
    ):
        if value not in allowed:
            raise ValueError(f"{op}: {name}={value!r} is unknown; choose from {', '.join(allowed)}")
    b, h, m, d = k.shape
    if log_g is not None and tuple(log_g.shape) not in ((b, h, m), (b, h, m, d)):
        raise ValueError(
            f"{op}: log_g must be [{b}, {h}, {m}] or [{b}, {h}, {m}, {d}], got {tuple(log_g.shape)}"
        )
    if log_i is not None:
        if tuple(log_i.shape) != (b, h, m):
            raise ValueError(f"{op}: log_i must be [{b}, {h}, {m}], got {tuple(log_i.shape)}")
        if log_g is not None and log_g.dim() == 4:
            raise ValueError(
                f"{op}: log_i goes with scalar decay [B, H, M]; multiply k by exp(log_i) instead"
            )
        if normalizer == "denom":
            raise ValueError(f"{op}: normalizer 'denom' is not defined with log_i; use 'mlstm'")
