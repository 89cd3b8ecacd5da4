"""Softmax attention with key mask, bias, causality, windows, grouped heads and a differentiable log-sum-exp.

B batch, H heads, Hk key heads, N queries, M keys, D head size of queries and keys, E head size of values.

Implementations: ``reference`` is explicit; ``torch`` hands each call to ``F.scaled_dot_product_attention`` where that is right and
fast (PyTorch's own kernels are the best available for plain attention on CPU, CUDA and ROCm, so the automatic choice uses them
there too) and to explicit softmax in row blocks for double backward, forward mode, float64 and a log-sum-exp output. Row blocks keep
memory linear in N, score mods and factors included. ``triton`` has forward and backward kernels for key mask, bias (its gradient reduced to its own shape;
by torch on AMD), bands, grouped heads, soft cap, low-rank factors with their gradients, score mods (gradients of their
tables by torch, in row blocks), a factor after the softmax and the differentiable log-sum-exp; few queries on many keys are split over the keys.
On a GPU the automatic choice takes them for what SDPA lacks: a log-sum-exp output, windows and given positions without a mask of N x M, a bias that
needs a gradient, and all of these options. Skipping (BLASST) works on whole tiles of the kernels, without a bias or the like. Dropout stays with torch.

Sources: FlashAttention, arXiv 2205.14135 (the merge identity of ``merge_lse`` is its section on blocks); FlashBias, arXiv 2505.12044 (factors);
Lean Attention, arXiv 2405.10480 (splitting the keys).
"""

from torch import Tensor
from torch import float64 as _float64
from torch.overrides import handle_torch_function as _handle

from kernels._common.checks import Positions, check_key_mask, check_qkv, query_key_positions
from kernels._common.choice import _current_traceable as current_choice
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels._common.widths import width_gap
from kernels.softmax import reference, skipping
from kernels.softmax import torch as torch_path
from kernels.softmax.combine import apply_sink, merge_lse
from kernels.softmax.mods import (
    Alibi,
    Polyline,
    RelativeTable,
    RelativeTable2d,
    RowColumn,
    ScoreMod,
    check_places,
)

__all__ = [
    "Alibi", "Polyline", "RelativeTable", "RelativeTable2d", "RowColumn", "ScoreMod",
    "apply_sink", "attention", "cost", "merge_lse",
]  # fmt: skip

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
    factors: tuple[Tensor, Tensor] | None = None,
    score_mod: ScoreMod | None = None,
    post_mask: Tensor | None = None,
    head_gate: Tensor | None = None,
    skip_threshold: float = 0.0,
    skip_tile: tuple[int, int] = (64, 64),
    skip_voting: Tensor | None = None,
    return_lse: bool = False,
    higher_order: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(w softmax(scale q k^T + phi_q phi_k^T + mod + bias)) v`` over visible keys.

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
        factors: A low-rank bias, phi_q [B|1, H, N, R] and phi_k [B|1, H, M, R]; kept in float32 at least.
        score_mod: A bias that follows from places, never built as a whole: see ``mods.py``.
        post_mask: Factor w of the weights after the softmax, broadcastable to [B, H, N, M]; rows then need not sum to one.
        head_gate: Factor of the output of each head and query, broadcastable to [B, H, N].
        skip_threshold: Drop a tile of keys in which every row has ``exp(tile maximum - running maximum)`` below this over the row's
            visible keys (BLASST); the dropped weight of a row is then below this number. 0 drops nothing.
        skip_tile: Queries and keys of such a tile.
        skip_voting: Queries, bool [B, N], for whose sake a tile stays; None for all. Queries that are padding have no say.
        return_lse: Also return the log-sum-exp of each row; it carries gradients.
        higher_order: The result will be differentiated more than once, or in forward mode.
        impl: "reference", "torch" or "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E] in the dtype of ``q``; with ``return_lse`` also [B, H, N].

    Raises:
        ValueError: Shapes or options that do not fit.
        NotImplementedError: impl="triton" for what its kernels lack.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        # Taylor jets and other tensor-likes bring their own rule
        options = dict(
            key_mask=key_mask, bias=bias, causal=causal, positions=positions, window=window, scale=scale
        )
        options |= dict(dropout=dropout, return_lse=return_lse)
        more = softcap, factors, score_mod, post_mask, head_gate, skip_threshold or None
        if any(option is not None for option in more):
            raise NotImplementedError(
                "attention: softcap, factors, score_mod, post_mask, head_gate and skip_threshold take plain tensors only; "
                "give their effect as a bias"
            )
        return _handle(attention, (q, k, v), q, k, v, **options)
    op = "attention"
    check_qkv(op, q, k, v, grouped=True)
    switches = causal or dropout or skip_threshold or return_lse or higher_order or impl is not None
    if not switches and key_mask is None and bias is None and positions is None and window is None:
        bare = (
            softcap is None
            and factors is None
            and score_mod is None
            and post_mask is None
            and head_gate is None
        )
        if bare and q.dtype != _float64 and current_choice() is None:
            # Without anything to check or choose: half of the time of decoding a token goes into such small steps.
            return torch_path.unmasked(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    full = (*q.shape[:3], k.shape[2])
    _check_pairs(op, "bias", bias, full)
    _check_pairs(op, "post_mask", post_mask, full)
    if head_gate is not None and (
        head_gate.dim() != 3
        or any(have not in (1, want) for have, want in zip(head_gate.shape, full, strict=False))
    ):
        raise ValueError(
            f"{op}: head_gate must be 3-D and broadcastable to [B, H, N] = {list(full[:3])}, got {tuple(head_gate.shape)}"
        )
    _check_factors(op, factors, full)
    if score_mod is not None:
        score_mod.check(full)
    left, right = _check_window(op, window)
    if causal:
        right = 0 if right is None else min(right, 0)
    banded = left is not None or right is not None
    if positions is not None and not banded and score_mod is None:
        raise ValueError(
            f"{op}: positions only matter for causal=True or a window or a score_mod; leave them out or set one of these"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
    if skip_threshold < 0 or min(skip_tile) < 1:
        raise ValueError(
            f"{op}: skip_threshold must be >= 0 and skip_tile >= 1, got {skip_threshold}, {skip_tile}"
        )
    check_key_mask(f"{op}, skip_voting", skip_voting, q.shape[0], q.shape[2])
    skip = reference.Skip(skip_threshold, *skip_tile, skip_voting) if skip_threshold else None
    gap = "dropout" if dropout else None
    if skip is not None:
        shaped = any(option is not None for option in (bias, factors, score_mod, post_mask))
        gap = gap or skipping.gap(skip, q, v, shaped)
    if gap is None and post_mask is not None and post_mask.requires_grad:
        gap = "the gradient of post_mask"
    gap = gap or width_gap("softmax", "head size", max(q.shape[-1], v.shape[-1]), q.dtype)
    asked = impl
    impl = choose(op, impl, q, k, v, triton_gap=gap)
    if impl == "triton" and asked in (None, "auto") and current_choice() is None:
        lacking = (
            return_lse
            or (bias is not None and bias.requires_grad)
            or (banded and not (window is None and positions is None))
            or any(option is not None for option in (softcap, factors, score_mod, post_mask, skip))
        )
        if higher_order or not lacking:  # nobody asked for Triton and SDPA has all of this
            impl = "torch"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pos_q = pos_k = mod = None
    if banded or score_mod is not None:
        pos_q, pos_k = query_key_positions(op, positions, q.shape[0], q.shape[2], k.shape[2], q.device)
    if score_mod is not None:
        if positions is not None:
            check_places(score_mod, pos_q, pos_k, full[3])
        mod = torch_path.Mod(score_mod.code(), score_mod.tables(), pos_q, pos_k)
    if not banded:
        pos_q = pos_k = None
    if impl == "reference":
        visible = None
        if key_mask is not None:
            drop = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
        if key_mask is not None or banded:
            visible = torch_path._visible(key_mask, pos_q, pos_k, (left, right), 0, q.shape[2], 0, k.shape[2])
        added = [] if bias is None else [bias]
        if factors is not None:
            added.append(factors[0] @ factors[1].mT)
        if mod is not None:
            added.append(mod.block(0, q.shape[2], 0, k.shape[2]))
        out, lse = reference.attention(
            q, k, v, visible=visible, bias=sum(added[1:], added[0]) if added else None, scale=scale, dropout=dropout,
            softcap=softcap, skip=skip, post=post_mask,
        )  # fmt: skip
    elif impl == "triton":
        from kernels.softmax import ops

        out, lse = ops.attention(
            q, k, v, key_mask=key_mask, bias=bias, pos_q=pos_q, pos_k=pos_k, aligned=positions is None,
            window=(left, right), scale=scale, softcap=softcap, factors=factors, mod=mod, post=post_mask, skip=skip,
        )  # fmt: skip
    else:
        out, lse = torch_path.attention(
            q, k, v, key_mask=key_mask, bias=bias, pos_q=pos_q, pos_k=pos_k, aligned=banded and positions is None,
            window=(left, right), scale=scale, want_lse=return_lse, explicit=higher_order or q.dtype == _float64,
            dropout=dropout, softcap=softcap, skip=skip, factors=factors, mod=mod, post=post_mask,
        )  # fmt: skip
    if head_gate is not None:
        out = out * head_gate[..., None].to(out.dtype)
    return (out, lse) if return_lse else out


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


def _check_pairs(op: str, name: str, t: Tensor | None, full: tuple[int, ...]) -> None:
    if t is None:
        return
    fits = t.dim() == 4 and all(have in (1, want) for have, want in zip(t.shape, full, strict=True))
    if not fits:
        raise ValueError(
            f"{op}: {name} must be 4-D and broadcastable to [B, H, N, M] = {list(full)}, got {tuple(t.shape)}"
        )
    if not t.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be floating point, got {t.dtype}; pass bool masks as key_mask or use -inf in a bias"
        )


def _check_factors(op: str, factors: tuple[Tensor, Tensor] | None, full: tuple[int, ...]) -> None:
    if factors is None:
        return
    batch, heads, *lengths = full
    shapes = [tuple(f.shape) for f in factors]
    fits = all(
        len(s) == 4 and s[0] in (1, batch) and s[1:3] == (heads, length)
        for s, length in zip(shapes, lengths, strict=True)
    )
    if not fits or shapes[0][3] != shapes[1][3]:
        raise ValueError(
            f"{op}: factors must be [B|1, H, N, R] and [B|1, H, M, R] with B, H, N, M = {list(full)}, got "
            f"{shapes[0]} and {shapes[1]}"
        )


def _check_window(op: str, window: Window | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    left, right = (window, window) if isinstance(window, int) else window
    if any(side is not None and side < 0 for side in (left, right)):
        raise ValueError(f"{op}: window sides must be >= 0 or None, got {window!r}")
    return left, right
