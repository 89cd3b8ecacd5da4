"""Logistic reaction.

    u_t - rho u (1 - u) = 0,   x in [0, 2 pi] periodic,  t in [0, 1],   u(x, 0) = h(x) = exp(-(x - pi)^2 / (2 (pi/4)^2))

Reference: h e^(rho t) / (h e^(rho t) + 1 - h).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.problems.base import Condition, Problem, initial_points, positive, tensor_grid


class Reaction(Problem):
    """Args: rho: rate, > 0; n: points per side of the test grid."""

    name = "reaction"
    lower, upper = (0.0, 0.0), (2 * math.pi, 1.0)
    derivatives = ("t",)
    ansatz, hard = "reaction", ("initial",)
    source = "closed form"

    def __init__(self, *, rho: float = 5.0, n: int = 101) -> None:
        positive(rho=rho, n=n)
        self.rho, self.n = rho, n

    def residuals(self, d, points, unknowns):
        return {"reaction": d("u", "t") - self.rho * d("u") * (1 - d("u"))}

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        start = torch.from_numpy(initial_points(self.lower, self.upper, count, generator))
        return [Condition("initial", start, ("u",), self.exact(start))]

    def exact(self, points: Tensor) -> Tensor:
        """[N, 2] -> [N, 1]."""
        x, t = points[:, :1], points[:, 1:]
        h = torch.exp(-((x - math.pi) ** 2) / (2 * (math.pi / 4) ** 2))
        grown = h * torch.exp(self.rho * t)
        return grown / (grown + 1 - h)

    def reference(self):
        points, shape = tensor_grid((np.linspace(0, 2 * math.pi, self.n), np.linspace(0, 1, self.n)))
        return points, self.exact(points), shape
