"""Five coupled fields: buoyant flow with an electric force in a porous cell.

    u_x + v_y = 0
    u u_x + v u_y + p_x - Pr (u_xx + u_yy) + drag(u) - S_E phi_x                = f_1
    u v_x + v v_y + p_y - Pr (v_xx + v_yy) + drag(v) - S_E phi_y - Ra Pr T      = f_2
    u T_x + v T_y - (T_xx + T_yy)                                              = f_3
    phi_xx + phi_yy + k (T_x phi_x + T_y phi_y)                                = f_4
    drag(w) = w / Da + C_F |velocity| w  (Brinkman-Forchheimer)

The published cases' data are not public, so the fields are prescribed smooth ones and f_1 ... f_4 are what they leave
over (manufactured solution); u, v, T, phi are prescribed on the border. Forces are computed by nested reverse mode from
the closed forms, so residual code and derivative engine are both put to the test.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.problems.base import (
    DIVERGENCE,
    LAPLACIAN,
    Condition,
    Problem,
    box_sides,
    exact_condition,
    positive,
    tensor_grid,
)
from zoo.layers.derivatives import differentiate


class Electrothermal(Problem):
    """Args: prandtl, rayleigh, darcy, forchheimer, electric, coupling: Pr, Ra, Da, C_F, S_E, k; n: test grid."""

    name = "electrothermal"
    coordinates, fields = ("x", "y"), ("u", "v", "p", "T", "phi")
    lower, upper = (0.0, 0.0), (1.0, 1.0)
    derivatives = ("x", "y", "laplacian")
    operators = {"laplacian": LAPLACIAN}
    free_constant = ("p",)
    source = "manufactured solution"
    quantities = DIVERGENCE

    def __init__(
        self,
        *,
        prandtl: float = 0.71,
        rayleigh: float = 10.0,
        darcy: float = 0.1,
        forchheimer: float = 0.5,
        electric: float = 1.0,
        coupling: float = 0.5,
        n: int = 65,
    ) -> None:
        positive(prandtl=prandtl, rayleigh=rayleigh, darcy=darcy, n=n)
        self.prandtl, self.rayleigh, self.darcy = prandtl, rayleigh, darcy
        self.forchheimer, self.electric, self.coupling, self.n = forchheimer, electric, coupling, n

    def balance(self, d) -> dict[str, Tensor]:
        """Left-hand sides."""
        u, v, temperature = d("u"), d("v"), d("T")
        # The root is smooth because speeds are shifted by 1e-12, far below any error measured here.
        drag = 1 / self.darcy + self.forchheimer * torch.sqrt(u * u + v * v + 1e-12)

        def flow(w: str) -> Tensor:
            carried = u * d(w, "x") + v * d(w, "y")
            return carried - self.prandtl * d(w, "laplacian") + drag * d(w)

        carried = u * d("T", "x") + v * d("T", "y")
        return {
            "continuity": d("u", "x") + d("v", "y"),
            "momentum_x": flow("u") + d("p", "x") - self.electric * d("phi", "x"),
            "momentum_y": flow("v")
            + d("p", "y")
            - self.electric * d("phi", "y")
            - self.rayleigh * self.prandtl * temperature,
            "energy": carried - d("T", "laplacian"),
            "potential": d("phi", "laplacian")
            + self.coupling * (d("T", "x") * d("phi", "x") + d("T", "y") * d("phi", "y")),
        }

    def forces(self, points: Tensor) -> dict[str, Tensor]:
        """Right-hand sides at the points, constants of training."""
        at = points.detach().double()
        return {
            k: f.detach() for k, f in self.balance(differentiate(self, self.exact, at, "reverse")).items()
        }

    def residuals(self, d, points, unknowns):
        with torch.inference_mode(False):
            forces = self.forces(points.clone())
        return {k: left - forces[k].to(left.dtype) for k, left in self.balance(d).items()}

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        sides = box_sides(self.lower, self.upper, (0, 1), 2 * count, generator)
        return [exact_condition("boundary", sides, self.exact, ("u", "v", "T", "phi"), (0, 1, 3, 4))]

    def exact(self, points: Tensor) -> Tensor:
        """[N, 2] -> u, v, p, T, phi [N, 5]."""
        x, y = points[:, 0], points[:, 1]
        sx, cx, sy, cy = (f(math.pi * c) for c in (x, y) for f in (torch.sin, torch.cos))
        temperature = 1 - x + 0.2 * sx * sy
        return torch.stack((sx * cy, -cx * sy, 0.5 * cx * cy, temperature, y + 0.3 * sx * cy), 1)

    def reference(self):
        side = np.linspace(0, 1, self.n)
        points, shape = tensor_grid((side, side))
        return points, self.exact(points), shape
