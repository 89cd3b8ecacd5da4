"""The algebra of truncated Taylor polynomials: what a network's values in its coordinates are pushed forward as.

A `Jet` holds, for each multi-index a of a set closed downwards, the coefficient `D^a f / a!` as one channel of a stacked
tensor [P, *shape]; channel 0 is the value. Linear layers act on the stack in one product, nonlinear ones by the rules here;
`zoo.layers.jet_autograd` differentiates them by the weights.

Letters: P channels, N points, K tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Index = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """A sum of derivatives with constant factors, such as u_t - nu u_xx.

    Attributes:
        terms: Multi-indices and their factors.
    """

    terms: tuple[tuple[Index, float], ...]


Key = Index | Operator


def below(index: Index) -> set[Index]:
    """All multi-indices that divide this one, itself among them."""
    found: set[Index] = {()}
    for order in index:
        found = {(*b, k) for b in found for k in range(order + 1)}
    return found


class Algebra:
    """Polynomials in `dims` variables, truncated to the multi-indices below the wanted ones.

    An operator gets one channel in place of one for each of its terms where no product needs these: the differences
    dropped are an ideal, so the quotient is an algebra as well, with factors on its products. Burgers' equation then has
    three channels (u, u_x, u_t - nu u_xx) instead of four, Navier-Stokes in the plane four instead of six.

    Args:
        dims: Number of coordinates.
        wanted: Multi-indices and operators that must be there; lower ones are added.

    Attributes:
        keys: Multi-index or operator of each channel, the value first.
        number: Channel of each key.
        pairs: For each channel a, the (b, c, factor) whose products add to it, b = 0 and c = 0 excluded.
        polynomials: The algebra in which no operator is merged; itself where none is.
    """

    def __init__(self, dims: int, wanted: Iterable[Key]) -> None:
        wanted = list(wanted)
        operators = [key for key in wanted if isinstance(key, Operator)]
        plain = {key for key in wanted if not isinstance(key, Operator)}
        terms = [index for op in operators for index, _ in op.terms]
        closed = set().union({(0,) * dims}, *(below(index) for index in (*plain, *terms)))
        lower = set().union(*(below(index) - {index} for index in closed))
        merged = [
            op
            for op in operators
            if all(a not in lower and a not in plain and terms.count(a) == 1 for a, _ in op.terms)
        ]
        gone = {index for op in merged for index, _ in op.terms}
        indices = sorted(closed, key=lambda i: (sum(i), tuple(-o for o in i)))
        self.dims, self.degree = dims, max(sum(i) for i in indices)
        self.keys: list[Key] = [*(i for i in indices if i not in gone), *merged]
        self.number = {key: n for n, key in enumerate(self.keys)}
        self.size = len(self.keys)
        self.polynomials = Algebra(dims, indices) if merged else self
        self.pairs = [self._pairs(key) for key in self.keys]

    def _pairs(self, key: Key) -> list[tuple[int, int, float]]:
        if isinstance(key, Operator):
            factors: dict[tuple[int, int], float] = {}
            for index, factor in key.terms:
                for b, c, _ in self._pairs(index):
                    factors[b, c] = factors.get((b, c), 0.0) + factor * factorial(index)
            return [(b, c, factor) for (b, c), factor in factors.items() if factor]
        halves = [(b, tuple(o - p for o, p in zip(key, b, strict=True))) for b in sorted(below(key))]
        return [(self.number[b], self.number[c], 1.0) for b, c in halves if any(b) and any(c)]

    def derivative(self, c: Tensor, key: Key) -> Tensor:
        """A derivative or an operator's value from coefficients [P, ...]."""
        if key in self.number:
            found = c[self.number[key]]
            scale = 1 if isinstance(key, Operator) else factorial(key)
            return found if scale == 1 else found * scale
        return sum(self.derivative(c, index) * factor for index, factor in key.terms)

    def project(self, c: Tensor) -> Tensor:
        """Coefficients of `polynomials` to coefficients here."""
        if self.polynomials is self:
            return c
        full = self.polynomials
        rows = [
            full.derivative(c, key) if isinstance(key, Operator) else c[full.number[key]] for key in self.keys
        ]
        return torch.stack(rows)

    def represent(self, c: Tensor) -> Tensor:
        """Some coefficients of `polynomials` that project to these."""
        if self.polynomials is self:
            return c
        out = c.new_zeros(self.polynomials.size, *c.shape[1:])
        for key, row in zip(self.keys, c, strict=True):
            index, factor = key.terms[0] if isinstance(key, Operator) else (key, 1.0 / factorial(key))
            out[self.polynomials.number[index]] = row / (factor * factorial(index))
        return out

    # ------------------------------------------------------------ on stacks of channels, no autograd

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Coefficients of a * b."""
        out = a[0] * b
        for n in range(1, self.size):
            out[n].addcmul_(a[n], b[0])
            for i, j, factor in self.pairs[n]:
                out[n].addcmul_(a[i], b[j], value=factor)
        return out

    def transposed(self, g: Tensor, b: Tensor) -> Tensor:
        """Gradient of <g, a * b> in a."""
        out = g * b[0]
        for n in range(1, self.size):
            out[0].addcmul_(g[n], b[n])
            for i, j, factor in self.pairs[n]:
                out[i].addcmul_(g[n], b[j], value=factor)
        return out

    def square(self, a: Tensor, scale: float = 1.0) -> Tensor:
        """Coefficients of scale * a * a."""
        out = a * (a[0] * (2.0 * scale))
        out[0] *= 0.5
        for n in range(1, self.size):
            for i, j, factor in _unordered(self.pairs[n]):
                out[n].addcmul_(a[i], a[j], value=scale * factor)
        return out

    def powers(self, x: Tensor) -> list[tuple[int, list[tuple[int, Tensor, float]]]]:
        """For k >= 2 the channels of (x - x[0])^k that are not zero: [(k, [(index number, tensor, its factor)])]."""
        found, last = [], {n: (x[n], 1.0) for n in range(1, self.size)}
        for k in range(2, self.degree + 1):
            power: dict[int, tuple[Tensor, float]] = {}
            for n in range(1, self.size):
                for i, j, factor in _unordered(self.pairs[n]) if k == 2 else self.pairs[n]:
                    if i not in last:
                        continue
                    tensor, scale = last[i]
                    if n in power:
                        power[n][0].addcmul_(tensor, x[j], value=factor * scale / power[n][1])
                    else:
                        power[n] = tensor * x[j], factor * scale
            found.append((k, [(n, *scaled) for n, scaled in power.items()]))
            last = power
        return found

    def compose(self, values: Sequence[Tensor], x: Tensor, powers: list) -> Tensor:
        """Coefficients of g(x) from `values[k] = g^(k)(x[0]) / k!`."""
        out = torch.empty_like(x)
        out[0] = values[0]
        if self.size > 1:
            torch.mul(x[1:], values[1], out=out[1:])
        for k, channels in powers:
            for n, tensor, factor in channels:
                out[n].addcmul_(tensor, values[k], value=factor)
        return out


def _unordered(pairs: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """The pairs of a product of equal factors, each once."""
    return [(i, j, factor if i == j else 2.0 * factor) for i, j, factor in pairs if i <= j]


def factorial(index: Index) -> int:
    """a! of a multi-index a: derivative over coefficient."""
    return math.prod(map(math.factorial, index))


@lru_cache(maxsize=64)
def algebra(dims: int, wanted: tuple[Key, ...]) -> Algebra:
    """The algebra for `wanted`, made once."""
    return Algebra(dims, wanted)
