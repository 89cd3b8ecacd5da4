"""The frame that gated and delta-rule recurrences share: projections, short convolutions, gates, four patterns, decoding.

A recurrence keeps a state ``S`` [B, H, D, E] per head, written by keys in their order and read by queries. The patterns: causal_self reads
after each write; self runs both directions and counts a token's own term once; cross reads the state after the last key; causal_cross
reads the state at each query's position. Only the first is in the papers, the others are this project's.

Gates are one set of numbers per key, so `project` appends them to the keys, which are float32 then: `attend` and `weights` get
[B, H, M, D + G].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import local
from kernels._common.checks import work_dtype
from kernels.bidirectional import bidirectional
from zoo.attention.base import Attention, BiasFactors, Grid, Pattern, State, merge_heads, split_heads
from zoo.errors import ConfigError

ACTIVATIONS = {"none": lambda x: x, "silu": F.silu, "sigmoid": torch.sigmoid}
PATTERNS = {"self", "causal_self", "cross", "causal_cross"}


class RecurrentAttention(Attention):
    """Base of recurrences; subclasses define `gates`, `arguments`, `scan`, `write` and `read`.

    Args:
        conv: Taps of the causal depthwise convolutions behind the q, k, v projections; 0 for none. Queries of cross patterns have none.
        activation: What follows the projections (and convolutions) of q, k, v: "none" or "silu".
        l2_norm: Bring queries and keys to length 1.
        norm: RMS-normalise each head's output, with a learned gain.
        gate: Activation of the output gate: None for no gate, "silu", "sigmoid".
        gate_rank: Width of the output gate's bottleneck; 0 for a full matrix.
        norm_eps: Added to the mean square of the output norm.
        normalizer: As in the kernel, for those that divide.
    """

    key_side = ("k", "v", "strength", "decay", "gate_map")
    scan: Any
    normalizer: str | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        conv: int = 0,
        activation: str = "none",
        l2_norm: bool = False,
        norm: bool = True,
        gate: str | None = None,
        gate_rank: int = 0,
        norm_eps: float = 1e-5,
        context_dim: int | None = None,
        **common: Any,
    ) -> None:
        if conv < 0:
            raise ConfigError(f"attention.conv={conv} must be 0 (none) or a number of taps")
        super().__init__(dim, num_heads, context_dim=context_dim, **common)
        h, d, e = num_heads, self.head_dim, self.value_head_dim
        self.activation, self.l2_norm, self.norm_eps, self.gate_kind = activation, l2_norm, norm_eps, gate
        self.key_dim = context_dim or dim
        new = lambda width: nn.Conv1d(width, width, conv, groups=width, bias=False)
        self.conv_q = new(h * d) if conv and not self.pattern.cross else None
        self.conv_k, self.conv_v = (new(h * d), new(h * e)) if conv else (None, None)
        self.gain = nn.Parameter(torch.ones(h, 1, e)) if norm else None
        if gate is None:
            self.output_gate = None
        elif gate_rank:
            self.output_gate = nn.Sequential(
                nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, h * e)
            )
        else:
            self.output_gate = nn.Linear(dim, h * e)

    # ---------------------------------------------------------------- what subclasses define

    def gates(self, keys: Tensor) -> Tensor | None:
        """Numbers that steer each key's write, [B, H, M, G], from the keys' input [B, M, Cc]."""
        raise NotImplementedError

    def arguments(self, gates: Tensor | None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The same numbers as the scan takes them: positional (beta) and by name (log_g, log_i)."""
        raise NotImplementedError

    def write(self, k: Tensor, v: Tensor, gates: Tensor | None, state: Any, key_mask: Tensor | None) -> Any:
        """State after keys [B, H, M, D] have been written to `state` (None: empty)."""
        raise NotImplementedError

    def read(self, q: Tensor, state: Any) -> Tensor:
        """Read one state with scaled queries [B, H, N, D]."""
        raise NotImplementedError

    @property
    def query_scale(self) -> float:
        return self.head_dim**-0.5

    # ---------------------------------------------------------------- projections

    def project(
        self, x: Tensor, context: Tensor, value: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, N, D], keys with gates [B, H, M, D + G], values [B, H, M, E]."""
        flat = self._flat(x, context, value)
        if key_mask is not None:
            # Zeros, so that the convolutions of later tokens see what they see at the start of a sequence.
            flat = [
                t if self.pattern.cross and i == 0 else t.masked_fill(~key_mask[..., None], 0.0)
                for i, t in enumerate(flat)
            ]
        convs = (self.conv_q, self.conv_k, self.conv_v)
        mixed = [
            t if c is None or t.shape[1] == 0 else local.depthwise_sequence(t, c.weight, causal=True)
            for t, c in zip(flat, convs, strict=True)
        ]
        return self._heads(mixed, context)

    def _flat(self, x: Tensor, context: Tensor, value: Tensor) -> list[Tensor]:
        if hasattr(self, "qkv"):
            h, d, e = self.num_heads, self.head_dim, self.value_head_dim
            return list(self.qkv(x).split((h * d, h * d, h * e), dim=-1))
        return [self.q(x), self.k(context), self.v(value)]

    def _heads(self, flat: list[Tensor], keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(ACTIVATIONS[self.activation](t), self.num_heads) for t in flat)
        q, k = self._features(q), self._features(k)
        gates = self.gates(keys)
        if gates is not None:
            work = work_dtype(k.dtype)
            k = torch.cat((k.to(work), gates.to(work)), -1)
        return q, k, v

    def _features(self, x: Tensor) -> Tensor:
        if not self.l2_norm:
            return x
        return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()

    def _split(self, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        d = self.head_dim
        return k[..., :d].to(dtype), (k[..., d:] if k.shape[-1] > d else None)

    # ---------------------------------------------------------------- mixing

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        q, k, v = self.project(x, context, value, call["key_mask"])
        return self.attend(q, k, v, **call)

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
        q = q * self.query_scale
        k, gates = self._split(k, q.dtype)
        v = v.to(q.dtype)
        if self.pattern is Pattern.CROSS:
            return self.read(q, self.write(k, v, gates, None, key_mask)).to(q.dtype)
        q = self._drop_padded(q, key_mask)
        writes, named = self.arguments(gates)
        if self.normalizer is not None:
            named["normalizer"] = self.normalizer
        if self.pattern is Pattern.SELF:
            return bidirectional(type(self).scan, q, k, v, *writes, key_mask=key_mask, **named)
        return type(self).scan(q, k, v, *writes, key_mask=key_mask, positions=positions, **named)

    def _drop_padded(self, q: Tensor, key_mask: Tensor | None) -> Tensor:
        """In self patterns padded tokens ask nothing, so that convolutions of padding show nowhere."""
        if key_mask is None or self.pattern.cross:
            return q
        return q.masked_fill(~key_mask[:, None, :, None], 0.0)

    def output(self, heads: Tensor, x: Tensor) -> Tensor:
        if self.gain is not None:
            heads = rms_norm(heads, self.norm_eps) * self.gain
        y = merge_heads(heads)
        if self.output_gate is not None:
            y = y * ACTIVATIONS[self.gate_kind](self.output_gate(x))
        return self.proj_drop(self.proj(y))

    def attention_map(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **call: Any
    ) -> Tensor:
        if not self.capabilities.has_map:
            raise self._refuse("an attention map", "has_map")
        context, value, call = self._check_call(x, context, value, **call)
        q, k, _ = self.project(x, context, value, call["key_mask"])
        return self.weights(q, k, **call)

    def weights(self, q: Tensor, k: Tensor, **call: Any) -> Tensor:
        """The rule is linear in the values, so unit values give the matrix; before output norm and gate."""
        m = k.shape[2]
        unit = torch.eye(m, dtype=q.dtype, device=q.device).expand(*k.shape[:2], m, m)
        return self.attend(q, k, unit, **call)

    # ---------------------------------------------------------------- decoding

    def init_state(
        self,
        batch_size: int,
        *,
        context: Tensor | None = None,
        value: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> State:
        self._check_streaming()
        if self.pattern is Pattern.CROSS:
            if context is None:
                raise ConfigError(
                    f"attention {self.name!r}, pattern 'cross': init_state needs context [B, M, Cc]"
                )
            empty = context.new_zeros(batch_size, 0, self.dim)
            _, k, v = self.project(empty, context, context if value is None else value, key_mask)
            k, gates = self._split(k, v.dtype)
            return {"memory": self.write(k, v, gates, None, key_mask)}
        weight = self.proj.weight
        empty = weight.new_zeros(batch_size, 0, self.dim)
        q, k, v = self.project(empty, empty, empty)
        k, gates = self._split(k, v.dtype)
        state: State = {"memory": self.write(k, v, gates, None, None)}
        if self.conv_k is not None:
            width = self.conv_k.weight.shape[-1] - 1
            state["recent"] = weight.new_zeros(
                batch_size, width, 2 * self.conv_k.in_channels + self.conv_v.in_channels
            )
        return state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_streaming()
        scale = self.query_scale
        if self.pattern is Pattern.CROSS:
            q = self._features(split_heads(ACTIVATIONS[self.activation](self.q(x_t)), self.num_heads))
            return self.output(self.read(q * scale, state["memory"]).to(q.dtype), x_t), state
        following: State = {}
        flat = self._flat(x_t, x_t, x_t)
        if self.conv_k is not None:
            window = torch.cat((state["recent"], torch.cat(flat, -1)), 1)
            taps = torch.cat([c.weight[:, 0] for c in (self.conv_q, self.conv_k, self.conv_v)]).T
            mixed = (window * taps).sum(1, keepdim=True)
            flat = list(mixed.split([t.shape[-1] for t in flat], -1))
            following["recent"] = window[:, 1:]
        q, k, v = self._heads(flat, x_t)
        k, gates = self._split(k, v.dtype)
        following["memory"] = self.write(k, v, gates, state["memory"], None)
        return self.output(self.read(q * scale, following["memory"]).to(q.dtype), x_t), following

    # ---------------------------------------------------------------- cost

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        d, e, h = self.head_dim, self.value_head_dim, self.num_heads
        sides = 2 if self.pattern is Pattern.SELF else 1
        cost = self.kernel_cost(1, h, m, d, e, queries=n, scan=self.pattern is not Pattern.CROSS)
        taps = 0 if self.conv_k is None else self.conv_k.weight.shape[-1]
        return sides * cost.flops + 2 * taps * h * (n * d + m * (d + e)), sides * cost.bytes

    def kernel_cost(self, *sizes: int, **options: Any):
        """`cost` of the kernel that does the scan."""
        raise NotImplementedError

    def state_size(self, m: int) -> int:
        h, d, e = self.num_heads, self.head_dim, self.value_head_dim
        recent = 0
        if self.conv_k is not None and not self.pattern.cross:
            recent = (self.conv_k.weight.shape[-1] - 1) * h * (2 * d + e)
        return h * d * e + recent


def in_float32(x: Tensor) -> Tensor:
    """Gates are computed in float32 (float64 stays)."""
    return x.to(work_dtype(x.dtype))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, in float32 at least; differentiable twice everywhere."""
    work = x.to(work_dtype(x.dtype))
    return (work * (work.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def decay_gate_init(a_range: tuple[float, float], heads: int, width: int) -> tuple[Tensor, Tensor]:
    """Mamba's start values: log A with A uniform in `a_range` [heads], softplus^-1(dt) with dt log-uniform in [1e-3, 1e-1] [width]."""
    low, high = a_range
    log_a = torch.empty(heads).uniform_(low, high).clamp(min=1e-3).log()
    dt = torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return log_a, dt + torch.log(-torch.expm1(-dt))


__all__ = ["PATTERNS", "RecurrentAttention", "decay_gate_init", "in_float32", "rms_norm"]
