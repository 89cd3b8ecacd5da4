"""Magnitude-aware linear attention (MALA).

Paper: Rectifying Magnitude Neglect in Linear Attention, arXiv:2507.00698, ICCV 2025. The official code (qhfan/MALA)
has no licence; its layer is described here from its behaviour.
With ``s_ij = D^-1/2 phi(q_i).phi(k_j)``: ``o = LinearAttention + mean_j (s_ij - mean_m s_im) v_j`` (``key_norm=mean``, the
official form; the paper's formula has the sum in place of the outer mean, ``key_norm=sum``). The whole layer adds rotary
positions to the features, a depthwise convolution of the values (LePE) and an output gate without activation:
``y = proj((o + LePE(v)) * (W_u x + b_u))``.
Differs from the official code in: causal and cross forms (ours: means run over the visible keys, LePE becomes a causal
convolution, or none in cross patterns); 1-D positions where tokens have no grid; sets have neither positions nor LePE; the
gate starts open (bias 1), since the official zero bias makes the output vanish at small widths.
With rotary positions rows of weights do not sum to 1, and weights may be negative: both as in the official layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kernels import linear as kernel
from kernels import local
from zoo.attention.base import (
    Attention,
    BiasFactors,
    Grid,
    Pattern,
    State,
    merge_heads,
    split_heads,
    visible_pairs,
)
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError

LEPE_TAPS = 5


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    grid_dims=(1, 2),
    streaming=True,
    has_map=True,
    signed_map=True,
)
class MalaAttention(Attention):
    """Linear attention whose sharpness grows with the query's magnitude.

    Args:
        feature: Feature map of queries and keys: elu1, relu or exp.
        key_norm: "mean" (official code) or "sum" (paper) in the centred term.
        rope: Rotary positions on the features: "auto" (2-D on a grid, 1-D on a sequence, none on sets and across), "2d",
            "1d" or "none". 2-D needs a head width divisible by 4, 1-D an even one; "auto" goes without otherwise.
        lepe: Depthwise convolution of the values: "auto" (5x5 on a grid, 5 taps on a sequence) or "none".
        gate: Multiply the output by a linear map of the input.
        eps: Added to the denominator, > 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature: str = "elu1",
        key_norm: str = "mean",
        rope: str = "auto",
        lepe: str = "auto",
        gate: bool = True,
        eps: float = 1e-6,
        **common: Any,
    ) -> None:
        _check(feature=(feature, ("elu1", "relu", "exp")), key_norm=(key_norm, ("mean", "sum")))
        _check(rope=(rope, ("auto", "2d", "1d", "none")), lepe=(lepe, ("auto", "none")))
        if eps <= 0:
            raise ConfigError(f"attention.eps={eps} must be positive")
        super().__init__(dim, num_heads, **common)
        self.feature, self.key_norm, self.eps = feature, key_norm, eps
        placed = self.ordered and not self.pattern.cross
        on_grid = placed and not self.causal and self.grid is not None and len(self.grid.shape) == 2
        self.rope = self._choose_rope(rope, placed, on_grid)
        taps = (LEPE_TAPS, LEPE_TAPS) if on_grid else (LEPE_TAPS,)
        width = num_heads * self.value_head_dim
        self.lepe = None
        if lepe == "auto" and placed:
            self.lepe = (
                nn.Conv2d(width, width, taps, groups=width)
                if on_grid
                else nn.Conv1d(width, width, taps[0], groups=width)
            )
        self.gate = nn.Linear(dim, width) if gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Official initialisation of the parts that plain attention lacks: normal 0.02, biases zero."""
        for module in (self.lepe, self.gate):
            if module is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.gate is not None:
            # An open gate at the start; the official zero bias makes the layer's output vanish at small widths.
            nn.init.ones_(self.gate.bias)

    def _choose_rope(self, rope: str, placed: bool, on_grid: bool) -> int:
        """Number of rotary axes: 0, 1 or 2."""
        wanted = {"none": 0, "1d": 1, "2d": 2, "auto": 0 if not placed else 2 if on_grid else 1}[rope]
        if rope == "2d" and not on_grid:
            raise ConfigError("attention.rope='2d' needs tokens on a 2-D grid; use rope=auto")
        if rope == "1d" and not placed:
            raise ConfigError("attention.rope='1d' needs ordered self-attention; use rope=auto")
        if wanted and self.head_dim % (2 * wanted):
            if rope != "auto":
                raise ConfigError(
                    f"attention.rope={rope!r} needs a head width divisible by {2 * wanted}, not {self.head_dim}"
                )
            return 0
        return wanted

    def _angles(self, tokens: int, grid: Grid | None, device: torch.device, start: int = 0) -> Tensor:
        if self.rope == 2:
            if grid is None or len(grid.shape) != 2:
                raise ConfigError(
                    "attention 'mala' was built for a 2-D grid; give grid=Grid((rows, columns), prefix)"
                )
            return _table(grid.shape, grid.prefix, self.head_dim, device)
        return _table((start + tokens,), 0, self.head_dim, device)[start:]

    def _rotated(self, q: Tensor, k: Tensor, grid: Grid | None) -> tuple[Tensor, Tensor] | None:
        if not self.rope:
            return None
        angles = self._angles(q.shape[2], grid, q.device)
        return tuple(local.rotate(kernel.apply_feature(self.feature, t), angles) for t in (q, k))

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
        return kernel.mala(
            q,
            k,
            v,
            feature=self.feature,
            key_norm=self.key_norm,
            key_mask=key_mask,
            causal=self.causal,
            positions=positions,
            rotated=self._rotated(q, k, grid),
            eps=self.eps,
        )

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        q, k, v = self.project(x, context, value)
        heads = self.attend(q, k, v, **call)
        return heads if self.lepe is None else heads + self._lepe(v, call["key_mask"], call["grid"])

    def _lepe(self, v: Tensor, key_mask: Tensor | None, grid: Grid | None) -> Tensor:
        """Depthwise convolution of the values over their places, [B, H, N, E]; zero at prefix tokens."""
        flat = merge_heads(v)
        if key_mask is not None:
            flat = flat.masked_fill(~key_mask[..., None], 0.0)
        weight, bias = self.lepe.weight, self.lepe.bias
        if isinstance(self.lepe, nn.Conv1d):
            out = local.depthwise_sequence(flat, weight, bias, causal=self.causal)
        else:
            if grid is None or len(grid.shape) != 2:
                raise ConfigError(
                    "attention 'mala' was built for a 2-D grid; give grid=Grid((rows, columns), prefix)"
                )
            out = local.depthwise_grid(flat, grid.shape, weight, bias, grid.prefix)
            if grid.prefix:
                out = torch.cat((out.new_zeros(out.shape[0], grid.prefix, out.shape[2]), out), 1)
        if key_mask is not None:
            out = out.masked_fill(~key_mask[..., None], 0.0)
        return split_heads(out, self.num_heads)

    def output(self, heads: Tensor, x: Tensor) -> Tensor:
        y = merge_heads(heads)
        if self.gate is not None:
            y = y * self.gate(x)
        return self.proj_drop(self.proj(y))

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The mixing matrix of the attention alone; LePE and the gate are outside it."""
        plain = [kernel.apply_feature(self.feature, t) for t in (q, k)]
        turned = self._rotated(q, k, grid) or plain
        visible = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        count = visible.sum(-1, keepdim=True).clamp(min=1)
        scale = plain[0].shape[-1] ** -0.5
        s = scale * (plain[0] @ plain[1].mT) * visible
        s_turned = scale * (turned[0] @ turned[1].mT) * visible
        if self.key_norm == "mean":
            s, s_turned = s / count, s_turned / count
        z = s.sum(-1, keepdim=True)
        return (s_turned * (1 + 1 / (z + self.eps)) - z / count) * visible

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        cache = super().init_state(batch_size, **inputs)
        phi = kernel.apply_feature(self.feature, cache["k"])
        k_rot = None
        if self.rope:
            k_rot = local.rotate(phi, self._angles(0, None, phi.device))
        state: State = {
            "sums": kernel.global_state(phi, cache["v"], cache.get("key_mask"), k_rot=k_rot),
            "length": 0,
        }
        if self.lepe is not None:
            state["recent"] = cache["v"].new_zeros(batch_size, LEPE_TAPS - 1, self.lepe.in_channels)
        return state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        if self.pattern is Pattern.CROSS:
            phi_q = kernel.apply_feature(self.feature, split_heads(self.q(x_t), self.num_heads))
            heads = kernel.mala_read(phi_q, state["sums"], key_norm=self.key_norm, eps=self.eps)
            return self.output(heads, x_t), state
        q, k, v = self.project(x_t, x_t, x_t)
        phi_q, phi_k = (kernel.apply_feature(self.feature, t) for t in (q, k))
        q_rot = k_rot = None
        if self.rope:
            angles = self._angles(1, None, q.device, start=state["length"])
            q_rot, k_rot = local.rotate(phi_q, angles), local.rotate(phi_k, angles)
        sums = kernel.add_states(state["sums"], kernel.global_state(phi_k, v, k_rot=k_rot))
        heads = kernel.mala_read(phi_q, sums, q_rot=q_rot, key_norm=self.key_norm, eps=self.eps)
        following: State = {"sums": sums, "length": state["length"] + 1}
        if self.lepe is not None:
            window = torch.cat((state["recent"], merge_heads(v)), 1)
            mixed = (window * self.lepe.weight[:, 0].T).sum(1, keepdim=True) + self.lepe.bias
            heads = heads + split_heads(mixed, self.num_heads)
            following["recent"] = window[:, 1:]
        return self.output(heads, x_t), following

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        cost = kernel.cost(
            "mala", 1, self.num_heads, n, m, self.head_dim, self.value_head_dim, causal=self.causal
        )
        width = self.num_heads * self.value_head_dim
        taps = 0 if self.lepe is None else self.lepe.weight[0].numel()
        return cost.flops + n * width * (2 * taps + (self.gate is not None)), cost.bytes

    def state_size(self, m: int) -> int:
        d, e = self.head_dim, self.value_head_dim
        recent = 0 if self.lepe is None else (LEPE_TAPS - 1) * self.num_heads * e
        return self.num_heads * (d * e + d + e + (d if self.rope else 0)) + 1 + recent


@lru_cache(maxsize=64)
def _table(shape: tuple[int, ...], prefix: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotary angles [tokens, D/2] of a row-major grid; each axis rotates its own share of the channels."""
    pairs = head_dim // (2 * len(shape))
    frequencies = local.rope_frequencies(pairs, closed=True).to(device)
    return local.rope_angles(local.grid_positions(shape, prefix, device), frequencies)


def _check(**options: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ConfigError(f"attention.{name}={value!r} is unknown; choose from {', '.join(allowed)}")
