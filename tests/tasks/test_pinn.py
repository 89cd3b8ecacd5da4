"""The physics-informed task: training, resuming, options, every attention variant."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tasks.physics.objective import Objective
from tests.tasks.pinn_tasks import fit, make, total
from zoo.attention.registry import get_attention, list_attention
from zoo.attention.slots import misfit, resolve_slots
from zoo.errors import CapabilityError, ConfigError, ZooError
from zoo.models.registry import get_model


@pytest.mark.parametrize("model", ["physicsformer", "pinn_mlp"])
def test_training_lowers_the_loss_through_both_phases(model, tmp_path):
    options = {"tokens": 2, "hidden": [8], "head": [8]} if model == "physicsformer" else {}
    task = make(model, model_options=options, lr=1e-2)
    before = total(task)
    trainer = fit(task, tmp_path, 14)
    assert trainer.global_step == 14 or task.exit_reason
    assert task.objective.dtype == torch.float64
    assert total(task) < 0.5 * before


@pytest.mark.parametrize(("half", "method"), [(4, "ssbroyden"), (8, "ssbroyden"), (8, "gauss_newton")])
def test_resumed_run_equals_the_uninterrupted_one(half, method, tmp_path):
    """The break falls into phase one (4) or phase two (8)."""
    whole = make(second=method)
    fit(whole, tmp_path, 12)
    first = make(second=method)
    fit(first, tmp_path, half).save_checkpoint(tmp_path / "half.ckpt")
    second = make(second=method)
    fit(second, tmp_path, 12, resume=tmp_path / "half.ckpt")
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"second": "lbgfs"}, "did you mean 'lbfgs'"),
        ({"derivatives": "taylr"}, "unknown task.derivatives"),
        ({"adaptive": 2}, "in \\[0, 1\\]"),
        ({"causal": [1.0, 0.1], "problem": "reaction"}, "rising list"),
        ({"chunk": 0}, "task.chunk=0 must be at least 1"),
        ({"history": 0}, "task.history=0 must be at least 1"),
        ({"first_steps": -3}, "task.first_steps=-3 must be at least 0"),
        ({"decay": 0.0}, "task.decay=0.0 is outside"),
        ({"floor": -2.0}, "floor=-2.0"),
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


def test_a_variants_own_loss_is_announced_as_left_out(caplog):
    with caplog.at_level("WARNING", "zoo.pinn"):
        make("physicsformer", attention="moh", model_options={"tokens": 2}, derivatives="reverse")
    assert "'moh' has a loss of its own" in caplog.text
    caplog.clear()
    make("physicsformer", model_options={"tokens": 2})
    assert "loss of its own" not in caplog.text


@pytest.mark.parametrize("first_steps, moves", [(2, True), (0, False)])
def test_a_line_search_sees_one_function(first_steps, moves, tmp_path):
    few = {"tokens": 2, "hidden": [8], "head": [8]}
    task = make("physicsformer", attention="causal_vit", model_options=few, first_steps=first_steps)
    masks = [m for m in task.model.modules() if hasattr(m, "passes")]
    before = [int(m.passes) for m in masks]
    fit(task, tmp_path, 2)
    assert masks and [int(m.passes) > b for m, b in zip(masks, before, strict=True)] == [moves] * len(masks)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_way_out_and_keeps_the_best_state(tmp_path):
    task = make(first_steps=20)
    good = task.objective.backward

    def poisoned(*args):
        terms = good(*args)
        return terms if task.global_step < 6 else {k: v * float("nan") for k, v in terms.items()}

    task.objective.backward = poisoned
    keep = ModelCheckpoint(tmp_path, filename="best", monitor="valid/loss", save_last=True)
    with pytest.raises(ZooError, match="not finite at step 6.*best.ckpt and last.ckpt.*smaller task.lr"):
        fit(task, tmp_path, 12, callbacks=[keep])
    for name in ("best", "last"):
        kept = torch.load(tmp_path / f"{name}.ckpt", weights_only=False)
        assert kept["global_step"] == 4 and all(
            v.isfinite().all() for k, v in kept["state_dict"].items() if k.startswith("model.")
        )


def test_conditions_on_unknown_fields_are_refused():
    task = make(problem="burgers1d", data={"hard_conditions": False})
    conditions = [replace(c, fields=("w",)) for c in task.data.conditions()]
    with pytest.raises(ConfigError, match="unknown field of condition 'initial' 'w'; choose from: u"):
        Objective(task.model, task.unknowns, task.problem, conditions)
