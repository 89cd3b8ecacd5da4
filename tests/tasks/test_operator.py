"""Neural operators: quadrature invariances, data, and learning."""

import numpy as np
import pytest
import torch

from data import create_data
from data.errors import DataError
from data.operator1d import burgers_flow
from tasks.operator import OperatorTask
from zoo.attention.registry import list_attention
from zoo.attention.slots import misfit, resolve_slots
from zoo.errors import ConfigError
from zoo.models.registry import build_model, model_slots


def make(name="tno", attention="softmax", **options):
    torch.manual_seed(0)
    return build_model(
        name, resolve_slots(model_slots(name), {"name": attention}), **{"dim": 16, "depth": 2, **options}
    ).double()


def weighted():
    slot = model_slots("tno")["encoder"]
    # none does not mix; hstu's weights are no normalised exponentials, so a log weight has no such meaning there.
    return [n for n in list_attention() if misfit(n, slot) is None and n not in ("none", "hstu")]


@pytest.mark.parametrize("attention", weighted())
def test_a_node_split_in_two_halves_changes_nothing(attention):
    model = make(attention=attention)
    x, u = torch.linspace(0, 0.9, 10).double(), torch.randn(2, 10).double()
    w = torch.rand(10).double() + 0.5
    expected = model(u, x, w)
    again = torch.cat((torch.arange(10), torch.tensor([3])))
    halved = w[again].clone()
    halved[[3, 10]] /= 2
    found = model(u[:, again], x[again], halved)
    torch.testing.assert_close(
        found[:, :10], expected, rtol=1e-5, atol=1e-7
    )  # some add 1e-6 to a denominator
    assert (model(u[:, again], x[again], w[again])[:, :10] - expected).abs().max() > 1e-6


def test_refining_the_grid_converges():
    model, errors = make(), []
    for n in (16, 32, 64, 512):
        x = torch.arange(n).double() / n
        errors.append(model(torch.sin(2 * torch.pi * x)[None] ** 3, x)[0, :: n // 16])
    gaps = [(e - errors[-1]).abs().max().item() for e in errors[:-1]]
    assert gaps[2] < 1e-6 or gaps[2] < gaps[0] / 4


def test_patch_operator_sees_the_same_function_at_any_resolution():
    model, found = make("fano", patches=4, modes=6), []
    for n in (64, 256):
        x = (torch.arange(n).double() + 0.5) / n
        found.append(
            model.embed.weight.new_tensor(0)
            + (torch.cos(2 * torch.pi * x)[None].unflatten(1, (4, -1)) @ model.basis(n // 4, x) / (n // 4))
        )
    assert (found[0] - found[1]).abs().max() < 2e-3
    basis = model.basis(16, x)
    torch.testing.assert_close(basis.T @ basis / 16, torch.eye(6).double())
    with pytest.raises(ConfigError, match="do not make 4 patches"):
        model(torch.zeros(1, 18).double())


def test_flow_against_cole_hopf_like_invariants():
    """Momentum is conserved, energy falls, and halving the step changes nothing."""
    x = np.arange(128) / 128
    start = (np.sin(2 * np.pi * x) + 0.3)[None]
    end = burgers_flow(start, 0.02, 0.3, 200)
    assert end.mean() == pytest.approx(start.mean(), abs=1e-12)
    assert (end**2).mean() < (start**2).mean()
    assert np.abs(end - burgers_flow(start, 0.02, 0.3, 400)).max() < 1e-6


@pytest.mark.parametrize("name", ["tno", "fano"])
def test_learning(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    data = create_data("operator1d", train=16, valid=4, test=4, duration=0.05)
    data.setup()
    task = OperatorTask(make(name).float(), data, lr=1e-2)
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.Adam(task.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = task.losses(batch)["rel_l2"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    task.update_metrics(next(iter(data.test_dataloader())), task.metrics["test"], "test")
    assert set(task.compute_metrics("test")) == {"rel_l2", "rel_l2_64", "rel_l2_128", "rel_l2_256"}
    assert 0 < data.compute_baselines()["ridge_regression"]["rel_l2"] < 1
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        task.update_metrics(next(iter(data.test_dataloader())), task.metrics["test"], "test")
    assert [p.name for p in task.figures(tmp_path)] == ["functions.png"]


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    sizes = {"train": 6, "valid": 2, "test": 2, "duration": 0.01}
    first = create_data("operator1d", **sizes)
    first.setup()
    (file,) = (tmp_path / "operator1d").iterdir()
    whole = file.read_bytes()
    for damage in (b"", b"not an array", whole[: len(whole) // 2]):
        file.write_bytes(damage)
        again = create_data("operator1d", **sizes)
        again.setup()
        assert again.data_hash() == first.data_hash() and file.read_bytes() == whole


def test_bad_input():
    with pytest.raises(DataError, match="data.nodes: 60 must divide 256"):
        create_data("operator1d", nodes=60)
    with pytest.raises(DataError, match="data.refine: 96 must divide 256"):
        create_data("operator1d", refine=[128, 96])
    with pytest.raises(ConfigError, match="positive numbers"):
        make()(torch.zeros(1, 4).double(), torch.zeros(4).double(), torch.zeros(4).double())
