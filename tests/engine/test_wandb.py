"""Real W&B runs without a network: what their files hold, read back record by record."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import losses, run

ROOT = Path(__file__).parents[2]
SMALL = ["data=digits", "model.patch_size=4", "model.dim=16", "model.num_heads=2", "model.depth=1"]
SMALL += ["callbacks.progress=none", "logger=wandb"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two jobs without a key; the first diverges."""
    from tasks.classification import Classification

    folder, real = tmp_path_factory.mktemp("sweep"), Classification.losses

    def poisoned(self, batch):
        bad = "none" in str(self.trainer.default_root_dir) and self.global_step == 3
        return {k: v * float("nan") if bad else v for k, v in real(self, batch).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(Classification, "losses", poisoned)
        place = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${attention.name}"]
        assert run("-m", *SMALL, "attention=none,softmax", "trainer.max_epochs=1", *place) == 2
    return folder


def test_a_run_carries_everything(sweep):
    from offline_wandb import read_folder

    folder = sweep / "softmax"
    (found,) = read_folder(folder)
    result = json.loads((folder / "result.json").read_text())
    assert found.config["attention"]["name"] == "softmax" and found.config["task"]["name"] == "vit"
    assert found.config["seed"] == 0 and {"vit", "softmax"} <= found.tags
    assert found.history["train/loss"] == pytest.approx(losses(folder))
    assert found.history["test/accuracy"][-1] == pytest.approx(result["test"]["accuracy"])
    assert found.summary["cost/parameters"] == result["cost"]["parameters"]
    baseline = result["baselines"]["majority_class"]["accuracy"]
    assert found.summary["baseline/majority_class/accuracy"] == pytest.approx(baseline)
    for name in result["figures"]:  # the pictures lie beside the file and are named in it
        (picture,) = found.history[name.removesuffix(".png") + "/path"]
        (stored,) = folder.glob(f"wandb/offline-run-*/files/{picture}")
        assert stored.read_bytes() == (folder / name).read_bytes()
    (table,) = found.history["slots/path"]
    (stored,) = folder.glob(f"wandb/offline-run-*/files/{table}")
    assert json.loads(stored.read_text())["data"] == [["encoder", "self", "softmax", "chosen"]]
    sizes = {name: (folder / name).stat().st_size for name in ("weights.safetensors", "weights.json")}
    assert found.artifacts["model"] == sizes


def test_a_sweep_is_a_group_of_runs_of_their_own(sweep):
    """The job after one that failed does not log into its run."""
    from offline_wandb import read_folder

    (failed,), (ended,) = (read_folder(sweep / name) for name in ("none", "softmax"))
    assert failed.id != ended.id and failed.group == ended.group == sweep.name
    assert [r.config["attention"]["name"] for r in (failed, ended)] == ["none", "softmax"]
    assert failed.exit_code == 1 and "model" not in failed.artifacts
    assert ended.exit_code == 0 and "model" in ended.artifacts


@pytest.mark.slow
def test_a_killed_run_goes_on_under_its_id(tmp_path, monkeypatch):
    from offline_wandb import BLOCK, read_folder

    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = [*SMALL, "trainer.max_epochs=8", "callbacks.checkpoint_every_steps=5"]
    environment = {
        k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"
    }  # a service of its own, which dies with it
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments, f"hydra.run.dir={tmp_path}"],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # W&B writes its file in blocks; a kill loses what has not filled one.
    while sum(p.stat().st_size for p in tmp_path.glob("wandb/*/*.wandb")) < BLOCK and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "result.json").exists(), "killed too late to test anything"
    assert run(f"resume={tmp_path}") == 0
    before, after = read_folder(tmp_path)
    assert before.id == after.id == (tmp_path / "wandb_id").read_text()
    assert before.config["task"]["name"] == "vit" and len(before.history["train/loss"]) > 5
    assert before.exit_code is None and after.exit_code == 0 and "model" in after.artifacts
    assert after.history["train/loss"] == pytest.approx(losses(tmp_path)[-len(after.history["train/loss"]) :])
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(after.history["train/loss"]) < result["steps"] == after.history["trainer/global_step"][-1]


def test_wandb_with_a_key_but_no_network_goes_offline(tmp_path, monkeypatch, capsys):
    """A server that refuses connections stands for the cut network."""
    from tasks.engine import wandb_logger

    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT_S", 3)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    folder = tmp_path / "r"
    began = time.monotonic()
    status = run(*SMALL, "trainer.max_epochs=1", f"hydra.run.dir={folder}")
    assert status == 0 and time.monotonic() - began < 90
    assert "logged offline" in capsys.readouterr().out
    assert (folder / "result.json").exists() and list(folder.glob("wandb/offline-run-*"))


def test_a_run_ends_without_wandb(tmp_path, monkeypatch, capsys):
    """Its service refuses to start: the training goes on with metrics.csv."""
    import wandb

    def refuse(*args, **kwargs):
        if kwargs.get("mode") != "disabled":
            raise wandb.errors.CommError("no service")
        return real(*args, **kwargs)

    real = wandb.init
    monkeypatch.setattr(wandb, "init", refuse)
    assert run(*SMALL, "trainer.max_epochs=1", "logger.mode=offline", f"hydra.run.dir={tmp_path}") == 0
    assert "W&B offline does not start (CommError); metrics.csv has the run" in capsys.readouterr().out
    assert (tmp_path / "result.json").exists() and losses(tmp_path)
