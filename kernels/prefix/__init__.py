"""Prefix softmax over per-key scores, and the element-wise linear recurrence.

B batch, H heads, N queries, M keys, E head size of values.

``prefix_softmax``: ``o_t = sum_{j<=t} e^{s_j} v_j / sum_{j<=t} e^{s_j}`` for every t, in time linear in M: attention with one query for all
positions, read as a recurrent network (max, denominator, numerator). ``diag_scan``: ``h_t = a_t h_{t-1} + x_t``.

Implementations: ``reference``; ``torch`` (chunks; differentiable any number of times); ``triton`` has one kernel for the recurrence, whose
gradient is the recurrence backwards. In units of the running maximum the prefix softmax is that recurrence too.

Source: Attention as an RNN, arXiv 2405.13956. The exclusive read and ``positions`` are this project's.
"""

from typing import NamedTuple

from torch import Tensor

from kernels._common.checks import Positions, check_key_mask, query_key_positions, work_dtype
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels._common.prefix import drop_keys
from kernels.prefix import reference
from kernels.prefix import torch as torch_path

__all__ = ["PrefixState", "cost", "diag_scan", "prefix_read", "prefix_softmax", "prefix_state"]


class PrefixState(NamedTuple):
    """Keys seen so far.

    Attributes:
        sums: ``sum e^{s_j - exponent} [v_j, 1]``, [B, H, E + 1].
        exponent: The largest score, [B, H]; a large negative number if there is none.
    """

    sums: Tensor
    exponent: Tensor


def prefix_softmax(
    s: Tensor,
    v: Tensor,
    *,
    read: str = "inclusive",
    reverse: bool = False,
    key_mask: Tensor | None = None,
    positions: Positions | None = None,
    queries: int | None = None,
    chunk: int = torch_path.CHUNK,
    impl: str | None = None,
) -> Tensor:
    """Softmax average of the values up to each position.

    Args:
        s: Scores of the keys, [B, H, M]; -inf hides a key.
        v: Values, [B, H, M, E].
        read: "inclusive" or "exclusive" (without the position's own key).
        reverse: From each position to the end instead.
        key_mask: Keys to keep, bool [B, M].
        positions: Last key that each of N readers sees, int [N] or [B, N] (below 0: none); not with ``reverse``.
        queries: Number of readers N without ``positions``: reader i sees keys up to ``i + M - N``. Left out: one per key.
        chunk: Keys per chunk of the torch path.
        impl: "reference", "torch", "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E], dtype of ``v``; zeros where no key is seen.

    Raises:
        ValueError: Shapes or options that do not fit.
    """
    op = "prefix_softmax"
    _check(op, s, v, key_mask)
    if read not in ("inclusive", "exclusive"):
        raise ValueError(f"{op}: read={read!r} is unknown; choose from inclusive, exclusive")
    if reverse and (positions is not None or queries not in (None, s.shape[2])):
        raise ValueError(f"{op}: reverse=True reads at every key; leave positions and queries out")
    if read == "exclusive" and positions is not None:
        raise ValueError(
            f"{op}: positions say which keys are read; give positions - 1 instead of read='exclusive'"
        )
    impl = choose(op, impl, v)
    work = work_dtype(v.dtype)
    s, v_work = drop_keys(key_mask, (s.to(work), float("-inf")), (v.to(work), 0.0))
    if reverse:
        s, v_work = s.flip(2), v_work.flip(2)
    if s.shape[2] == 0:
        # Sums of nothing keep the result in the graph.
        return v.new_zeros(*v.shape[:2], queries or 0, v.shape[3]) + v.sum() + s.sum().to(v.dtype)
    options = {"chunk": chunk} if impl == "torch" else {}
    out = _path(impl).prefix_softmax(s, v_work, read=read, **options).to(v.dtype)
    if reverse:
        return out.flip(2)
    n, m = s.shape[2] if queries is None else queries, s.shape[2]
    if positions is None and n == m:
        return out
    if isinstance(positions, (tuple, list)):
        raise ValueError(f"{op}: give positions as one tensor, the index of each reader's last key")
    n = n if positions is None else positions.shape[-1]
    place, _ = query_key_positions(op, positions, s.shape[0], n, m, s.device)
    index = place.clamp(0, m - 1).expand(s.shape[0], n)[:, None, :, None]
    out = out.gather(2, index.expand(-1, out.shape[1], -1, out.shape[3]))
    return out.masked_fill((place < 0)[:, None, :, None], 0.0)


def prefix_state(
    s: Tensor, v: Tensor, *, key_mask: Tensor | None = None, initial_state: PrefixState | None = None
) -> PrefixState:
    """State after all keys; one token at a time it is the decoding step. Arguments as in ``prefix_softmax``."""
    _check("prefix_state", s, v, key_mask)
    work = work_dtype(v.dtype)
    s, v = drop_keys(key_mask, (s.to(work), float("-inf")), (v.to(work), 0.0))
    return PrefixState(*torch_path.state(s, v, initial_state))


def prefix_read(state: PrefixState) -> Tensor:
    """The softmax average of the state's keys, [B, H, 1, E]."""
    return torch_path.divide(state.sums)[:, :, None]


def diag_scan(
    a: Tensor,
    x: Tensor,
    *,
    h0: Tensor | None = None,
    reverse: bool = False,
    segment: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """``h_t = a_t h_{t-1} + x_t`` element by element along axis 2.

    Args:
        a: Factors of any sign, broadcastable to ``x``.
        x: Inputs, [B, H, N, *].
        h0: Start value, [B, H, *]; zero if left out.
        reverse: From the last step to the first.
        segment: Restart from zero every so many steps; not with ``h0``.
        impl: "reference", "torch", "triton"; None chooses by context, environment and device.

    Returns:
        h, the shape of ``x``, in its dtype.
    """
    op = "diag_scan"
    if segment is not None and (segment < 1 or h0 is not None):
        raise ValueError(f"{op}: segment={segment} must be at least 1 and goes without h0")
    impl = choose(op, impl, x)
    work = work_dtype(x.dtype)
    a_work, x_work = a.to(work).expand(x.shape), x.to(work)
    if reverse:
        a_work, x_work = a_work.flip(2), x_work.flip(2)
    h = _path(impl).diag_scan(a_work, x_work, None if h0 is None else h0.to(work), segment).to(x.dtype)
    return h.flip(2) if reverse else h


def cost(
    batch: int, heads: int, tokens: int, value_dim: int, *, backward: bool = False, itemsize: int = 4
) -> Cost:
    """FLOPs and bytes of ``prefix_softmax``; the chunked form does ``2 T E`` per token."""
    flops = batch * heads * tokens * 2 * torch_path.CHUNK * (value_dim + 1)
    moved = batch * heads * tokens * itemsize * (2 * value_dim + 1)
    state = batch * heads * (value_dim + 2)
    return Cost(2.5 * flops, 2 * moved, state) if backward else Cost(flops, moved, state)


def _path(impl: str):
    if impl == "triton":
        from kernels.prefix import ops

        return ops
    return reference if impl == "reference" else torch_path


def _check(op: str, s: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    if v.dim() != 4 or s.shape != v.shape[:3]:
        raise ValueError(
            f"{op}: scores must be [batch, heads, keys] and values [batch, heads, keys, channels], got {tuple(s.shape)} and {tuple(v.shape)}"
        )
    check_key_mask(op, key_mask, v.shape[0], v.shape[2])
