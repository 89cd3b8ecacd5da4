"""mLSTM: matrix memory with exponential or sigmoid input gates.

Paper: xLSTM: Extended Long Short-Term Memory, arXiv:2405.04517; chunked form and sigmoid gate: Tiled Flash Linear Attention,
arXiv:2503.14376, NeurIPS 2025.
``S_t = f_t S_{t-1} + i_t k_t v_t^T``, ``n_t = f_t n_{t-1} + i_t k_t``, ``log f_t = logsigmoid``, ``i_t = exp`` of linear maps of the token;
``h_t = q S_t / max(|q.n_t|, 1)``, ``q = D^-1/2 q_t``. ``gate=sigmoid``: ``i_t = sigmoid`` and no normaliser. Each head's output is
RMS-normalised and multiplied by ``sigmoid(x W_o + b_o)``.
Differs from the papers in: the running maximum that keeps the exponentials in range never falls below 0, so that the bound 1 needs no
epsilon; input-gate biases start at 0 instead of -10 (``input_bias``), which short trainings need; self, cross and causal_cross forms are
ours (two directions joined before the division, final-state read, prefix-state read).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import decay as kernel
from zoo.attention._recurrent import PATTERNS, RecurrentAttention, in_float32
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(patterns=PATTERNS, order_sensitive=True, streaming=True, has_map=True, signed_map=True)
class MlstmAttention(RecurrentAttention):
    """Linear attention with a forget gate per head and an input gate that may grow exponentially.

    Args:
        gate: Input gate: "exp" (with normaliser) or "sigmoid" (without).
        input_bias: Start value of the input gates' bias; the papers use -10 for long trainings.
        soft_cap: Bound both gates' pre-activations smoothly to this size, > 0; None for no bound (xLSTM-7B: 15).
        output_gate: Multiply the output by a sigmoid of a linear map of the input.
        norm: RMS-normalise each head's output.
        conv: Taps of causal depthwise convolutions behind q, k, v; 0 for none.
    """

    scan = kernel.decay_scan
    no_weight_decay = ("gate_bias",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gate: str = "exp",
        input_bias: float = 0.0,
        soft_cap: float | None = None,
        output_gate: bool = True,
        norm: bool = True,
        conv: int = 0,
        **common: Any,
    ) -> None:
        if gate not in ("exp", "sigmoid"):
            raise ConfigError(f"attention.gate={gate!r} is unknown; choose from exp, sigmoid")
        if soft_cap is not None and soft_cap <= 0:
            raise ConfigError(f"attention.soft_cap={soft_cap} must be positive, or null for no bound")
        super().__init__(
            dim,
            num_heads,
            conv=conv,
            norm=norm,
            gate="sigmoid" if output_gate else None,
            norm_eps=1e-6,
            **common,
        )
        self.input_gate, self.soft_cap = gate, soft_cap
        self.normalizer = "mlstm" if gate == "exp" else "none"
        self.gate_map = nn.Linear(self.key_dim, 2 * num_heads, bias=False)
        nn.init.normal_(self.gate_map.weight, std=0.02)
        start = torch.cat((torch.full((num_heads,), float(input_bias)), torch.linspace(3, 6, num_heads)))
        self.gate_bias = nn.Parameter(start)

    def gates(self, keys: Tensor) -> Tensor:
        raw = in_float32(self.gate_map(keys)) + self.gate_bias
        if self.soft_cap is not None:
            raw = self.soft_cap * torch.tanh(raw / self.soft_cap)
        i, f = raw.mT[..., None].chunk(2, 1)
        return torch.cat((i if self.input_gate == "exp" else F.logsigmoid(i), F.logsigmoid(f)), -1)

    def arguments(self, gates: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (), {"log_i": gates[..., 0], "log_g": gates[..., 1]}

    def write(
        self, k: Tensor, v: Tensor, gates: Tensor, state: Any, key_mask: Tensor | None
    ) -> kernel.DecayState:
        _, named = self.arguments(gates)
        return kernel.decay_state(
            k, v, normalizer=self.normalizer, key_mask=key_mask, initial_state=state, **named
        )

    def read(self, q: Tensor, state: kernel.DecayState) -> Tensor:
        return kernel.decay_read(q, state, normalizer=self.normalizer)

    def kernel_cost(self, *sizes: int, **options: Any):
        return kernel.cost(*sizes, **options)

    def state_size(self, m: int) -> int:
        return super().state_size(m) + self.num_heads * (
            (self.head_dim if self.normalizer == "mlstm" else 0) + 1
        )
