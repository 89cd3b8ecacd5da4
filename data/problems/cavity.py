"""Lid-driven cavity: steady Navier-Stokes in a closed square.

    u u_x + v u_y + p_x - (u_xx + u_yy) / Re = 0,   the same for v with p_y,   u_x + v_y = 0
    [0, 1]^2, velocity (1 - cosh(C (x - 1/2)) / cosh(C / 2), 0) on y = 1 with C = 50, zero on the other walls

The profile takes the jump out of the corners, where plain conditions contradict each other; what is left there is a layer
of width 1 / C with residuals a thousand times those of the rest. Residuals are therefore multiplied by r^2 / (r^2 + a^2),
a = 0.1, with the distance r to either lid corner: without it training fits the corners' sampled points and nothing else
(centre lines off by 0.1). Residual figures of this problem are of the weighted ones. Reference: Newton's method on
stream function and vorticity (`solvers.cavity_flow`); velocity only, the pressure is not compared.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.problems.base import (
    DIVERGENCE,
    Condition,
    Problem,
    box_sides,
    navier_stokes,
    positive,
    tensor_grid,
)
from data.problems.solvers import cavity_flow, lid_profile


class Cavity(Problem):
    """Args: reynolds: Reynolds number, > 0; sharpness: C of the lid; cells: cells per side of the reference."""

    name = "cavity"
    coordinates, fields = ("x", "y"), ("u", "v", "p")
    lower, upper = (0.0, 0.0), (1.0, 1.0)
    derivatives = ("x", "y", "friction")
    ansatz, hard = "cavity", ("boundary",)
    source = "stream function and vorticity, Newton's method"
    reported = {"u": ((1.0, "u", ""),), "v": ((1.0, "v", ""),)}
    quantities = DIVERGENCE
    headline = ("centre_line_error",)

    def __init__(self, *, reynolds: float = 100.0, sharpness: float = 50.0, cells: int = 96) -> None:
        positive(reynolds=reynolds, sharpness=sharpness, cells=cells)
        if cells % 2:
            raise DataError(f"cells={cells} must be even, so that the grid has centre lines")
        self.reynolds, self.sharpness, self.cells = reynolds, sharpness, cells
        self.ansatz_options = {"sharpness": sharpness}

    @property
    def operators(self):
        return {"friction": ((-1 / self.reynolds, "xx"), (-1 / self.reynolds, "yy"))}

    def residuals(self, d, points, unknowns):
        x, y = points[:, 0], points[:, 1]
        weight = 1.0
        for corner in (0.0, 1.0):
            r2 = (x - corner) ** 2 + (y - 1.0) ** 2
            weight = weight * r2 / (r2 + 0.1**2)
        equations = navier_stokes(d, lambda w: d(w, "friction"))
        return {k: weight * r for k, r in equations.items()}

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        sides = box_sides(self.lower, self.upper, (0, 1), 2 * count, generator)
        values = np.zeros((len(sides), 2))
        lid = sides[:, 1] == 1.0
        values[lid, 0] = lid_profile(sides[lid, 0], self.sharpness)
        return [Condition("boundary", torch.from_numpy(sides), ("u", "v"), torch.from_numpy(values))]

    def reference(self):
        axis, _, u, v = cavity_flow(self.reynolds, self.cells, self.sharpness)
        points, shape = tensor_grid((axis, axis))
        return points, torch.from_numpy(np.stack((u.ravel(), v.ravel()), 1)), shape

    def grid_metrics(self, found: Tensor, true: Tensor, points: Tensor) -> dict[str, float]:
        """Largest error of u on x = 1/2 and of v on y = 1/2, where the literature compares."""
        error = (found - true).abs()
        u = error[(points[:, 0] - 0.5).abs() < 1e-9, 0]
        v = error[(points[:, 1] - 0.5).abs() < 1e-9, 1]
        return {"centre_line_error": float(torch.cat((u, v)).max())}
