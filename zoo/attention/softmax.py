"""Softmax attention.

Paper: Attention Is All You Need, arXiv:1706.03762; computed as in FlashAttention-2, arXiv:2307.08691.
``o_i = sum_j softmax_j(q_i.k_j / sqrt(D) + b_ij) v_j``. Grouped key/value heads: GQA, arXiv:2305.13245. Query/key
normalisation: ViT-22B, arXiv:2302.05442, as in timm (LayerNorm over the head width). Score cap ``c tanh(s / c)``: Gemma 2,
arXiv:2408.00118. Sinks, a place for weight that no key should get (studied in arXiv:2410.10781): `off_by_one` adds 1 to the denominator,
`zero_kv` says the same as a key and value of zeros, `learned` adds exp(b) with one b per head, `token` a learned key and value per head.
Differs from the papers in: a query that sees no key gives zeros, with a sink too. The map lists the real keys; with a sink its rows
sum to less than one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels import softmax as kernel
from zoo.attention.base import (
    Attention,
    BiasFactors,
    Grid,
    Pattern,
    State,
    dense_bias,
    masked_softmax,
    scaled_scores,
    split_heads,
    visible_pairs,
)
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError

SINKS = ("none", "token", "off_by_one", "learned", "zero_kv")


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
        sink: "none", "token", "off_by_one", "learned" or "zero_kv".
        softcap: Bound of the scaled scores, > 0; None for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        sink: str = "none",
        softcap: float | None = None,
        **common: Any,
    ) -> None:
        if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
            raise ConfigError(
                f"attention.num_kv_heads={num_kv_heads} must divide the {num_heads} query heads"
            )
        if sink not in SINKS:
            raise ConfigError(f"attention.sink={sink!r} is unknown; choose from {', '.join(SINKS)}")
        if softcap is not None and softcap <= 0:
            raise ConfigError(f"attention.softcap={softcap} must be positive, or null for none")
        super().__init__(dim, num_heads, kv_heads=num_kv_heads, **common)
        self.sink, self.softcap = sink, softcap
        if sink == "learned":
            self.sink_logit = nn.Parameter(torch.zeros(num_heads))
        elif sink == "token":
            self.sink_key = nn.Parameter(torch.empty(num_heads, self.head_dim))
            self.sink_value = nn.Parameter(torch.zeros(num_heads, self.value_head_dim))
            nn.init.trunc_normal_(self.sink_key, std=0.02)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else None

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, value)
        return (q, k, v) if self.q_norm is None else (self.q_norm(q), self.k_norm(k), v)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        if self.pattern is not Pattern.CROSS:
            return super().step(x_t, state)
        self._check_streaming()
        q = split_heads(self.q(x_t), self.num_heads)  # the keys are in the state
        q = q if self.q_norm is None else self.q_norm(q)
        return self.output(self.attend(q, **state), x_t), state

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
        found = kernel.attention(
            q,
            k,
            v,
            key_mask=key_mask,
            bias=dense_bias(bias),
            # One query at the end of its keys, as in decoding, sees them all: no mask to build.
            causal=self.causal and (positions is not None or q.shape[2] != 1),
            positions=positions,
            softcap=self.softcap,
            return_lse=self.sink != "none",
            higher_order=self.higher_order,
        )
        if self.sink == "none":
            return found
        value = self.sink_value[:, None] if self.sink == "token" else None
        return kernel.apply_sink(*found, self._sink_logit(q), value)[0]

    def _sink_logit(self, q: Tensor) -> Tensor:
        """Score of the sink, broadcastable to [B, H, N]."""
        if self.sink == "learned":
            return self.sink_logit[:, None]
        if self.sink == "token":
            scores = (q @ self.sink_key[..., None])[..., 0] * self.head_dim**-0.5
            return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
        return q.new_zeros(())

    def raw_scores(self, q: Tensor, k: Tensor, bias: Tensor | BiasFactors | None) -> Tensor:
        scores = scaled_scores(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores if bias is None else scores + dense_bias(bias)

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
        scores = self.raw_scores(q, k, bias)
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        weights = masked_softmax(scores, seen)
        if self.sink != "none":
            total = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
            weights = weights * (total - self._sink_logit(q)).sigmoid()[..., None]
        return weights

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
