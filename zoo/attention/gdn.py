"""Gated DeltaNet (GDN): the delta rule with forgetting.

Paper: Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464, ICLR 2025. Independent code:
fla-org/flash-linear-attention, MIT.
``S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T``, ``o_t = D^-1/2 q_t S_t``; q, k, v pass a causal depthwise convolution (4 taps)
and silu, q and k are brought to length 1, ``b_t = sigmoid(x_t w_b)``, ``log a_t = -e^A softplus(x_t w_a + dt)`` per head. The output is
RMS-normalised per head and multiplied by ``silu(x W_g + b_g)``.
Differs from the paper in: head widths come from the model (the paper doubles the value width); self, cross and causal_cross forms are
ours (two directions with shared gates, final-state read, prefix-state read).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._recurrent import PATTERNS, decay_gate_init, in_float32
from zoo.attention.deltanet import DeltanetAttention
from zoo.attention.registry import register_attention


@register_attention(patterns=PATTERNS, order_sensitive=True, streaming=True, has_map=True, signed_map=True)
class GdnAttention(DeltanetAttention):
    """The delta rule on a memory that decays by one learned gate per head.

    Args:
        conv: Taps of causal depthwise convolutions behind q, k, v; 0 for none.
        negative_eigenvalues: Let the write strength reach 2 instead of 1.
        output_gate: Multiply the output by silu of a linear map of the input.
        norm: RMS-normalise each head's output.
    """

    no_weight_decay = ("log_a", "dt_bias")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        conv: int = 4,
        negative_eigenvalues: bool = False,
        output_gate: bool = True,
        norm: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            conv=conv,
            negative_eigenvalues=negative_eigenvalues,
            output_gate=output_gate,
            norm=norm,
            **common,
        )
        log_a, dt = decay_gate_init((0.0, 16.0), num_heads, num_heads)
        self.log_a, self.dt_bias = nn.Parameter(log_a), nn.Parameter(dt)
        self.decay = nn.Linear(self.key_dim, num_heads, bias=False)

    def gates(self, keys: Tensor) -> Tensor:
        rate = F.softplus(in_float32(self.decay(keys)) + self.dt_bias) * self.log_a.exp()
        return torch.cat((self._beta(keys), -rate.mT[..., None]), -1)

    def arguments(self, gates: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (gates[..., 0],), {"log_g": gates[..., 1]}
