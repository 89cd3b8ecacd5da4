"""Native sparse attention (NSA).

Paper: Native Sparse Attention, arXiv:2502.11089. No official code; independent forms exist in flash-linear-attention and
lucidrains/native-sparse-attention-pytorch. With l, d the size and stride of compression blocks, l' the size of selection blocks:
``kc_i = phi([k_{id} + pe_0 .. k_{id+l-1} + pe_{l-1}])``, ``o_cmp = softmax(q kc^T) vc``;
``p_slc[j] = sum_i p_cmp[i] overlap(i, j) / d`` summed over the heads of a group, ``o_slc`` = softmax over the raw tokens of the
n best blocks (forced blocks first), ``o_win`` = softmax over a window; ``o = sum_c sigmoid(W_c x)_c o_c``. Each branch has keys and
values of its own. The choice of blocks carries no gradient.
Non-causal self-attention, which the paper lacks and TabNSA (arXiv:2503.09850) uses: every compressed block is visible, the window lies
around the query, the last partial block is kept with its padding zeroed, and the query's own block (with neighbours on either side,
`local_blocks` in all) is forced. Across two sequences tokens have no common place: no window and no forced block in "cross"; both in
"causal_cross", where `positions` give the place.
Differs from the paper in: sizes for tens of tokens instead of thousands by default; phi's hidden layer (2 D, GELU; unstated in the
paper) is shared by the heads; gates start at one over the number of branches; no rotary positions (models of this zoo bring their own).
A key bias or pair bias has no meaning on compressed blocks and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels import selected
from kernels import softmax as kernel
from zoo.attention.base import Attention, BiasFactors, Grid, Pattern, State, append, split_heads
from zoo.attention.registry import register_attention
from zoo.errors import ConfigError


@register_attention(
    patterns={"self", "causal_self", "cross", "causal_cross"},
    order_sensitive=True,
    smooth=False,
    streaming=True,
)
class NsaAttention(Attention):
    """Compressed, selected and windowed attention, gated.

    Args:
        num_kv_heads: Key/value heads, a divisor of num_heads; None for as many as query heads. A group shares its choice.
        compress_block: Tokens l of a compression block.
        compress_stride: Distance d of compression blocks; divides `compress_block` and `select_block`.
        compress: "mlp" (paper) or "mean" (mean of the block, no parameters).
        compress_hidden: Width of the MLP's hidden layer; None for twice the head width.
        select_block: Tokens l' of a selection block.
        num_selected: Blocks n that a query reads.
        initial_blocks: First blocks always read; causal patterns only.
        local_blocks: Blocks about the query always read (causal: own and previous ones); not in "cross".
        window: Tokens of the sliding window w.
        shared_kv: One key and value for all branches instead of one for each.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        compress_block: int = 8,
        compress_stride: int = 4,
        compress: str = "mlp",
        compress_hidden: int | None = None,
        select_block: int = 8,
        num_selected: int = 4,
        initial_blocks: int = 1,
        local_blocks: int = 1,
        window: int = 16,
        shared_kv: bool = False,
        **common: Any,
    ) -> None:
        groups = num_kv_heads or num_heads
        if groups < 1 or num_heads % groups:
            raise ConfigError(
                f"attention.num_kv_heads={num_kv_heads} must divide the {num_heads} query heads"
            )
        self._check_sizes(compress_block, compress_stride, select_block, num_selected, window)
        if compress not in ("mlp", "mean"):
            raise ConfigError(f"attention.compress={compress!r} is unknown; choose from mlp, mean")
        self.branches = 2 if Pattern(common["pattern"]) is Pattern.CROSS else 3
        super().__init__(dim, num_heads, kv_heads=groups * (1 if shared_kv else self.branches), **common)
        forced = 0 if self.pattern is Pattern.CROSS else local_blocks + (initial_blocks if self.causal else 0)
        if min(initial_blocks, local_blocks) < 0 or forced > num_selected:
            raise ConfigError(
                f"attention.num_selected={num_selected} must hold the {forced} forced blocks "
                f"(initial_blocks={initial_blocks}, local_blocks={local_blocks})"
            )
        self.groups, self.shared_kv, self.window = groups, shared_kv, window
        self.block, self.stride = compress_block, compress_stride
        self.select_block, self.num_selected = select_block, num_selected
        self.initial_blocks, self.local_blocks = initial_blocks, local_blocks
        self.compress_k = Compress(compress, compress_block, self.head_dim, compress_hidden)
        self.compress_v = Compress(compress, compress_block, self.value_head_dim, compress_hidden)
        self.gate = nn.Linear(dim, self.branches * num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        share = torch.tensor(1 / self.branches)
        nn.init.constant_(self.gate.bias, float(share.logit()))

    @staticmethod
    def _check_sizes(block: int, stride: int, select: int, count: int, window: int) -> None:
        if min(block, stride, select, count, window) < 1:
            raise ConfigError(
                "attention.nsa: block sizes, stride, num_selected and window must be at least 1"
            )
        if block % stride or select % stride:
            raise ConfigError(
                f"attention.compress_stride={stride} must divide compress_block={block} and select_block={select}"
            )

    # ---------------------------------------------------------------- branches

    def _split(self, t: Tensor) -> tuple[Tensor, ...]:
        """Keys or values of each branch: compressed, selected[, window]."""
        return (t,) * self.branches if self.shared_kv else t.chunk(self.branches, 1)

    def _count(self, m: int) -> int:
        """Compressed blocks of m tokens."""
        rest = m - self.block
        return max(0, rest // self.stride + 1) if self.causal else 1 + max(0, -(-rest // self.stride))

    def _compress(
        self, k: Tensor, v: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compressed keys and values [B, Hk, Nc, D], and which of them exist, bool [B, Nc] or None for all.

        In causal patterns a block counts once it is complete. Otherwise the tail forms a partial block, and a block exists if it holds
        a kept token that the block before it lacks: every kept token is covered, and padding equals deletion.
        """
        m, l, d = k.shape[2], self.block, self.stride
        count = self._count(m)
        end = (count - 1) * d + l
        if count == 0 or m == 0:
            return k[:, :, :0], v[:, :, :0], None
        mask = key_mask
        if mask is None and end > m:
            mask = torch.ones(k.shape[0], m, dtype=torch.bool, device=k.device)
        if mask is not None:
            mask = nn.functional.pad(mask[:, :end], (0, max(0, end - m)))
        k, v = (nn.functional.pad(t[:, :, :end], (0, 0, 0, max(0, end - m))) for t in (k, v))
        blocks = None if mask is None else mask.unfold(1, l, d)  # [B, Nc, l]
        kc, vc = self.compress_k(k, d, blocks), self.compress_v(v, d, blocks)
        if key_mask is None:
            return kc, vc, None
        if self.causal:
            return kc, vc, blocks.any(-1)
        return kc, vc, torch.cat((blocks[:, :1].any(-1), blocks[:, 1:, l - d :].any(-1)), 1)

    def _choose(
        self,
        q: Tensor,
        kc: Tensor,
        m: int,
        cmp_mask: Tensor | None,
        key_mask: Tensor | None,
        pos: Tensor | None,
    ) -> Tensor:
        """Blocks that each query reads, [B, Hk, N, n]. `pos` [B|1, N] is the last visible key in causal patterns."""
        size, nb, dev = self.select_block, -(-m // self.select_block), q.device
        n = q.shape[2]
        if nb <= self.num_selected and not self.causal:  # everything is read: nothing to score
            return torch.arange(nb, device=dev).expand(q.shape[0], self.groups, n, nb)
        visible = None if cmp_mask is None else cmp_mask[:, None, None]
        starts = torch.arange(nb, device=dev)
        valid = forced = None
        if key_mask is not None:
            padded = nn.functional.pad(key_mask, (0, nb * size - m))
            valid = padded.unflatten(1, (nb, size)).any(-1)[:, None, None]
        if self.causal:
            ends = torch.arange(kc.shape[2], device=dev) * self.stride + self.block - 1
            seen = ends <= pos[:, None, :, None]
            visible = seen if visible is None else visible & seen
            own = pos[:, None, :, None].div(size, rounding_mode="floor")
            begun = starts <= own
            valid = begun if valid is None else valid & begun
            forced = (starts < self.initial_blocks) | ((starts > own - self.local_blocks) & begun)
        elif self.pattern is Pattern.SELF and self.local_blocks:
            own = (torch.arange(n, device=dev) // size)[:, None]
            left, right = self.local_blocks // 2, (self.local_blocks - 1) // 2
            forced = (starts >= own - left) & (starts <= own + right)
        stencil = selected.overlap_stencil(kc.shape[2], nb, self.block, self.stride, size, dev)
        scores = selected.block_scores(q, kc, stencil, visible=visible)
        return selected.select_blocks(scores, self.num_selected, forced=forced, valid=valid)

    def _read(
        self,
        q: Tensor,
        compressed: tuple[Tensor, Tensor, Tensor | None],
        raw: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        pos: Tensor | None,
    ) -> list[Tensor]:
        """The compressed and the selected branch."""
        kc, vc, cmp_mask = compressed
        order = {"higher_order": self.higher_order}
        span: dict[str, Any] = {}
        if self.causal:
            ends = torch.arange(kc.shape[2], device=q.device) * self.stride + self.block - 1
            span = {"causal": True, "positions": (pos, ends)}
        o_cmp = kernel.attention(q, kc, vc, key_mask=cmp_mask, **span, **order)
        index = self._choose(q, kc, raw[0].shape[2], cmp_mask, key_mask, pos)
        o_slc = selected.attention(
            q, *raw, index, block_size=self.select_block, key_mask=key_mask,
            causal=self.causal, positions=pos, **order,
        )  # fmt: skip
        return [o_cmp, o_slc]

    def _positions(self, n: int, m: int, positions: Tensor | None, device: torch.device) -> Tensor | None:
        if not self.causal:
            return None
        if positions is None:
            return torch.arange(n, device=device)[None] + (m - n)
        return positions if positions.dim() == 2 else positions[None]

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
        gates: Tensor | None = None,
    ) -> Tensor:
        """`gates` [B, H, N, branches] weigh the branches; left out, each counts the same."""
        ks, vs = self._split(k), self._split(v)
        pos = self._positions(q.shape[2], k.shape[2], positions, q.device)
        compressed = self._compress(ks[0], vs[0], key_mask)
        outs = self._read(q, compressed, (ks[1], vs[1]), key_mask, pos)
        if self.branches == 3:
            w = self.window
            span = {"causal": True, "positions": pos, "window": (w - 1, 0)}
            if not self.causal:
                span = {"window": (w // 2, (w - 1) // 2)}
            outs.append(
                kernel.attention(q, ks[2], vs[2], key_mask=key_mask, higher_order=self.higher_order, **span)
            )
        return _weigh(outs, gates)

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        q, k, v = self.project(x, context, value)
        return self.attend(q, k, v, gates=self._gates(x), **call)

    def _gates(self, x: Tensor) -> Tensor:
        return split_heads(self.gate(x), self.num_heads).sigmoid()

    # ---------------------------------------------------------------- decoding

    def init_state(self, batch_size: int, **inputs: Any) -> State:
        state = super().init_state(batch_size, **inputs)
        ks, vs = self._split(state["k"]), self._split(state["v"])
        if self.pattern is Pattern.CROSS:
            kc, vc, cmp_mask = self._compress(ks[0], vs[0], state["key_mask"])
            return {
                "kc": kc,
                "vc": vc,
                "cmp_mask": cmp_mask,
                "k": ks[1],
                "v": vs[1],
                "key_mask": state["key_mask"],
            }
        names = ("kc", "vc", "k", "v", "k_win", "v_win", "k_recent", "v_recent")
        return {name: (ks if name[0] == "k" else vs)[0] for name in names} | {"length": 0, "blocks": 0}

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        gates = self._gates(x_t)
        if self.pattern is Pattern.CROSS:
            q = split_heads(self.q(x_t), self.num_heads)
            compressed = (state["kc"], state["vc"], state["cmp_mask"])
            outs = self._read(q, compressed, (state["k"], state["v"]), state["key_mask"], None)
            return self.output(_weigh(outs, gates), x_t), state
        q, k_t, v_t = self.project(x_t, x_t, x_t)
        ks, vs = self._split(k_t), self._split(v_t)
        new = dict(state, length=state["length"] + 1)
        length = new["length"]
        for name, parts, cache in (("k", ks, state["k"]), ("v", vs, state["v"])):
            new[name] = append(cache, parts[1], length)
            new[f"{name}_win"] = torch.cat((state[f"{name}_win"], parts[2]), 2)[:, :, -self.window :]
            new[f"{name}_recent"] = torch.cat((state[f"{name}_recent"], parts[0]), 2)[:, :, -self.block :]
        if length >= self.block and (length - self.block) % self.stride == 0:
            new["blocks"] += 1
            kc, vc, _ = self._compress(new["k_recent"], new["v_recent"], None)
            new["kc"], new["vc"] = (
                append(state["kc"], kc, new["blocks"]), append(state["vc"], vc, new["blocks"])
            )  # fmt: skip
        pos = torch.full((1, 1), length - 1, device=q.device)
        blocks = new["blocks"]
        outs = self._read(
            q,
            (new["kc"][:, :, :blocks], new["vc"][:, :, :blocks], None),
            (new["k"][:, :, :length], new["v"][:, :, :length]),
            None,
            pos,
        )
        outs.append(kernel.attention(q, new["k_win"], new["v_win"]))
        return self.output(_weigh(outs, gates), x_t), new

    def state_size(self, m: int) -> int:
        if self.pattern is Pattern.CROSS:
            tokens = m + 1 + max(0, -(-(m - self.block) // self.stride))
        else:
            tokens = m + max(0, (m - self.block) // self.stride + 1)
            tokens += min(m, self.window) + min(m, self.block)
        return tokens * self.groups * (self.head_dim + self.value_head_dim)

    def linear_rows(self, child: str, n: int, m: int) -> int:
        return (
            self.groups * self._count(m) if child.startswith("compress") else super().linear_rows(child, n, m)
        )

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        d, e, h, blocks = self.head_dim, self.value_head_dim, self.num_heads, self._count(m)
        keys = min(m, self.num_selected * self.select_block)
        keys += min(m, self.window) if self.branches == 3 else 0
        share = 0.5 if self.causal else 1.0
        # The scores of the compressed blocks are computed twice: for the branch and for the choice.
        flops = 2.0 * h * n * (keys * (d + e) + share * blocks * (2 * d + e))
        flops += self.groups * blocks * (self.compress_k.flops() + self.compress_v.flops())
        moved = 4.0 * (h * n * (d + e) + self.branches * self.groups * m * (d + e))
        return flops, moved


def _weigh(outs: list[Tensor], gates: Tensor | None) -> Tensor:
    if gates is None:
        return sum(outs) / len(outs)
    return sum(out * gate.unsqueeze(-1) for out, gate in zip(outs, gates.unbind(-1), strict=True))


class Compress(nn.Module):
    """Blocks of tokens to one vector each, shared by the heads: MLP over the concatenated block, or mean."""

    def __init__(self, kind: str, block: int, width: int, hidden: int | None) -> None:
        super().__init__()
        self.kind, self.block, self.width = kind, block, width
        self.hidden = hidden or 2 * width
        if kind == "mlp":
            self.place = nn.Parameter(torch.zeros(block, width))
            self.up = nn.Linear(block * width, self.hidden)
            self.down = nn.Linear(self.hidden, width)
            nn.init.trunc_normal_(self.place, std=0.02)

    def forward(self, x: Tensor, stride: int, keep: Tensor | None) -> Tensor:
        """[B, Hk, M, D] -> [B, Hk, Nc, D]; `keep` bool [B, Nc, block] leaves tokens out."""
        x = x.unfold(2, self.block, stride).transpose(-1, -2)  # [B, Hk, Nc, block, D]
        if self.kind == "mlp":
            x = x + self.place
        if keep is not None:
            x = x.masked_fill(~keep[:, None, :, :, None], 0.0)
        if self.kind == "mean":
            if keep is None:
                return x.mean(-2)
            return x.sum(-2) / keep.sum(-1).clamp(min=1)[:, None, :, None].to(x.dtype)
        return self.down(nn.functional.gelu(self.up(x.flatten(-2))))

    def flops(self) -> float:
        """Of one block, linear layers left out."""
        return float(self.block * self.width) if self.kind == "mean" else 0.0
