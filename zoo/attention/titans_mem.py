"""Titans' neural memory: a network per head that learns key-to-value pairs while the tokens pass.

Paper: Titans: Learning to Memorize at Test Time, arXiv:2501.00663, 2025. No official code.
``mom_t = eta_t mom_{t-1} - theta_t grad |Mem(k_t) - v_t|^2``, ``Mem_t = (1 - alpha_t) Mem_{t-1} + mom_t``, read ``Mem_t(q_t)``; theta, alpha and eta are
sigmoids of linear maps of the token, per head. q, k, v pass a causal depthwise convolution and silu, q and k are brought to length 1; each head's
output is RMS-normalised and multiplied by ``silu(x W_g + b_g)``. Gradients are taken at the memory of the chunk's start, as in the paper's
parallel form; ``chunk=1`` takes each at the newest memory.
Differs from the paper in: theta is at most `max_lr`; the memory is one matrix or two layers with residual and LayerNorm (as independent
code has it, where the LayerNorm's gain is learned online as well); a memory that has learned nothing reads as zero; self, cross and
causal_cross forms are ours (two directions, the second read before the token is learned; final memory; memory at each query's position).
Persistent tokens and the MAC, MAG and MAL blocks are not part of this layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import memory as kernel
from zoo.attention._recurrent import PATTERNS, RecurrentAttention, in_float32
from zoo.attention.base import BiasFactors, Grid, Pattern
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(patterns=PATTERNS, order_sensitive=True, streaming=True)
class TitansMemAttention(RecurrentAttention):
    """Attention replaced by a small network that is trained on the sequence itself.

    Args:
        memory: "linear" (one matrix) or "mlp" (two layers).
        expansion: Hidden width of "mlp" in head widths, >= 1.
        chunk: Tokens whose gradients are taken at the same memory, >= 1.
        momentum: Carry momentum over tokens.
        decay: Forget by a learned gate.
        max_lr: Largest step size theta, > 0.
        conv: Taps of causal depthwise convolutions behind q, k, v; 0 for none.
        output_gate: Multiply the output by silu of a linear map of the input.
        norm: RMS-normalise each head's output.
    """

    no_weight_decay = ("memory_weights.0", "memory_weights.1", "gate_bias")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        memory: str = "mlp",
        expansion: int = 2,
        chunk: int = 16,
        momentum: bool = True,
        decay: bool = True,
        max_lr: float = 0.25,
        conv: int = 4,
        output_gate: bool = True,
        norm: bool = True,
        **common: Any,
    ) -> None:
        if memory not in ("linear", "mlp"):
            raise ConfigError(f"attention.memory={memory!r} is unknown; choose from linear, mlp")
        if expansion < 1 or chunk < 1 or max_lr <= 0:
            raise ConfigError(
                f"attention.expansion={expansion} and chunk={chunk} must be at least 1, max_lr={max_lr} positive"
            )
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
        h, d, e = num_heads, self.head_dim, self.value_head_dim
        self.memory, self.chunk, self.momentum, self.forget, self.max_lr = (
            memory,
            chunk,
            momentum,
            decay,
            max_lr,
        )
        self.hidden = expansion * d if memory == "mlp" else 0
        sizes = [(d, self.hidden), (self.hidden, e)] if self.hidden else [(d, e)]
        self.memory_weights = nn.ParameterList(
            nn.Parameter(torch.randn(h, a, b) * (a**-0.5 if self.hidden else 0.0)) for a, b in sizes
        )
        self.memory_gain = nn.Parameter(torch.ones(h, e)) if self.hidden else None
        self.gate_map = nn.Linear(self.key_dim, 3 * h, bias=False)
        nn.init.normal_(self.gate_map.weight, std=0.02)
        # Half the largest step, little forgetting, momentum over about two tokens.
        start = [torch.full((h,), value) for value in (0.0, -4.0, 0.0)]
        self.gate_bias = nn.Parameter(torch.cat(start))

    def gates(self, keys: Tensor) -> Tensor:
        """Step size, log(1 - alpha), log eta: [B, H, M, 3]."""
        raw = in_float32(self.gate_map(keys)) + self.gate_bias
        theta, alpha, eta = raw.mT[..., None].chunk(3, 1)
        return torch.cat((self.max_lr * torch.sigmoid(theta), F.logsigmoid(-alpha), F.logsigmoid(eta)), -1)

    def _learning(self, gates: Tensor) -> dict[str, Any]:
        return {
            "gain": self.memory_gain,
            "lr": gates[..., 0],
            "log_keep": gates[..., 1] if self.forget else None,
            "log_momentum": gates[..., 2] if self.momentum else None,
            "chunk": self.chunk,
        }

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        k, gates = self._split(k, q.dtype)
        v = v.to(q.dtype)
        if self.pattern is Pattern.CROSS:
            return self.read(q, self.write(k, v, gates, None, key_mask))
        common = {"weights": tuple(self.memory_weights), "key_mask": key_mask, **self._learning(gates)}
        if self.pattern is Pattern.SELF:
            forward = kernel.memory_scan(q, k, v, **common)
            return forward + kernel.memory_scan(q, k, v, read="exclusive", reverse=True, **common)
        return kernel.memory_scan(q, k, v, positions=positions, **common)

    @property
    def query_scale(self) -> float:
        return 1.0

    def write(
        self, k: Tensor, v: Tensor, gates: Tensor, state: Any, key_mask: Tensor | None
    ) -> kernel.MemoryState:
        if state is None:
            weights = tuple(self.memory_weights)
            return kernel.memory_state(k, v, weights=weights, key_mask=key_mask, **self._learning(gates))
        return kernel.memory_step(state, k, v, **self._learning(gates))

    def read(self, q: Tensor, state: kernel.MemoryState) -> Tensor:
        return kernel.memory_read(q, state, gain=self.memory_gain)

    def kernel_cost(self, *sizes: int, scan: bool = True, **options: Any):
        return kernel.cost(*sizes, hidden=self.hidden, chunk=self.chunk, **options)

    def state_size(self, m: int) -> int:
        d, e = self.head_dim, self.value_head_dim
        size = d * e if not self.hidden else self.hidden * (d + e)
        copies = 2 + self.momentum if self.chunk > 1 else 1 + self.momentum
        return super().state_size(m) + self.num_heads * (copies * size - d * e) + 1
