"""Convection of a sine.

    u_t + beta u_x = 0,   x in [0, 2 pi] periodic,  t in [0, 1],   u(x, 0) = sin x

Reference: sin(x - beta t). Large beta (50) is a known failure of plain PINNs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.problems.base import Condition, Problem, initial_points, positive, tensor_grid


class Convection(Problem):
    """Args: beta: speed, > 0; n: points per side of the test grid."""

    name = "convection"
    lower, upper = (0.0, 0.0), (2 * math.pi, 1.0)
    derivatives = ("along",)
    periods = (2 * math.pi, None)
    ansatz, hard = "convection", ("initial", "boundary")
    source = "closed form"

    def __init__(self, *, beta: float = 50.0, n: int = 101) -> None:
        positive(beta=beta, n=n)
        self.beta, self.n = beta, n

    @property
    def operators(self):
        return {"along": ((1.0, "t"), (self.beta, "x"))}

    def residuals(self, d, points, unknowns):
        return {"convection": d("u", "along")}

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        start = torch.from_numpy(initial_points(self.lower, self.upper, count, generator))
        return [Condition("initial", start, ("u",), self.exact(start))]

    def exact(self, points: Tensor) -> Tensor:
        """[N, 2] -> [N, 1]."""
        return torch.sin(points[:, :1] - self.beta * points[:, 1:])

    def reference(self):
        points, shape = tensor_grid((np.linspace(0, 2 * math.pi, self.n), np.linspace(0, 1, self.n)))
        return points, self.exact(points), shape
