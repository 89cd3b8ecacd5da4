"""A small causal language model for recall tests.

Paper: the two-layer models of "Zoology", arXiv:2312.04927: token and position embedding, a short causal convolution, blocks, a final
norm, scores over the vocabulary. The convolution lets a token know its predecessor, so that what is compared is the recall itself, not
how fast each mechanism learns to look one token back (some variants bring such a convolution along, softmax does not).
Differs from the paper in: pre-norm blocks with an MLP; one depthwise convolution for all blocks instead of layers that alternate with
attention; scores are computed at the places that are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.local import depthwise_sequence
from zoo.attention.base import Pattern, State
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.blocks import TransformerBlock
from zoo.models.registry import register_model


@register_model
class RecallLm(nn.Module):
    """Embedding, short convolution, causal blocks, norm, linear scores.

    Args:
        attention: Factory for slot "encoder".
        vocabulary: Tokens.
        max_length: Longest sequence L.
        dim: Width C.
        depth: Number of blocks.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        short_conv: Taps of a causal depthwise convolution behind the embedding, with a residual; 0 for none.
        position: "learned" adds a table of places, "none" nothing.
        tied: Scores use the embedding's table.
        dropout: In the blocks.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        vocabulary: int = 256,
        max_length: int = 64,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 1,
        mlp_ratio: float = 2.0,
        short_conv: int = 3,
        position: str = "learned",
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if vocabulary < 1 or max_length < 1 or depth < 1:
            raise ConfigError(
                f"model.vocabulary={vocabulary}, max_length={max_length} and depth={depth} must be at least 1"
            )
        if short_conv < 0:
            raise ConfigError(f"model.short_conv={short_conv} must be 0 (none) or a number of taps")
        if position not in ("learned", "none"):
            raise ConfigError(f"model.position={position!r} is unknown; choose learned or none")
        self.max_length = max_length
        self.tokens = nn.Embedding(vocabulary, dim)
        self.places = nn.Embedding(max_length, dim) if position == "learned" else None
        self.taps = nn.Parameter(torch.empty(dim, 1, short_conv)) if short_conv else None
        self.blocks = nn.ModuleList(
            TransformerBlock(
                attention["encoder"], dim, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, length=max_length
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.reset_parameters()
        if tied:
            self.head.weight = self.tokens.weight

    def reset_parameters(self) -> None:
        """Small tables, as language models have them."""
        for table in (self.tokens, self.places, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        if self.taps is not None:
            nn.init.uniform_(self.taps, -(self.taps.shape[-1] ** -0.5), self.taps.shape[-1] ** -0.5)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """One slot: every block looks back over the sequence."""
        return {"encoder": Slot(Pattern.CAUSAL_SELF, length_known=True)}

    def forward(self, tokens: Tensor, asked: Tensor | None = None) -> Tensor:
        """Scores of the answers.

        Args:
            tokens: int64 [B, L].
            asked: Places to answer at, bool [B, L]; all if left out.

        Returns:
            [B, L, V], or [number of places, V] in row-major order.
        """
        if tokens.shape[1] > self.max_length:
            raise ConfigError(f"{tokens.shape[1]} tokens are more than model.max_length={self.max_length}")
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        if self.taps is not None:
            x = x + depthwise_sequence(x, self.taps, causal=True)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x if asked is None else x[asked])
        return self.head(x)

    def init_state(self, batch_size: int) -> State:
        """State before the first token; streaming variants only."""
        state = {"blocks": tuple(b.init_state(batch_size) for b in self.blocks), "length": 0}
        if self.taps is not None:
            state["recent"] = self.taps.new_zeros(batch_size, self.taps.shape[-1] - 1, self.taps.shape[0])
        return state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of each sequence, int64 [B], in; scores [B, V] and the next state out."""
        x = self.tokens(tokens)[:, None]
        if self.places is not None:
            x = x + self.places.weight[state["length"]]
        after = {"length": state["length"] + 1}
        if self.taps is not None:
            window = torch.cat((state["recent"], x), 1)
            after["recent"] = window[:, 1:]
            x = x + (window * self.taps[:, 0].T).sum(1, keepdim=True)
        inner = []
        for block, before in zip(self.blocks, state["blocks"], strict=True):
            x, new = block.step(x, before)
            inner.append(new)
        return self.head(self.norm(x))[:, 0], after | {"blocks": tuple(inner)}
