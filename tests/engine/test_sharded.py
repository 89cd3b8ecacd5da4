"""Two gloo processes, with whole parameters (ddp) and with parameters shared out (fsdp), do what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import run

ROOT = Path(__file__).parents[2]
MODEL = ["data=digits", "model.patch_size=2", "model.dim=16", "model.num_heads=2", "model.depth=2"]
# A rate that does not know how long the run is, so that one epoch and a resumed second one are two epochs.
COMMON = [
    *MODEL,
    "data.augment=false",
    "data.eval_batch_size=181",
    "task.schedule=constant",
    "task.warmup_fraction=0",
    "callbacks.ema_decay=0.9",
    "callbacks.progress=none",
    "trainer.max_epochs=2",
]
TWO = ["trainer.accelerator=cpu", "data.batch_size=32"]


def start(*jobs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).parent / "ranks.py"), json.dumps(jobs)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    done = start(
        (1, [*COMMON, "data.batch_size=64", f"hydra.run.dir={base}/one"]),
        (2, [*COMMON, *TWO, "trainer=ddp", f"hydra.run.dir={base}/ddp"]),
        (2, [*COMMON, *TWO, "trainer=fsdp", "trainer.max_epochs=1", f"hydra.run.dir={base}/fsdp"]),
        (2, [f"resume={base}/fsdp", "trainer.max_epochs=2"]),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return base


def close(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        other = two[name]
        if name.endswith("qkv.bias"):
            # A bias of the keys shifts all scores of a query alike: its gradient is rounding noise, which Adam scales.
            tensor, other = (t.view(3, -1)[[0, 2]] for t in (tensor, other))
        assert (tensor - other).abs().max() < 2e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_equal_one(runs, trainer):
    """Weights after two epochs, averaged ones and the optimiser's moments; fsdp was stopped and resumed between the two."""
    one, two = (torch.load(runs / n / "checkpoints/last.ckpt", weights_only=True) for n in ("one", trainer))
    assert one["global_step"] == two["global_step"] == 40
    close(one["state_dict"], two["state_dict"])
    close(one["ema"], two["ema"])
    moments = [c["optimizer_states"][0]["state"] for c in (one, two)]
    assert moments[0].keys() == moments[1].keys()
    for number, first in moments[0].items():
        torch.testing.assert_close(moments[1][number]["exp_avg"], first["exp_avg"], rtol=1e-2, atol=1e-5)
    close(*(load_file(runs / n / "weights.safetensors") for n in ("one", trainer)))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_metrics_count_every_sample_once(runs, trainer):
    """363 test samples, 182 and 181 to a process, in two batches each: nothing is padded, nothing hangs."""
    one, two = (json.loads((runs / n / "result.json").read_text()) for n in ("one", trainer))
    assert two["test"]["accuracy"] * 363 == pytest.approx(round(two["test"]["accuracy"] * 363), abs=1e-3)
    assert two["test"] == pytest.approx(one["test"], abs=1e-4)
    assert two["valid"] == pytest.approx(one["valid"], abs=1e-4)
    assert two["cost"]["parameters"] == one["cost"]["parameters"]


@pytest.mark.slow
def test_weights_of_shared_parameters_load_anywhere(runs):
    import zoo

    predictor = zoo.load(runs / "fsdp")
    assert predictor.card["config"]["trainer"]["strategy"] == "fsdp"
    assert predictor.card["metrics"]["accuracy"] > 0.1


@pytest.mark.slow
def test_muon_sees_whole_matrices(tmp_path):
    """An epoch with parameters shared out, stopped and resumed for another, ends where one process does."""
    muon = [*COMMON, "task.optimizer=muon"]
    done = start(
        (1, [*muon, "data.batch_size=64", f"hydra.run.dir={tmp_path}/one"]),
        (2, [*muon, *TWO, "trainer=fsdp", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}/fsdp"]),
        (2, [f"resume={tmp_path}/fsdp", "trainer.max_epochs=2"]),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for n in ("one", "fsdp")
    )
    for name, tensor in one.items():
        # The iteration makes equal what is rounding noise and what is not; a step is up to 4e-4.
        assert (tensor - two[name]).square().mean().sqrt() < 2e-3, name


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["trainer.devices=1"], "shares parameters among processes, and here is only one"),
        (["task=pinn"], "task 'pinn' takes many gradients a step"),
    ],
)
def test_what_cannot_be_shared_is_said(overrides, text, tmp_path, capsys):
    model = [] if "task=pinn" in overrides else MODEL
    arguments = ["trainer=fsdp", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path}"]
    assert run(*overrides, *model, *arguments) == 2
    assert text in capsys.readouterr().err
