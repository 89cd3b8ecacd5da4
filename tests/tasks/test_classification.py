"""Every attention variant trains in the vision transformer, or says why not."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tasks.engine.cli import CONF
from tests.commands import forked
from zoo.attention import list_attention
from zoo.errors import ZooError


def build(attention, *overrides):
    import train  # registers the resolver
    from tasks.engine.run import build_data, build_task

    assert train
    GlobalHydra.instance().clear()
    small = [
        "data=digits",
        "model.patch_size=2",
        "model.stem=patch",
        "model.dim=16",
        "model.num_heads=2",
        "model.depth=1",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"attention={attention}", *small, *overrides])
    data = build_data(cfg)
    return build_task(cfg, data)[0], data


@pytest.mark.parametrize("attention", list_attention())
def test_one_step_with_every_variant(attention):
    try:
        task, data = build(attention)
    except ZooError as error:
        assert "encoder" in str(error) and "fit" in str(error), "a refusal names the slot and what fits"
        return
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        terms = task.losses(batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(float(terms["cross_entropy"].detach()))
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_soft_targets_are_smoothed_as_labels_are():
    task, data = build("none", "task.label_smoothing=0.2")
    batch = next(iter(data.val_dataloader()))
    hard = task.losses(batch)["cross_entropy"]
    batch["target"] = torch.nn.functional.one_hot(batch["label"], 10).float()
    torch.testing.assert_close(task.losses(batch)["cross_entropy"], hard)


def test_metrics_are_those_of_the_whole_split():
    task, data = build("softmax")
    task.eval()
    right = total = 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            task.update_metrics(batch, task.metrics["test"], "test")
            right += int((task.model(batch["image"]).argmax(-1) == batch["label"]).sum())
            total += len(batch["label"])
    found = task.compute_metrics("test")
    assert found["accuracy"] == pytest.approx(right / total, abs=1e-6)
    assert int(task.confusion.compute().sum()) == total
    assert found["accuracy_top5"] >= found["accuracy"]


def test_ema_weights_differ_and_a_decay_of_zero_is_the_live_model(tmp_path):
    from tasks.engine.callbacks import AveragedWeights

    task, _ = build("softmax")

    class Trainer:
        global_step = 0

    for decay in (0.0, 0.9):
        average, trainer = AveragedWeights(decay), Trainer()
        average.on_fit_start(trainer, task)
        with torch.no_grad():
            for step in range(1, 30):
                trainer.global_step = step
                for parameter in task.model.parameters():
                    parameter.add_(0.01)
                average.on_train_batch_end(trainer, task)
        distance = max(
            float((a - p).abs().max().detach())
            for a, p in zip(average.average, task.model.parameters(), strict=True)
        )
        assert (distance < 1e-6) == (decay == 0.0)


def test_a_figure_that_fails_in_one_of_two_processes_holds_up_nobody(tmp_path, monkeypatch):
    """What figures show is gathered before; the first process alone draws, and its failure is its own."""
    from matplotlib.figure import Figure

    from tasks.engine import run as engine

    def broken(*args, **options):
        raise OSError("no font")

    task, data = build("softmax")
    task.eval()
    batches = list(data.test_dataloader())[:2]

    @torch.no_grad()
    def one_of_two(rank):
        os.environ["RANK"] = str(rank)
        test = lambda *_, **__: task.update_metrics(batches[rank], task.metrics["test"], "test")
        trainer = SimpleNamespace(is_global_zero=rank == 0, test=test)
        fitted = SimpleNamespace(task=task, data=None, trainer=trainer)
        monkeypatch.setattr(engine, "train", lambda *_: fitted)
        monkeypatch.setattr(engine, "finish", lambda fitted, folder, figures, *_: {"figures": figures})
        cfg = OmegaConf.create({"trainer": {"fast_dev_run": False}})
        if rank:
            assert engine.run(cfg, tmp_path / "run") == {}  # a warning would be an error here
            return
        monkeypatch.setattr(Figure, "savefig", broken)
        with pytest.warns(UserWarning, match="could not be drawn .*no font"):
            assert engine.run(cfg, tmp_path / "run") == {"figures": []}
        assert task._counts.sum() == sum(len(batch["label"]) for batch in batches)

    assert forked(one_of_two, 2, tmp_path) == [0, 0]
