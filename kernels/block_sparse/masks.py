"""Which key tokens a query token may see, by their places. Each rule is hashable, so that its block lists are built once.

Tokens are numbered from 0, `prefix` tokens without a place first, then the grid in row-major order. `visible(i, j)` takes integer
tensors that broadcast against each other; `code()` is the rule as integers, for kernels and registered operators, and `decode` its inverse.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _coordinates(token: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    out = []
    for size in reversed(shape):
        out.append(token % size)
        token = token.div(size, rounding_mode="floor")
    return out[::-1]


def axis_visible(
    p: Tensor, j: Tensor, length: int | Tensor, window: int | Tensor, dilation: int, stride: int, causal: bool
) -> Tensor:
    """The neighbourhood rule on one axis: query place ``p``, key place ``j``, both in [0, length).

    Tokens fall into ``dilation`` groups of every d-th place. Not causal: the window of ``window`` keys is centred on the query's leader
    (an even one has one more key on the left) and shifted inwards at the ends, never cut. Causal: the last ``window`` keys up to the
    query, cut at the start. ``stride`` s makes s neighbouring queries share a leader; s = window gives separate windows.
    """
    group = p % dilation
    own, key = p.div(dilation, rounding_mode="floor"), j.div(dilation, rounding_mode="floor")
    count = (length - group + dilation - 1).div(dilation, rounding_mode="floor")
    together = group == j % dilation
    first = own.div(stride, rounding_mode="floor") * stride
    if causal:
        leader = torch.minimum(first + stride - 1, count - 1)
        return together & (key <= own) & (leader - key < window)
    right = window - 1 - window // 2
    leader = torch.minimum(first + stride // 2, count - 1)
    low = torch.as_tensor(window // 2, device=p.device)
    centre = torch.minimum(torch.maximum(leader, low), count - 1 - right)
    return together & (key >= centre - window // 2) & (key <= centre + right)


@dataclass(frozen=True)
class Neighborhood:
    """NATTEN's rule on a grid of any number of axes; prefix tokens see all and are seen by all."""

    shape: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()
    prefix: int = 0

    def __post_init__(self) -> None:
        axes = len(self.shape)
        for name, default in (("dilation", 1), ("stride", 1), ("causal", False)):
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * axes)
        for values in (self.window, self.dilation, self.stride, self.causal):
            if len(values) != axes:
                raise ValueError(
                    f"Neighborhood: {values} needs one entry for each of the {axes} axes of {self.shape}"
                )
        for length, w, d, s in zip(self.shape, self.window, self.dilation, self.stride, strict=True):
            if w < 1 or d < 1 or w * d > length or not 1 <= s <= w:
                raise ValueError(
                    f"Neighborhood: axis of {length} tokens with window {w}, dilation {d}, stride {s}; needs window * "
                    "dilation <= length and 1 <= stride <= window"
                )

    @property
    def tokens(self) -> int:
        return self.prefix + math.prod(self.shape)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        out = torch.ones((), dtype=torch.bool, device=i.device)
        places = zip(
            _coordinates((i - self.prefix).clamp(min=0), self.shape),
            _coordinates((j - self.prefix).clamp(min=0), self.shape),
            self.shape, self.window, self.dilation, self.stride, self.causal, strict=True,
        )  # fmt: skip
        for p, k, length, w, d, s, c in places:
            out = out & axis_visible(p, k, length, w, d, s, c)
        return out | (i < self.prefix) | (j < self.prefix)

    def code(self) -> tuple[int, ...]:
        axes = zip(self.shape, self.window, self.dilation, self.stride, self.causal, strict=True)
        return 1, self.prefix, len(self.shape), *(int(value) for axis in axes for value in axis)


@dataclass(frozen=True)
class Disc:
    """Keys at a Euclidean distance below ``radius`` on a 2-D grid, cut at the border; prefix tokens see all and are seen by all."""

    shape: tuple[int, int]
    radius: float
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + math.prod(self.shape)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        a = _coordinates((i - self.prefix).clamp(min=0), self.shape)
        b = _coordinates((j - self.prefix).clamp(min=0), self.shape)
        near = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < self.radius**2
        return near | (i < self.prefix) | (j < self.prefix)

    def code(self) -> tuple[int, ...]:
        """Squared distances are integers: the largest one allowed stands for the radius."""
        return 2, self.prefix, self.shape[1], math.ceil(self.radius**2) - 1, self.shape[0]


@dataclass(frozen=True)
class Segments:
    """Tokens of the same document; ``ids`` has one number per token. With ``causal`` only earlier ones."""

    ids: tuple[int, ...]
    causal: bool = False

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        ids = torch.tensor(self.ids, device=i.device)
        same = ids[i] == ids[j]
        return same & (j <= i) if self.causal else same

    def code(self) -> tuple[int, ...]:
        return 3, int(self.causal), *self.ids


@dataclass(frozen=True)
class PrefixLM:
    """Causal, but the first ``prefix`` tokens are seen by all."""

    tokens: int
    prefix: int

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) | (j < self.prefix)

    def code(self) -> tuple[int, ...]:
        return 4, self.prefix, self.tokens


@dataclass(frozen=True)
class GlobalWindow:
    """Keys at most ``window`` away; the first ``leading`` tokens see all and are seen by all."""

    tokens: int
    window: int
    leading: int = 0

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() <= self.window) | (i < self.leading) | (j < self.leading)

    def code(self) -> tuple[int, ...]:
        return 5, self.window, self.leading, self.tokens


Mask = Neighborhood | Disc | Segments | PrefixLM | GlobalWindow


def decode(code: tuple[int, ...]) -> Mask:
    """The rule that has this code."""
    kind, *rest = code
    if kind == 1:
        prefix, _, *axes = rest
        shape, window, dilation, stride, causal = (tuple(axes[at::5]) for at in range(5))
        return Neighborhood(shape, window, dilation, stride, tuple(bool(c) for c in causal), prefix)
    if kind == 2:
        prefix, columns, largest, rows = rest
        return Disc((rows, columns), math.sqrt(largest + 0.5), prefix)
    if kind == 3:
        return Segments(tuple(rest[1:]), bool(rest[0]))
    return PrefixLM(rest[1], rest[0]) if kind == 4 else GlobalWindow(rest[2], rest[0], rest[1])
