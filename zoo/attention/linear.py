"""Plain linear attention with a choice of feature maps.

Paper: Transformers are RNNs, arXiv:2006.16236 (elu + 1). Feature maps: Efficient Attention, arXiv:1812.01243 (softmax);
T2R, arXiv:2103.13076 (t2r); DPFP, arXiv:2102.11174 (dpfp).
``o_i = phi(q_i) S / (phi(q_i).z + eps)``, ``S = sum_j phi(k_j) v_j^T``, ``z = sum_j phi(k_j)``.
Differs from the papers in: relu-like maps add 1e-3, so that no row of weights vanishes. ``normalize=rmsnorm|groupnorm``
drops the denominator and normalises each head's output instead, as causal models do today.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import linear as kernel
from zoo.attention.base import (
    Attention,
    BiasFactors,
    Capabilities,
    Grid,
    Pattern,
    State,
    split_heads,
    visible_pairs,
)
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError

NEGATIVE = ("silu", "identity")  # features that may be, and with them the weights
UNWEIGHTED = ("silu", "softmax")  # features whose keys take no log weight
NORMALIZE = ("denom", "none", "rmsnorm", "groupnorm")


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"}, bias="key", streaming=True, has_map=True
)
class LinearAttention(Attention):
    """Attention with weights ``phi(q).phi(k)``, in time and memory linear in the number of tokens.

    Args:
        feature: Feature map: elu1, relu, sqrelu, exp, softplus, silu, identity, softmax, t2r, dpfp, dpfp2 or dpfp3.
        normalize: "denom" divides by the sum of weights; "none" does not; "rmsnorm" and "groupnorm" (mean removed as
            well) normalise each head's output over its width, with a learned gain.
        eps: Added to the denominator, > 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature: str = "elu1",
        normalize: str = "denom",
        eps: float = 1e-6,
        **common: Any,
    ) -> None:
        if feature not in kernel.FEATURES:
            raise ConfigError(
                f"attention.feature={feature!r} is unknown; choose from {', '.join(kernel.FEATURES)}"
            )
        if normalize not in NORMALIZE:
            raise ConfigError(
                f"attention.normalize={normalize!r} is unknown; choose from {', '.join(NORMALIZE)}"
            )
        if eps <= 0:
            raise ConfigError(f"attention.eps={eps} must be positive")
        super().__init__(dim, num_heads, **common)
        if feature == "softmax" and self.causal:
            raise ConfigError(
                "attention.feature='softmax' normalises keys over all positions and cannot be causal; use elu1 or relu"
            )
        self.feature, self.normalize, self.eps = feature, normalize, eps
        self.features_q = HeadLinear(num_heads, self.head_dim) if feature == "t2r" else None
        self.features_k = HeadLinear(num_heads, self.head_dim) if feature == "t2r" else None
        shape = (num_heads, 1, self.value_head_dim)
        self.gain = nn.Parameter(torch.ones(shape)) if normalize in ("rmsnorm", "groupnorm") else None

    @classmethod
    def capabilities_with(cls, *, feature: str = "elu1", **options: Any) -> Capabilities:
        can = replace(cls.capabilities, signed_map=feature in NEGATIVE)
        if feature in UNWEIGHTED:
            able = ", ".join(f for f in kernel.FEATURES if f not in UNWEIGHTED)
            can = replace(can, bias=None, note=f"with attention.feature={feature}; features that do: {able}")
        return can

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, value)
        if self.features_q is not None:
            q, k = self.features_q(q), self.features_k(k)
        return q, k, v

    @property
    def _division(self) -> str:
        return "denom" if self.normalize == "denom" else "none"

    def _normalize(self, heads: Tensor) -> Tensor:
        if self.gain is None:
            return heads
        if self.normalize == "groupnorm":
            heads = heads - heads.mean(-1, keepdim=True)
        return F.rms_norm(heads, heads.shape[-1:], eps=1e-5) * self.gain

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
        heads = kernel.linear_attention(
            q,
            k,
            v,
            feature=self.feature,
            key_mask=key_mask,
            key_bias=None if bias is None else bias.squeeze(-2),
            causal=self.causal,
            positions=positions,
            normalize=self._division,
            eps=self.eps,
        )
        return self._normalize(heads)

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
        phi_q = kernel.apply_feature(self.feature, q)
        phi_k = kernel.apply_feature(self.feature, k, side="k", key_mask=key_mask)
        weights = phi_q @ phi_k.mT
        if bias is not None:
            weights = weights * bias.exp()
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        weights = weights.masked_fill(~seen, 0.0)
        if self.normalize == "denom" and self.feature != "softmax":
            weights = weights / (weights.sum(-1, keepdim=True) + self.eps)
        return weights

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        state = super().init_state(batch_size, **inputs)
        phi_k = kernel.apply_feature(self.feature, state["k"], side="k", key_mask=state.get("key_mask"))
        return {"sums": kernel.global_state(phi_k, state["v"], state.get("key_mask"), want_v=False)}

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        sums = state["sums"]
        if self.pattern is Pattern.CROSS:
            q = split_heads(self.q(x_t), self.num_heads)
            q = q if self.features_q is None else self.features_q(q)
        else:
            q, k, v = self.project(x_t, x_t, x_t)
            sums = kernel.add_states(
                sums, kernel.global_state(kernel.apply_feature(self.feature, k, side="k"), v, want_v=False)
            )
        division = "none" if self.feature == "softmax" else self._division
        heads = kernel.linear_read(
            kernel.apply_feature(self.feature, q), sums, normalize=division, eps=self.eps
        )
        return self.output(self._normalize(heads), x_t), {"sums": sums}

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        width = kernel.feature_size(self.feature, self.head_dim)
        cost = kernel.cost("linear", 1, self.num_heads, n, m, width, self.value_head_dim, causal=self.causal)
        return cost.flops, cost.bytes

    def state_size(self, m: int) -> int:
        width = kernel.feature_size(self.feature, self.head_dim)
        return self.num_heads * width * (self.value_head_dim + 1)


class HeadLinear(nn.Module):
    """A linear map per head, [B, H, N, D] -> [B, H, N, D], identity at the start."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias
