"""Softmax attention with key mask, bias, causality, windows, grouped heads and a differentiable log-sum-exp.

B batch, H heads, Hk key heads, N queries, M keys, D head size of queries and keys, E head size of values.

Implementations: ``reference`` is explicit; ``torch`` hands each call to ``F.scaled_dot_product_attention`` where that is right and
fast (PyTorch's own kernels are the best available for plain attention on CPU, CUDA and ROCm, so the automatic choice uses them
there too) and to explicit softmax in row blocks for double backward, forward mode, float64 and a log-sum-exp output. Row blocks keep
memory linear in N. ``triton`` has forward and backward kernels for key mask, bias (its gradient reduced to its own shape; by torch for wide float32 heads and on AMD), bands, grouped
heads and the differentiable log-sum-exp; on a GPU the automatic choice takes them for what SDPA lacks: a log-sum-exp output, windows
and given positions without a mask of N x M, and a bias that needs a gradient. Dropout, softcap and skipping stay with torch.

Source: FlashAttention, arXiv 2205.14135; the merge identity of ``merge_lse`` is its section on blocks.
"""

from torch import Tensor, inf
from torch import float64 as _float64
from torch import stack as _stack
from torch.overrides import handle_torch_function as _handle

from kernels._common.checks import Positions, check_key_mask, check_qkv, query_key_positions
from kernels._common.choice import _current_traceable as current_choice
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels.softmax import reference
from kernels.softmax import torch as torch_path

__all__ = ["attention", "apply_sink", "cost", "merge_lse"]

Window = int | tuple[int | None, int | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    positions: Positions | None = None,
    window: Window | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    skip_threshold: float = 0.0,
    skip_tile: tuple[int, int] = (64, 64),
    return_lse: bool = False,
    higher_order: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` over visible keys.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, Hk, M, D]; Hk divides H, query head h reads key head ``h // (H / Hk)``.
        v: Values, [B, Hk, M, E].
        key_mask: Keys to keep, bool [B, M]; a row that sees no key gives zeros (lse -inf) and no gradient.
        bias: Added to the scaled scores, broadcastable to [B, H, N, M]; -inf hides a key.
        causal: Key j is visible to query i if its position is not larger.
        positions: Integer positions for ``causal`` and ``window``: of the queries on the key axis, [N] or [B, N], or a pair of query and
            key positions. Left out: query i sits at ``i + M - N``, key j at j.
        window: Keys at most this far from the query: one number for both sides or (left, right), None for no limit.
        scale: ``D ** -0.5`` if left out.
        dropout: Probability of zeroing a weight after the softmax; always applied, so pass 0 outside training.
        softcap: Bound the scaled scores by ``softcap tanh(. / softcap)``, before the bias; None for none.
        skip_threshold: Drop a tile of keys in which every row has ``exp(tile maximum - running maximum)`` below this over the row's
            visible keys (BLASST); the dropped weight of a row is then below this number. 0 drops nothing.
        skip_tile: Queries and keys of such a tile.
        return_lse: Also return the log-sum-exp of each row; it carries gradients.
        higher_order: The result will be differentiated more than once, or in forward mode.
        impl: "reference", "torch" or "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E] in the dtype of ``q``; with ``return_lse`` also [B, H, N].

    Raises:
        ValueError: Shapes or options that do not fit.
        NotImplementedError: impl="triton" for what its kernels lack.
    """
    if not all(
        isinstance(t, Tensor) for t in (q, k, v)
    ):  # Taylor jets and other tensor-likes bring their own rule
        options = dict(
            key_mask=key_mask, bias=bias, causal=causal, positions=positions, window=window, scale=scale
        )
        options |= dict(dropout=dropout, return_lse=return_lse)
        if softcap is not None or skip_threshold:
            raise NotImplementedError(
                "attention: softcap and skip_threshold take plain tensors only; leave them out"
            )
        return _handle(attention, (q, k, v), q, k, v, **options)
    op = "attention"
    check_qkv(op, q, k, v, grouped=True)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    _check_bias(op, bias, q, k)
    left, right = _check_window(op, window)
    if causal:
        right = 0 if right is None else min(right, 0)
    banded = left is not None or right is not None
    if positions is not None and not banded:
        raise ValueError(
            f"{op}: positions only matter for causal=True or a window; leave them out or set one of these"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
    if skip_threshold < 0 or min(skip_tile) < 1:
        raise ValueError(
            f"{op}: skip_threshold must be >= 0 and skip_tile >= 1, got {skip_threshold}, {skip_tile}"
        )
    skip = reference.Skip(skip_threshold, *skip_tile) if skip_threshold else None
    gap = "dropout" if dropout else "softcap" if softcap is not None else "skip_threshold" if skip else None
    asked = impl not in (None, "auto") or current_choice() is not None
    impl = choose(op, impl, q, k, v, triton_gap=gap)
    needs = (
        return_lse
        or (bias is not None and bias.requires_grad)
        or (banded and not (window is None and positions is None))
    )
    if impl == "triton" and not asked and (higher_order or not needs):
        impl = "torch"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pos_q = pos_k = None
    if banded:
        pos_q, pos_k = query_key_positions(op, positions, q.shape[0], q.shape[2], k.shape[2], q.device)
    if impl == "reference":
        visible = None
        if key_mask is not None:
            drop = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
        if key_mask is not None or banded:
            visible = torch_path._visible(key_mask, pos_q, pos_k, (left, right), 0, q.shape[2], 0, k.shape[2])
        out, lse = reference.attention(
            q, k, v, visible=visible, bias=bias, scale=scale, dropout=dropout, softcap=softcap, skip=skip
        )
    elif impl == "triton":
        from kernels.softmax import ops

        aligned = banded and positions is None
        out, lse = ops.attention(
            q, k, v, key_mask=key_mask, bias=bias, pos_q=pos_q, pos_k=pos_k, aligned=aligned, window=(left, right), scale=scale
        )  # fmt: skip
    else:
        out, lse = torch_path.attention(
            q,
            k,
            v,
            key_mask=key_mask,
            bias=bias,
            pos_q=pos_q,
            pos_k=pos_k,
            aligned=banded and positions is None,
            window=(left, right),
            scale=scale,
            want_lse=return_lse,
            explicit=higher_order or q.dtype == _float64,
            dropout=dropout,
            softcap=softcap,
            skip=skip,
        )
    return (out, lse) if return_lse else out


def apply_sink(out: Tensor, lse: Tensor, logit: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add one more key to every row after the fact: a sink that takes weight away from the others.

    ``O' = O sigmoid(lse - b) + v_s sigmoid(b - lse)`` and ``lse' = logaddexp(lse, b)``.

    Args:
        out: Attention over the real keys, [B, H, N, E].
        lse: Its log-sum-exp, [B, H, N].
        logit: Score b of the sink, broadcastable to [B, H, N].
        value: Value of the sink, broadcastable to [B, H, N, E]; zero if left out.

    Returns:
        Output and log-sum-exp with the sink. Rows without a real key stay zero, whatever the sink's value.
    """
    empty = lse == -inf
    # Empty rows get a harmless finite score, so that no infinity meets a zero in any derivative.
    kept = (lse.masked_fill(empty, 0.0) - logit).sigmoid().to(out.dtype)
    mixed = out * kept[..., None]
    if value is not None:
        mixed = mixed + (1 - kept)[..., None] * value
    return mixed.masked_fill(empty[..., None], 0.0), lse.logaddexp(logit.expand(lse.shape).to(lse.dtype))


def merge_lse(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the attention over each.

    Args:
        parts: Pairs of output [..., N, E] and log-sum-exp [..., N] as ``attention(..., return_lse=True)`` returns them.

    Returns:
        Output and log-sum-exp over all keys; rows without any key are 0 and -inf.
    """
    if not parts:
        raise ValueError("merge_lse: needs at least one (output, lse) pair, got an empty list")
    lse = _stack([part[1] for part in parts])
    peak = lse.detach().amax(0)
    peak = peak.masked_fill(peak == -inf, 0.0)
    weights = (lse - peak).exp()
    total = weights.sum(0)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    out = sum(
        (w / safe)[..., None].to(part[0].dtype) * part[0]
        for w, part in zip(weights.unbind(0), parts, strict=True)
    )
    return out, (safe.log() + peak).masked_fill(empty, -inf)


def cost(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    value_dim: int | None = None,
    *,
    causal: bool = False,
    key_heads: int | None = None,
    backward: bool = False,
    itemsize: int = 4,
) -> Cost:
    """FLOPs and bytes of the forward, or of the backward alone (2.5 times the products, scores recomputed)."""
    e = dim if value_dim is None else value_dim
    key_heads = heads if key_heads is None else key_heads
    pairs = queries * keys
    if causal:
        short = min(queries, keys)
        pairs = short * (keys - short) + short * (short + 1) / 2
    flops = batch * heads * pairs * 2 * (dim + e)
    moved = batch * itemsize * (heads * queries * (dim + e) + key_heads * keys * (dim + e))
    state = batch * key_heads * keys * (dim + e)
    return Cost(2.5 * flops, 2 * moved, state) if backward else Cost(flops, moved, state)


def _check_bias(op: str, bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    if bias is None:
        return
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = bias.dim() == 4 and all(have in (1, want) for have, want in zip(bias.shape, full, strict=True))
    if not fits:
        raise ValueError(
            f"{op}: bias must be 4-D and broadcastable to [B, H, N, M] = {list(full)}, got {tuple(bias.shape)}"
        )
    if not bias.is_floating_point():
        raise ValueError(
            f"{op}: bias must be floating point, got {bias.dtype}; pass bool masks as key_mask or use -inf"
        )


def _check_window(op: str, window: Window | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    left, right = (window, window) if isinstance(window, int) else window
    if any(side is not None and side < 0 for side in (left, right)):
        raise ValueError(f"{op}: window sides must be >= 0 or None, got {window!r}")
    return left, right
