"""Taylor-Green vortices: unsteady periodic Navier-Stokes with a closed form.

    u_t + u u_x + v u_y + p_x - nu (u_xx + u_yy) = 0,   the same for v with p_y,   u_x + v_y = 0
    [0, 2 pi]^2 periodic,  t in [0, T],  u and v prescribed at t = 0

Reference, F = e^(-2 nu t): u = -cos x sin y F, v = sin x cos y F, p = -(cos 2x + cos 2y) F^2 / 4.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.problems.base import (
    DIVERGENCE,
    Condition,
    Problem,
    exact_condition,
    initial_points,
    navier_stokes,
    positive,
    tensor_grid,
)


class TaylorGreen(Problem):
    """Args: nu: viscosity, > 0; duration: T, > 0; n, nt: test grid."""

    name = "taylor_green"
    coordinates, fields = ("x", "y", "t"), ("u", "v", "p")
    derivatives = ("x", "y", "heat")
    lower = (0.0, 0.0, 0.0)
    periods = (2 * math.pi, 2 * math.pi, None)
    ansatz, hard = "taylor_green", ("initial",)
    free_constant = ("p",)
    source = "closed form"
    quantities = DIVERGENCE

    def __init__(self, *, nu: float = 0.1, duration: float = 1.0, n: int = 41, nt: int = 11) -> None:
        positive(nu=nu, duration=duration, n=n, nt=nt)
        self.nu, self.n, self.nt = nu, n, nt
        self.upper = (2 * math.pi, 2 * math.pi, duration)

    @property
    def operators(self):
        return {"heat": ((1.0, "t"), (-self.nu, "xx"), (-self.nu, "yy"))}

    def residuals(self, d, points, unknowns):
        return navier_stokes(d, lambda w: d(w, "heat"))

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        start = initial_points(self.lower, self.upper, 2 * count, generator)
        return [exact_condition("initial", start, self.exact, ("u", "v"), (0, 1))]

    def exact(self, points: Tensor) -> Tensor:
        """[N, 3] -> u, v, p [N, 3]."""
        x, y, t = points.unbind(1)
        f = torch.exp(-2 * self.nu * t)
        p = -0.25 * (torch.cos(2 * x) + torch.cos(2 * y)) * f * f
        return torch.stack((-torch.cos(x) * torch.sin(y) * f, torch.sin(x) * torch.cos(y) * f, p), 1)

    def reference(self):
        side = np.linspace(0, 2 * math.pi, self.n)
        points, shape = tensor_grid((side, side, np.linspace(0, self.upper[2], self.nt)))
        return points, self.exact(points), shape
