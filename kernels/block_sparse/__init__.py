"""Softmax attention in which places decide who sees whom: neighbourhoods, discs, documents, prefix and window rules.

B batch, H heads, Hk key heads, N tokens (queries and keys are the same tokens), D and E head sizes.

    O_i = softmax_j(scale q_i.k_j + b_ij) v_j     over j with mask.visible(i, j) and key_mask[j]

A rule (``masks.py``) is a small hashable value; ``block_lists`` turns it once into CSR lists of key tiles per query tile, marked full or
partial, and their transpose. Implementations: ``reference`` uses the dense mask; ``torch`` gathers, for each tile of neighbouring queries,
the keys that any of them sees, so that work and memory grow with the window and not with N; ``triton`` runs the softmax kernels over the lists, forward and
backward, with the rule evaluated from places in partial tiles and tiles of square neighbourhoods on grids.

Sources: Faster Neighborhood Attention, arXiv 2403.04690, and NATTEN's rule for borders, dilation and stride; CLEAR, arXiv 2412.16112.
"""

from torch import Tensor
from torch import float64 as _float64

from kernels._common.checks import check_key_mask, check_qkv
from kernels._common.choice import _current_traceable as current_choice
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels._common.widths import width_gap
from kernels.block_sparse import reference
from kernels.block_sparse import torch as torch_path
from kernels.block_sparse.lists import BlockLists, block_lists, dense_mask
from kernels.block_sparse.masks import Disc, GlobalWindow, Mask, Neighborhood, PrefixLM, Segments

__all__ = [
    "BlockLists", "Disc", "GlobalWindow", "Mask", "Neighborhood", "PrefixLM", "Segments",
    "attention", "block_lists", "cost", "dense_mask",
]  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    higher_order: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention among the tokens of ``mask``.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, Hk, N, D]; Hk divides H.
        v: Values, [B, Hk, N, E].
        mask: The rule; its ``tokens`` must be N.
        key_mask: Keys to keep, bool [B, N]; a row that sees no key gives zeros (lse -inf) and no gradient.
        bias: Added to the scaled scores, broadcastable to [B, H, N, N]; takes the dense path, not in Triton.
        scale: ``D ** -0.5`` if left out.
        return_lse: Also return the log-sum-exp of each row; it carries gradients.
        higher_order: The result will be differentiated more than once.
        impl: "reference", "torch" or "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E] in the dtype of ``q``; with ``return_lse`` also [B, H, N].
    """
    op = "block_sparse"
    check_qkv(op, q, k, v, grouped=True)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    if not q.shape[2] == k.shape[2] == mask.tokens:
        raise ValueError(
            f"{op}: the rule is for {mask.tokens} tokens, got {q.shape[2]} queries and {k.shape[2]} keys"
        )
    asked = impl not in (None, "auto") or current_choice() is not None
    gap = width_gap(op, "head size", max(q.shape[-1], v.shape[-1]), q.dtype)
    impl = choose(op, impl, q, k, v, triton_gap=gap if bias is None else "a bias over pairs")
    if impl == "triton" and higher_order and not asked:
        impl = "torch"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "triton":
        from kernels.block_sparse import ops

        out, lse = ops.attention(q, k, v, mask, key_mask=key_mask, scale=scale)
        return (out, lse) if return_lse else out
    explicit = higher_order or return_lse or q.dtype == _float64
    run = reference.attention if impl == "reference" else torch_path.attention
    out, lse = run(q, k, v, mask, key_mask=key_mask, bias=bias, scale=scale, explicit=explicit)
    return (out, lse) if return_lse else out


def cost(
    batch: int, heads: int, tokens: int, keys_per_query: float, dim: int, value_dim: int | None = None,
    *, key_heads: int | None = None, itemsize: int = 4,
) -> Cost:  # fmt: skip
    """FLOPs and bytes of the forward with ``keys_per_query`` visible keys on average."""
    e = dim if value_dim is None else value_dim
    key_heads = heads if key_heads is None else key_heads
    flops = 2.0 * batch * heads * tokens * keys_per_query * (dim + e)
    moved = batch * itemsize * tokens * ((heads + key_heads) * (dim + e))
    return Cost(flops, float(moved))
