"""Wake behind a cylinder from the user's simulation: coefficients and pressure from measured velocities.

    u_t + l1 (u u_x + v u_y) + p_x - l2 (u_xx + u_yy) = 0,   the same for v with p_y,   u_x + v_y = 0

Reads the layout of `cylinder_nektar_wake.mat` (MATLAB 5 or 7.3): X_star [P, 2], t [T, 1], U_star [P, 2, T], p_star
[P, T], non-dimensional by diameter and inflow velocity. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from data.errors import DataError
from data.problems.base import DIVERGENCE, LAPLACIAN, Condition, Problem, navier_stokes, positive
from data.problems.weak import shortest_waves, weak_coefficients

_LAYOUT = "X_star [P, 2], t [T, 1], U_star [P, 2, T], p_star [P, T]"


def read_wake(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of the file, checked.

    Raises:
        DataError: No such file, not a .mat file, missing names or shapes that contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}; set data.physics.path to your cylinder_nektar_wake.mat")
    names = ("X_star", "t", "U_star", "p_star")
    try:
        arrays = _arrays(path, names)
    except (ValueError, TypeError, IndexError, EOFError, OSError, MatReadError) as error:
        raise DataError(f"{path} is no MATLAB file ({error}); expected {_LAYOUT}") from error
    missing = [k for k in names if k not in arrays]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; expected {_LAYOUT}")
    points, times = arrays["X_star"].shape[0], arrays["t"].size
    wanted = {"X_star": (points, 2), "U_star": (points, 2, times), "p_star": (points, times)}
    for key, shape in wanted.items():
        if arrays[key].shape != shape:
            raise DataError(
                f"{path}: {key} is {list(arrays[key].shape)}, expected {list(shape)}; the layout is {_LAYOUT}"
            )
        if not np.isfinite(arrays[key]).all():
            raise DataError(f"{path}: {key} holds values that are not finite")
    if points < 1 or times < 2:
        raise DataError(
            f"{path} has {points} points and {times} times; give at least one point and two times"
        )
    return arrays | {"t": arrays["t"].ravel()}


def _arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that the file has."""
    try:
        raw = loadmat(path)
        return {k: np.asarray(raw[k], float) for k in names if k in raw}
    except NotImplementedError:  # MATLAB 7.3 is HDF5, with axes reversed
        import h5py

        with h5py.File(path) as file:
            return {k: np.asarray(file[k], float).T for k in names if k in file}


class Cylinder(Problem):
    """Args: path: the .mat file; measurements: points with known u, v; reynolds: true Re = 1 / l2; noise: deviation of the
    noise over that of the field."""

    name = "cylinder"
    coordinates, fields = ("x", "y", "t"), ("u", "v", "p")
    derivatives = ("x", "y", "t", "laplacian")
    operators = {"laplacian": LAPLACIAN}
    free_constant = ("p",)
    source = "the user's simulation"
    quantities = DIVERGENCE

    def __init__(
        self,
        *,
        path: str | None = None,
        measurements: int = 5000,
        reynolds: float = 100.0,
        noise: float = 0.0,
    ) -> None:
        if path is None:
            raise DataError(
                "problem cylinder reads your file: set data.physics.path=/where/cylinder_nektar_wake.mat"
            )
        positive(measurements=measurements, reynolds=reynolds)
        if noise < 0:
            raise DataError(f"noise={noise} must not be negative")
        self.wake, self.measurements, self.noise = read_wake(path), measurements, noise
        x, t = self.wake["X_star"], self.wake["t"]
        self.lower = (*map(float, x.min(0)), float(t.min()))
        self.upper = (*map(float, x.max(0)), float(t.max()))
        self.unknowns = {"l1": (0.0, 1.0), "l2": (0.0, 1.0 / reynolds)}

    def residuals(self, d, points, unknowns):
        return navier_stokes(d, lambda w: d(w, "t") - unknowns["l2"] * d(w, "laplacian"), unknowns["l1"])

    def _pick(self, i: np.ndarray, m: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        w = self.wake
        points = np.column_stack((w["X_star"][i], w["t"][m]))
        return torch.from_numpy(points), np.column_stack(
            (w["U_star"][i, 0, m], w["U_star"][i, 1, m], w["p_star"][i, m])
        )

    def closed_form(self, fields):
        waves = shortest_waves(self.measurements)
        return weak_coefficients(lambda p: fields(p)[:, :2], self.lower, self.upper, self.periods, waves)

    def conditions(self, count: int, generator: np.random.Generator) -> list[Condition]:
        size = self.wake["p_star"].shape
        points, values = self._pick(*(generator.integers(0, s, self.measurements) for s in size))
        values = values[:, :2]
        values = values + self.noise * values.std(0) * generator.standard_normal(values.shape)
        return [Condition("data", points, ("u", "v"), torch.from_numpy(values))]

    def reference(self):
        """The middle snapshot."""
        count, times = self.wake["p_star"].shape
        points, values = self._pick(np.arange(count), np.full(count, times // 2))
        return points, torch.from_numpy(values), (count,)
