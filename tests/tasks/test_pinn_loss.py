"""The physics-informed loss: terms, weights, conditions and the errors that are reported."""

import numpy as np
import pytest
import torch

from data.problems import create_problem
from data.problems.baselines import field_errors
from tasks.physics.balance import SCHEMES, Balance
from tasks.physics.scores import coefficients
from tests.tasks.pinn_tasks import make, total
from zoo.errors import ConfigError, DataError


@pytest.mark.parametrize("scheme", SCHEMES)
def test_balancing_schemes_change_weights_and_stay_finite(scheme):
    task = make(problem="burgers1d", data={"hard_conditions": False}, balance=scheme)
    assert task.objective.terms == ["residual", "initial", "boundary"]
    for _ in range(2):
        if scheme != "fixed":
            task.objective.kernel_trace = lambda term, *_: torch.tensor(
                {"residual": 100.0, "initial": 1.0, "boundary": 4.0}[term]
            )
            task.rebalance()
    assert torch.isfinite(task.balance.weights).all() and (task.balance.weights > 0).all()
    assert (task.balance.weights != 1).any() == (scheme != "fixed")


def test_gradient_norm_weights_by_hand():
    balance = Balance(["a", "b"], "grad_norm", momentum=0.0)
    balance.update(
        lambda t: torch.tensor([3.0, 4.0]) if t == "a" else torch.tensor([0.5, 0.0]), None, torch.ones(2)
    )
    assert balance.weights.tolist() == [1.0, 10.0]


def test_kernel_trace_is_unbiased():
    """Random signs against per-point gradients."""
    task = make()
    task.points.at = points = task.points.at[:16]
    rows = task.objective.residuals(task.objective.fields(points), points)[:, 0]
    exact = sum(
        sum(
            g.square().sum() for g in torch.autograd.grad(r, list(task.model.parameters()), retain_graph=True)
        )
        for r in rows
    ) / len(rows)
    found = task.objective.kernel_trace("residual", task.points, draws=300)
    assert found.item() == pytest.approx(exact.item(), rel=0.25)


def test_kernel_trace_looks_at_all_points_not_at_the_first_ones(monkeypatch):
    """Resampling puts the points of large residual first."""
    task, seen = make(), []
    task.points.at = torch.linspace(0, 1, 90, dtype=torch.float64)[:, None].expand(-1, 2)
    whole = task.objective.fields
    monkeypatch.setattr(task.objective, "fields", lambda at, *rest: seen.append(at) or whole(at, *rest))
    task.objective.kernel_trace("residual", task.points, draws=1, most=20)
    assert len(seen[0]) <= 20 and seen[0].min() == 0 and seen[0].max() > 0.9


def test_chunks_do_not_change_the_gradient():
    grads = []
    for chunk in (48, 7):
        task = make(problem="burgers1d", chunk=chunk).double()
        total(task)
        grads.append(torch.cat([p.grad.reshape(-1) for p in task.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads)


def test_causal_weights_fall_with_time():
    task = make(causal=1.0, slabs=4)
    task.points.slab_loss.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    weights = task.points.weights()
    early, late = task.points.at[:, 1] < 0.25, task.points.at[:, 1] > 0.75
    assert weights[early].min() == 1 and weights[late].max() == pytest.approx(2.718281828**-3, rel=1e-5)


@pytest.mark.parametrize(
    "problem", ["burgers1d", "convection", "reaction", "wave1d", "kovasznay", "taylor_green", "cavity"]
)
def test_hard_conditions_hold_exactly(problem):
    task = make(problem=problem)
    assert task.objective.terms == ["residual"]
    task.double()
    assert task.problem.hard
    for condition in task.data.conditions():
        assert task.objective.misfit(condition).abs().max() < 1e-5, condition.name
    inside = task.points.at
    assert (task.model(inside) - task.model(inside.roll(1, 0))).abs().max() > 1e-3


def test_inverse_problem_trains_its_coefficients():
    task = make(problem="ns_inverse", physics={"measurements": 60, "snapshots": 4, "duration": 0.3})
    total(task)
    assert set(task.unknowns) == {"l1", "l2"} and task.unknowns["l1"].grad.abs() > 0
    stream = make(
        problem="ns_inverse",
        physics={"measurements": 30, "snapshots": 4, "duration": 0.3, "formulation": "stream"},
    )
    total(stream)
    assert stream.unknowns["l2"].grad is not None
    # What is reported is the closed form of the fields, whatever the trained numbers are.
    found = {name: coefficients(t.objective) for name, t in (("velocity", task), ("stream", stream))}
    with torch.no_grad():
        task.unknowns["l1"].fill_(7.0)
    assert coefficients(task.objective) == found["velocity"] != found["stream"]


def test_a_grid_may_have_more_points_than_asked_for():
    task = make(data={"sampling": "grid"})  # 48 points asked for, 7 x 7 given
    assert len(task.points.at) == 49 and np.isfinite(total(task))
    task.points.resample(3, 48, task.objective.squared_residual)
    assert len(task.points.at) == 49 and np.isfinite(total(task))


def test_causal_needs_time():
    with pytest.raises(ConfigError, match="needs a time coordinate"):
        make(problem="kovasznay", causal=1.0)


def test_causal_stages_rise_when_every_slab_is_learnt():
    task = make(causal=[0.5, 5.0], slabs=4)
    task.points.squares = torch.full((48,), 1.0, dtype=torch.float64)
    task.points.learn()
    assert task.points.causal == 0.5 and task.points.weights().min() == pytest.approx(np.exp(-1.5))
    task.points.squares *= 1e-4
    task.points.learn()
    assert task.points.causal == 5.0


def test_held_out_conditions_are_not_those_of_training():
    task = make(problem="burgers1d", data={"hard_conditions": False})
    for seen, unseen in zip(task.objective.conditions, task.held_out, strict=True):
        assert seen.name == unseen.name
        assert not (seen.points[:, None] == unseen.points[None]).all(-1).any()


def test_pressure_is_compared_without_its_mean_at_each_time():
    true = torch.randn(12, 2, dtype=torch.float64)
    times = torch.arange(3).repeat_interleave(4)
    found = true + torch.stack((torch.zeros(12), times.square() * 0.7), 1)
    assert field_errors(found, true, ("u", "p"), ("p",), times)["rel_l2_p"] < 1e-12
    assert field_errors(found, true, ("u", "p"), ("p",))["rel_l2_p"] > 0.1
    assert field_errors(found + 1.0, true, ("u", "p"), ("p",), times)["rel_l2_u"] > 0.1


def test_centre_lines_of_the_cavity():
    problem = create_problem("cavity", {"cells": 8})
    points, true, shape = problem.reference()
    found = true.clone().view(*shape, 2)
    found[4, 3, 0] += 0.3  # u on x = 1/2
    found[2, 4, 1] += 0.1  # v on y = 1/2
    found[1, 4, 0] += 9.0  # u where nobody looks
    assert problem.grid_metrics(found.view(-1, 2), true, points)["centre_line_error"] == pytest.approx(0.3)
    with pytest.raises(DataError, match="must be even"):
        create_problem("cavity", {"cells": 9})


def test_pieces_on_two_cores_give_the_gradient_of_one():
    """Points and conditions are cut in pieces; values, gradients and residuals at the points stay the same."""
    found = []
    for threads in (1, 2):
        task = make(
            "physicsformer",
            problem="burgers1d",
            data={"hard_conditions": False, "interior": 300, "border": 300},
            model_options={"tokens": 2, "hidden": [8]},
        )
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            loss = total(task.double())
        finally:
            torch.set_num_threads(before)
        grads = [p.grad.reshape(-1) for p in task.model.parameters() if p.grad is not None]
        found.append(torch.cat([torch.tensor([loss]).double(), task.points.squares, *grads]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
