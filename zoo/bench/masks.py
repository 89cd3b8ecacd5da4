"""Kinds of masks, ours beside SDPA with the dense mask: `python -m zoo bench masks`, after LongCA-bench (arXiv:2510.17896).

Forward and backward, time and memory, at B 1, H 4, D 64, float32. SDPA with its own causal flag stands beside where it has one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import block_sparse, selected, softmax
from zoo.bench.growth import BOTH, Contestant, Growth, climb
from zoo.bench.timing import Timing, row

HEADS, WIDTH = 4, 64
LENGTHS = [512, 1024, 2048, 4096, 8192]
WINDOW, LEADING, BLOCK, CHOSEN = 256, 16, 64, 8
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
Kind = Callable[[int, torch.device], tuple[Operation, Tensor]]  # -> ours, and the mask, bool [N, N]


def _dense(visible: Callable[[Tensor, Tensor], Tensor], tokens: int, device: torch.device) -> Tensor:
    place = torch.arange(tokens, device=device)
    return visible(place[:, None], place[None, :]).expand(tokens, tokens).contiguous()


def full(tokens: int, device: torch.device) -> tuple[Operation, Tensor]:
    """Every key."""
    return softmax.attention, torch.ones(tokens, tokens, dtype=torch.bool, device=device)


def causal(tokens: int, device: torch.device) -> tuple[Operation, Tensor]:
    """Keys up to the query."""
    return lambda q, k, v: softmax.attention(q, k, v, causal=True), _dense(
        lambda i, j: j <= i, tokens, device
    )


def _rule(rule: Any, device: torch.device) -> tuple[Operation, Tensor]:
    return lambda q, k, v: block_sparse.attention(q, k, v, rule), block_sparse.dense_mask(rule, device)


def documents(tokens: int, device: torch.device, *, causal: bool = False) -> tuple[Operation, Tensor]:
    """Keys of the same document; about eight documents of unlike lengths."""
    draw = torch.Generator().manual_seed(0)
    borders = torch.sort(torch.randperm(tokens - 1, generator=draw)[:7] + 1).values
    ids = torch.bucketize(torch.arange(tokens), borders, right=True)
    return _rule(block_sparse.Segments(tuple(ids.tolist()), causal), device)


def causal_documents(tokens: int, device: torch.device) -> tuple[Operation, Tensor]:
    """Keys of the same document up to the query."""
    return documents(tokens, device, causal=True)


def sliding_window(tokens: int, device: torch.device) -> tuple[Operation, Tensor]:
    """Keys at most 256 before or after the query."""
    ours = lambda q, k, v: softmax.attention(q, k, v, window=WINDOW)
    return ours, _dense(lambda i, j: (i - j).abs() <= WINDOW, tokens, device)


def prefix_lm(tokens: int, device: torch.device) -> tuple[Operation, Tensor]:
    """A quarter of the tokens seen by all, causal behind it."""
    return _rule(block_sparse.PrefixLM(tokens, tokens // 4), device)


def global_window(tokens: int, device: torch.device) -> tuple[Operation, Tensor]:
    """A window of 256 to either side; the first 16 tokens see all and are seen by all."""
    return _rule(block_sparse.GlobalWindow(tokens, WINDOW, LEADING), device)


def block_sparse_random(tokens: int, device: torch.device) -> tuple[Operation, Tensor]:
    """For each block of 64 queries its own block and 7 random ones."""
    count = tokens // BLOCK
    draw = torch.Generator().manual_seed(0)
    score = torch.rand(count, count, generator=draw).fill_diagonal_(2.0)
    blocks = score.topk(min(CHOSEN, count), -1).indices.sort(-1).values.to(device)  # [blocks, S]
    index = blocks.repeat_interleave(BLOCK, 0).expand(1, HEADS, tokens, -1).contiguous()
    chosen = torch.zeros(count, count, dtype=torch.bool, device=device).scatter_(1, blocks, True)
    mask = chosen.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return lambda q, k, v: selected.attention(q, k, v, index, block_size=BLOCK), mask


KINDS: dict[str, Kind] = {
    "full": full,
    "causal": causal,
    "document": documents,
    "causal document": causal_documents,
    "sliding window": sliding_window,
    "prefix-LM": prefix_lm,
    "global+window": global_window,
    "block-sparse": block_sparse_random,
}
FLAGS = {"full": {}, "causal": {"is_causal": True}}  # what SDPA has without a mask


def operations(kind: str, tokens: int, device: torch.device) -> tuple[dict[str, Operation], float]:
    """Ours and the peers for one kind of mask, and the share of pairs that it leaves visible."""
    ours, mask = KINDS[kind](tokens, device)
    found = {
        "zoo": ours,
        "torch.SDPA dense mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    if kind in FLAGS:
        found["torch.SDPA"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **FLAGS[kind])
    return found, float(mask.float().mean())


def measure(
    kinds: list[str] | None, lengths: list[int], *, rounds: int, budget_s: float = 40.0
) -> tuple[dict[str, dict[str, Growth]], dict[tuple[str, int], float]]:
    """Growth by kind (of `KINDS`; all when left out) and provider, and the share of visible pairs by kind and length."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shares: dict[tuple[str, int], float] = {}
    found = {}
    for kind in kinds or KINDS:

        def build(tokens: int, kind: str = kind) -> dict[str, Contestant]:
            torch.manual_seed(0)
            tensors = [
                torch.randn(1, HEADS, tokens, WIDTH, device=device, requires_grad=True) for _ in range(3)
            ]
            calls, shares[kind, tokens] = operations(kind, tokens, device)
            return {name: Contestant(lambda op=op: op(*tensors), tensors) for name, op in calls.items()}

        found[kind] = climb(build, lengths, ("forward", "backward"), rounds=rounds, budget_s=budget_s)
    return found, shares


def show(found: dict[str, dict[str, Growth]], shares: dict[tuple[str, int], float]) -> None:
    """One line a kind, provider and length."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "mask",
        "tokens",
        "visible",
        "provider",
        "forward ms",
        "backward ms",
        "MiB",
        "time of dense SDPA / its own",
    )
    for kind, by in found.items():
        dense = by["torch.SDPA dense mask"]
        for (_, n), share in ((key, s) for key, s in shares.items() if key[0] == kind):
            for name, growth in by.items():
                if n not in growth.memory:
                    continue
                ahead, back = (growth.times[m][n].p50 for m in ("forward", "backward"))
                times = [dense.times[m][n].p50 for m in ("forward", "backward") if n in dense.memory]
                ratio = f"{sum(times) / (ahead + back):.2f}" if times else "-"
                table.add_row(
                    kind,
                    str(n),
                    f"{share:.1%}",
                    name,
                    f"{ahead:.2f}",
                    f"{back:.2f}",
                    f"{growth.memory[n]:.0f}",
                    ratio,
                )
    out = Console()
    (out if out.is_terminal else Console(width=140)).print(table)
    print(f"B 1, H {HEADS}, D {WIDTH}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")


def rows(found: dict[str, dict[str, Growth]], shares: dict[tuple[str, int], float]) -> list[dict[str, Any]]:
    """The long csv."""
    lines = []
    for kind, by in found.items():
        shape = lambda n, kind=kind: f"{kind} 1x{HEADS}x{n}x{WIDTH}"
        for name, growth in by.items():
            lines += growth.rows("masks", name, shape)
        for (own, n), share in shares.items():
            if own == kind:
                lines.append(
                    row(
                        "masks", "mask", BOTH, shape(n), Timing([share]), metric="visible pairs", unit="share"
                    )
                )
    return lines


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The command."""
    found = measure(args.only, args.lengths or LENGTHS, rounds=args.rounds)
    show(*found)
    return rows(*found)
