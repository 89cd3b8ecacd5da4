"""Attention to a few blocks of keys that each query chose: scoring from compressed attention, selection, and the attention itself.

B batch, H heads, Hk key heads (a group of H / Hk query heads shares one choice), N queries, M keys, D head size of queries and keys,
E head size of values, Nc compressed blocks, Nb selection blocks, S chosen blocks.

    p = softmax(scale q k_cmp^T)                                         over visible compressed blocks, per head
    score[j] = sum over the group and over i of p_i overlap(i, j) / stride
    index = the S blocks with the largest score, lowest index first among equals
    O = softmax over the raw keys of the chosen blocks

The overlap form of the score equals the double sum of the paper (eq. 9). Scores and choice carry no gradient. Implementations:
``reference`` builds a dense mask; ``torch`` does so too while that is cheap and goes by blocks of keys when these are many (``streamed.py``; for
higher order it gathers the chosen blocks of each query, in row blocks); ``triton`` has the attention forward and backward with the heads of a group as rows of the products, the scores from the
log-sum-exp of compressed attention, and the choice.

Source: Native Sparse Attention, arXiv 2502.11089.
"""

from functools import lru_cache

import torch as pt
from torch import Tensor

from kernels import softmax
from kernels._common.checks import Positions, check_key_mask, check_qkv, check_shape, query_key_positions
from kernels._common.choice import _current_traceable as current_choice
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels._common.widths import width_gap
from kernels.selected import reference
from kernels.selected import torch as torch_path

# The heads of a group are the rows of a tile; the compile gate takes groups of 16.
MOST_HEADS = 64

__all__ = ["attention", "block_scores", "cost", "overlap_stencil", "select_blocks"]


@lru_cache(maxsize=256)
def overlap_stencil(
    compressed: int, selected: int, block: int, stride: int, select_block: int, device: pt.device
) -> Tensor:
    """Weight of compressed block i (tokens [i stride, i stride + block)) in selection block j, float32 [Nc, Nb].

    Raises:
        ValueError: Sizes that the stride does not divide.
    """
    if stride < 1 or block % stride or select_block % stride:
        raise ValueError(
            f"overlap_stencil: stride {stride} must divide the compression block {block} and the selection block "
            f"{select_block}"
        )
    start_c = pt.arange(compressed, device=device)[:, None] * stride
    start_s = pt.arange(selected, device=device)[None] * select_block
    shared = pt.minimum(start_c + block, start_s + select_block) - pt.maximum(start_c, start_s)
    return shared.clamp(min=0).float() / stride


@pt.no_grad()
def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    stencil: Tensor,
    *,
    visible: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """How much a group of queries attends to each selection block.

    Args:
        q: Queries, [B, H, N, D].
        k_cmp: Compressed keys, [B, Hk, Nc, D].
        stencil: From ``overlap_stencil``, [Nc, Nb].
        visible: bool, broadcastable to [B, 1, N, Nc]; rows that see nothing score 0 everywhere.
        scale: ``D ** -0.5`` if left out.
        lse: Log-sum-exp [B, H, N] of the compressed attention, if it is known; the Triton kernel needs it.
        impl: "reference", "torch" (the same here) or "triton"; None chooses by context, environment and device.

    Returns:
        float32 [B, Hk, N, Nb], without gradient.
    """
    op = "block_scores"
    check_qkv(op, q, k_cmp, k_cmp, grouped=True)
    batch, heads, n, compressed = *q.shape[:3], k_cmp.shape[2]
    check_shape(op, "lse", lse, batch, heads, n)
    if stencil.dim() != 2 or stencil.shape[0] != compressed:
        raise ValueError(f"{op}: stencil must be [{compressed}, Nb], got {tuple(stencil.shape)}")
    if visible is not None:
        fits = visible.dim() == 4 and all(
            have in (1, want) for have, want in zip(visible.shape, (batch, 1, n, compressed), strict=True)
        )
        if not fits or visible.dtype != pt.bool:
            raise ValueError(
                f"{op}: visible must be bool and broadcastable to [B, 1, N, Nc] = [{batch}, 1, {n}, {compressed}], got "
                f"{visible.dtype} {tuple(visible.shape)}"
            )
        visible = visible.expand(-1, -1, -1, compressed)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gap = width_gap("selected", "head size", q.shape[-1], q.dtype)
    if choose(op, impl, q, k_cmp, triton_gap=gap) == "triton":
        from kernels.selected import ops

        if lse is None:
            hidden = (
                None
                if visible is None
                else pt.zeros_like(visible, dtype=pt.float32).masked_fill(~visible, -pt.inf)
            )
            lse = softmax.attention(
                q, k_cmp, k_cmp, bias=hidden, scale=scale, return_lse=True, impl="triton"
            )[1]
        return ops.selected_scores(q, k_cmp, stencil, visible, lse, float(scale))
    return torch_path.block_scores(q, k_cmp, stencil, visible, scale)


@pt.no_grad()
def select_blocks(
    scores: Tensor,
    count: int,
    *,
    forced: Tensor | None = None,
    valid: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The ``count`` best blocks of each query, in ascending order.

    Args:
        scores: [B, Hk, N, Nb].
        count: S, how many to take at most.
        forced: bool, broadcastable to ``scores``; blocks taken first, where valid.
        valid: bool, broadcastable to ``scores``; others are never taken.
        impl: "reference", "torch" (the same here) or "triton"; None chooses by context, environment and device.

    Returns:
        Block numbers, int64 [B, Hk, N, min(S, Nb)]; missing ones are -1, at the end.
    """
    if count < 1:
        raise ValueError(f"select_blocks: count must be at least 1, got {count}")
    scores = scores.float()
    if forced is not None:
        scores = scores.masked_fill(forced, pt.inf)
    if valid is not None:
        scores = scores.masked_fill(~valid, -pt.inf)
    if choose("select_blocks", impl, scores) == "triton":
        from kernels.selected import ops

        return ops.selected_top(scores, count)
    return torch_path.top(scores, count)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    block_size: int,
    causal: bool = False,
    positions: Positions | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    higher_order: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query to the keys of its chosen blocks.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, Hk, M, D]; Hk divides H.
        v: Values, [B, Hk, M, E].
        index: Chosen blocks, [B, Hk, N, S], each block at most once per row; -1 stands for none.
        block_size: Keys of a block; block j holds keys [j block_size, (j + 1) block_size).
        causal: Key j is visible to query i if its position is not larger.
        positions: As in ``kernels.softmax.attention``.
        key_mask: Keys to keep, bool [B, M]; a row that sees no key gives zeros (lse -inf) and no gradient.
        scale: ``D ** -0.5`` if left out.
        return_lse: Also return the log-sum-exp of each row; it carries gradients.
        higher_order: The result will be differentiated more than once.
        impl: "reference", "torch" or "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E] in the dtype of ``q``; with ``return_lse`` also [B, H, N].
    """
    op = "selected_attention"
    check_qkv(op, q, k, v, grouped=True)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    if index.dim() != 4 or index.shape[:3] != (k.shape[0], k.shape[1], q.shape[2]):
        raise ValueError(
            f"{op}: index must be [B, Hk, N, S] = [{k.shape[0]}, {k.shape[1]}, {q.shape[2]}, S], got {tuple(index.shape)}"
        )
    if index.is_floating_point() or index.is_complex() or index.dtype == pt.bool:
        raise ValueError(f"{op}: index must hold integers, the numbers of blocks, got {index.dtype}")
    if block_size < 1:
        raise ValueError(f"{op}: block_size must be at least 1, got {block_size}")
    asked = impl not in (None, "auto") or current_choice() is not None
    gap = width_gap("selected", "head size", max(q.shape[-1], v.shape[-1]), q.dtype)
    if gap is None and q.shape[1] > MOST_HEADS * k.shape[1]:
        gap = f"groups of {q.shape[1] // k.shape[1]} heads, only up to {MOST_HEADS}"
    impl = choose(op, impl, q, k, v, triton_gap=gap)
    if impl == "triton" and higher_order and not asked:
        impl = "torch"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pos_q = pos_k = None
    if causal:
        pos_q, pos_k = query_key_positions(op, positions, q.shape[0], q.shape[2], k.shape[2], q.device)
    elif positions is not None:
        raise ValueError(f"{op}: positions only matter for causal=True")
    if impl == "triton":
        from kernels.selected import ops

        if key_mask is not None:
            # NaN or infinity in a masked row would survive a weight of zero.
            drop = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
        given = (None, None) if positions is None else (pos_q, pos_k)
        out, lse = ops.selected_fwd(
            q, k, v, index, key_mask, *given, block_size, causal, float(scale), "triton"
        )
        return (out, lse) if return_lse else out
    options = dict(key_mask=key_mask, pos_q=pos_q, pos_k=pos_k, scale=scale)
    if impl == "reference":
        out, lse = reference.attention(q, k, v, index, block_size, **options)
    else:
        out, lse = torch_path.attention(
            q, k, v, index, block_size, want_lse=return_lse, higher_order=higher_order, **options
        )
    return (out, lse) if return_lse else out


def cost(
    batch: int, heads: int, queries: int, chosen: int, block_size: int, dim: int, value_dim: int | None = None,
    *, key_heads: int | None = None, itemsize: int = 4,
) -> Cost:  # fmt: skip
    """FLOPs and bytes of the attention to ``chosen`` blocks; each group reads its blocks once per query."""
    e = dim if value_dim is None else value_dim
    key_heads = heads if key_heads is None else key_heads
    keys = chosen * block_size
    flops = 2.0 * batch * heads * queries * keys * (dim + e)
    moved = batch * itemsize * queries * (heads * (dim + e) + key_heads * keys * (dim + e))
    return Cost(flops, float(moved))
