"""The command line, end to end on the digits that scikit-learn bundles: real files, real processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import commands
from tests.commands import logged

ROOT = Path(__file__).parents[2]
SMALL = [
    "data=digits",
    "model.patch_size=2",
    "model.stem=patch",
    "model.dim=16",
    "model.num_heads=2",
    "model.depth=1",
    "callbacks.progress=lines",
]


def run(*overrides, capsys=None):
    """Exit status and standard error."""
    status = commands.run(*overrides)
    return status, capsys.readouterr().err if capsys else ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    status, _ = run(
        *SMALL, "trainer.max_epochs=6", "task.lr=5e-3", "attention=mala", f"hydra.run.dir={folder}"
    )
    assert status == 0
    return folder


def test_a_run_leaves_what_it_promises(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["task"] == "vit" and result["attention"] == "mala" and result["seed"] == 0
    assert result["slots"] == [{"slot": "encoder", "pattern": "self", "attention": "mala", "note": "chosen"}]
    assert result["baselines"]["majority_class"]["accuracy"] < 0.2
    # Six epochs of a 3k-parameter model: far above the majority class, below the linear baseline.
    assert result["test"]["accuracy"] > 0.5
    cost = result["cost"]
    assert cost["parameters"] > 1000 and cost["flops"] > 1e4 and cost["samples_per_s"] > 0
    for name in (
        "config.yaml",
        "metrics.csv",
        "weights.safetensors",
        "weights.json",
        "checkpoints/last.ckpt",
    ):
        assert (finished / name).stat().st_size > 0
    assert {"figures/confusion_matrix.png", "figures/misclassified.png"} <= set(result["figures"])
    assert not [p for p in finished.rglob("*.tmp")] and not (finished / ".lock").exists()
    losses = list(map(float, logged(finished).values()))
    assert len(losses) == result["steps"] and losses[-1] < losses[0]


def test_weights_predict_as_the_test_said(finished):
    import zoo
    from data import create_data

    predictor = zoo.load(finished)
    data = create_data("digits")
    data.setup()
    right = total = 0
    for batch in data.test_dataloader():
        with torch.no_grad():
            right += int((predictor.model(batch["image"]).argmax(-1) == batch["label"]).sum())
        total += len(batch["label"])
    assert right / total == pytest.approx(predictor.card["metrics"]["accuracy"], abs=1e-6)
    assert predictor.labels == [str(i) for i in range(10)]


def test_predict_and_show_commands(finished, tmp_path, capsys):
    from PIL import Image

    from zoo.__main__ import main

    Image.effect_noise((8, 8), 60).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    assert main(["predict", str(finished), str(tmp_path), "--json"]) == 1
    out = capsys.readouterr()
    assert json.loads(out.out)["label"] in set("0123456789")
    assert "b.png" in out.err and "1 of 2 inputs skipped" in out.err
    assert main(["show", str(finished)]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"] > 0.5
    assert main(["show", "malla"]) == 2
    assert "did you mean 'mala'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["attention=malla"], "did you mean 'mala'"),
        (["task=vitt"], "did you mean 'vit'"),
        (["model.depht=3"], "did you mean depth"),
        (["data=imagefolder", "data.root=/nope"], "/nope is not a folder; expected"),
        (["attention=mala", "attention.key_norm=median"], "choose from mean, sum"),
        (["model.num_heads=3"], "must divide dim"),
        (["trainer.max_epoch=3"], "did you mean max_epochs"),
        (["resume=/nope"], "no run there"),
        (["attention@encodr_attention=mala"], "did you mean attention@encoder_attention?"),
        (["data=adult"], "task 'vit' needs images: digits, imagefolder, mnist"),
        (["model=sasrec"], "model 'sasrec' is for task=recommendation; those of task 'vit': vit"),
        pytest.param(
            ["trainer=gpu"],
            "trainer=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
        (["logger=csv", "callbacks.ema_decay=2"], r"outside [0, 1)"),
        (["task.lr=abc"], "task.lr='abc' must be of type float"),
        (["task.betas=[1,2]"], "task.betas=[1, 2] must be two numbers in [0, 1)"),
        (["data.num_workers=x"], "data.num_workers='x' must be of type int"),
        (["model.depth=2.5"], "model.depth=2.5 must be of type int | None"),
        (["attention=mala", "attention.eps=[1]"], "attention.eps=[1] must be of type float"),
        (["attention.strict=maybe"], "write true or false"),
        (["seed=-1"], "seed=-1 must be a whole number from 0"),
        (["trainer.accumulate_grad_batches=0"], "must be a whole number of at least 1"),
        (["trainer.gradient_clip_val=-1"], "must be positive, or null"),
        (["trainer.gradient_clip_val=abc"], "trainer.gradient_clip_val=abc must be positive, or null"),
        (["callbacks.ema_decay=abc"], "callbacks.ema_decay=abc is outside [0, 1)"),
        (["trainer.max_epochs=-1"], "would train for ever"),
        (["trainer.deterministic=abc"], "trainer.deterministic=abc must be true, false or warn"),
        (["trainer.threads=true"], "trainer.threads=True must be a whole number of at least 1"),
        (["trainer.matmul_precision=hihg"], "did you mean 'high'"),
        (
            ["attention=[softmax,mala]"],
            "write attention=softmax, or -m attention=softmax,mala for a run of each",
        ),
        (["attention=null"], "attention=null: leave it out, or choose: python train.py --list attention"),
        (["trainer.precision=17"], "trainer: Precision 17 is invalid"),
        (["task=pinn", "data=pinn", "data.physics.nu=1"], "to add it, write +data.physics.nu="),
    ],
)
def test_bad_input_gets_one_clear_line(overrides, text, tmp_path, capsys):
    status, err = run(*SMALL[:1], *overrides, f"hydra.run.dir={tmp_path}/r", capsys=capsys)
    if "resume" in overrides[0]:
        status, err = run(*overrides, capsys=capsys)
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and text in lines[0] and "Traceback" not in err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_auto_needs_a_folder_to_look_in(capsys):
    status, err = run(*SMALL, "resume=auto", capsys=capsys)
    assert status == 2 and "resume=auto" in err and "hydra.run.dir=FOLDER" in err


def launch(folder, *overrides):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "train.py", *SMALL, *overrides, f"hydra.run.dir={folder}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_killed_run_resumes_on_the_same_curve(tmp_path, capsys):
    """SIGKILL in the middle of an epoch; the mid-epoch checkpoint and the rows after it are what a resume needs."""
    arguments = ["trainer.max_epochs=4", "task.lr=5e-3", "model.dropout=0.1", "callbacks.ema_decay=0.9"]
    arguments += ["callbacks.checkpoint_every_steps=7"]
    whole = tmp_path / "whole"
    assert run(*SMALL, *arguments, f"hydra.run.dir={whole}")[0] == 0
    cut = tmp_path / "cut"
    process = launch(cut, *arguments)
    while not (cut / "checkpoints" / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    assert not (cut / "result.json").exists(), "killed too late to test anything"
    status, err = run(*SMALL, *arguments, f"hydra.run.dir={cut}", capsys=capsys)
    assert status == 2 and "another run is writing" in err, "two processes in one folder"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(f"resume={cut}")[0] == 0
    assert logged(cut) == logged(whole)
    assert logged(cut, "valid/accuracy") == logged(whole, "valid/accuracy")
    same = [json.loads((f / "result.json").read_text())["test"] for f in (whole, cut)]
    assert same[0] == same[1]


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    from tasks.engine.folder import RunFolder

    with RunFolder(tmp_path / "r"):
        status, err = run(*SMALL, f"hydra.run.dir={tmp_path}/r", capsys=capsys)
    assert status == 2 and "another run is writing" in err


def test_a_sweep_leaves_a_leaderboard_although_a_job_fails(tmp_path, capsys):
    status, err = run(
        "-m",
        *SMALL,
        "attention=linear,none",
        "seed=0,1",
        "trainer.max_epochs=1",
        "model.num_heads=2,3",
        f"hydra.sweep.dir={tmp_path}",
        "hydra.sweep.subdir=${hydra.job.num}",
        capsys=capsys,
    )
    assert status != 0 and "must divide dim" in err
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        board = {row["attention"]: row for row in csv.DictReader(file)}
    # Jobs with 3 heads have no result; the row says which heads those of its seeds had.
    assert set(board) == {"linear (model.num_heads=2)", "none (model.num_heads=2)"}
    for row in board.values():
        assert row["seeds"] == "2" and float(row["accuracy_ci95"]) >= 0
        assert float(row["parameters"]) > 0 and float(row["flops"]) > 0 and float(row["samples_per_s"]) > 0
    text = (tmp_path / "leaderboard.md").read_text()
    page = (tmp_path / "leaderboard.html").read_text()
    assert page.count("<tr>") >= 4 and "data:image/png;base64," in page and "must divide dim" in page
    assert 'src="http' not in page and "<link" not in page  # nothing is loaded from elsewhere
    assert "majority_class" in text and text.split("## Without result")[1].count("| vit | ") == 4


def test_full_disk_at_checkpoint_time(tmp_path, capsys, monkeypatch):
    """/dev/full stands for a disk without room: every write to it fails with ENOSPC."""
    from tasks.engine import callbacks
    from tasks.engine.folder import write_atomic

    real = torch.save

    def save_to_full_disk(content, path):
        if not Path(path).parent.parent.joinpath("filled").exists():
            Path(path).parent.parent.joinpath("filled").touch()
            return real(content, path)
        with open(path, "wb") as file:
            file.write(b"partial")
        with open("/dev/full", "wb") as file:
            real(content, file)

    monkeypatch.setattr(callbacks.torch, "save", save_to_full_disk)
    status, err = run(*SMALL, "trainer.max_epochs=3", f"hydra.run.dir={tmp_path}/r", capsys=capsys)
    assert status == 2 and "no room left" in err and "resume=" in err
    checkpoints = tmp_path / "r" / "checkpoints"
    assert not [p for p in checkpoints.iterdir() if p.name.endswith(".tmp")]
    for path in checkpoints.glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["state_dict"]
    assert write_atomic
