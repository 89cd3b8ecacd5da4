"""Lightning's trainer and the loggers of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig

from tasks.base import ZooTask
from tasks.engine.build import plain
from tasks.engine.callbacks import AtomicCheckpointIO, build_callbacks
from tasks.engine.csv_logger import MetricsCsv
from zoo.errors import ConfigError


def build_trainer(cfg: DictConfig, task: ZooTask, folder: Path, budget: list[Callback]) -> L.Trainer:
    options = plain(cfg.trainer)
    for ours in ("matmul_precision", "threads"):
        options.pop(ours)
    return L.Trainer(
        **options,
        default_root_dir=folder,
        logger=build_loggers(cfg, folder),
        # The budget first: what it decides after a step counts for the checkpoints of that step.
        callbacks=budget
        + build_callbacks(task, folder, cfg.seed, terminal=sys.stdout.isatty(), **plain(cfg.callbacks)),
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_progress_bar=_wants_bar(cfg),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )


def _wants_bar(cfg: DictConfig) -> bool:
    progress = cfg.callbacks.progress
    return progress == "bar" or (progress == "auto" and sys.stdout.isatty())


def build_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """metrics.csv always, and the logger that the user chose beside it."""
    loggers: list[Logger] = [MetricsCsv(folder)]
    options = plain(cfg.logger)
    name = options.pop("name")
    if name == "wandb":
        from tasks.engine.wandb_logger import build_wandb

        loggers.append(build_wandb(cfg, folder, options))
    elif name == "tensorboard":
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    elif name != "csv":
        raise ConfigError(f"logger.name={name!r}: choose csv, wandb or tensorboard")
    return loggers
