"""Words of the attention contract: patterns, grids, biases, capabilities, costs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor

from zoo.errors import unknown

State = dict[str, Any]
"""What a variant carries while decoding: tensors with the batch first, and plain numbers."""


class Pattern(StrEnum):
    """Who may look at whom. In causal patterns query i sees the keys up to `positions[i]`."""

    SELF = "self"
    CAUSAL_SELF = "causal_self"
    CROSS = "cross"
    CAUSAL_CROSS = "causal_cross"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise unknown("attention pattern", str(value), [p.value for p in cls])

    @property
    def causal(self) -> bool:
        return self in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS)

    @property
    def cross(self) -> bool:
        return self in (Pattern.CROSS, Pattern.CAUSAL_CROSS)


class Grid(NamedTuple):
    """Where tokens lie: `prefix` tokens without a place (class token, registers), then `shape` in row-major order."""

    shape: tuple[int, ...]
    prefix: int = 0

    @property
    def tokens(self) -> int:
        n = self.prefix
        size = 1
        for s in self.shape:
            size *= s
        return n + size


class BiasFactors(NamedTuple):
    """A low-rank score bias: bias[b, h, n, m] = query[b, h, n] . key[b, h, m].

    `query` is broadcastable to [B, H, N, R], `key` to [B, H, M, R].
    """

    query: Tensor
    key: Tensor

    def dense(self) -> Tensor:
        return self.query @ self.key.transpose(-2, -1)


BIAS_KINDS = (None, "key", "factors", "full")
"""Each takes what stands before it, too."""


@dataclass(frozen=True)
class Capabilities:
    """What a variant defines. The contract tests prove every line.

    Attributes:
        patterns: Patterns that the mechanism defines.
        strict_causal: In causal patterns an output is unchanged by any edit to later tokens. False for rules that
            only zero the weight of later tokens.
        key_mask: `key_mask` is honoured.
        bias: "full" takes any bias (and factors), "factors" low-rank factors and per-key bias, "key" per-key bias
            [B|1, H|1, 1, M], None none.
        grid_dims: Numbers of grid axes understood, e.g. (1, 2); empty when the grid is ignored.
        needs_grid: A grid must be given.
        fixed_length: `length` must be given and inputs have exactly that many tokens.
        order_sensitive: The mechanism needs an order of the keys and is refused on sets.
        order_free: Patterns in which an order-sensitive mechanism treats the keys as a set after all.
        smooth: The output is a smooth function of the inputs (no top-k, hash or rounding).
        double_backward: Second derivatives are right when built with `higher_order=True`.
        streaming: `init_state` and `step` are defined for causal_self, and cross where that pattern is defined.
        has_map: `attention_map` returns the implied mixing matrix.
        signed_map: Entries of that matrix may be negative.
        has_scores: `scores` returns the scores before normalisation.
        note: Where options take something away (`Attention.capabilities_with`): which, and which do not.
    """

    patterns: frozenset[Pattern]
    strict_causal: bool = True
    key_mask: bool = True
    bias: str | None = None
    grid_dims: tuple[int, ...] = ()
    needs_grid: bool = False
    fixed_length: bool = False
    order_sensitive: bool = False
    order_free: frozenset[str] = frozenset()
    smooth: bool = True
    double_backward: bool = True
    streaming: bool = False
    has_map: bool = False
    signed_map: bool = False
    has_scores: bool = False
    note: str = ""

    def takes_bias(self, kind: str | None) -> bool:
        """Whether a bias of this kind ("key", "factors", "full"; None: no bias) is taken."""
        return BIAS_KINDS.index(kind) <= BIAS_KINDS.index(self.bias)

    def needs_order(self, pattern: Pattern) -> bool:
        """Whether the mechanism is refused on sets in this pattern."""
        return self.order_sensitive and pattern not in self.order_free


@dataclass(frozen=True)
class Cost:
    """Analytic cost of one forward pass of one sample.

    Attributes:
        flops: Floating point operations; a multiply-add counts two.
        bytes: Bytes read and written by the mixing at 4 bytes a number, projections left out.
        parameters: Trainable numbers of the module.
        state_size: Numbers kept per sample to decode the next token after M tokens.
    """

    flops: float
    bytes: float
    parameters: int
    state_size: int
