"""Softmax attention.

Paper: Attention Is All You Need, arXiv:1706.03762; computed as in FlashAttention-2, arXiv:2307.08691.
``o_i = sum_j softmax_j(q_i.k_j / sqrt(D) + b_ij) v_j``. Grouped key/value heads: GQA, arXiv:2305.13245. Query/key
normalisation: ViT-22B, arXiv:2302.05442, as in timm (LayerNorm over the head width).
Differs from the papers in: a query that sees no key gives zeros.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kernels import softmax as kernel
from zoo.attention.base import Attention, BiasFactors, Grid, visible_keys
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    bias="full",
    streaming=True,
    has_map=True,
    has_scores=True,
)
class SoftmaxAttention(Attention):
    """Scaled dot-product attention.

    Args:
        num_kv_heads: Key/value heads, a divisor of num_heads; None for as many as query heads.
        qk_norm: Normalise queries and keys over the head width (LayerNorm, learned gain and shift).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        **common: Any,
    ) -> None:
        if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
            raise ConfigError(
                f"attention.num_kv_heads={num_kv_heads} must divide the {num_heads} query heads"
            )
        super().__init__(dim, num_heads, kv_heads=num_kv_heads, **common)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, value)
        return self.q_norm(q), self.k_norm(k), v

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
        return kernel.attention(
            q,
            k,
            v,
            key_mask=key_mask,
            bias=bias.dense() if isinstance(bias, BiasFactors) else bias,
            causal=self.causal,
            positions=positions,
            higher_order=self.higher_order,
        )

    def scores(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **call: Any
    ) -> Tensor:
        context, value, call = self._check_call(
            x, context, value, **{k: call.get(k) for k in ("key_mask", "bias", "grid", "positions")}
        )
        q, k, _ = self.project(x, context, value)
        return self._scores(q, k, call["bias"])

    def _scores(self, q: Tensor, k: Tensor, bias: Tensor | BiasFactors | None) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + (bias.dense() if isinstance(bias, BiasFactors) else bias)
        return scores

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        scores = self._scores(q, k, bias)
        hidden = scores.new_zeros((), dtype=bool)
        if self.causal:
            hidden = ~visible_keys(q.shape[2], k.shape[2], positions, q.device)
        if key_mask is not None:
            hidden = hidden | ~key_mask[:, None, None, :]
        return scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        cost = kernel.cost(
            1,
            self.num_heads,
            n,
            m,
            self.head_dim,
            self.value_head_dim,
            causal=self.causal,
            key_heads=self.kv_heads,
        )
        return cost.flops, cost.bytes
