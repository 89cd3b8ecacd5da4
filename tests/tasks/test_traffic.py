"""The traffic task: loss, training on a small generated road network, attention keys, prediction from CSV."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data import create_data
from data.sampler import BatchKey
from tasks.traffic import Traffic, masked_mae
from tests.commands import forked, run
from zoo.attention.registry import list_attention
from zoo.attention.slots import resolve_slots
from zoo.errors import CapabilityError, ConfigError
from zoo.models.registry import build_model, get_model

ROOT = Path(__file__).parents[2]
SMALL = [
    "task=traffic",
    "data=road_network",
    "data.days=21",
    "data.num_sensors=6",
    "data.lag_steps=[24]",
    "model.patch_steps=6",
    "model.spatial_depth=1",
    "callbacks.progress=lines",
]


@pytest.fixture(scope="module")
def roads():
    data = create_data("road_network", days=21, num_sensors=6, lag_steps=[24])
    data.setup()
    return data


def make_task(roads, name, attention="softmax", **options):
    options = {**Traffic.model_arguments(roads), **options}
    slots = resolve_slots(get_model(name).slots(**options), {"name": attention})
    return Traffic(build_model(name, slots, **options), roads)


def test_loss_without_missing_cells_is_plain_mae():
    forecast, target = torch.randn(2, 3, 4, 5)
    seen = torch.ones(3, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(masked_mae(forecast, target, seen), (forecast - target).abs().mean())


def test_missing_cells_move_neither_loss_nor_gradient():
    forecast = torch.randn(3, 4, 5, requires_grad=True)
    target, seen = torch.randn(3, 4, 5), torch.rand(3, 4, 5) > 0.4
    target[~seen] = torch.nan  # whatever stands there
    loss = masked_mae(forecast, target, seen)
    (grad,) = torch.autograd.grad(loss, forecast)
    assert (grad[~seen] == 0).all() and (grad[seen] != 0).all()
    moved = forecast.detach() + (~seen) * 1e6
    torch.testing.assert_close(masked_mae(moved, target, seen), loss.detach())
    torch.testing.assert_close(loss, (forecast - target)[seen].abs().mean())
    nothing = masked_mae(forecast, target, torch.zeros_like(seen))
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, forecast)[0].any()


def test_hidden_inputs_are_marked_as_missing(roads):
    task = make_task(roads, "stid")
    task.hide_sensors, task.hide_looks = 0.5, 0.5
    batch = roads.dataset("train")[BatchKey(np.arange(30, 200), 0, 0)]
    hidden = task.hide(batch)
    sensors = hidden["history_seen"].any(1)
    assert 0.3 < sensors.float().mean() < 0.7
    assert (hidden["history"][~hidden["history_seen"]] == 0).all()
    looks = hidden["known_seen"].flatten(2).any(2)
    assert 0.3 < looks.float().mean() < 0.7
    assert (hidden["target"] == batch["target"]).all() and batch["history_seen"].any(1).all()
    with pytest.raises(ConfigError, match=r"hide_looks=1\.5"):
        Traffic(task.model, roads, hide_looks=1.5)


def test_figures_of_two_processes_show_every_window_in_order(roads, tmp_path, monkeypatch):
    task = make_task(roads, "stid").eval()
    drawn = []
    monkeypatch.setattr("tasks._traffic_figures.draw", lambda *args: drawn.append(args[3:]))

    def figures():
        task.on_test_epoch_start()
        with torch.no_grad():
            for batch in roads.test_dataloader():
                task.update_metrics(batch, task.metrics["test"], "test")
        task.gather()
        task.figures(tmp_path)

    def one_of_two(rank):
        figures()
        one, both = drawn
        assert len(roads.test_dataloader().sampler.order()) < len(one[0]) == len(both[0])
        for expected, found in zip(one, both, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)

    figures()
    assert forked(one_of_two, 2, tmp_path) == [0, 0]


def test_a_run_beats_persistence_and_reports_by_step(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(*SMALL, "trainer.max_epochs=6", "task.lr=5e-3", f"hydra.run.dir={folder}") == 0
    printed = capsys.readouterr().out
    for name in ("copy_last", "historical_average", "ridge"):
        assert f"{name} (baseline)" in printed
    result = json.loads((folder / "result.json").read_text())
    assert set(result["test"]) >= {"mae", "rmse", "mape", "mae_h1", "mae_h3", "mae_h6", "rmse_h6"}
    assert result["test"]["mae"] < result["baselines"]["copy_last"]["mae"]
    assert result["monitor"] == "mae" and result["split"]["rows"]["train"][0].startswith("2024-01-01")
    assert {Path(f).stem for f in result["figures"]} == {
        "forecast",
        "error_by_hour",
        "error_map",
        "attention_map",
    }
    check_prediction(folder)


def check_prediction(folder):
    """The stored weights forecast from a CSV what the task forecast for the same window."""
    from zoo.predict import get_predictor
    from zoo.pretrained.weights import load_model

    data = create_data("road_network", days=21, num_sensors=6, lag_steps=[24])
    data.setup()
    series, start = data.series, int(data.starts["test"][3])
    path = folder / "recent.csv"
    with path.open("w") as file:
        file.write("time," + ",".join(reversed(series.sensors)) + "\n")
        for row in range(start - 40, start + 6):
            cells = ["" if np.isnan(v) else f"{v:.9g}" for v in series.values[row, ::-1]]
            file.write(",".join([str(series.times[row]), *cells]) + "\n")
    model, card = load_model(folder / "weights.safetensors")
    predictor = get_predictor(card)(model.eval(), card)
    got = predictor.predict(path)
    batch = data.dataset("test")[BatchKey(np.array([3]), -1, 0)]
    inputs = {k: v for k, v in batch.items() if not k.startswith("target")}
    with torch.no_grad():
        wanted = model(**inputs)[0].clamp_min(0)
    torch.testing.assert_close(torch.tensor(got["forecast"]), wanted, atol=2e-3, rtol=1e-4)
    assert got["times"][0] == str(series.times[start + 6]) and got["sensors"] == series.sensors
    assert got["missing"] == int((~batch["history_seen"]).sum())


@pytest.mark.parametrize("name", ["gman", "staeformer"])
@pytest.mark.parametrize("attention", list_attention())
def test_every_attention_trains_or_refuses_with_the_reason(roads, name, attention):
    batch = roads.dataset("train")[BatchKey(np.arange(40, 44), 0, 0)]
    options = {"patch_steps": 2, "temporal_depth": 1, "spatial_depth": 1} if name == "staeformer" else {}
    try:
        task = make_task(roads, name, attention, **options)
    except (CapabilityError, ConfigError) as error:
        assert attention not in ("softmax", "none", "linear")
        assert f"attention {attention!r}" in str(error) and len(str(error)) > 40
        return
    loss = sum(task.losses(batch).values())
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in task.model.parameters())


def test_graph_and_statistics_reach_the_model(roads):
    task = make_task(roads, "staeformer", graph="mask", patch_steps=6)
    torch.testing.assert_close(task.model.graph.adjacency, roads.adjacency())
    np.testing.assert_array_equal(task.model.scaler.profile, roads.profile)
    batch = roads.dataset("test")[BatchKey(np.arange(5), -1, 0)]
    zero = {k: v for k, v in batch.items() if not k.startswith("target")}
    torch.nn.init.zeros_(task.model.head.weight)
    future = (batch["clock"][:, None] + 6 + torch.arange(6)) % 168
    torch.testing.assert_close(task.model(**zero), torch.from_numpy(roads.profile)[future])


def test_members_of_an_ensemble_learn_alone_and_answer_together(roads):
    ensemble = make_task(roads, "traffic_ensemble", members=2, options={"patch_steps": 6, "dropout": 0.0})
    batch = roads.dataset("train")[BatchKey(np.arange(40, 44), 0, 0)]
    ensemble.losses(batch)["mae"].backward()
    forecasts = []
    for member in ensemble.model.networks:
        alone = Traffic(member, roads)
        got = [p.grad.clone() for p in member.parameters()]
        member.zero_grad()
        alone.losses(batch)["mae"].backward()
        for grad, parameter in zip(got, member.parameters(), strict=True):
            torch.testing.assert_close(2 * grad, parameter.grad)
        forecasts.append(alone.forecast(batch))
    assert not torch.equal(*forecasts)
    ensemble.eval()
    torch.testing.assert_close(ensemble.forecast(batch), sum(forecasts) / 2)
    with pytest.raises(ConfigError, match="num_sensors comes from the data"):
        make_task(roads, "traffic_ensemble", options={"num_sensors": 3})
    with pytest.raises(ConfigError, match="did you mean 'staeformer'"):
        make_task(roads, "traffic_ensemble", network="staformer")
