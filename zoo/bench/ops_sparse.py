"""Windows and neighbourhoods beside what a user would pick instead: forward and backward, at B 1, H 4, D 64, float32."""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, NEIGHBOURHOOD = 64, 13
# A mask of N x N and its scores: 64 MiB of floats per head at 4,096 tokens.
LONGEST_MASK = 4096


def peers(tokens: int) -> dict:
    """The local-attention package, if installed, and SDPA with the same mask as the neighbourhood up to 4,096 tokens."""
    from kernels import block_sparse

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = block_sparse.dense_mask(_rule(q.shape[2]), q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    found = {"torch.SDPA neighbourhood mask": masked} if tokens <= LONGEST_MASK else {}
    if importlib.util.find_spec("local_attention") is not None:
        from local_attention import LocalAttention

        # Blocks of 64 see themselves and both neighbours: 192 keys at most, as many as a block reads for a window of 64 to either side.
        found["local-attention window"] = LocalAttention(
            WINDOW,
            causal=False,
            look_backward=1,
            look_forward=1,
            dim=64,
            autopad=True,
            use_rotary_pos_emb=False,
        )
    return found


def ours() -> dict:
    """Neighbourhood attention on a square grid, and NSA's selected branch with 8 of the blocks of 64."""
    from kernels import block_sparse, selected

    def neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse.attention(q, k, v, _rule(q.shape[2]))

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            blocks = k.shape[2] // 64
            pooled = k.unflatten(2, (blocks, 64)).mean(3)
            stencil = selected.overlap_stencil(blocks, blocks, 64, 64, 64, q.device)
            index = selected.select_blocks(selected.block_scores(q, pooled, stencil), 8)
        return selected.attention(q, k, v, index, block_size=64)

    return {f"block_sparse {NEIGHBOURHOOD}x{NEIGHBOURHOOD}": neighbourhood, "selected 8 of 64": chosen}


def _rule(tokens: int):
    """A square grid where there is one, otherwise the nearest rectangle of whole rows."""
    from kernels.block_sparse import Neighborhood

    side = next(s for s in range(math.isqrt(tokens), 0, -1) if tokens % s == 0)
    shape = side, tokens // side
    return Neighborhood(shape, tuple(min(NEIGHBOURHOOD, s) for s in shape))
