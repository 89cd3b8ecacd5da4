"""Hedgehog: linear attention with feature maps learned to imitate softmax.

Paper: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, arXiv:2402.04347, ICLR 2024. Independent code:
fla-org/flash-linear-attention, MIT.
Per head and side ``y = W x + b`` (W starts as identity), ``phi(x) = softmax([y, -y])`` over the 2 D features, or ``exp([y, -y])`` with
``stable=false``; ``o_i = phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i).sum_j phi(k_j) + eps)``.
Differs from the paper in: the softmax over features is the default (as the independent code has it, with ``sharpness`` 2); keys' softmax
denominators do not cancel, so the two forms weigh keys differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels import linear as kernel
from zoo.attention.base import Pattern, State, scaled_scores, visible_pairs
from zoo.attention.linear import HeadLinear, LinearAttention
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"}, bias="key", streaming=True, has_map=True
)
class HedgehogAttention(LinearAttention):
    """Linear attention whose features can be distilled from softmax weights.

    Args:
        stable: Softmax over the features (stays in range) instead of their exponential.
        sharpness: Factor of y, > 0.
        distill_weight: Weight of the distillation loss in `auxiliary_loss` while training; 0 for none.
        eps: Added to the denominator, > 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        stable: bool = True,
        sharpness: float = 1.0,
        distill_weight: float = 0.0,
        eps: float = 1e-6,
        **common: Any,
    ) -> None:
        if sharpness <= 0 or distill_weight < 0:
            raise ConfigError(
                f"attention.sharpness={sharpness} must be positive and attention.distill_weight={distill_weight} not negative"
            )
        super().__init__(dim, num_heads, feature="identity", eps=eps, **common)
        self.features_q = HedgehogMap(num_heads, self.head_dim, stable, sharpness)
        self.features_k = HedgehogMap(num_heads, self.head_dim, stable, sharpness)
        self.distill_weight = distill_weight
        self._distillation: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_distillation": None}  # part of a graph: neither copied nor pickled

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        self._distillation = None
        if self.distill_weight and self.training:
            self._distillation = self._distill(x, context, value, **call)
        return super().mix(x, context, value, **call)

    def auxiliary_loss(self) -> Tensor:
        if self._distillation is None:
            return super().auxiliary_loss()
        return self.distill_weight * self._distillation

    def distillation_loss(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **call: Any
    ) -> Tensor:
        """How far this layer's rows are from softmax rows of the same queries and keys.

        Mean over heads and queries of the cross-entropy between softmax weights (teacher, no gradient) and linear weights, less the
        teacher's entropy: 0 exactly when the rows coincide. Only the feature maps learn from it. Takes the arguments of `forward`;
        holds [B, H, N, M] matrices.
        """
        context, value, call = self._check_call(x, context, value, **call)
        return self._distill(x, context, value, **call)

    def _distill(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        q, k, _ = (t.detach() for t in super(LinearAttention, self).project(x, context, value))
        scores = scaled_scores(q, k)
        visible = visible_pairs(
            q, k, causal=self.causal, key_mask=call["key_mask"], positions=call["positions"]
        ).expand_as(scores)
        # Finite floor: rows without any key get equal weights here and are left out below.
        teacher = scores.masked_fill(~visible, -1e9).softmax(-1)
        student = self.weights(self.features_q(q), self.features_k(k), **{**call, "bias": None})
        gap = teacher * (teacher.clamp(min=1e-12).log() - student.clamp(min=1e-12).log())
        rows = visible.any(-1)
        return gap.masked_fill(~visible, 0.0).sum() / rows.sum().clamp(min=1)

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        if self.pattern is not Pattern.CAUSAL_SELF:
            return super().init_state(batch_size, **inputs)
        self._check_streaming()
        empty = self.proj.weight.new_zeros(batch_size, self.num_heads, 0, 2 * self.head_dim)
        return {
            "sums": kernel.global_state(
                empty, empty[..., :1].expand(-1, -1, -1, self.value_head_dim), want_v=False
            )
        }

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        h, d = self.num_heads, self.head_dim
        cost = kernel.cost("linear", 1, h, n, m, 2 * d, self.value_head_dim, causal=self.causal)
        return cost.flops + 2 * h * (n + m) * d * d, cost.bytes

    def state_size(self, m: int) -> int:
        return self.num_heads * 2 * self.head_dim * (self.value_head_dim + 1)


class HedgehogMap(nn.Module):
    """[B, H, N, D] -> positive features [B, H, N, 2 D]."""

    def __init__(self, heads: int, dim: int, stable: bool, sharpness: float) -> None:
        super().__init__()
        self.linear, self.stable, self.sharpness = HeadLinear(heads, dim), stable, sharpness

    def forward(self, x: Tensor) -> Tensor:
        y = self.sharpness * self.linear(x)
        both = torch.cat((y, -y), -1)
        return both.softmax(-1) if self.stable else both.clamp(max=30.0).exp()
