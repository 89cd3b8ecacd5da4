"""Coefficients in closed form: right on a solver's flow in both kinds of box, blind to short waves."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from data.problems.solvers import periodic_flow
from data.problems.weak import shortest_waves, weak_coefficients

VISCOSITY, DURATION, MODES = 0.05, 0.6, 24
SIDE = 2 * np.pi


@pytest.fixture(scope="module")
def flow():
    """Velocity at any points of a product grid: by its waves in space, by splines in time."""
    _, times, *velocity, _ = periodic_flow(VISCOSITY, DURATION, modes=MODES, snapshots=25, step=0.01)
    k = np.fft.fftfreq(MODES, 1 / MODES)
    waves = [CubicSpline(times, np.fft.fft2(w, axes=(0, 1)) / MODES**2, axis=2) for w in velocity]

    def at(points):
        x, y, t = (np.unique(points[:, n].numpy()) for n in range(3))
        ex, ey = (np.exp(1j * np.outer(a, k)) for a in (x, y))
        columns = [np.einsum("xk,klt,yl->xyt", ex, w(t), ey).real.ravel() for w in waves]
        return torch.from_numpy(np.stack(columns, 1))

    return at


@pytest.mark.parametrize(
    ("upper", "periods"), [((SIDE, SIDE), (SIDE, SIDE, None)), ((5.0, 4.0), None)], ids=["periodic", "walls"]
)
def test_coefficients_of_a_flow(flow, upper, periods):
    found = weak_coefficients(flow, (0.0, 0.0, 0.0), (*upper, DURATION), periods, 3)
    assert found["l1"] == pytest.approx(1.0, rel=1e-3)
    assert found["l2"] == pytest.approx(VISCOSITY, rel=5e-3)


def test_errors_in_short_waves_hardly_matter(flow):
    """A tenth of a percent of the velocity, whose Laplacian is a quarter of the flow's."""
    box = (0.0, 0.0, 0.0), (SIDE, SIDE, DURATION), (SIDE, SIDE, None)

    def disturbed(points):
        return flow(points) + 1e-3 * torch.sin(11 * points[:, :1] - 9 * points[:, 1:2] + 40 * points[:, 2:])

    plain, other = (weak_coefficients(f, *box, 3) for f in (flow, disturbed))
    assert abs(plain["l1"] - other["l1"]) < 1e-4 and abs(plain["l2"] - other["l2"]) < 1e-3 * VISCOSITY


def test_waves_are_as_long_as_four_measurements():
    assert [shortest_waves(n) for n in (10, 2000, 2500, 5000)] == [1, 3, 3, 4]
