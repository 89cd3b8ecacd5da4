"""What a problem is: a box, fields, an equation, conditions, and a reference that training never sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError


class Fields(Protocol):
    """`d("u", "xx")`: derivative of a field, or one of the problem's operators, at N points, [N]; see
    `zoo.layers.derivatives.Derivatives`."""

    def __call__(self, field: str, by: str = "") -> Tensor: ...


Combination = tuple[
    tuple[float, str, str], ...
]  # sum of factor * derivative of field, e.g. ((-1.0, "s", "x"),)


def combine(d: Fields, terms: Combination) -> Tensor:
    """Value of a combination, [N]."""
    return sum(factor * d(field, by) for factor, field, by in terms)


@dataclass(frozen=True)
class Condition:
    """A condition on a part of the border, or on measured points.

    Attributes:
        name: Loss term it belongs to: "initial", "boundary" or "data".
        points: Where, [N, d] float64.
        fields: Fields that are prescribed.
        values: Their values, [N, len(fields)] float64.
        by: Derivative that is prescribed instead of the value, e.g. "t".
    """

    name: str
    points: Tensor
    fields: tuple[str, ...]
    values: Tensor
    by: str = ""


class Problem:
    """Base of all problems.

    Attributes:
        name: File stem.
        coordinates: One-letter names; time, where there is one, comes last.
        fields: What the network gives out.
        lower, upper: The box.
        derivatives: Derivatives that the residuals need, and names of operators.
        operators: Sums of derivatives by name, e.g. {"heat": ((1.0, "t"), (-nu, "xx"))}. Taylor mode carries one in place
            of its parts where no other derivative needs these.
        periods: Period per coordinate, None where there is none.
        ansatz: Form of `zoo.layers.ansatz` that fulfils all or some conditions.
        hard: Names of conditions that the ansatz fulfils.
        free_constant: Fields defined up to a constant, compared after removing their means (at each time).
        unknowns: Coefficients to find: start value and true value.
        reported: Fields that are compared with the reference, where they are not the network's own, e.g. a velocity from
            a stream function.
        quantities: Further quantities whose root mean square is reported, e.g. the divergence.
        headline: Names among `grid_metrics` that belong into a short table.
        source: Where the reference comes from.
    """

    name: ClassVar[str] = ""
    coordinates: tuple[str, ...] = ("x", "t")
    fields: tuple[str, ...] = ("u",)
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()
    derivatives: tuple[str, ...] = ()
    operators: dict[str, tuple[tuple[float, str], ...]] = {}
    periods: tuple[float | None, ...] | None = None
    ansatz: str = "none"
    ansatz_options: dict[str, Any] = {}
    hard: tuple[str, ...] = ()
    free_constant: tuple[str, ...] = ()
    unknowns: dict[str, tuple[float, float]] = {}
    reported: dict[str, Combination] = {}
    quantities: dict[str, Combination] = {}
    headline: tuple[str, ...] = ()
    source: str = ""

    def residuals(self, d: Fields, points: Tensor, unknowns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named residuals at the points, [N] each; zero for a solution."""
        raise NotImplementedError

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        """About `count` points for each condition."""
        return []

    def reference(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Test grid: points [M, d], fields [M, len(report_fields)], shape of the grid; float64."""
        raise NotImplementedError

    @property
    def report_fields(self) -> tuple[str, ...]:
        """Names of the fields that are compared with the reference."""
        return tuple(self.reported) or self.fields

    @property
    def report_derivatives(self) -> tuple[str, ...]:
        """Derivatives that the reported fields need."""
        return tuple(sorted({by for terms in self.reported.values() for _, _, by in terms if by}))

    def report(self, d: Fields) -> Tensor:
        """Fields to compare, [N, len(report_fields)]."""
        columns = [combine(d, t) for t in self.reported.values()] or [d(f) for f in self.fields]
        return torch.stack(columns, 1)

    def closed_form(self, fields: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Coefficients that follow from the reported fields [N, F] at points [N, d] without training; none by default."""
        return {}

    def grid_metrics(self, found: Tensor, true: Tensor, points: Tensor) -> dict[str, float]:
        """Further figures of the whole test grid, named; found and true [M, F], points [M, d]."""
        return {}

    def times(self, points: Tensor) -> Tensor | None:
        """Time of each point, [M]; None for steady problems."""
        return points[:, -1] if self.coordinates[-1] == "t" else None


def navier_stokes(
    d: Fields, linear: Callable[[str], Tensor], convection: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """Residuals of the incompressible equations in u, v, p over x, y.

    Args:
        d: Fields.
        linear: Of "u" or "v": rate of change and viscous term, e.g. u_t - nu (u_xx + u_yy).
        convection: Coefficient of the convective term.
    """
    u, v = d("u"), d("v")
    return {
        "momentum_x": linear("u") + convection * (u * d("u", "x") + v * d("u", "y")) + d("p", "x"),
        "momentum_y": linear("v") + convection * (u * d("v", "x") + v * d("v", "y")) + d("p", "y"),
        "continuity": d("u", "x") + d("v", "y"),
    }


LAPLACIAN = ((1.0, "xx"), (1.0, "yy"))
DIVERGENCE: dict[str, Combination] = {"divergence": ((1.0, "u", "x"), (1.0, "v", "y"))}


def positive(**values: float) -> None:
    """Refuse physical parameters that are not positive."""
    for name, value in values.items():
        if not value > 0:
            raise DataError(
                f"{name}={value} must be positive; check its unit (all problems are non-dimensional)"
            )


def tensor_grid(axes: Sequence[np.ndarray]) -> tuple[Tensor, tuple[int, ...]]:
    """Points [M, d] of a product grid in row-major order, and its shape."""
    mesh = np.meshgrid(*axes, indexing="ij")
    return torch.from_numpy(np.stack([m.ravel() for m in mesh], 1)), tuple(len(a) for a in axes)


def exact_condition(
    name: str,
    points: np.ndarray,
    exact: Callable[[Tensor], Tensor],
    fields: tuple[str, ...],
    columns: Sequence[int],
) -> Condition:
    """A condition whose values come from a closed form [N, d] -> [N, F]."""
    at = torch.from_numpy(points)
    return Condition(name, at, fields, exact(at)[:, list(columns)])


def box_sides(
    lower: Sequence[float],
    upper: Sequence[float],
    axes: Sequence[int],
    count: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Uniform points on the sides of a box across `axes`, about count in all, [N, d]."""
    parts, each = [], max(1, count // (2 * len(axes)))
    for axis in axes:
        for side in (lower[axis], upper[axis]):
            p = generator.uniform(lower, upper, (each, len(lower)))
            p[:, axis] = side
            parts.append(p)
    return np.concatenate(parts)


def initial_points(
    lower: Sequence[float], upper: Sequence[float], count: int, generator: np.random.Generator
) -> np.ndarray:
    """Uniform points at the first time, [N, d]."""
    p = generator.uniform(lower, upper, (count, len(lower)))
    p[:, -1] = lower[-1]
    return p
