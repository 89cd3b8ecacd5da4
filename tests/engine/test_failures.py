"""What goes wrong in the middle of a run: not a number, no memory, a dead worker; and searches and sweeps that go on."""

import csv
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from tests import commands
from tests.commands import losses

ROOT = Path(__file__).parents[2]
SMALL = ["data=digits", "model.patch_size=4", "model.dim=16", "model.num_heads=2", "model.depth=1"]


def run(*overrides, model=SMALL):
    return commands.run(*overrides, *model, "callbacks.progress=none")


def test_not_a_number_ends_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch, capsys):
    from tasks.classification import Classification

    real = Classification.losses

    def poisoned(self, batch):
        terms = real(self, batch)
        return terms if self.global_step < 25 else {k: v * float("nan") for k, v in terms.items()}

    monkeypatch.setattr(Classification, "losses", poisoned)
    assert run("trainer.max_epochs=3", f"hydra.run.dir={tmp_path}") == 2
    assert "the loss is nan at step 26" in capsys.readouterr().err
    weights = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(w.isfinite().all() for w in weights.values())
    assert not (tmp_path / "result.json").exists()


def test_out_of_memory_halves_the_batch_and_keeps_the_step(tmp_path, monkeypatch, recwarn):
    """The allocator's own error, raised by a tensor that no machine holds, for batches above 16."""
    from tasks.classification import Classification

    real = Classification.losses

    def hungry(self, batch):
        if len(batch["label"]) > 16:
            torch.empty(1 << 60)
        return real(self, batch)

    common = ["trainer.max_epochs=1", "data.augment=false", "data.batch_size=64"]
    assert run(*common, f"hydra.run.dir={tmp_path}/whole") == 0
    monkeypatch.setattr(Classification, "losses", hungry)
    assert run(*common, f"hydra.run.dir={tmp_path}/r") == 0
    whole, result = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "r"))
    assert result["out_of_memory"] == [
        {"batch_size": 64, "next_batch_size": 32},
        {"batch_size": 32, "next_batch_size": 16},
    ]
    # The same samples make a step: as many steps as without the shortage, and nearly the same model after them.
    assert abs(result["steps"] - whole["steps"]) <= 1
    assert result["test"]["loss"] == pytest.approx(whole["test"]["loss"], rel=0.02)
    data = json.loads((tmp_path / "r" / "weights.json").read_text())["config"]
    assert data["data"]["batch_size"] == 16 and data["trainer"]["accumulate_grad_batches"] == 4
    assert any("going on with 16" in str(w.message) for w in recwarn.list)


def test_figures_and_loggers_that_fail_cost_nothing_else(tmp_path, monkeypatch):
    from tasks.classification import Classification
    from tasks.engine.csv_logger import MetricsCsv

    def broken(*args):
        raise ValueError("no font")

    monkeypatch.setattr(Classification, "figures", broken)
    monkeypatch.setattr(MetricsCsv, "log_run_extras", broken, raising=False)
    with (
        pytest.warns(UserWarning, match=r"could not be drawn \(ValueError: no font\)"),
        pytest.warns(UserWarning, match="MetricsCsv did not take figures and weights"),
    ):
        assert run("trainer.max_epochs=1", f"hydra.run.dir={tmp_path}") == 0
    assert json.loads((tmp_path / "result.json").read_text())["figures"] == []
    assert (tmp_path / "weights.safetensors").exists()


def test_memory_that_is_never_enough_is_said(tmp_path, monkeypatch, capsys):
    from tasks.classification import Classification

    monkeypatch.setattr(Classification, "losses", lambda self, batch: torch.empty(1 << 60))
    assert run("data.batch_size=6", f"hydra.run.dir={tmp_path}") == 2
    assert "out of memory with data.batch_size=3, which cannot be halved" in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_its_smaller_batches(tmp_path):
    from omegaconf import OmegaConf

    from tasks.engine.memory import remembered, smaller_batch

    sizes = {"batch_size": 8, "eval_batch_size": 6}
    cfg = OmegaConf.create({"data": sizes, "trainer": {"accumulate_grad_batches": 1}})
    with pytest.warns(UserWarning, match="going on with 4, gradients of 2 batches a step"):
        smaller = smaller_batch(cfg, tmp_path, MemoryError("no more"))
    assert smaller.data == {"batch_size": 4, "eval_batch_size": 3}
    assert remembered(cfg, tmp_path) == smaller


def test_memory_that_runs_out_in_one_of_many_processes_is_said(tmp_path):
    """The others wait inside a step: no batch is halved behind their backs."""
    import torch.distributed as dist
    from omegaconf import OmegaConf

    from tasks.engine.memory import RECORD, smaller_batch
    from zoo.errors import ZooError

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ZooError, match="process 0 of 1 with data.batch_size=8; start again with half"):
            smaller_batch(OmegaConf.create({"data": {"batch_size": 8}}), tmp_path, MemoryError("no more"))
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("launcher", ["submitit", "ray"])
def test_a_launcher_without_its_plugin_names_it(launcher, tmp_path, capsys):
    import importlib.util

    if importlib.util.find_spec(f"hydra_plugins.hydra_{launcher}_launcher"):
        pytest.skip("the plugin is installed")
    assert run("-m", f"launcher={launcher}", f"hydra.sweep.dir={tmp_path}") == 2
    err = capsys.readouterr().err
    assert f"launcher={launcher} needs a plugin of Hydra's: pip install hydra-{launcher}-launcher" in err


def test_the_slurm_launcher_takes_our_options():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir

    import train  # registers the resolver

    assert train
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["launcher=submitit"], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.max_num_timeout == 3
    assert launcher.timeout_min == 240 and launcher.gpus_per_node == 1 and launcher.cpus_per_task == 8


def test_a_dead_worker_is_named(tmp_path, monkeypatch, capsys):
    from data.base import SplitDataset

    real = SplitDataset.__getitem__

    def deadly(self, key):
        if torch.utils.data.get_worker_info() is not None and key.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key)

    monkeypatch.setattr(SplitDataset, "__getitem__", deadly)
    assert run("data.num_workers=1", "trainer.max_epochs=3", f"hydra.run.dir={tmp_path}") == 2
    assert "a data-loader worker died" in capsys.readouterr().err
    monkeypatch.setattr(SplitDataset, "__getitem__", real)
    assert run("data.num_workers=1", "trainer.max_epochs=3", f"hydra.run.dir={tmp_path}", "resume=auto") == 0
    assert len(losses(tmp_path)) == json.loads((tmp_path / "result.json").read_text())["steps"]


def test_search_gives_every_trial_the_same_budget_and_reads_what_it_has(tmp_path, capsys):
    pytest.importorskip("optuna")
    arguments = ["sweep=lr", "sweep.trials=2", "sweep.epochs=0.5", "trainer.max_epochs=2", "task.lr=1e-4"]
    assert run(*arguments, f"hydra.run.dir={tmp_path}") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    search = result["search"]
    rates = [t["task.lr"] for t in search["found"]]
    assert len(rates) == 2 and rates[0] == pytest.approx(1e-4)
    assert all(1e-5 <= r <= 1e-3 for r in rates) and rates[0] != rates[1]
    assert search["best"] == min(search["found"], key=lambda t: t["loss"])["task.lr"]
    trials = sorted((tmp_path / "search").iterdir())
    lengths = {len(losses(t)) for t in trials}
    assert lengths == {len(losses(tmp_path)) // 2}, "half the epochs each"
    assert not list((tmp_path / "search").rglob("result.json")), "no trial is tested"
    card = json.loads((tmp_path / "weights.json").read_text())
    assert card["config"]["task"]["lr"] == search["best"]
    (tmp_path / "result.json").unlink()
    before = [t.stat().st_mtime_ns for t in trials]
    assert run(*arguments, f"hydra.run.dir={tmp_path}", "resume=auto") == 0
    assert [t.stat().st_mtime_ns for t in trials] == before, "trials were repeated"
    assert run(f"resume={tmp_path}", "trainer.max_epochs=3") == 0
    longer = json.loads((tmp_path / "result.json").read_text())
    assert longer["epochs"] == 3 and longer["search"] == search


def test_a_run_killed_in_its_search_resumes_with_the_trials_it_has(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from tasks.engine import search

    tried = []

    def trial(cfg, folder):
        tried.append(folder.name)
        if tried == ["0", "1"]:
            raise KeyboardInterrupt
        loss = 0.5 if folder.name == "1" else 1.0
        return SimpleNamespace(task=SimpleNamespace(monitor="loss", mode="min"), valid={"loss": loss})

    monkeypatch.setattr(search, "train", trial)
    arguments = ["sweep=lr", "sweep.trials=3", "trainer.max_epochs=1", "task.lr=1e-4"]
    assert run(*arguments, f"hydra.run.dir={tmp_path}") == 130
    assert run(f"resume={tmp_path}") == 0
    assert tried == ["0", "1", "1", "2"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["search"]["best"] == result["search"]["found"][1]["task.lr"] != 1e-4
    card = json.loads((tmp_path / "weights.json").read_text())
    assert card["config"]["task"]["lr"] == result["search"]["best"]


def test_a_refused_variant_is_no_failed_job(tmp_path, capsys):
    sweep = ["-m", "attention=softmax,nsa", "task=traffic", f"hydra.sweep.dir={tmp_path}"]
    assert run(*sweep, model=["data=road_network", "model.patch_steps=6", "trainer.max_epochs=1"]) == 0
    said = capsys.readouterr().err
    assert "1 jobs done, 1 refused, 0 failed" in said and "depends on the order" in said
    assert "no result" in (tmp_path / "leaderboard.md").read_text()


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, capsys):
    sweep = [
        "-m",
        "attention=none,softmax",
        "trainer.max_epochs=1",
        f"hydra.sweep.dir={tmp_path}",
        "resume=auto",
    ]
    sweep += ["hydra.sweep.subdir=${attention.name}"]
    assert run(*sweep) == 0
    stamp = (tmp_path / "none" / "weights.safetensors").stat().st_mtime_ns
    (tmp_path / "softmax" / "result.json").unlink()
    assert run(*sweep) == 0
    assert "2 jobs done, 0 refused, 0 failed" in capsys.readouterr().err
    assert (tmp_path / "none" / "weights.safetensors").stat().st_mtime_ns == stamp, "a finished job ran again"
    assert run(*sweep, "model.dropout=0.1") == 2
    assert "holds a run with another configuration (model differ)" in capsys.readouterr().err


def test_tensorboard_file_holds_what_metrics_csv_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("logger=tensorboard", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [e.value for e in events.Scalars("train/loss")]
    assert logged == pytest.approx(losses(tmp_path), rel=1e-5)
    result = json.loads((tmp_path / "result.json").read_text())
    assert events.Scalars("test/accuracy")[-1].value == pytest.approx(result["test"]["accuracy"], rel=1e-5)


@pytest.mark.slow
def test_jobs_side_by_side_leave_one_whole_table(tmp_path, capfd):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    import subprocess

    command = [sys.executable, "train.py", "-m", "launcher=joblib", *SMALL, "attention=none", "seed=0,-1"]
    command += ["trainer.max_epochs=1", "trainer.threads=1", "callbacks.progress=none"]
    command += [f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1 and "1 jobs done, 0 refused, 1 failed" in done.stderr, done.stderr[-2000:]
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["1"]
    assert (tmp_path / "leaderboard.md").read_text().count("not in bounds") >= 1
