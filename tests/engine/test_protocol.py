"""What the fairness protocols promise, measured on the runs that they make."""

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tasks.engine.build import build_data, build_task
from tasks.engine.protocol import describe, settle
from tests import commands
from zoo.errors import ConfigError
from zoo.layers.flops import count_flops

ROOT = Path(__file__).parents[2]
SMALL = ["data=digits", "model.patch_size=2", "model.dim=16", "model.num_heads=2", "model.depth=1"]


def configure(*overrides):
    sys.path.insert(0, str(ROOT))
    import train  # registers the resolver

    assert train
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture(scope="module")
def digits():
    return build_data(configure(*SMALL))


def parameters(cfg, data):
    return sum(p.numel() for p in build_task(cfg, data)[0].model.parameters())


@pytest.mark.parametrize("attention", ["none", "mala", "gdn"])
def test_equal_params_matches_the_reference(attention, digits):
    cfg = configure(*SMALL, f"attention={attention}", "protocol=equal_params")
    goal = parameters(configure(*SMALL, "attention=softmax"), digits)
    assert abs(parameters(cfg, digits) / goal - 1) > 0.02, "nothing to match: the test would be empty"
    settled, record = settle(cfg, digits)
    assert record["reference_parameters"] == goal
    assert parameters(settled, digits) == pytest.approx(goal, rel=0.02)
    assert record["difference"] == pytest.approx(parameters(settled, digits) / goal - 1)
    (key,) = record["changed"]
    assert settled.model[key] == record["changed"][key] != cfg.model[key]
    assert f"{goal:,}" in describe(record)


def test_equal_params_leaves_the_reference_and_the_random_state_alone(digits):
    import torch

    before = torch.get_rng_state()
    cfg, record = settle(configure(*SMALL, "protocol=equal_params"), digits)
    assert record["changed"] == {} and record["difference"] == 0
    settle(configure(*SMALL, "protocol=equal_params", "attention=none"), digits)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_params_refuses_what_cannot_match(digits):
    arguments = [*SMALL, "protocol=equal_params", "attention=none", "protocol.adjust=depth"]
    with pytest.raises(ConfigError, match="the nearest is depth="):
        settle(configure(*arguments, "protocol.tolerance=0.0001"), digits)
    with pytest.raises(ConfigError, match="no option 'widht'"):
        settle(configure(*SMALL, "protocol=equal_params", "attention=none", "protocol.adjust=widht"), digits)


def test_equal_flops_scales_the_epochs_by_counted_flops(digits):
    cfg = configure(*SMALL, "attention=none", "protocol=equal_flops", "trainer.max_epochs=2")
    settled, record = settle(cfg, digits)
    flops = []
    for attention in ("none", "softmax"):
        task, _ = build_task(configure(*SMALL, f"attention={attention}"), digits)
        flops.append(count_flops(task.model, *task.example_inputs()))
    assert record["epochs"] == pytest.approx(2 * flops[1] / flops[0]) and record["epochs"] > 2.5
    assert settled.trainer.max_epochs * record["share"] == pytest.approx(record["epochs"])


def run(folder, *overrides):
    assert commands.run(*SMALL, *overrides, "callbacks.progress=none", f"hydra.run.dir={folder}") == 0
    return json.loads((folder / "result.json").read_text())


def test_equal_flops_runs_so_many_steps_and_validates_the_last(tmp_path):
    result = run(tmp_path, "attention=mala", "protocol=equal_flops", "trainer.max_epochs=1")
    detail = result["protocol_detail"]
    # 1,077 training digits in batches of 54 or so: one epoch of the reference.
    whole = len(build_data(configure(*SMALL)).train_dataloader())
    assert detail["epochs"] < 1 and result["steps"] == round(whole * detail["epochs"]) < whole
    spent = result["steps"] * result["cost"]["flops"]
    assert spent == pytest.approx(whole * detail["reference_flops"], rel=0.05)
    assert result["protocol"] == "equal_flops" and "accuracy" in result["valid"]


def test_equal_time_stops_by_the_clock_and_anneals_by_it(tmp_path):
    result = run(tmp_path, "protocol=equal_time", "protocol.seconds=1", "task.lr=1e-3")
    detail = result["protocol_detail"]
    # One step more than the budget at most; a step here takes far less than 0.3 CPU seconds.
    assert detail["clock"] == "process" and 1.0 <= detail["used_seconds"] < 1.3
    assert result["steps"] == detail["steps"] > 1 and "accuracy" in result["valid"]
    import torch

    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["_last_lr"][0] < 0.1 * 1e-3  # near the end of the cosine
    assert state["callbacks"]["Budget"]["used"] >= 1.0
