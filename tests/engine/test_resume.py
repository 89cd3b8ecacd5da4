"""What a continued run may change, what it refuses, and what its folder says about it."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tasks.engine.cli import CONF
from tasks.engine.resume import merge_resumed, write_config
from zoo.errors import ConfigError

STARTED = ["attention=mala", "data=digits", "model.dim=16", "trainer.max_epochs=2"]


def composed(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture
def folder(tmp_path):
    write_config(composed(*STARTED), tmp_path)
    return tmp_path


def resumed(folder, *overrides):
    return merge_resumed(composed(*overrides, f"resume={folder}"), [*overrides, f"resume={folder}"])


def test_the_stored_configuration_counts(folder):
    for same in ([], STARTED, ["task=vit", "seed=0", "callbacks=default"]):
        cfg = resumed(folder, *same)
        assert cfg.resume == str(folder)
        cfg.resume = None
        assert cfg == OmegaConf.load(folder / "config.yaml")


def test_length_place_and_loggers_may_change(folder):
    changes = [
        "trainer=ddp",
        "trainer.max_epochs=5",
        "logger=wandb",
        "logger.project=p",
        "data.batch_size=32",
    ]
    cfg = resumed(folder, *changes)
    assert (cfg.trainer.strategy, cfg.trainer.devices, cfg.trainer.max_epochs) == ("ddp", 2, 5)
    assert (cfg.logger.name, cfg.logger.project, cfg.data.batch_size, cfg.model.dim) == ("wandb", "p", 32, 16)
    assert resumed(folder, "trainer=ddp").trainer.max_epochs == 2, "a place, not a length"


@pytest.mark.parametrize(
    "change, said",
    [
        ("attention=softmax", r"attention\.name \(mala, now softmax\)"),
        ("attention@encoder_attention=none", r"encoder_attention\.name \(None, now none\)"),
        ("experiment=traffic_best", r"task\.name \(vit, now traffic\)"),
        ("task.lr=0.1", r"task\.lr \(0\.002, now 0\.1\)"),
        ("model.dim=32", r"model\.dim \(16, now 32\)"),
        ("seed=3", r"seed \(0, now 3\)"),
        ("callbacks.ema_decay=0.5", r"callbacks\.ema_decay"),
    ],
)
def test_what_makes_another_run_is_refused_by_name(folder, change, said):
    with pytest.raises(ConfigError, match=said):
        resumed(folder, change)


def test_a_folder_without_a_run_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no run there"):
        resumed(tmp_path)


def test_the_folder_says_what_runs_and_keeps_what_ran(folder):
    before = OmegaConf.load(folder / "config.yaml")
    write_config(resumed(folder), folder)
    assert [f.name for f in folder.glob("*.yaml")] == ["config.yaml"]
    write_config(resumed(folder, "trainer.max_epochs=5"), folder)
    assert OmegaConf.load(folder / "config.1.yaml") == before
    assert resumed(folder).trainer.max_epochs == 5, "also when that part is killed and resumed again"
    write_config(resumed(folder, "trainer.max_epochs=7"), folder)
    assert OmegaConf.load(folder / "config.2.yaml").trainer.max_epochs == 5
