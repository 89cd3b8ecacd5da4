"""The physics-informed task: training, resuming, balancing, optimisers, errors."""

import lightning as L
import numpy as np
import pytest
import torch

from data import create_data
from data.problems import create_problem
from data.problems.baselines import field_errors
from tasks.optimizers.quasi_newton import QuasiNewton
from tasks.optimizers.soap import Soap
from tasks.optimizers.symmetric import ROWS, Update, multiply, scaled_identity
from tasks.physics.balance import SCHEMES, Balance
from tasks.pinn import PinnTask
from zoo.attention.registry import get_attention, list_attention
from zoo.attention.slots import misfit, resolve_slots
from zoo.errors import CapabilityError, ConfigError, DataError, ZooError
from zoo.models.registry import build_model, get_model


def make(
    model="pinn_mlp",
    problem="reaction",
    physics=None,
    data=None,
    model_options=None,
    attention="softmax",
    **options,
):
    torch.manual_seed(0)
    points = create_data(
        "pinn", problem=problem, physics=physics, interior=48, border=20, valid_points=50, **(data or {})
    )
    points.setup()
    arguments = {"dim": 8, **PinnTask.model_arguments(points), **(model_options or {})}
    slots = get_model(model).slots(**arguments)
    factories = resolve_slots(slots, {"name": attention}) if slots else {}
    network = build_model(model, factories, **arguments)
    return PinnTask(network, points, **{"first_steps": 6, "resample_every": 3, **options})


def total(task):
    """The loss, with its gradients left in the weights."""
    return float(task._total(task.objective.backward(task.balance, task.points)))


def fit(task, folder, steps, resume=None):
    task.data.steps_per_epoch = 4
    task.data._datasets = {}
    task.data.setup()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=task.data, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("second", ["ssbroyden", "bfgs", "lbfgs"])
def test_quasi_newton_minimises_rosenbrock(second):
    x = torch.tensor([-1.2, 1.0] * 5, dtype=torch.float64, requires_grad=True)
    optimizer = QuasiNewton([x], second)

    def closure():
        optimizer.zero_grad()
        loss = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        loss.backward()
        return loss

    for _ in range(400):
        optimizer.step(closure)
        if optimizer.exit_reason:
            break
    assert (x.detach() - 1).abs().max() < 1e-6
    assert optimizer.exit_reason


def test_quasi_newton_survives_nan_and_keeps_the_best():
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    optimizer = QuasiNewton([x], "bfgs")

    def closure():
        optimizer.zero_grad()
        loss = (x - 1).square().sum() if float(x.detach()) > 2.5 else (x * float("nan")).sum()
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
    assert torch.isfinite(x).all() and 2.5 < float(x.detach()) <= 3.0
    assert "line search" in optimizer.exit_reason or "tolerance" in optimizer.exit_reason


@pytest.mark.parametrize("size", [5, 64, 150])
def test_symmetric_blocks_equal_the_dense_matrix(size):
    x, factors = torch.randn(size, dtype=torch.float64), torch.randn(2, size, 2, dtype=torch.float64)
    core = torch.randn(2, 2, 2, dtype=torch.float64)
    core = core + core.mT
    blocks, dense = scaled_identity(x, 0.7), 0.7 * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(multiply(blocks, x), dense @ x)
    for n in range(2):
        dense = 0.9 * dense + factors[n] @ core[n] @ factors[n].T
        torch.testing.assert_close(multiply(blocks, x, Update(0.9, factors[n], core[n])), dense @ x)
    assert sum(b.numel() for b in blocks) <= size * (size + ROWS) / 2


def test_soap_beats_adam_on_an_ill_conditioned_matrix():
    target = torch.randn(6, 6) * torch.logspace(0, -2, 6)
    mix = torch.randn(6, 6)
    losses = {}
    for cls, lr in ((Soap, 0.03), (torch.optim.Adam, 0.03)):
        w = torch.zeros(6, 6, requires_grad=True)
        optimizer = cls([w], lr=lr)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (mix @ (w - target)).square().sum()
            loss.backward()
            optimizer.step()
        losses[cls] = float(loss.detach())
    assert losses[Soap] < losses[torch.optim.Adam]


@pytest.mark.parametrize("model", ["physicsformer", "pinn_mlp"])
def test_training_lowers_the_loss_through_both_phases(model, tmp_path):
    options = {"tokens": 2, "hidden": [8], "head": [8]} if model == "physicsformer" else {}
    task = make(model, model_options=options, lr=1e-2)
    before = total(task)
    trainer = fit(task, tmp_path, 14)
    assert trainer.global_step == 14 or task.exit_reason
    assert task.objective.dtype == torch.float64
    assert total(task) < 0.5 * before


@pytest.mark.parametrize("half", [4, 8])
def test_resumed_run_equals_the_uninterrupted_one(half, tmp_path):
    """The break falls into phase one (4) or phase two (8)."""
    whole = make()
    fit(whole, tmp_path, 12)
    first = make()
    fit(first, tmp_path, half).save_checkpoint(tmp_path / "half.ckpt")
    second = make()
    fit(second, tmp_path, 12, resume=tmp_path / "half.ckpt")
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"second": "lbgfs"}, "did you mean 'lbfgs'"),
        ({"derivatives": "taylr"}, "unknown task.derivatives"),
        ({"adaptive": 2}, "in \\[0, 1\\]"),
        ({"causal": [1.0, 0.1], "problem": "reaction"}, "rising list"),
        ({"chunk": 0}, "task.chunk=0 must be at least 1"),
        ({"balance": "gradnorm"}, "did you mean 'grad_norm'"),
        ({"weights": {"inital": 2.0}}, "unknown loss term"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ConfigError, match=text):
        make(**options)


@pytest.mark.parametrize("attention", list_attention())
def test_every_variant_trains_or_says_why_not(attention):
    slot = get_model("physicsformer").slots()["encoder"]
    if misfit(attention, slot) is not None:
        with pytest.raises(CapabilityError, match=attention):
            resolve_slots({"encoder": slot}, {"name": attention}, task="pinn")
        return
    options = {
        "model": "physicsformer",
        "attention": attention,
        "model_options": {"tokens": 2, "hidden": [8], "head": [8]},
    }
    if attention == "affine":
        with pytest.raises(CapabilityError, match="mixes collocation points"):
            make(**options)
        return
    task = make(**options)
    assert np.isfinite(total(task))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in task.model.parameters())


def test_variants_that_are_not_smooth_are_announced(caplog):
    rough = [
        n
        for n in list_attention(pattern="self", double_backward=True)
        if not get_attention(n).capabilities.smooth
    ]
    if not rough:
        pytest.skip("no variant with second derivatives is declared not smooth")
    slot = get_model("physicsformer").slots()["encoder"]
    name = next((n for n in rough if misfit(n, slot) is None), None)
    if name is None:
        pytest.skip("no such variant fits the encoder")
    with caplog.at_level("WARNING", "zoo.pinn"):
        make("physicsformer", attention=name, model_options={"tokens": 2})
    assert "not smooth" in caplog.text and name in caplog.text


def test_predictor_writes_fields(tmp_path):
    from zoo.predict.pinn import TaskPredictor

    task = make(problem="kovasznay")
    predictor = TaskPredictor(task.model, {"preprocessing": task.data.preprocessing()})
    predictor.options({"out": str(tmp_path / "flow.npz")})
    found = predictor.predict("grid:4x3")
    with np.load(tmp_path / "flow.npz") as saved:
        at = torch.from_numpy(np.stack((saved["x"], saved["y"]), 1)).float()
        np.testing.assert_allclose(saved["v"], task.model(at)[:, 1].detach().numpy(), rtol=1e-5, atol=1e-6)
    assert found["points"] == 12 and "grid:4x3: 12 points" in predictor.format("grid:4x3", found)
    (tmp_path / "points.csv").write_text("y,x\n0.5,0.1\n1.5,0.2\n")
    assert predictor.preprocess(str(tmp_path / "points.csv")).tolist() == [[0.1, 0.5], [0.2, 1.5]]
    for bad, text in (
        ("grid:4", "one positive number per coordinate"),
        ([[5.0, 0.0]], "outside the trained box"),
    ):
        with pytest.raises(DataError, match=text):
            predictor.predict(bad)


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


def test_a_loss_that_is_not_finite_ends_the_run_with_a_way_out(tmp_path):
    task = make()
    with torch.no_grad():
        task.model.head.bias.fill_(float("nan"))
    with pytest.raises(ZooError, match="not finite at step 0.*smaller task.lr"):
        fit(task, tmp_path, 3)


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


def test_predictor_derives_velocities_from_a_stream_function(tmp_path):
    from zoo.predict.pinn import TaskPredictor

    physics = {"measurements": 30, "snapshots": 4, "duration": 0.3, "formulation": "stream"}
    task = make(problem="ns_inverse", physics=physics).double()
    predictor = TaskPredictor(task.model, {"preprocessing": task.data.preprocessing()})
    predictor.options({"out": str(tmp_path / "flow.csv")})
    predictor.predict("grid:3x4x2")
    table = np.genfromtxt(tmp_path / "flow.csv", delimiter=",", names=True)
    assert table.dtype.names == ("x", "y", "t", "s", "p", "u", "v")
    at = torch.from_numpy(np.stack([table[c] for c in "xyt"], 1))
    up, down = (task.model(at + torch.tensor([0.0, h, 0.0]))[:, 0] for h in (1e-5, -1e-5))
    np.testing.assert_allclose(table["u"], ((up - down) / 2e-5).detach().numpy(), atol=1e-6)


def test_vtk_by_meshio_or_a_way_out(tmp_path):
    from zoo.predict.pinn import TaskPredictor

    task = make(problem="kovasznay")
    predictor = TaskPredictor(task.model, {"preprocessing": task.data.preprocessing()})
    predictor.options({"out": str(tmp_path / "flow.vtk")})
    try:
        import meshio
    except ImportError:
        with pytest.raises(ConfigError, match="pip install meshio"):
            predictor.predict("grid:4x3")
        return
    predictor.predict("grid:4x3")
    mesh = meshio.read(tmp_path / "flow.vtk")
    assert len(mesh.points) == 12 and set(mesh.point_data) == {"u", "v", "p"}
