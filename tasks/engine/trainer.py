"""Lightning's trainer and the loggers of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from tasks.base import ZooTask
from tasks.engine.build import plain
from tasks.engine.callbacks import AtomicCheckpointIO, build_callbacks
from tasks.engine.csv_logger import MetricsCsv
from zoo.errors import ConfigError, unknown

PRECISIONS = ("highest", "high", "medium")


def check_settings(cfg: DictConfig) -> None:
    """Refuse numbers that would fail later, or not at all.

    Raises:
        ConfigError: A seed, or an option of trainer or callbacks, outside its range.
    """
    trainer, callbacks = cfg.trainer, cfg.callbacks
    whole = {
        "seed": (cfg.seed, 0, 2**32 - 1),
        "trainer.threads": (trainer.threads, 1, None),
        "trainer.accumulate_grad_batches": (trainer.accumulate_grad_batches, 1, None),
        "trainer.check_val_every_n_epoch": (trainer.check_val_every_n_epoch, 1, None),
        "trainer.max_epochs": (trainer.max_epochs, -1, None),
        "trainer.max_steps": (trainer.max_steps, -1, None),
        "callbacks.early_stop_patience": (callbacks.early_stop_patience, 1, None),
        "callbacks.checkpoint_every_steps": (callbacks.checkpoint_every_steps, 1, None),
    }
    for name, (value, low, high) in whole.items():
        number = type(value) is int and low <= value and (high is None or value <= high)
        if value is not None and not number:
            limit = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{name}={value} must be a whole number {limit}")
    endless = (trainer.max_epochs or -1) < 0 and (trainer.max_steps or -1) < 0
    if endless and cfg.protocol.name != "equal_time" and not trainer.fast_dev_run:
        raise ConfigError(
            "trainer.max_epochs=-1 would train for ever: give a number, trainer.max_steps, or protocol=equal_time protocol.seconds=S"
        )
    clip = trainer.gradient_clip_val
    if clip is not None and not (isinstance(clip, int | float) and clip > 0):
        raise ConfigError(f"trainer.gradient_clip_val={clip} must be positive, or null for none")
    average = callbacks.ema_decay
    if not (isinstance(average, int | float) and 0 <= average < 1):
        raise ConfigError(f"callbacks.ema_decay={average} is outside [0, 1); 0 switches it off")
    if not isinstance(trainer.deterministic, bool) and trainer.deterministic != "warn":
        raise ConfigError(
            f"trainer.deterministic={trainer.deterministic} must be true, false or warn (only say where a result may differ)"
        )
    if trainer.matmul_precision not in PRECISIONS:
        raise unknown("trainer.matmul_precision", str(trainer.matmul_precision), PRECISIONS)


def build_trainer(cfg: DictConfig, task: ZooTask, folder: Path, budget: list[Callback]) -> L.Trainer:
    options = plain(cfg.trainer)
    for ours in ("matmul_precision", "threads"):
        options.pop(ours)
    sharded = options["strategy"] == "fsdp"
    if sharded:
        options["strategy"] = _sharded()
    elif options["strategy"] == "ddp":
        # Not every option of every model uses all parameters in every step (no categories in a table, CTC alone at first).
        options["strategy"] = DDPStrategy(find_unused_parameters=True)
    loggers = build_loggers(cfg, folder)
    # The budget first: what it decides after a step counts for the checkpoints of that step.
    callbacks = budget + build_callbacks(
        task, folder, cfg.seed, terminal=sys.stdout.isatty(), **plain(cfg.callbacks)
    )
    try:
        trainer = L.Trainer(
            **options,
            default_root_dir=folder,
            logger=loggers,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            enable_model_summary=False,
            enable_progress_bar=_wants_bar(cfg),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:  # no such device, precision ...
        way_out = "; on this machine: trainer=cpu" if "backend found" in str(error) else ""
        raise ConfigError(f"trainer: {error}{way_out}") from error
    if sharded and trainer.world_size == 1:
        raise ConfigError(
            "trainer.strategy=fsdp shares parameters among processes, and here is only one: give trainer.devices=2 or more "
            "(on CPU too: trainer.accelerator=cpu), or use trainer=gpu or trainer=cpu"
        )
    if trainer.world_size > 1 and not task.automatic_optimization:
        raise ConfigError(
            f"task {cfg.task.name!r} takes many gradients a step, which engines for several processes do not average; use one: "
            "trainer=gpu or trainer=cpu"
        )
    return trainer


def _sharded() -> Strategy:
    """FSDP2 as Lightning runs it."""
    try:
        from tasks.engine.sharding import Sharded
    except ImportError as error:
        raise ConfigError(
            f"trainer.strategy=fsdp needs torch 2.11 or newer ({error}); this is torch {torch.__version__}. Update it or use "
            "trainer=ddp"
        ) from None
    return Sharded()


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
        try:
            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        except ModuleNotFoundError:
            raise ConfigError("logger=tensorboard needs tensorboard: pip install tensorboard") from None
    elif name != "csv":
        raise ConfigError(f"logger.name={name!r}: choose csv, wandb or tensorboard")
    return loggers
