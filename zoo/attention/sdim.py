"""SDIM: keys that share a random hash signature with the query are summed, with equal weight.

Paper: "Sampling is all you need on modeling long-term user behaviors for CTR prediction", arXiv:2205.10249.
``o = (1/G) sum_g l2normalise(sum_j [h_g(k_j) = h_g(q)] v_j)``, where each of G signatures packs ``bits`` signs of random
projections. Over the draw of the projections a key counts with weight ``(1 - angle(q, k) / pi) ** bits``.
Differs from the paper in: several queries and causal patterns; projections differ between heads. Gradients reach the
values alone, as in the paper: signatures are steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.attention.base import Attention, BiasFactors, Grid, Pattern, State, split_heads, visible_keys
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError

BLOCK_ELEMENTS = 1 << 24  # collisions held at once in causal patterns


@register_attention(patterns={"self", "causal_self", "cross", "causal_cross"}, smooth=False, streaming=True)
class SdimAttention(Attention):
    """Hash and add. All keys fit a table [G, 2**bits, E], which can be kept per user and read by any query.

    Args:
        hashes: Number of random projections m, a multiple of `bits`; there are G = m / bits signatures.
        bits: Signs in one signature, 1 .. 8; more bits, narrower attention.
        l2_norm: Scale the sum of each signature to length one, so that its direction counts and not its size.
        seed: Of the projections, which are fixed and saved with the weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hashes: int = 48,
        bits: int = 3,
        l2_norm: bool = True,
        seed: int = 0,
        **common: Any,
    ) -> None:
        if not 1 <= bits <= 8:
            raise ConfigError(f"attention.bits={bits} must lie between 1 and 8")
        if hashes < bits or hashes % bits:
            raise ConfigError(f"attention.hashes={hashes} must be a multiple of attention.bits={bits}")
        super().__init__(dim, num_heads, **common)
        self.groups, self.bits, self.l2_norm = hashes // bits, bits, l2_norm
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("planes", torch.randn(num_heads, self.head_dim, hashes, generator=draw))

    def signatures(self, x: Tensor) -> Tensor:
        """Signature of each group, [B, H, N, D] -> int64 [B, H, N, G], values 0 .. 2**bits - 1."""
        signs = (x.detach() @ self.planes.to(x.dtype) > 0).unflatten(-1, (self.groups, self.bits))
        powers = 2 ** torch.arange(self.bits, device=x.device)
        return (signs * powers).sum(-1)

    def table(self, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """What a user's history is reduced to.

        Args:
            k: Keys, [B, H, M, D].
            v: Values, [B, H, M, E].
            key_mask: Keys that count, bool [B, M].

        Returns:
            Sum of the values in each bucket, [B, H, G, 2**bits, E]. Tables of disjoint sets of keys add up.
        """
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
        batch, heads, m, width = v.shape
        buckets = 2**self.bits
        codes = self.signatures(k).flatten(0, 1)  # [BH, M, G]
        row = torch.arange(batch * heads, device=v.device)[:, None] * buckets
        flat = v.reshape(-1, width)
        sums = [
            flat.new_zeros(batch * heads * buckets, width).index_add(0, (row + codes[..., g]).flatten(), flat)
            for g in range(self.groups)
        ]
        return torch.stack(sums, 1).view(batch, heads, buckets, self.groups, width).transpose(2, 3)

    def read(self, q: Tensor, table: Tensor) -> Tensor:
        """Look the queries up, [B, H, N, D] and [B, H, G, 2**bits, E] -> [B, H, N, E]."""
        codes = self.signatures(q).transpose(2, 3)[..., None]  # [B, H, G, N, 1]
        found = table.gather(3, codes.expand(*codes.shape[:-1], table.shape[-1]))
        return self._pool(found, 2) + 0.0 * q[..., :1]  # queries take part in the graph, with zero gradient

    def _pool(self, found: Tensor, groups_axis: int) -> Tensor:
        if self.l2_norm:
            found = found * (found.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
        return found.mean(groups_axis)

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
        if not self.causal:
            return self.read(q, self.table(k, v, key_mask))
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
        batch, heads, n, m = *q.shape[:3], k.shape[2]
        visible = visible_keys(n, m, positions, q.device)
        code_q, code_k = self.signatures(q), self.signatures(k)
        rows = max(1, BLOCK_ELEMENTS // max(1, batch * heads * m))
        blocks = []
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            found = [
                ((code_q[:, :, part, None, g] == code_k[:, :, None, :, g]) & visible[..., part, :]).to(
                    v.dtype
                )
                @ v
                for g in range(self.groups)
            ]
            blocks.append(self._pool(torch.stack(found, 2), 2))
        return torch.cat(blocks, 2) + 0.0 * q[..., :1]

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        state = super().init_state(batch_size, **inputs)
        return {"table": self.table(state["k"], state["v"], state.get("key_mask"))}

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        table = state["table"]
        if self.pattern is Pattern.CROSS:
            q = split_heads(self.q(x_t), self.num_heads)
        else:
            q, k, v = self.project(x_t, x_t, x_t)
            table = table + self.table(k, v)
        return self.output(self.read(q, table), x_t), {"table": table}

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        hashes, e = self.groups * self.bits, self.value_head_dim
        hashing = 2 * (n + m) * self.head_dim * hashes
        if self.causal:
            adding = 2 * self.groups * n * m * e
        else:
            adding = self.groups * (m + 4 * n) * e
        numbers = (n + m) * (self.head_dim + self.groups) + self.groups * (m + 2 * n) * e
        return float(self.num_heads * (hashing + adding)), 4.0 * self.num_heads * numbers

    def state_size(self, m: int) -> int:
        return self.num_heads * self.groups * 2**self.bits * self.value_head_dim

    def expected_weight(self, cosine: Tensor) -> Tensor:
        """Probability that a key at this cosine to the query shares a signature, any shape."""
        return (1 - torch.arccos(cosine.clamp(-1, 1)) / math.pi) ** self.bits
