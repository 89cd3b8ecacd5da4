"""Wave equation with two modes.

    u_tt - 4 u_xx = 0,   x, t in [0, 1],   u(x, 0) = sin pi x + sin(3 pi x) / 2,  u_t(x, 0) = 0,  u(0, t) = u(1, t) = 0

Reference: sin pi x cos 2 pi t + sin(3 pi x) cos(6 pi t) / 2.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.problems.base import Condition, Problem, box_sides, initial_points, positive, tensor_grid


class Wave1d(Problem):
    """Args: n: points per side of the test grid."""

    name = "wave1d"
    lower, upper = (0.0, 0.0), (1.0, 1.0)
    derivatives = ("wave",)
    operators = {"wave": ((1.0, "tt"), (-4.0, "xx"))}
    ansatz, hard = "wave1d", ("initial", "boundary")
    source = "closed form"

    def __init__(self, *, n: int = 101) -> None:
        positive(n=n)
        self.n = n

    def residuals(self, d, points, unknowns):
        return {"wave": d("u", "wave")}

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        start = torch.from_numpy(initial_points(self.lower, self.upper, count, generator))
        sides = torch.from_numpy(box_sides(self.lower, self.upper, (0,), count, generator))
        return [
            Condition("initial", start, ("u",), self.exact(start)),
            Condition("initial", start, ("u",), torch.zeros(len(start), 1, dtype=torch.float64), by="t"),
            Condition("boundary", sides, ("u",), torch.zeros(len(sides), 1, dtype=torch.float64)),
        ]

    def exact(self, points: Tensor) -> Tensor:
        """[N, 2] -> [N, 1]."""
        x, t = points[:, :1] * math.pi, points[:, 1:] * math.pi
        return torch.sin(x) * torch.cos(2 * t) + 0.5 * torch.sin(3 * x) * torch.cos(6 * t)

    def reference(self):
        points, shape = tensor_grid((np.linspace(0, 1, self.n), np.linspace(0, 1, self.n)))
        return points, self.exact(points), shape
