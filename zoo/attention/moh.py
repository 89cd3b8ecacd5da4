"""Mixture-of-head attention (MoH).

Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv:2410.11842, ICML 2025. Official code: SkyworkAI/MoH,
Apache-2.0. Of H heads the first h_s are shared by all tokens; of the other E each token takes the k with the largest router
probability. ``y = W_O [g_i O_i]_i``; with ``a = softmax(W_h x)``, shared ``g = a_1 softmax(W_s x)``, routed
``g = a_2 softmax(W_r x)`` where selected, else 0 (`gating=paper`); `gating=official` scales all of this to mean one as the released ViT does:
``2 a``, ``h_s softmax(W_s x)``, and the routed probabilities divided by their sum over the selected and multiplied by k.
Load balance: ``L = E sum_e mean(prob_e) mean(selected_e)``, k when balanced; `auxiliary_loss` returns it per layer.
Differs from the official code in: heads that a token did not select are not computed (the released code computes and multiplies by
zero); tokens that the key mask hides do not count for the balance; tasks add up the balance of their layers, of which the official
code takes the mean, so `task.auxiliary_weight` (0.01 there and here) counts as many times as there are layers. Without `shared_heads`
there is no W_h, as there.
Gates depend on the query token alone, hence strict causality and every pattern. The LLaMA form without router parameters is left out.
"""

from __future__ import annotations

import math
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
    dense_bias,
    masked_softmax,
    scaled_scores,
    split_heads,
    visible_pairs,
)
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError

# Selecting rows pays only if it drops more than this share of them.
COMPACT_BELOW = 0.8


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    bias="full",
    smooth=False,
    streaming=True,
    has_map=True,
)
class MohAttention(Attention):
    """Softmax attention whose heads are experts.

    Args:
        shared_heads: Heads h_s that every token uses; None for half of them.
        active_heads: Routed heads k per token; None for half of the routed ones, rounded up.
        gating: "official" (mean one) or "paper".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        gating: str = "official",
        **common: Any,
    ) -> None:
        shared = max(1, num_heads // 2) if shared_heads is None else shared_heads
        if not 0 <= shared <= num_heads:
            raise ConfigError(f"attention.shared_heads={shared} must be in [0, {num_heads}]")
        routed = num_heads - shared
        active = (routed + 1) // 2 if active_heads is None else active_heads
        if not 0 <= active <= routed or shared + active == 0:
            raise ConfigError(
                f"attention.active_heads={active} must be in [0, {routed}] ({num_heads} heads, {shared} shared), and some "
                "head must be active"
            )
        if gating not in ("official", "paper"):
            raise ConfigError(f"attention.gating={gating!r} is unknown; choose from official, paper")
        super().__init__(dim, num_heads, **common)
        self.shared, self.routed, self.active, self.gating = shared, routed, active, gating
        new = lambda width: nn.Linear(dim, width, bias=False)  # noqa: E731
        self.route_shared = new(shared) if shared else None
        self.route = new(routed) if active else None
        self.route_kind = new(2) if shared and active else None
        self._balance: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_balance": None}  # part of a graph: neither copied nor pickled

    # ---------------------------------------------------------------- routing

    def gates(self, x: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gate of each head [B, H, N], zero where not selected, and the routed heads taken, int64 [B, N, k]."""
        official = self.gating == "official"
        parts = []
        kind = None if self.route_kind is None else self.route_kind(x).softmax(-1) * (2 if official else 1)
        if self.shared:
            own = self.route_shared(x).softmax(-1) * (self.shared if official else 1)
            parts.append(own if kind is None else kind[..., :1] * own)
        index = torch.empty(*x.shape[:2], 0, dtype=torch.long, device=x.device)
        if self.active:
            prob = self.route(x).softmax(-1)
            # A stable sort: equal routers choose the first heads on every device.
            index = (
                prob.detach().float().sort(dim=-1, descending=True, stable=True).indices[..., : self.active]
            )
            chosen = torch.zeros_like(prob).scatter(-1, index, 1.0)
            own = prob * chosen
            if official:
                own = self.active * own / own.sum(-1, keepdim=True)
            parts.append(own if kind is None else kind[..., 1:] * own)
            keep = None if self.pattern.cross else key_mask
            self._balance = self._load(prob, chosen, keep) if self.training else None
        elif self.routed:
            parts.append(x.new_zeros(*x.shape[:2], self.routed))
        return torch.cat(parts, -1).transpose(1, 2), index

    def _load(self, prob: Tensor, chosen: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            means = [t.mean((0, 1)) for t in (prob, chosen)]
        else:
            weight = keep[..., None].to(prob.dtype)
            means = [(t * weight).sum((0, 1)) / weight.sum().clamp(min=1) for t in (prob, chosen)]
        return self.routed * (means[0] * means[1]).sum()

    def auxiliary_loss(self) -> Tensor:
        """Load balance of the last pass if that was training: k when balanced."""
        return super().auxiliary_loss() if self._balance is None else self._balance

    # ---------------------------------------------------------------- mixing

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
        """Every head, without gates."""
        return kernel.attention(
            q,
            k,
            v,
            key_mask=key_mask,
            bias=dense_bias(bias),
            causal=self.causal,
            positions=positions,
            higher_order=self.higher_order,
        )

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
        """Softmax rows of every head, without gates."""
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        return masked_softmax(scaled_scores(q, k, bias), seen)

    def attention_map(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Softmax rows times the head's gate for the token: zero rows where a head was not chosen."""
        gates, _ = self.gates(x, call.get("key_mask"))
        return super().attention_map(x, context, value, **call) * gates[..., None]

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        q, k, v = self.project(x, context, value)
        gates, index = self.gates(x, call["key_mask"])
        return self._gated(q, k, v, gates, index, **call)

    def _gated(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, index: Tensor, **call: Any) -> Tensor:
        if isinstance(call.get("bias"), BiasFactors):
            call["bias"] = call["bias"].dense()
        s, n = self.shared, q.shape[2]
        if self.active == 0:
            return self._pad(self._some(q, k, v, slice(0, s), call) * gates[:, :s, :, None])
        chosen = q.new_zeros(q.shape[0], n, self.routed, dtype=torch.bool).scatter(2, index, True)
        chosen = chosen.transpose(1, 2)  # [B, E, N]
        most = int(chosen.sum(-1).max()) if n > 1 and self.active < self.routed else n
        if most > COMPACT_BELOW * n:
            return self.attend(q, k, v, **call) * gates[..., None]
        routed = self._rows(q[:, s:], k[:, s:], v[:, s:], chosen, most, call)
        if s:
            routed = torch.cat((self._some(q, k, v, slice(0, s), call), routed), 1)
        return routed * gates[..., None]

    def _some(self, q: Tensor, k: Tensor, v: Tensor, heads: slice, call: dict[str, Any]) -> Tensor:
        bias = call.get("bias")
        if bias is not None and bias.shape[1] > 1:
            call = {**call, "bias": bias[:, heads]}
        return self.attend(q[:, heads], k[:, heads], v[:, heads], **call)

    def _pad(self, heads: Tensor) -> Tensor:
        """Zeros for heads that no token uses."""
        return nn.functional.pad(heads, (0, 0, 0, 0, 0, self.num_heads - heads.shape[1]))

    def _rows(
        self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, most: int, call: dict[str, Any]
    ) -> Tensor:
        """Only the chosen queries of each routed head, [B, E, N, V]; zeros elsewhere. `most` is the longest list."""
        b, e, n, d = q.shape
        m = k.shape[2]
        # Chosen rows first, in order; the lists are filled up with rows whose results are thrown away.
        rows = (
            chosen.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]
        )  # [B, E, most]
        real = chosen.gather(2, rows)
        part = q.gather(2, rows[..., None].expand(-1, -1, -1, d)).reshape(b * e, 1, most, d)
        key_mask, bias, positions = call.get("key_mask"), call.get("bias"), call.get("positions")
        if key_mask is not None:
            key_mask = key_mask.repeat_interleave(e, 0)
        if bias is not None:
            bias = (bias[:, -e:] if bias.shape[1] > 1 else bias).expand(b, e, -1, -1)
            if bias.shape[2] > 1:
                bias = bias.gather(2, rows[..., None].expand(-1, -1, -1, bias.shape[3]))
            bias = bias.reshape(b * e, 1, *bias.shape[2:])
        if self.causal:
            last = torch.arange(n, device=q.device) + m - n if positions is None else positions
            positions = last.expand(b, n)[:, None].expand(b, e, n).gather(2, rows).reshape(b * e, most)
        k, v = (t.reshape(b * e, 1, m, t.shape[-1]) for t in (k, v))
        out = self.attend(part, k, v, key_mask=key_mask, bias=bias, positions=positions)
        out = out.reshape(b, e, most, -1).masked_fill(~real[..., None], 0.0)
        whole = out.new_zeros(b, e, n, out.shape[-1])
        return whole.scatter(2, rows[..., None].expand(-1, -1, -1, out.shape[-1]), out)

    # ---------------------------------------------------------------- decoding and cost

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_streaming()
        gates, _ = self.gates(x_t)
        if self.pattern is Pattern.CROSS:
            q = split_heads(self.q(x_t), self.num_heads)
            heads = self.attend(q, state["k"], state["v"], key_mask=state["key_mask"])
            return self.output(heads * gates[..., None], x_t), state
        q, k_t, v_t = self.project(x_t, x_t, x_t)
        length = state["length"] + 1
        k, v = append(state["k"], k_t, length), append(state["v"], v_t, length)
        heads = self.attend(q, k[:, :, :length], v[:, :, :length])
        return self.output(heads * gates[..., None], x_t), {"k": k, "v": v, "length": length}

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        whole = kernel.cost(1, self.num_heads, n, m, self.head_dim, self.value_head_dim, causal=self.causal)
        share = (self.shared + self.active) / self.num_heads
        return math.ceil(whole.flops * share), whole.bytes
