"""Gauss-Newton steps of the physics-informed task: rows point by point, damping, and what is refused."""

import pytest
import torch
from torch import nn

from tasks.optimizers.gauss_newton import GaussNewton, add_gram
from tests.tasks.pinn_tasks import fit, make, total
from zoo.errors import CapabilityError, ConfigError
from zoo.layers.point_jacobian import PointJacobian


@pytest.mark.parametrize(
    ("model", "options"),
    [("pinn_mlp", {"modified": True}), ("physicsformer", {"tokens": 2, "hidden": [8], "act": "wavelet"})],
)
def test_rows_are_the_gradients_of_single_points(model, options):
    """Of all weights, those of wavelets and the coefficients among them."""
    physics = {"measurements": 20, "snapshots": 3, "duration": 0.2}
    task = make(model, problem="ns_inverse", physics=physics, model_options=options)
    task._to_double()
    o, at = task.objective, task.points.at[:3]
    values = lambda: o.residuals(o.fields(at), at)  # noqa: E731
    found, rows = PointJacobian(task.model, o.parameters())(values)
    expected = values()
    torch.testing.assert_close(found, expected)
    for point in range(3):
        for column in range(3):
            slopes = torch.autograd.grad(
                expected[point, column], o.parameters(), retain_graph=True, allow_unused=True
            )
            flat = [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(o.parameters(), slopes, strict=True)
            ]
            torch.testing.assert_close(rows[column, point], torch.cat(flat), rtol=1e-7, atol=1e-7)


def test_normal_equations_are_those_of_the_loss():
    task = make(
        "pinn_mlp",
        problem="burgers1d",
        data={"hard_conditions": False},
        second="gauss_newton",
        weights={"initial": 3.0},
        chunk=20,
    )
    task._to_double()
    task.points.own_weight.uniform_(0.5, 2.0)
    matrix, slope, loss = task.system.normal()
    assert loss == pytest.approx(total(task), rel=1e-12)
    assert loss == pytest.approx(task.system.loss(), rel=1e-12)
    gradient = torch.cat([p.grad.reshape(-1) for p in task.objective.parameters()])
    torch.testing.assert_close(2 * slope, gradient)
    # The matrix is the curvature of the rows' squares as they are linearised along any direction.
    direction, step = torch.randn(len(slope), dtype=torch.float64), 1e-6
    parameters = task.objective.parameters()
    parts = direction.split([p.numel() for p in parameters])

    def rows(moved):
        for p, d in zip(parameters, parts, strict=True):
            p.data += moved * d.view_as(p)
        return [(task.balance[t] * share).sqrt()[:, None] * v() for t, v, share in task.system._rows()]

    pairs = zip(rows(step), rows(-2 * step), strict=True)
    expected = sum(((above - below) / (2 * step)).square().sum() for above, below in pairs)
    full = matrix.tril() + matrix.tril(-1).T
    torch.testing.assert_close(direction @ full @ direction, expected, rtol=1e-5, atol=0)


class Curve:
    """Rosenbrock's valley as two values, and NaN beyond a wall."""

    def __init__(self, x, wall=float("inf")):
        self.x, self.wall = x, wall

    def values(self):
        a, b = self.x.detach()
        return torch.stack((10 * (b - a * a), 1 - a)) * (1.0 if a < self.wall else float("nan"))

    def loss(self):
        return float(self.values().square().sum())

    def normal(self):
        a = float(self.x[0])
        jacobian = torch.tensor([[-20 * a, 10.0], [-1.0, 0.0]], dtype=torch.float64)
        matrix = torch.zeros(2, 2, dtype=torch.float64)
        add_gram(matrix, jacobian, block=1)
        return matrix, jacobian.T @ self.values(), self.loss()


def test_damped_steps_reach_the_minimum_and_say_why_they_end():
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer, losses = GaussNewton([x], Curve(x)), []
    while not optimizer.exit_reason:
        losses.append(float(optimizer.step()))
    assert (
        (x.detach() - 1).abs().max() < 1e-10 and losses == sorted(losses, reverse=True) and len(losses) < 60
    )


def test_a_wall_of_nan_is_not_crossed():
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = GaussNewton([x], Curve(x, wall=0.5))
    for _ in range(60):
        optimizer.step()
    assert torch.isfinite(x).all() and float(x[0].detach()) < 0.5 and "dampings" in optimizer.exit_reason


def test_the_task_trains_by_gauss_newton(tmp_path):
    task = make(second="gauss_newton", lr=1e-2)
    before = total(task)
    trainer = fit(task, tmp_path, 36)
    assert trainer.global_step == 36 and total(task) < 0.05 * before


class Tied(nn.Module):
    """A layer whose matrix is used outside its call as well."""

    def __init__(self, mixed=False):
        super().__init__()
        self.layer, self.mixed = nn.Linear(2, 2).double(), mixed

    def forward(self, points):
        if self.mixed:
            return self.layer(points.reshape(2, -1, 2)).reshape(-1, 2)
        return self.layer(points) @ self.layer.weight


def test_networks_without_rows_are_refused():
    points = torch.rand(4, 2, dtype=torch.float64)
    for network, text in ((Tied(), "do not add up"), (Tied(mixed=True), "not 4 points on its first axis")):
        rows = PointJacobian(network, [*network.layer.parameters()])
        with pytest.raises(CapabilityError, match=text):
            rows.check(lambda n=network: n(points))
    with pytest.raises(CapabilityError, match="100 of the network's numbers are outside linear layers"):
        PointJacobian(nn.Linear(2, 2), [torch.ones(100)])
    with pytest.raises(CapabilityError, match="needs derivatives by Taylor mode, not 'jvp'"):
        make(second="gauss_newton", derivatives="jvp")
    with pytest.raises(ConfigError, match="up to 8000 parameters"):
        make(second="gauss_newton", model_options={"dim": 60}).configure_optimizers()
