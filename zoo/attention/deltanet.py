"""DeltaNet: linear attention that corrects its memory.

Paper: Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484, NeurIPS 2024. Independent code:
fla-org/flash-linear-attention, MIT.
``S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T``, ``o_t = D^-1/2 q_t S_t``; q, k, v pass a causal depthwise convolution (4 taps) and
silu, q and k are brought to length 1, ``b_t = sigmoid(x_t w_b)``; each head's output is RMS-normalised.
Differs from the paper in: self, cross and causal_cross forms are ours (two directions, final-state read, prefix-state read); padded
tokens between kept ones stay in the convolution as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels import delta as kernel
from zoo.attention._recurrent import PATTERNS, RecurrentAttention, in_float32
from zoo.attention.registry import register_attention


@register_attention(patterns=PATTERNS, order_sensitive=True, streaming=True, has_map=True, signed_map=True)
class DeltanetAttention(RecurrentAttention):
    """A key's old value in memory is replaced, not added to.

    Args:
        conv: Taps of causal depthwise convolutions behind q, k, v; 0 for none.
        negative_eigenvalues: Let the write strength reach 2 instead of 1: the memory can then flip signs (state tracking).
        output_gate: Multiply the output by silu of a linear map of the input.
        norm: RMS-normalise each head's output.
    """

    scan = kernel.delta_scan

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        conv: int = 4,
        negative_eigenvalues: bool = False,
        output_gate: bool = False,
        norm: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            conv=conv,
            activation="silu",
            l2_norm=True,
            norm=norm,
            gate="silu" if output_gate else None,
            **common,
        )
        self.largest = 2.0 if negative_eigenvalues else 1.0
        self.strength = nn.Linear(self.key_dim, num_heads, bias=False)

    def gates(self, keys: Tensor) -> Tensor:
        return self._beta(keys)

    def _beta(self, keys: Tensor) -> Tensor:
        """Write strengths, [B, H, M, 1]."""
        return self.largest * torch.sigmoid(in_float32(self.strength(keys))).mT[..., None]

    def arguments(self, gates: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (gates[..., 0],), {}

    def write(
        self, k: Tensor, v: Tensor, gates: Tensor, state: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        (beta,), named = self.arguments(gates)
        return kernel.delta_state(k, v, beta, key_mask=key_mask, initial_state=state, **named)

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        return kernel.delta_read(q, state)

    def kernel_cost(self, *sizes: int, **options: Any):
        return kernel.cost(*sizes, **options)
