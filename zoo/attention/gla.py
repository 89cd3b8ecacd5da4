"""Gated linear attention (GLA).

Paper: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635, ICML 2024. Independent code:
fla-org/flash-linear-attention, MIT.
``S_t = diag(a_t) S_{t-1} + k_t v_t^T``, ``o_t = D^-1/2 q_t S_t``, ``log a_t = logsigmoid(x_t W1 W2 + b) / 16`` per channel; the output is
RMS-normalised per head and multiplied by ``silu(x W_g + b_g)``.
Differs from the paper in: head widths come from the model (the paper halves the key width); self, cross and causal_cross forms are
ours (two directions with shared gates, final-state read, prefix-state read).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kernels import decay as kernel
from zoo.attention._recurrent import PATTERNS, RecurrentAttention, in_float32
from zoo.attention.base import split_heads
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(patterns=PATTERNS, order_sensitive=True, streaming=True, has_map=True, signed_map=True)
class GlaAttention(RecurrentAttention):
    """Linear attention whose state forgets per channel, by gates computed from the tokens.

    Args:
        gate_rank: Width of the bottleneck that computes the decay, >= 1.
        temperature: Divides the log decay, > 0: larger forgets more slowly.
        output_gate: Multiply the output by silu of a linear map of the input.
        norm: RMS-normalise each head's output.
        conv: Taps of causal depthwise convolutions behind q, k, v; 0 for none.
    """

    scan = kernel.decay_scan

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gate_rank: int = 16,
        temperature: float = 16.0,
        output_gate: bool = True,
        norm: bool = True,
        conv: int = 0,
        **common: Any,
    ) -> None:
        if gate_rank < 1 or temperature <= 0:
            raise ConfigError(
                f"attention.gate_rank={gate_rank} must be >= 1 and attention.temperature={temperature} > 0"
            )
        super().__init__(dim, num_heads, conv=conv, norm=norm, gate="silu" if output_gate else None, **common)
        self.temperature = temperature
        self.decay = nn.Sequential(
            nn.Linear(self.key_dim, gate_rank, bias=False), nn.Linear(gate_rank, num_heads * self.head_dim)
        )

    def gates(self, keys: Tensor) -> Tensor:
        return F.logsigmoid(in_float32(split_heads(self.decay(keys), self.num_heads))) / self.temperature

    def arguments(self, gates: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (), {"log_g": gates}

    def write(
        self, k: Tensor, v: Tensor, gates: Tensor, state: Any, key_mask: Tensor | None
    ) -> kernel.DecayState:
        return kernel.decay_state(k, v, log_g=gates, key_mask=key_mask, initial_state=state)

    def read(self, q: Tensor, state: kernel.DecayState) -> Tensor:
        return kernel.decay_read(q, state)

    def kernel_cost(self, *sizes: int, **options: Any):
        return kernel.cost(*sizes, **options)
