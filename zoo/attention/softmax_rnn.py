"""Softmax attention as a sum of recurrent networks, with its parts exchangeable.

Paper: On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective, arXiv:2507.23632, 2025.
``o_t = norm( sum_s f(D^-1/2 q_t.k_s) v_s )``: the exponential is the sum of all orders of linear attention with Kronecker features,
``f = taylor`` keeps the orders up to p, ``identity`` the first alone; ``norm`` is the softmax denominator or something simpler. The
paper finds that an L2 norm of the output vector comes close to the denominator, which is the default here.
Differs from the paper in: gains and epsilons of the norms are our choice; the logarithm of the sum of exponentials, which "gate" and
"none" leave in the output, is cut at 30 either way; truncated series are computed from the full score matrix (a state for order 2 is
attention `based`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels import softmax as kernel
from zoo.attention.base import Attention, BiasFactors, Grid, dense_bias, merge_heads, visible_pairs
from zoo.attention.registry import register_attention
from zoo.errors import CapabilityError, ConfigError

FUNCTIONS = ("exp", "taylor", "identity")
NORMS = ("softmax", "l2", "rms", "gate", "none")


@register_attention(patterns={"self", "causal_self", "cross", "causal_cross"}, bias="full", streaming=True)
class SoftmaxRnnAttention(Attention):
    """Attention with an exchangeable score function and output norm.

    Args:
        function: "exp", "taylor" (series of exp up to `order`) or "identity".
        order: Last term of the series, >= 1; even orders never turn negative.
        norm: "softmax" divides by the sum of weights; "l2" and "rms" normalise each head's output vector; "gate" multiplies the sum by
            a sigmoid of a linear map of the input; "none" leaves it.
        gain: Learned gain per head behind "l2" and "rms".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        function: str = "exp",
        order: int = 2,
        norm: str = "l2",
        gain: bool = True,
        **common: Any,
    ) -> None:
        for name, value, allowed in (("function", function, FUNCTIONS), ("norm", norm, NORMS)):
            if value not in allowed:
                raise ConfigError(f"attention.{name}={value!r} is unknown; choose from {', '.join(allowed)}")
        if order < 1:
            raise ConfigError(f"attention.order={order} must be at least 1")
        if norm == "softmax" and (function == "identity" or (function == "taylor" and order % 2)):
            raise ConfigError(
                f"attention.norm='softmax' divides by a sum that may vanish with function={function!r} of order {order}; "
                "use norm=l2 or an even order"
            )
        super().__init__(dim, num_heads, **common)
        self.function, self.order, self.norm = function, order, norm
        self.gate = nn.Linear(dim, num_heads * self.value_head_dim) if norm == "gate" else None
        scaled = gain and norm in ("l2", "rms")
        self.gain = nn.Parameter(torch.ones(num_heads, 1, 1)) if scaled else None

    def _weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Weights of a truncated series before the norm, [B, H, N, M]."""
        s = (q * self.head_dim**-0.5) @ k.mT
        weights = s
        if self.function == "taylor":
            term = weights = torch.ones_like(s)
            for i in range(1, self.order + 1):
                term = term * s / i
                weights = weights + term
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        return weights.masked_fill(~seen, 0.0)

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
        if self.function == "exp":
            # The flash recurrence serves every norm: l2 and rms cancel its division, the others undo it.
            raw = self.norm in ("gate", "none")
            out = kernel.attention(
                q,
                k,
                v,
                key_mask=key_mask,
                bias=dense_bias(bias),
                causal=self.causal,
                positions=positions,
                higher_order=self.higher_order,
                return_lse=raw,
            )
            if raw:
                out, lse = out
                out = out * lse.clamp(-30.0, 30.0).exp().to(out.dtype)[..., None]
        else:
            if bias is not None:
                raise CapabilityError(
                    f"attention 'softmax_rnn' takes a bias with function=exp only, not {self.function!r}"
                )
            weights = self._weights(q, k, key_mask, positions)
            out = weights @ v
            if self.norm == "softmax":
                out = out / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        return self._normalise(out)

    def _normalise(self, out: Tensor) -> Tensor:
        if self.norm in ("l2", "rms"):
            square = out.float() if out.dtype != torch.float64 else out
            square = square.square()
            size = square.sum(-1, keepdim=True) if self.norm == "l2" else square.mean(-1, keepdim=True)
            out = (out * (size + 1e-6).rsqrt()).to(out.dtype)
            out = out if self.gain is None else out * self.gain
        return out

    def output(self, heads: Tensor, x: Tensor) -> Tensor:
        y = merge_heads(heads)
        return self.proj_drop(self.proj(y if self.gate is None else y * torch.sigmoid(self.gate(x))))

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        h, d, e = self.num_heads, self.head_dim, self.value_head_dim
        cost = kernel.cost(1, h, n, m, d, e, causal=self.causal)
        return cost.flops + 4 * h * n * e, cost.bytes
