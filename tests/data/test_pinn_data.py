"""Problems: references solve their own equations; points are reproducible; bad input is refused with a way out."""

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from data import create_data
from data.errors import DataError
from data.pinn import sample_box
from data.problems import create_problem, list_problems
from data.problems.cylinder import read_wake
from data.problems.solvers import cavity_flow, periodic_flow
from zoo.layers.derivatives import derivatives, differentiate

CLOSED = ["convection", "reaction", "wave1d", "kovasznay", "taylor_green", "electrothermal"]


def exact_residual(problem, points):
    d = differentiate(problem, problem.exact, points, "reverse")
    return torch.stack(list(problem.residuals(d, points, {}).values())).abs().max()


def inside(problem, count=60):
    return sample_box("uniform", count, np.array(problem.lower), np.array(problem.upper), 0)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_solve_their_equations(name):
    problem = create_problem(name, {"beta": 5.0} if name == "convection" else None)
    assert exact_residual(problem, inside(problem)) <= 1e-12


def test_burgers_reference():
    problem = create_problem("burgers1d")
    points = inside(problem)
    points[:, 1] = 0.1 + 0.8 * points[:, 1]
    # The front amplifies round-off of the quadrature: u_xx reaches 1e4 there.
    assert exact_residual(problem, points) < 1e-7
    fine = problem.exact(points, nodes=300)
    assert (problem.exact(points) - fine).abs().max() < 1e-9
    slope = derivatives(
        problem.exact, torch.tensor([[0.0, 1.6037 / np.pi]], dtype=torch.float64), [(1, 0)], "reverse"
    )
    assert slope[(1, 0)].item() == pytest.approx(-152.00516, abs=1e-4)


def test_burgers_too_thin_for_its_quadrature_is_refused():
    """At nu = 5e-4 150 nodes are off by 1e-3 where the front is."""
    assert create_problem("burgers1d", {"nu": 1e-3, "nx": 32, "nt": 8}).reference()[1].isfinite().all()
    with pytest.raises(DataError, match="nu=0.0005.*off by 0.00.*larger nu"):
        create_problem("burgers1d", {"nu": 5e-4}).reference()


def test_a_wrong_reference_is_noticed():
    problem = create_problem("kovasznay")
    problem.reynolds = 39.0
    wrong = create_problem("kovasznay")
    problem.exact = wrong.exact
    assert exact_residual(problem, inside(problem)) > 1e-4


def test_cavity_against_ghia():
    """Ghia, Ghia and Shin (1982), Re = 100, u on x = 1/2; their grid and ours differ in the third digit."""
    axis, psi, u, _ = cavity_flow(100.0, 32, None)
    y = [0.0547, 0.1719, 0.2813, 0.4531, 0.5, 0.6172, 0.7344, 0.8516, 0.9531]
    expected = [-0.03717, -0.10150, -0.15662, -0.21090, -0.20581, -0.13641, 0.00332, 0.23151, 0.68717]
    assert np.abs(np.interp(y, axis, u[16]) - expected).max() < 0.012
    assert psi.min() == pytest.approx(-0.1034, abs=0.004)


def test_periodic_flow_decays_like_taylor_green_and_satisfies_its_equation():
    side, times, u, v, p = periodic_flow(0.05, 0.2, modes=32, snapshots=5, step=1e-3)
    k = np.fft.fftfreq(32, 1 / 32)
    dx = lambda f: np.fft.ifft(1j * k[:, None] * np.fft.fft(f, axis=0), axis=0).real  # noqa: E731
    dy = lambda f: np.fft.ifft(1j * k[None, :] * np.fft.fft(f, axis=1), axis=1).real  # noqa: E731
    assert np.abs(dx(u[..., 2]) + dy(v[..., 2])).max() < 1e-10
    h = times[1] - times[0]
    for w, slope in ((u, dx), (v, dy)):
        rate = (w[..., 0] - 8 * w[..., 1] + 8 * w[..., 3] - w[..., 4]) / (12 * h)
        now = w[..., 2]
        rest = (
            u[..., 2] * dx(now) + v[..., 2] * dy(now) + slope(p[..., 2]) - 0.05 * (dx(dx(now)) + dy(dy(now)))
        )
        assert np.abs(rate + rest).max() < 1e-3


@pytest.mark.parametrize("viscosity, way", [(1e-3, "larger viscosity"), (100.0, "smaller viscosity")])
def test_a_flow_that_the_modes_do_not_resolve_is_refused(viscosity, way):
    with pytest.raises(DataError, match=way), np.errstate(all="ignore"):
        periodic_flow(viscosity, 2.0, modes=16, snapshots=2)


def test_all_problems_are_listed_and_build():
    assert set(CLOSED) | {"burgers1d", "cavity", "ns_inverse", "cylinder"} == set(list_problems())


def test_points_are_a_function_of_seed_and_step():
    data = create_data("pinn", interior=32, seed=3, problem="reaction")
    data.setup()
    assert torch.equal(data.draw(32, 1, 5), data.draw(32, 1, 5))
    assert not torch.equal(data.draw(32, 1, 5), data.draw(32, 1, 6))
    for kind in ("sobol", "latin", "uniform", "grid"):
        points = sample_box(kind, 20, np.array([-1.0, 2.0]), np.array([1.0, 5.0]), 0)
        assert points[:, 1].min() >= 2 and points[:, 1].max() <= 5 and len(points) >= 20
    held_out = next(iter(data.val_dataloader()))["points"]
    assert not (held_out[:, None] == data.draw(32, 0)[None]).all(-1).any()


def test_wake_file(tmp_path):
    x = np.random.default_rng(0).uniform([1, -2], [8, 2], (30, 2))
    t = np.linspace(0, 1.9, 20)[:, None]
    head = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    wake = {"X_star": x, "t": t, "U_star": np.random.rand(30, 2, 20), "p_star": np.random.rand(30, 20)}
    savemat(tmp_path / "wake.mat", wake)
    problem = create_problem("cylinder", {"path": str(tmp_path / "wake.mat"), "measurements": 40})
    (condition,) = problem.conditions(1, np.random.default_rng(0))
    assert condition.points.shape == (40, 3) and condition.values.shape == (40, 2)
    row = int(np.abs(x - condition.points[0, :2].numpy()).sum(1).argmin())
    column = int(np.abs(t[:, 0] - condition.points[0, 2].item()).argmin())
    assert condition.values[0, 1].item() == pytest.approx(wake["U_star"][row, 1, column])
    with h5py.File(
        tmp_path / "new.mat", "w", userblock_size=512
    ) as file:  # as MATLAB 7.3 writes it, axes reversed
        for key, array in wake.items():
            file[key] = array.T
    with (tmp_path / "new.mat").open("r+b") as file:
        file.write(head)
    new = read_wake(tmp_path / "new.mat")
    assert all(np.array_equal(new[key], problem.wake[key]) for key in wake)
    savemat(tmp_path / "turned.mat", {**wake, "U_star": wake["U_star"].transpose(1, 0, 2)})
    with pytest.raises(DataError, match=r"U_star is \[2, 30, 20\], expected \[30, 2, 20\]"):
        create_problem("cylinder", {"path": str(tmp_path / "turned.mat")})
    savemat(tmp_path / "other.mat", {"usol": x})
    with pytest.raises(DataError, match="has no X_star"):
        create_problem("cylinder", {"path": str(tmp_path / "other.mat")})
    for damage in (b"", head[:100], head + 400 * b"0", b"neither of them"):
        (tmp_path / "damaged.mat").write_bytes(damage)
        with pytest.raises(DataError, match="is no MATLAB file"):
            create_problem("cylinder", {"path": str(tmp_path / "damaged.mat")})
    still = {"t": t[:1], "U_star": wake["U_star"][..., :1], "p_star": wake["p_star"][:, :1]}
    none = {"X_star": x[:0], "U_star": wake["U_star"][:0], "p_star": wake["p_star"][:0]}
    for few in (still, none):
        savemat(tmp_path / "few.mat", wake | few)
        with pytest.raises(DataError, match="at least one point and two times"):
            create_problem("cylinder", {"path": str(tmp_path / "few.mat")})


@pytest.mark.parametrize(
    ("problem", "physics", "text"),
    [
        ("kovasznay", {"reynolds": 0}, "reynolds=0 must be positive"),
        ("cavity", {"reynolds": -5}, "must be positive"),
        ("burgers1d", {"viscosity": 1.0}, "no option 'viscosity'; nearest: nu"),
        ("burgers", None, "did you mean 'burgers1d'"),
        ("cylinder", None, "set data.physics.path"),
        ("ns_inverse", {"noise": -1}, "must not be negative"),
    ],
)
def test_bad_input_says_what_to_do(problem, physics, text):
    with pytest.raises(DataError, match=text):
        create_data("pinn", problem=problem, physics=physics)
