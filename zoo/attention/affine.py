"""Affine-scaled attention.

Paper: Affine-Scaled Attention, arXiv:2602.23057. No official code; the formula follows the card's two independent readings.
``a_ij = alpha_i p_ij + beta_i`` with ``alpha_i = sigmoid(W_a x_i)`` per head and ``beta_i = (m - alpha_i) / n_i``, where n_i counts the visible
keys and m is a moving average of alpha over training (per head, factor `decay`, frozen in evaluation). So rows sum to m, and
``o_i = alpha_i (O_i - vbar_i) + m vbar_i`` with vbar the mean of the visible values (a running mean in causal patterns).
A bias is refused: a key that it hides would still count in the uniform part, so a bias could not stand for a mask.
Differs from the paper in (unconfirmed there): W_a starts at zero and m at 0.5 = its first alpha; `average_start=0` is the paper's start.
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
    append,
    masked_softmax,
    scaled_scores,
    split_heads,
    visible_pairs,
)
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    streaming=True,
    has_map=True,
    signed_map=True,
)
class AffineAttention(Attention):
    """Softmax rows scaled by the query, made up with a uniform part.

    Args:
        decay: Factor of the moving average of alpha, in [0, 1).
        average_start: Its start, in [0, 1].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        decay: float = 0.9,
        average_start: float = 0.5,
        **common: Any,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"attention.decay={decay} is outside [0, 1)")
        if not 0.0 <= average_start <= 1.0:
            raise ConfigError(f"attention.average_start={average_start} is outside [0, 1]")
        super().__init__(dim, num_heads, **common)
        self.decay = decay
        self.alpha = nn.Linear(dim, num_heads)
        self.register_buffer("average", torch.full((num_heads,), average_start))
        nn.init.zeros_(self.alpha.weight)
        nn.init.zeros_(self.alpha.bias)

    def scale(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """alpha [B, H, N]; in training it moves the average, over the tokens that `keep` [B, N] leaves."""
        alpha = self.alpha(x).sigmoid()
        if self.training:
            with torch.no_grad():
                rows = (alpha.flatten(0, 1) if keep is None else alpha[keep]).float()
                total = torch.cat((rows.sum(0), rows.new_full((1,), rows.shape[0])))
                # Every process takes part, also one whose tokens are all hidden.
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    torch.distributed.all_reduce(total)
                mean = (total[:-1] / total[-1].clamp(min=1)).to(self.average.dtype)
                self.average.lerp_(mean, (1 - self.decay) * (total[-1] > 0).to(mean.dtype))
        return alpha.transpose(1, 2)

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        q, k, v = self.project(x, context, value)
        alpha = self.scale(x, None if self.pattern.cross else call["key_mask"])
        return self.attend(q, k, v, alpha=alpha, **call)

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
        alpha: Tensor | None = None,
    ) -> Tensor:
        """`alpha` [B, H, N]; left out, 1 and an average of 1: plain softmax attention."""
        out = kernel.attention(
            q,
            k,
            v,
            key_mask=key_mask,
            causal=self.causal,
            positions=positions,
            higher_order=self.higher_order,
        )
        if alpha is None:
            return out
        return self._blend(out, self._mean(v, q.shape[2], key_mask, positions), alpha)

    def _blend(self, out: Tensor, mean: Tensor, alpha: Tensor) -> Tensor:
        # A copy: the next training pass moves the buffer in place, before this one's backward.
        average = self.average.to(out.dtype).clone()[:, None, None]
        return alpha[..., None] * (out - mean) + average * mean

    def _mean(self, v: Tensor, n: int, key_mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Mean of the visible values, [B, H, 1|N, E]; zeros where there are none."""
        b, _, m, e = v.shape
        keep = torch.ones(b, m, dtype=torch.bool, device=v.device) if key_mask is None else key_mask
        v = v if key_mask is None else v.masked_fill(~keep[:, None, :, None], 0.0)
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        if not self.causal:
            total, count = v.sum(2, keepdim=True, dtype=dtype), keep.sum(1)[:, None, None, None]
            return (total / count.clamp(min=1)).to(v.dtype)
        last = torch.arange(n, device=v.device) + m - n if positions is None else positions
        last = last.expand(b, n).clamp(min=-1, max=m - 1) + 1  # sums carry a zero in front
        total = nn.functional.pad(v.cumsum(2, dtype=dtype), (0, 0, 1, 0))
        count = nn.functional.pad(keep.cumsum(1), (1, 0)).gather(1, last)
        total = total.gather(2, last[:, None, :, None].expand(-1, v.shape[1], -1, e))
        return (total / count.clamp(min=1)[:, None, :, None]).to(v.dtype)

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
        """Softmax rows, before scale and uniform part."""
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        return masked_softmax(scaled_scores(q, k), seen)

    def attention_map(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **call: Any
    ) -> Tensor:
        """alpha p + beta over the visible keys; negative where alpha exceeds its average."""
        rows = super().attention_map(x, context, value, **call)
        alpha = self.alpha(x).sigmoid().transpose(1, 2)  # looking moves no average
        seen = visible_pairs(
            rows, rows.mT, causal=self.causal, key_mask=call.get("key_mask"), positions=call.get("positions")
        ).to(rows.dtype)
        uniform = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        return self._blend(rows, uniform, alpha)

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        state = super().init_state(batch_size, **inputs)
        if self.pattern is Pattern.CROSS:
            return {**state, "mean": self._mean(state["v"], 1, state["key_mask"], None)}
        shape = (batch_size, self.num_heads, 1, self.value_head_dim)
        return {**state, "sum": state["v"].new_zeros(shape, dtype=torch.float32)}

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_streaming()
        alpha = self.scale(x_t)
        if self.pattern is Pattern.CROSS:
            q = split_heads(self.q(x_t), self.num_heads)
            heads = kernel.attention(q, state["k"], state["v"], key_mask=state["key_mask"])
            return self.output(self._blend(heads, state["mean"], alpha), x_t), state
        q, k_t, v_t = self.project(x_t, x_t, x_t)
        length, total = state["length"] + 1, state["sum"] + v_t
        k, v = append(state["k"], k_t, length), append(state["v"], v_t, length)
        heads = kernel.attention(q, k[:, :, :length], v[:, :, :length])
        heads = self._blend(heads, (total / length).to(v.dtype), alpha)
        return self.output(heads, x_t), {"k": k, "v": v, "length": length, "sum": total}

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        cost = kernel.cost(1, self.num_heads, n, m, self.head_dim, self.value_head_dim, causal=self.causal)
        extra = self.num_heads * self.value_head_dim * (m + 3 * n)
        return cost.flops + extra, cost.bytes + 4 * extra

    def state_size(self, m: int) -> int:
        return super().state_size(m) + self.num_heads * self.value_head_dim
