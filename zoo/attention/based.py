"""Based: second-order Taylor features for reach, a small softmax window for precision.

Paper: Simple linear attention language models balance the recall-throughput tradeoff, arXiv:2402.18668, 2024. Independent code:
HazyResearch/based and fla-org/flash-linear-attention.
Taylor heads project queries and keys to d' channels and use ``phi(x) = [1, x / d'^(1/4), x_i x_j / sqrt(2 d')]``, so that
``phi(q).phi(k) = 1 + s + s^2 / 2`` with ``s = q.k / sqrt(d')``, with the usual denominator. Window heads are softmax attention with
rotary positions over the last `window` tokens.
Differs from the paper in: the paper alternates Taylor and window *layers* (and short convolutions); here ``combine=head`` puts both into
one layer, and ``combine=taylor`` and ``combine=window`` make layers, which `attention.stack` alternates. Self uses a centred window; cross has no window,
its queries lie elsewhere, so all heads are Taylor heads there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels import linear, local, softmax
from kernels.linear import taylor2
from zoo.attention.base import (
    Attention,
    BiasFactors,
    Grid,
    Pattern,
    State,
    masked_softmax,
    split_heads,
    visible_pairs,
)
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError

COMBINE = ("head", "taylor", "window")
EPS = 1e-6


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    order_sensitive=True,
    order_free={"cross"},
    streaming=True,
    has_map=True,
)
class BasedAttention(Attention):
    """Linear attention on quadratic features beside exact attention on a short window.

    Args:
        feature_dim: Width d' of queries and keys in Taylor heads, >= 1; the state has 1 + d' + d'(d'+1)/2 rows.
        window: Tokens that window heads see, >= 1; self sees half of them on each side.
        combine: "head" (first half of the heads window, rest Taylor), "taylor" or "window" (all heads).
        rope: Rotary positions in window heads: "auto" (where the head width is even) or "none".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature_dim: int = 16,
        window: int = 64,
        combine: str = "head",
        rope: str = "auto",
        **common: Any,
    ) -> None:
        if combine not in COMBINE:
            raise ConfigError(f"attention.combine={combine!r} is unknown; choose from {', '.join(COMBINE)}")
        if rope not in ("auto", "none"):
            raise ConfigError(f"attention.rope={rope!r} is unknown; choose from auto, none")
        if feature_dim < 1 or window < 1:
            raise ConfigError(f"attention.feature_dim={feature_dim} and window={window} must be at least 1")
        super().__init__(dim, num_heads, **common)
        if combine == "window" and self.pattern is Pattern.CROSS:
            raise ConfigError(
                "attention.combine='window' needs queries on the keys' axis, which pattern 'cross' lacks; use combine=head"
            )
        shares = {"head": num_heads // 2, "taylor": 0, "window": num_heads}
        # With one head the window would leave nothing of the state: Taylor it is.
        self.window_heads = 0 if self.pattern is Pattern.CROSS else shares[combine]
        self.window, self.feature_dim = window, feature_dim
        self.rope = rope == "auto" and self.head_dim % 2 == 0
        taylor = num_heads - self.window_heads
        shape = (taylor, self.head_dim, feature_dim)
        self.down_q = nn.Parameter(torch.randn(shape) * self.head_dim**-0.5)
        self.down_k = nn.Parameter(torch.randn(shape) * self.head_dim**-0.5)

    def _taylor(self, x: Tensor, down: Tensor) -> Tensor:
        """Taylor heads' small queries or keys, scaled so that their product is s; [B, Ht, N, d']."""
        return (x[:, self.window_heads :] @ down) * self.feature_dim**-0.25

    def _rotated(self, x: Tensor, places: Tensor) -> Tensor:
        """Window heads' queries or keys at integer places [N] or [B, N]."""
        x = x[:, : self.window_heads]
        if not self.rope:
            return x
        angles = local.rope_angles(places[..., None], local.rope_frequencies(self.head_dim // 2).to(x.device))
        return local.rotate(x, angles if angles.dim() == 2 else angles[:, None])

    def _places(self, n: int, m: int, positions: Tensor | None, device: torch.device) -> Tensor:
        return torch.arange(n, device=device) + (m - n) if positions is None else positions

    @property
    def _sides(self) -> tuple[int, int]:
        return (self.window - 1, 0) if self.causal else (self.window // 2, self.window // 2)

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
        w, parts = self.window_heads, []
        if w:
            places = self._places(q.shape[2], k.shape[2], positions, q.device)
            parts.append(
                softmax.attention(
                    self._rotated(q, places),
                    self._rotated(k, torch.arange(k.shape[2], device=k.device)),
                    v[:, :w],
                    key_mask=key_mask,
                    causal=self.causal,
                    positions=positions,
                    window=self._sides,
                    higher_order=self.higher_order,
                )
            )
        if w < self.num_heads:
            parts.append(
                linear.linear_attention(
                    self._taylor(q, self.down_q),
                    self._taylor(k, self.down_k),
                    v[:, w:],
                    feature="taylor2",
                    key_mask=key_mask,
                    causal=self.causal,
                    positions=positions,
                    eps=EPS,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

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
        n, m, w, parts = q.shape[2], k.shape[2], self.window_heads, []
        visible = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        if w:
            places = self._places(n, m, positions, q.device)
            gap = places[..., None] - torch.arange(m, device=q.device)
            near = (gap <= self._sides[0]) & (gap >= -self._sides[1])
            near = near if near.dim() == 2 else near[:, None]
            scores = self._rotated(q, places) @ self._rotated(k, torch.arange(m, device=k.device)).mT
            parts.append(masked_softmax(scores * self.head_dim**-0.5, visible & near))
        if w < self.num_heads:
            s = self._taylor(q, self.down_q) @ self._taylor(k, self.down_k).mT
            series = (1 + s + s.square() / 2).masked_fill(~visible, 0.0)
            parts.append(series / (series.sum(-1, keepdim=True) + EPS))
        return torch.cat(parts, 1)

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        cache = super().init_state(batch_size, **inputs)
        k, v, w = cache["k"], cache["v"], self.window_heads
        state: State = {
            "sums": linear.global_state(
                taylor2(self._taylor(k, self.down_k)), v[:, w:], cache.get("key_mask"), want_v=False
            )
        }
        if self.pattern is Pattern.CAUSAL_SELF:
            state |= {"k": k[:, :w], "v": v[:, :w], "length": 0}
        return state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_streaming()
        w, sums = self.window_heads, state["sums"]
        if self.pattern is Pattern.CROSS:
            q = split_heads(self.q(x_t), self.num_heads)
            following = state
        else:
            q, k, v = self.project(x_t, x_t, x_t)
            new = linear.global_state(taylor2(self._taylor(k, self.down_k)), v[:, w:], want_v=False)
            sums = linear.add_states(sums, new)
            place = torch.tensor([state["length"]], device=x_t.device)
            recent_k = torch.cat((state["k"], self._rotated(k, place)), 2)[:, :, -self.window :]
            recent_v = torch.cat((state["v"], v[:, :w]), 2)[:, :, -self.window :]
            following = {"sums": sums, "k": recent_k, "v": recent_v, "length": state["length"] + 1}
        parts = []
        if w:
            parts.append(softmax.attention(self._rotated(q, place), recent_k, recent_v))
        if w < self.num_heads:
            parts.append(linear.linear_read(taylor2(self._taylor(q, self.down_q)), sums, eps=EPS))
        return self.output(torch.cat(parts, 1), x_t), following

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        d, e, f = self.head_dim, self.value_head_dim, feature_size(self.feature_dim)
        taylor = self.num_heads - self.window_heads
        cost = linear.cost("linear", 1, taylor, n, m, f, e, causal=self.causal)
        near = softmax.cost(1, self.window_heads, n, min(m, self.window), d, e)
        return cost.flops + near.flops + 2 * taylor * (n + m) * d * self.feature_dim, cost.bytes + near.bytes

    def state_size(self, m: int) -> int:
        e, taylor = self.value_head_dim, self.num_heads - self.window_heads
        near = self.window_heads * min(m, self.window) * (self.head_dim + e)
        return taylor * feature_size(self.feature_dim) * (e + 1) + near


def feature_size(dim: int) -> int:
    """Number of Taylor features of `dim` channels."""
    return linear.feature_size("taylor2", dim)
