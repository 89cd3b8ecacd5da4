"""Viscous Burgers equation with a steepening front.

    u_t + u u_x - nu u_xx = 0,   x in [-1, 1],  t in [0, 1],   nu = 0.01 / pi
    u(x, 0) = -sin(pi x),   u(-1, t) = u(1, t) = 0

Reference: Cole-Hopf integral by Gauss-Hermite quadrature; 150 nodes agree with 300 to 1e-10.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.problems.base import Condition, Problem, box_sides, initial_points, positive, tensor_grid


class Burgers1d(Problem):
    """Args: nu: viscosity, > 0; nx, nt: test grid."""

    name = "burgers1d"
    lower, upper = (-1.0, 0.0), (1.0, 1.0)
    derivatives = ("x", "heat")
    ansatz, hard = "burgers1d", ("initial", "boundary")
    source = "Cole-Hopf integral, Gauss-Hermite quadrature"

    def __init__(self, *, nu: float = 0.01 / math.pi, nx: int = 256, nt: int = 100) -> None:
        positive(nu=nu, nx=nx, nt=nt)
        self.nu, self.nx, self.nt = nu, nx, nt

    @property
    def operators(self):
        return {"heat": ((1.0, "t"), (-self.nu, "xx"))}

    def residuals(self, d, points, unknowns):
        return {"momentum": d("u", "heat") + d("u") * d("u", "x")}

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        start = initial_points(self.lower, self.upper, count, generator)
        sides = box_sides(self.lower, self.upper, (0,), count, generator)
        return [
            Condition(
                "initial",
                torch.from_numpy(start),
                ("u",),
                -torch.sin(math.pi * torch.from_numpy(start[:, :1])),
            ),
            Condition(
                "boundary", torch.from_numpy(sides), ("u",), torch.zeros(len(sides), 1, dtype=torch.float64)
            ),
        ]

    def exact(self, points: Tensor, nodes: int = 150) -> Tensor:
        """u at points [N, 2] -> [N, 1]; differentiable, t = 0 allowed."""
        z, w = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(nodes))
        x, t = points[:, :1], points[:, 1:]
        e = x - torch.sqrt(4 * self.nu * t) * z
        a = -torch.cos(math.pi * e) / (2 * math.pi * self.nu)
        f = torch.exp(a - a.max(-1, keepdim=True).values.detach()) * w
        return (-(torch.sin(math.pi * e) * f).sum(-1) / f.sum(-1))[:, None]

    def reference(self):
        times = np.linspace(0, 1, self.nt + 1)[1:]  # the initial state is prescribed, so it is no test
        axis = np.linspace(-1, 1, self.nx)
        self._check_nodes(axis)
        points, shape = tensor_grid((axis, times))
        return points, torch.cat([self.exact(p) for p in points.split(4096)]), shape

    def _check_nodes(self, axis: np.ndarray) -> None:
        """Small viscosities carry the peak of the integrand beyond the outermost node, latest times first."""
        last = torch.from_numpy(np.stack((axis, np.ones_like(axis)), 1))
        off = float((self.exact(last) - self.exact(last, nodes=300)).abs().nan_to_num(torch.inf).max())
        if off > 1e-6:
            raise DataError(
                f"nu={self.nu}: the reference's quadrature is off by {off:.2g} at t = 1, where the front is thin; "
                "choose a larger nu (1e-3 is safe)"
            )
