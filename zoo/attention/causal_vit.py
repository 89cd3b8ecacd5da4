"""Causal attention for images, introduced gradually (iLLaMA).

Paper: Adapting LLaMA Decoder to Vision Transformer, arXiv:2404.06773. Official code: techmonsterwang/iLLaMA (no licence file; described
from its behaviour). Weights are multiplied by ``M = a + (1 - a) tril`` with a going from 1 to 0 during training. The official code does so
*after* the softmax over all keys (`mask_site=post`): rows do not sum to one, and even at a = 0 the denominator holds future keys, so that form
is masked but not strictly causal. `mask_site=pre` adds log M to the scores: a causal softmax at a = 0. The class token comes after the
patches; here tokens without a place (`grid.prefix`) count as last instead of being moved.
Differs from the official code in: a falls linearly over `anneal_steps` training passes of the module, not over epochs, and is
``1 - (t + 1) / (anneal_steps + 1)`` after t of them (point networks make several in a step, one for each piece of their loss, and none
in quasi-Newton steps, where a is frozen); the causal pattern has a = 0; norms, SwiGLU and positions belong to the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import softmax as kernel
from zoo.attention.base import Attention, BiasFactors, Grid, dense_bias, scaled_scores, visible_keys
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self", "causal_self"},
    strict_causal=False,
    bias="full",
    order_sensitive=True,
    has_map=True,
)
class CausalVitAttention(Attention):
    """Softmax attention with a soft causal mask.

    Args:
        mask_site: "post" (official: multiply after the softmax) or "pre" (log mask on the scores).
        anneal_steps: Training passes until the mask is causal; 0 for causal from the start. Pattern "self" only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mask_site: str = "post",
        anneal_steps: int = 500,
        **common: Any,
    ) -> None:
        if mask_site not in ("post", "pre"):
            raise ConfigError(f"attention.mask_site={mask_site!r} is unknown; choose from post, pre")
        if anneal_steps < 0:
            raise ConfigError(f"attention.anneal_steps={anneal_steps} must be >= 0")
        super().__init__(dim, num_heads, **common)
        self.mask_site, self.anneal_steps = mask_site, 0 if self.causal else anneal_steps
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    @property
    def softness(self) -> float:
        """a: 1 leaves the mask out, 0 is causal."""
        return max(0.0, 1 - (int(self.passes) + 1) / (self.anneal_steps + 1))

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        heads = super().mix(x, context, value, **call)
        if self.training:
            self.passes += 1
        return heads

    def _earlier(
        self, n: int, m: int, grid: Grid | None, positions: Tensor | None, device: torch.device
    ) -> Tensor:
        """bool, broadcastable to [B, 1, N, M]: keys at or before the query; prefix tokens come last, in their order."""
        if self.causal:
            return visible_keys(n, m, positions, device)
        place = torch.arange(n, device=device)
        if grid is not None and grid.prefix:
            place = (place - grid.prefix) % n
        return place <= place[:, None]

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
        a = self.softness
        prefix = grid is not None and grid.prefix and not self.causal
        plain = a == 1.0 or (a == 0.0 and self.mask_site == "pre" and not prefix)
        if plain:
            bias = dense_bias(bias)
            return kernel.attention(
                q, k, v, key_mask=key_mask, bias=bias, causal=a == 0.0, positions=positions if a == 0.0 else None,
                higher_order=self.higher_order,
            )  # fmt: skip
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
        weights = self.weights(q, k, key_mask=key_mask, bias=bias, grid=grid, positions=positions)
        return weights @ v

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
        if key_mask is not None:
            k = k.masked_fill(~key_mask[:, None, :, None], 0.0)
        scores = scaled_scores(q, k, bias)
        earlier = self._earlier(q.shape[2], k.shape[2], grid, positions, q.device)
        soft = torch.where(earlier, 1.0, self.softness).to(scores.dtype)
        if self.mask_site == "pre":
            scores = scores + soft.log()
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
        # Rows without a key: finite scores in, zeros out, so that no gradient turns into NaN.
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        return weights * soft if self.mask_site == "post" else weights

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        half = self.causal and self.mask_site == "pre"
        cost = kernel.cost(1, self.num_heads, n, m, self.head_dim, self.value_head_dim, causal=half)
        return cost.flops, cost.bytes + (0 if half else 8.0 * self.num_heads * n * m)
