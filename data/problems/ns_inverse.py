"""Finding two coefficients of the Navier-Stokes equations from velocities alone.

    u_t + l1 (u u_x + v u_y) + p_x - l2 (u_xx + u_yy) = 0,   the same for v with p_y,   u_x + v_y = 0
    [0, 2 pi]^2 periodic,  t in [0, T],  true l1 = 1, l2 = 0.01; u and v measured at scattered points, p never

The flow starts from modes of different wavenumber. On Taylor-Green or any single-|k| flow l1 cannot be found: there the
convective term is a gradient, which the free pressure absorbs. Reference: pseudo-spectral (`solvers.periodic_flow`).
The coefficients reported are those of the field's weak form (`weak.py`); those trained in the residual are given beside them.
`formulation: stream` gives out a stream function s, u = s_y, v = -s_x: divergence-free, but of third order.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from data.errors import DataError
from data.problems.base import (
    DIVERGENCE,
    LAPLACIAN,
    Condition,
    Problem,
    navier_stokes,
    positive,
    tensor_grid,
)
from data.problems.solvers import periodic_flow
from data.problems.weak import shortest_waves, weak_coefficients


class NsInverse(Problem):
    """Args: viscosity: true l2, > 0; duration: T; noise: deviation of the noise over that of the field, >= 0;
    measurements: number of points with known u, v; formulation: velocity | stream; snapshots: stored times."""

    name = "ns_inverse"
    coordinates = ("x", "y", "t")
    lower = (0.0, 0.0, 0.0)
    periods = (2 * math.pi, 2 * math.pi, None)
    free_constant = ("p",)
    source = "pseudo-spectral solver"

    def __init__(
        self,
        *,
        viscosity: float = 0.01,
        duration: float = 3.0,
        noise: float = 0.0,
        measurements: int = 2000,
        formulation: str = "velocity",
        snapshots: int = 31,
    ) -> None:
        positive(viscosity=viscosity, duration=duration, measurements=measurements, snapshots=snapshots)
        if noise < 0:
            raise DataError(f"noise={noise} must not be negative; it is a share of the field's deviation")
        if formulation not in ("velocity", "stream"):
            raise DataError(f"formulation={formulation!r}: choose velocity or stream")
        self.viscosity, self.noise, self.measurements = viscosity, noise, measurements
        self.formulation, self.snapshots = formulation, snapshots
        self.upper = (2 * math.pi, 2 * math.pi, duration)
        self.unknowns = {"l1": (0.0, 1.0), "l2": (0.0, viscosity)}
        if formulation == "velocity":
            self.fields = ("u", "v", "p")
            self.derivatives = ("x", "y", "t", "laplacian")
            self.operators = {"laplacian": LAPLACIAN}
            self.quantities = DIVERGENCE
        else:
            self.fields = ("s", "p")
            self.derivatives = ("x", "y", "xx", "xy", "yy", "xt", "yt", "laplacian_x", "laplacian_y")
            self.operators = {
                "laplacian_x": ((1.0, "xxx"), (1.0, "xyy")),
                "laplacian_y": ((1.0, "xxy"), (1.0, "yyy")),
            }
            self.reported = {"u": ((1.0, "s", "y"),), "v": ((-1.0, "s", "x"),), "p": ((1.0, "p", ""),)}
        self._flow: tuple[np.ndarray, ...] | None = None

    def residuals(self, d, points, unknowns):
        l1, l2 = unknowns["l1"], unknowns["l2"]
        if self.formulation == "velocity":
            return navier_stokes(d, lambda w: d(w, "t") - l2 * d(w, "laplacian"), l1)
        u, v = d("s", "y"), -d("s", "x")
        return {
            "momentum_x": d("s", "yt")
            + l1 * (u * d("s", "xy") + v * d("s", "yy"))
            + d("p", "x")
            - l2 * d("s", "laplacian_y"),
            "momentum_y": -d("s", "xt")
            - l1 * (u * d("s", "xx") + v * d("s", "xy"))
            + d("p", "y")
            + l2 * d("s", "laplacian_x"),
        }

    @property
    def flow(self) -> tuple[np.ndarray, ...]:
        """Side, times, u, v, p of the reference; solved once."""
        if self._flow is None:
            self._flow = periodic_flow(self.viscosity, self.upper[2], snapshots=self.snapshots)
        return self._flow

    def closed_form(self, fields):
        waves = shortest_waves(self.measurements)
        return weak_coefficients(lambda p: fields(p)[:, :2], self.lower, self.upper, self.periods, waves)

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        side, times, u, v, _ = self.flow
        i, j = generator.integers(0, len(side), (2, self.measurements))
        m = generator.integers(0, len(times), self.measurements)
        points = np.stack((side[i], side[j], times[m]), 1)
        values = np.stack((u[i, j, m], v[i, j, m]), 1)
        values = values + self.noise * np.array([u.std(), v.std()]) * generator.standard_normal(values.shape)
        return [Condition("data", torch.from_numpy(points), ("u", "v"), torch.from_numpy(values))]

    def reference(self):
        side, times, u, v, p = self.flow
        every = slice(None, None, 2), slice(None, None, 2), slice(None, None, 3)
        points, shape = tensor_grid((side[::2], side[::2], times[::3]))
        values = np.stack([f[every].ravel() for f in (u, v, p)], 1)
        return points, torch.from_numpy(values), shape
