"""Kimi Delta Attention (KDA): the delta rule with forgetting per channel.

Paper: Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv:2510.26692, 2025. Independent code:
fla-org/flash-linear-attention, MIT.
``S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T``, ``o_t = D^-1/2 q_t S_t``; q, k, v pass a causal depthwise convolution (4
taps) and silu, q and k are brought to length 1, ``b_t = sigmoid(x_t w_b)``, ``log a_t = -e^A softplus(x_t W1 W2 + dt)`` per channel (A per
head). The output is RMS-normalised per head and multiplied by ``sigmoid(x Wg1 Wg2 + b_g)``. No positions: the decay carries them.
``lower`` bounds the gate: ``log a_t = lower * sigmoid(e^A (x_t W1 W2 + dt))``.
Differs from the paper in: self, cross and causal_cross forms are ours (two directions with shared gates, final-state read, prefix-state
read); the hybrid with full attention is a choice of slots, not of this layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._recurrent import PATTERNS, RecurrentAttention, decay_gate_init, in_float32
from zoo.attention.base import split_heads
from zoo.attention.deltanet import DeltanetAttention
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(patterns=PATTERNS, order_sensitive=True, streaming=True, has_map=True, signed_map=True)
class KdaAttention(DeltanetAttention):
    """The delta rule on a memory that decays by one learned gate per key channel.

    Args:
        conv: Taps of causal depthwise convolutions behind q, k, v; 0 for none.
        negative_eigenvalues: Let the write strength reach 2 instead of 1.
        lower: Lower bound of the log decay, < 0; None for the unbounded gate.
        output_gate: Multiply the output by a sigmoid of a low-rank map of the input.
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
        lower: float | None = None,
        output_gate: bool = True,
        norm: bool = True,
        **common: Any,
    ) -> None:
        if lower is not None and lower >= 0:
            raise ConfigError(f"attention.lower={lower} must be negative, e.g. -5, or null for no bound")
        rank = common.get("head_dim") or dim // num_heads
        # Past DeltanetAttention: its output gate is a full matrix.
        RecurrentAttention.__init__(
            self,
            dim,
            num_heads,
            conv=conv,
            activation="silu",
            l2_norm=True,
            norm=norm,
            gate="sigmoid" if output_gate else None,
            gate_rank=rank,
            **common,
        )
        self.largest, self.lower = 2.0 if negative_eigenvalues else 1.0, lower
        width = num_heads * self.head_dim
        self.strength = nn.Linear(self.key_dim, num_heads, bias=False)
        log_a, dt = decay_gate_init((1.0, 16.0), num_heads, width)
        self.log_a, self.dt_bias = nn.Parameter(log_a), nn.Parameter(dt)
        self.decay = nn.Sequential(
            nn.Linear(self.key_dim, rank, bias=False), nn.Linear(rank, width, bias=False)
        )

    def gates(self, keys: Tensor) -> Tensor:
        raw = split_heads(in_float32(self.decay(keys)) + self.dt_bias, self.num_heads)
        a = self.log_a.exp()[:, None, None]
        log_g = -a * F.softplus(raw) if self.lower is None else self.lower * torch.sigmoid(a * raw)
        return torch.cat((self._beta(keys), log_g), -1)

    def arguments(self, gates: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (gates[..., 0],), {"log_g": gates[..., 1:]}
