"""Test-time memory: a small network per head, trained by gradient descent while the tokens pass (Titans).

B batch, H heads, N queries, M keys, D head size of queries and keys, E of values, T chunk, R hidden width of a two-layer memory.

For every token: ``mom_t = eta_t mom_{t-1} - theta_t grad |Mem(k_t) - v_t|^2``, ``Mem_t = (1 - alpha_t) Mem_{t-1} + mom_t``, read ``Mem_t(q_t)``. In chunks of T
tokens the gradient is taken at the memory of the chunk's start; ``chunk=1`` is the rule as written. A memory that has seen no token reads as
zero.

Memories: one matrix (``Mem(x) = x W``), or two layers, ``Mem(x) = x + gain * LayerNorm(gelu(x W1) W2)`` (without ``x +`` where D != E); the gain
is not trained online. Weights and momenta are the state; skipped tokens (``key_mask``) leave both alone.

Implementations: ``reference`` goes token by token with gradients from autograd; ``torch`` writes them out and never forms weights per token; ``triton``
makes the walk from chunk to chunk of a memory that is one matrix a kernel, and its gradient the same kernel backwards. The two-layer memory has none: its
four states and the hidden layer of a chunk, through a GELU and a LayerNorm, do not stay in the registers of one program, and between programs the
walk would wait for memory at each of its steps, which is what the torch path does already.

Source: Titans, arXiv 2501.00663. Reading at ``positions``, the exclusive read and the final state for cross attention are this project's.
"""

from typing import NamedTuple

from torch import Tensor

from kernels._common.checks import check_key_mask, check_qkv, check_shape, query_key_positions, work_dtype
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels._common.widths import width_gap
from kernels.memory import reference
from kernels.memory import torch as torch_path
from kernels.memory.torch import predict

__all__ = ["MemoryState", "cost", "memory_read", "memory_scan", "memory_state", "memory_step"]


class MemoryState(NamedTuple):
    """Where the online training stands; every tensor has the batch first.

    Attributes:
        weights: The memory now: (W,) or (W1, W2), each [B, H, in, out].
        momenta: Alike.
        start: Weights at the start of the running chunk, at which gradients are taken.
        steps: Tokens learned so far, [B].
    """

    weights: tuple[Tensor, ...]
    momenta: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    steps: Tensor


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: tuple[Tensor, ...],
    gain: Tensor | None = None,
    lr: Tensor,
    log_keep: Tensor | None = None,
    log_momentum: Tensor | None = None,
    chunk: int = 16,
    read: str = "inclusive",
    reverse: bool = False,
    key_mask: Tensor | None = None,
    positions: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Learn keys in their order and read the memory at every query.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, M, D].
        v: Values, [B, H, M, E].
        weights: The memory before the first token: (W [H, D, E],) or (W1 [H, D, R], W2 [H, R, E]).
        gain: Gain of the LayerNorm of a two-layer memory, [H, E].
        lr: theta, [B, H, M].
        log_keep: log(1 - alpha), at most 0, [B, H, M]; None keeps everything.
        log_momentum: log(eta), at most 0, [B, H, M]; None for no momentum.
        chunk: Tokens whose gradients are taken at the same weights.
        read: "inclusive" or "exclusive" (before the token is learned).
        reverse: From the last token to the first; N = M, without positions.
        key_mask: Tokens to learn, bool [B, M]; the others are skipped, and do not count towards chunks.
        positions: Last key of each query, int [N] or [B, N]; left out: ``i + M - N``.
        impl: "reference", "torch", "triton" (one matrix only); None chooses by context, environment and device.

    Returns:
        [B, H, N, E], dtype of ``v``; zeros where nothing has been learned.
    """
    op = "memory_scan"
    _check(op, q, k, v, weights, gain, (lr, log_keep, log_momentum), key_mask, chunk)
    if read not in ("inclusive", "exclusive"):
        raise ValueError(f"{op}: read={read!r} is unknown; choose from inclusive, exclusive")
    if reverse and (positions is not None or q.shape[2] != k.shape[2]):
        raise ValueError(f"{op}: reverse=True reads every query at its own key; give N = M and no positions")
    if isinstance(positions, (tuple, list)):
        raise ValueError(
            f"{op}: give positions as one tensor, the index of each query's last key; keys are learned in their order"
        )
    impl = choose(op, impl, q, k, v, triton_gap=_gap(weights, k))
    n, m = q.shape[2], k.shape[2]
    if 0 in (*q.shape, m, v.shape[3]):
        # Sums of nothing keep the result in the graph.
        return v.new_zeros(*v.shape[:2], n, v.shape[3]) + sum(t[..., :0].sum() for t in (q, k, v))
    inputs = torch_path.Inputs.prepare(k, v, lr, log_keep, log_momentum, key_mask, reverse)
    work = work_dtype(v.dtype)
    weights = tuple(w.to(work).expand(q.shape[0], *w.shape) for w in weights)
    gain = None if gain is None else gain.to(work)
    # How many learned tokens each query has behind it in scan order, [B, N]; reversed queries are flipped below.
    place, _ = query_key_positions(op, positions, q.shape[0], n, m, q.device)
    seen = inputs.learned(place if read == "inclusive" or positions is not None else place - 1)
    q = q.to(work)
    q = q.flip(2) if reverse else q
    if impl == "triton":
        from kernels.memory import ops

        out = ops.scan(q, inputs, weights, seen, chunk, str(v.dtype)[6:]).to(v.dtype)
    else:
        path = reference if impl == "reference" else torch_path
        out = path.scan(q, inputs, weights, gain, seen, chunk).to(v.dtype)
    return out.flip(2) if reverse else out


def memory_state(
    k: Tensor,
    v: Tensor,
    *,
    weights: tuple[Tensor, ...],
    gain: Tensor | None = None,
    lr: Tensor,
    log_keep: Tensor | None = None,
    log_momentum: Tensor | None = None,
    chunk: int = 16,
    key_mask: Tensor | None = None,
) -> MemoryState:
    """The memory after all keys; arguments as in ``memory_scan``."""
    _check("memory_state", k, k, v, weights, gain, (lr, log_keep, log_momentum), key_mask, chunk)
    inputs = torch_path.Inputs.prepare(k, v, lr, log_keep, log_momentum, key_mask, False)
    work = work_dtype(v.dtype)
    weights = tuple(w.to(work).expand(k.shape[0], *w.shape) for w in weights)
    return MemoryState(*torch_path.learn(inputs, weights, None if gain is None else gain.to(work), chunk))


def memory_step(
    state: MemoryState,
    k: Tensor,
    v: Tensor,
    *,
    gain: Tensor | None = None,
    lr: Tensor,
    log_keep: Tensor | None = None,
    log_momentum: Tensor | None = None,
    chunk: int = 16,
) -> MemoryState:
    """Learn one token: k [B, H, 1, D], v [B, H, 1, E], gates [B, H, 1]."""
    if k.shape[2] != 1:
        raise ValueError(f"memory_step: one token at a time, got {k.shape[2]}; memory_state learns many")
    work = state.weights[0].dtype
    return MemoryState(
        *torch_path.step(state, k.to(work), v.to(work), gain, lr, log_keep, log_momentum, chunk)
    )


def memory_read(q: Tensor, state: MemoryState, *, gain: Tensor | None = None) -> Tensor:
    """Ask the memory with queries [B, H, N, D]; zeros in batch rows that have learned nothing."""
    out = predict(q.to(state.weights[0].dtype), state.weights, gain)
    return out.masked_fill((state.steps == 0)[:, None, None, None], 0.0).to(q.dtype)


def cost(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    value_dim: int,
    *,
    hidden: int = 0,
    queries: int | None = None,
    chunk: int = 16,
    itemsize: int = 4,
) -> Cost:
    """FLOPs and bytes: prediction, gradient and update per key, read per query with the chunk's corrections."""
    n = tokens if queries is None else queries
    size = dim * value_dim if not hidden else hidden * (dim + value_dim)
    widths = dim + value_dim + 2 * hidden
    flops = batch * heads * (tokens * 8 * size + n * (4 * size + 2 * chunk * widths))
    moved = batch * heads * itemsize * (n + tokens) * (dim + value_dim)
    return Cost(flops, moved, batch * heads * 3 * size)


def _gap(weights: tuple[Tensor, ...], k: Tensor) -> str | None:
    """What the Triton kernel lacks for this call."""
    if len(weights) > 1:
        return "a memory of two layers"
    return width_gap("memory", "key channels", k.shape[-1], k.dtype)


def _check(op, q, k, v, weights, gain, gates, key_mask, chunk) -> None:
    check_qkv(op, q, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    h, d, e = k.shape[1], k.shape[-1], v.shape[-1]
    shapes = [tuple(w.shape) for w in weights]
    if len(shapes) == 1:
        fits = shapes[0] == (h, d, e)
    else:
        fits = len(shapes) == 2 and shapes[0][:2] == (h, d) and shapes[1] == (h, shapes[0][2], e)
    if not fits:
        raise ValueError(
            f"{op}: weights must be one [{h}, {d}, {e}] or [{h}, {d}, R] and [{h}, R, {e}], got {shapes}"
        )
    if (gain is None) != (len(shapes) == 1):
        raise ValueError(f"{op}: a two-layer memory needs gain [{h}, {e}], a matrix takes none")
    check_shape(op, "gain", gain, h, e)
    for name, gate in zip(("lr", "log_keep", "log_momentum"), gates, strict=True):
        check_shape(op, name, gate, *k.shape[:3])
    if chunk < 1:
        raise ValueError(f"{op}: chunk={chunk} must be at least 1")
