"""FlashBias: a low-rank score bias carried by extra query and key channels.

Paper: FlashBias, arXiv:2505.12044, NeurIPS 2025. Official code: thuml/FlashBias, MIT. ``S = scale q k^T + phi_q phi_k^T`` is plain attention on
``[scale q | phi_q]`` and ``[k | phi_k]``, so no N x M bias is stored and gradients reach the factors. Sources of factors:
`learned`: two small networks on the tokens (the paper's way to reproduce a dynamic bias); `distance`: ``-s |x_i - x_j|^2`` on a sequence (rank 3)
or a grid (rank d + 2), exact; `alibi`: ``s (j - i)``, exact with rank 2, causal only (the two-sided form has full rank);
`cosine`: ``sum_w c_w cos(w (i - j))``, exact with rank 2 per frequency; `none`: what the caller passes. Low-rank and per-key biases that a call
passes become channels too; `factorize` turns a learned table into factors by SVD (99.5 % of its energy, as the official code).
Differs from the official code in: positions are centred and scaled to [-1, 1] (raw squares would lose digits in half precision); slopes are
learned per head; no fallback to a dense bias above rank 16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from kernels import local
from kernels import softmax as kernel
from zoo.attention.base import Attention, BiasFactors, Grid, Pattern, State, masked_softmax, visible_pairs
from zoo.attention.registry import register_attention
from zoo.errors import CapabilityError, ConfigError

SOURCES = ("learned", "distance", "alibi", "cosine", "none")


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    bias="full",
    streaming=True,
    has_map=True,
)
class FlashBiasAttention(Attention):
    """Softmax attention with a bias given by its factors.

    Args:
        factors: "learned", "distance", "alibi" (causal_self only), "cosine" or "none". Those of place serve self patterns with ordered tokens.
        rank: Rank R of the learned factors, or twice the number of frequencies of "cosine".
        hidden: Width of the hidden layer of the learned factors; None for twice their width.
    """

    key_side = ("k", "v", "factor_k")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        factors: str = "learned",
        rank: int = 8,
        hidden: int | None = None,
        **common: Any,
    ) -> None:
        if factors not in SOURCES:
            raise ConfigError(f"attention.factors={factors!r} is unknown; choose from {', '.join(SOURCES)}")
        if rank < 1 or (factors == "cosine" and rank % 2):
            raise ConfigError(f"attention.rank={rank} must be at least 1, and even for factors='cosine'")
        super().__init__(dim, num_heads, **common)
        self.factors = factors
        placed = factors in ("distance", "alibi", "cosine")
        if placed and (self.pattern.cross or not self.ordered):
            raise CapabilityError(
                f"attention 'flash_bias': factors={factors!r} needs self-attention over ordered tokens; try factors=learned"
            )
        if factors == "alibi" and not self.causal:
            raise CapabilityError(
                "attention 'flash_bias': a two-sided alibi has full rank; factors=alibi serves causal_self, try factors=distance"
            )
        h = num_heads
        if factors == "learned":
            width = hidden or 2 * h * rank
            key_dim = self.k.in_features if self.pattern.cross or self.separate_value else dim
            self.factor_q, self.factor_k = Factor(dim, width, h * rank), Factor(key_dim, width, h * rank)
            # One side starts at zero: no bias at first, and yet a gradient.
            nn.init.zeros_(self.factor_q.down.weight)
            nn.init.zeros_(self.factor_q.down.bias)
        elif factors == "cosine":
            self.frequency = nn.Parameter(torch.pi * torch.arange(1, rank // 2 + 1).float())
            self.slope = nn.Parameter(torch.zeros(h, rank // 2))
        elif placed:
            self.slope = nn.Parameter(torch.zeros(h))
        self.rank = {"learned": rank, "cosine": rank, "none": 0, "alibi": 2}.get(factors, 0)
        if factors == "distance":
            self.rank = 2 + (1 if self.grid is None or self.causal else len(self.grid.shape))

    # ---------------------------------------------------------------- factors

    def _place(
        self, start: int, tokens: int, grid: Grid | None, like: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        """Coordinates [B|1, 1, tokens, axes] in [-1, 1]; decoding has no last token, so causal places count in steps of 1/64."""
        if self.causal or grid is None:
            at = torch.arange(start, start + tokens, device=like.device)[:, None].to(like.dtype)
            if self.causal:
                return (at / 64)[None, None]
            last = at.new_full((1,), tokens - 1) if key_mask is None else (at[:, 0] * key_mask).amax(1)
            return 2 * at / last.clamp(min=1)[:, None, None, None] - 1
        places = local.grid_positions(grid.shape, grid.prefix, like.device).to(like.dtype)
        place = 2 * places / places.new_tensor([max(s - 1, 1) for s in grid.shape]) - 1
        place[: grid.prefix] = 0.0  # tokens without a place sit in the middle
        return place[None, None]

    def _phi(
        self,
        x: Tensor,
        context: Tensor,
        start: int = 0,
        grid: Grid | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """phi_q [B|1, H, N, R] and phi_k [B|1, H, M, R]."""
        if self.factors == "none":
            return None
        h = self.num_heads
        if self.factors == "learned":
            return tuple(
                f(t).unflatten(-1, (h, -1)).transpose(1, 2)
                for f, t in ((self.factor_q, x), (self.factor_k, context))
            )
        p = self._place(start, x.shape[1], grid, x, key_mask)  # [B|1, 1, N, A]
        if self.factors == "cosine":
            angle = p[..., :1] * self.frequency  # [B|1, 1, N, R/2]; on grids the first axis
            cos, sin = angle.cos(), angle.sin()
            slope = self.slope[:, None]  # [H, 1, R/2]
            left, right = torch.cat((slope * cos, slope * sin), -1), torch.cat((cos, sin), -1)
        else:
            slope, one = softplus(self.slope)[:, None, None], torch.ones_like(p[..., :1])
            if self.factors == "alibi":
                left, right = slope * torch.cat((p, one), -1), torch.cat((-one, p), -1)
            else:
                square = p.square().sum(-1, keepdim=True)
                left = -slope * torch.cat((-2 * p, square, one), -1)
                right = torch.cat((p, one, square), -1)
        return left, right.expand(-1, h, -1, -1)

    def _extend(self, q: Tensor, k: Tensor, phi: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """[scale q | phi_q] and [k | phi_k]."""
        q = q * self.head_dim**-0.5
        if phi is None:
            return q, k
        phi_q, phi_k = (p.to(q.dtype).expand(q.shape[0], -1, -1, -1) for p in phi)
        return torch.cat((q, phi_q), -1), torch.cat((k, phi_k), -1)

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._project(x, context, value)

    def _project(
        self,
        x: Tensor,
        context: Tensor,
        value: Tensor,
        start: int = 0,
        grid: Grid | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their extra channels."""
        q, k, v = super().project(x, context, value)
        return *self._extend(q, k, self._phi(x, context, start, grid or self.grid, key_mask)), v

    def content(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return super().project(x, context, value)[:2]

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        return self.attend(*self._project(x, context, value, **_layout(call)), **call)

    def attention_map(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **call: Any
    ) -> Tensor:
        context, value, call = self._check_call(x, context, value, **call)
        q, k, _ = self._project(x, context, value, **_layout(call))
        return self.weights(q, k, **call)

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
        """`q` and `k` as `project` returns them, scale included."""
        q, k, bias = _absorb(q, k, bias)
        return kernel.attention(
            q, k, v, key_mask=key_mask, bias=bias, causal=self.causal, positions=positions, scale=1.0,
            higher_order=self.higher_order,
        )  # fmt: skip

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
        q, k, bias = _absorb(q, k, bias)
        scores = q @ k.mT if bias is None else q @ k.mT + bias
        seen = visible_pairs(q, k, causal=self.causal, key_mask=key_mask, positions=positions)
        return masked_softmax(scores, seen)

    # ---------------------------------------------------------------- decoding and cost

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        state = super().init_state(batch_size, **inputs)
        if self.pattern is Pattern.CAUSAL_SELF:
            state["k"] = state["v"].new_zeros(batch_size, self.num_heads, 0, self.head_dim + self.rank)
        return state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_streaming()
        if self.pattern is Pattern.CROSS:
            q = self.q(x_t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) * self.head_dim**-0.5
            if self.factors == "learned":
                phi = self.factor_q(x_t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                q = torch.cat((q, phi), -1)
            heads = self.attend(q, state["k"], state["v"], key_mask=state["key_mask"])
            return self.output(heads, x_t), state
        q, k, v = self._project(x_t, x_t, x_t, start=state["length"])
        k, v = (torch.cat((state[n], t), 2) for n, t in (("k", k), ("v", v)))
        return self.output(self.attend(q, k, v), x_t), {"k": k, "v": v, "length": state["length"] + 1}

    def state_size(self, m: int) -> int:
        return m * self.num_heads * (self.head_dim + self.value_head_dim + self.rank)

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        d = self.head_dim + self.rank
        cost = kernel.cost(1, self.num_heads, n, m, d, self.value_head_dim, causal=self.causal)
        return cost.flops, cost.bytes


def _layout(call: dict[str, Any]) -> dict[str, Any]:
    """What places depend on: the grid of this call, and where a padded sequence ends."""
    return {name: call.get(name) for name in ("grid", "key_mask")}


class Factor(nn.Module):
    """A token's share of the bias: two layers with GELU."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def factorize(table: Tensor, *, energy: float = 0.995, rank: int | None = None) -> BiasFactors:
    """Factors of a dense bias [..., N, M] by SVD, with the least rank that keeps `energy` of every table's squared norm."""
    if not 0.0 < energy <= 1.0:
        raise ConfigError(f"factorize: energy={energy} is outside (0, 1]")
    u, s, vh = torch.linalg.svd(table.float(), full_matrices=False)
    if rank is None:
        kept = s.square().cumsum(-1) / s.square().sum(-1, keepdim=True).clamp(min=1e-30)
        rank = int((kept < energy).sum(-1).max()) + 1
    root = s[..., None, :rank].sqrt()
    return BiasFactors((u[..., :rank] * root).to(table.dtype), (vh.mT[..., :rank] * root).to(table.dtype))


def _absorb(q: Tensor, k: Tensor, bias: Tensor | BiasFactors | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A bias of low rank becomes channels; any other one is left as it is."""
    if bias is None:
        return q, k, None
    if isinstance(bias, Tensor):
        if bias.shape[-2] != 1 or not bool(torch.isfinite(bias).all()):  # an infinite channel would make NaN
            return q, k, bias
        bias = BiasFactors(bias.new_ones(1, 1, 1, 1), bias.expand(*bias.shape[:-1], k.shape[2]).mT)
    b, h, n, m = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    left, right = (
        f.to(q.dtype).expand(b, h, size, f.shape[-1]) for f, size in ((bias.query, n), (bias.key, m))
    )
    return torch.cat((q, left), -1), torch.cat((k, right), -1), None
