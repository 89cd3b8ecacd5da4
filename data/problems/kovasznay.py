"""Kovasznay flow behind a grid: steady Navier-Stokes with a closed form.

    u u_x + v u_y + p_x - (u_xx + u_yy) / Re = 0,   the same for v with p_y,   u_x + v_y = 0
    [-0.5, 1] x [-0.5, 1.5], u and v prescribed on all sides

Reference: k = Re/2 - sqrt(Re^2/4 + 4 pi^2); u = 1 - e^(kx) cos 2 pi y, v = k e^(kx) sin(2 pi y) / (2 pi),
p = (1 - e^(2kx)) / 2. The pressure has no other condition, so it is compared after removing its mean.
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
    box_sides,
    exact_condition,
    navier_stokes,
    positive,
    tensor_grid,
)


class Kovasznay(Problem):
    """Args: reynolds: Reynolds number, > 0; n: points per side of the test grid."""

    name = "kovasznay"
    coordinates, fields = ("x", "y"), ("u", "v", "p")
    lower, upper = (-0.5, -0.5), (1.0, 1.5)
    derivatives = ("x", "y", "friction")
    ansatz, hard = "kovasznay", ("boundary",)
    free_constant = ("p",)
    source = "closed form"
    quantities = DIVERGENCE

    def __init__(self, *, reynolds: float = 40.0, n: int = 101) -> None:
        positive(reynolds=reynolds, n=n)
        self.reynolds, self.n = reynolds, n
        self.ansatz_options = {"reynolds": reynolds}

    @property
    def operators(self):
        return {"friction": ((-1 / self.reynolds, "xx"), (-1 / self.reynolds, "yy"))}

    def residuals(self, d, points, unknowns):
        return navier_stokes(d, lambda w: d(w, "friction"))

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        sides = box_sides(self.lower, self.upper, (0, 1), 2 * count, generator)
        return [exact_condition("boundary", sides, self.exact, ("u", "v"), (0, 1))]

    def exact(self, points: Tensor) -> Tensor:
        """[N, 2] -> u, v, p [N, 3]."""
        k = self.reynolds / 2 - math.sqrt(self.reynolds**2 / 4 + 4 * math.pi**2)
        x, y = points[:, 0], 2 * math.pi * points[:, 1]
        e = torch.exp(k * x)
        return torch.stack((1 - e * torch.cos(y), k / (2 * math.pi) * e * torch.sin(y), 0.5 * (1 - e * e)), 1)

    def reference(self):
        points, shape = tensor_grid(
            [np.linspace(a, b, self.n) for a, b in zip(self.lower, self.upper, strict=True)]
        )
        return points, self.exact(points), shape
