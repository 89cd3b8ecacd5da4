"""One run: build everything from a resolved configuration, train, test, report."""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tasks.base import ZooTask
from tasks.engine.build import build_data, build_task, plain
from tasks.engine.callbacks import Speed, load_checkpoint
from tasks.engine.folder import (
    RunFolder,
    command,
    git_commit,
    is_main_process,
    versions,
    write_json,
)
from tasks.engine.memory import is_out_of_memory, remembered, smaller_batch
from tasks.engine.protocol import Budget, describe, settle
from tasks.engine.report import print_result, print_slots
from tasks.engine.resume import write_config
from tasks.engine.sharding import load_whole_state, make_whole, whole_state
from tasks.engine.trainer import build_trainer, check_settings
from zoo.attention.slots import AttentionFactory, slot_table
from zoo.layers.flops import count_flops
from zoo.pretrained.weights import save_tensors
from zoo.system import peak_memory


@dataclass
class Fitted:
    """A trained task with what `finish` reports about it."""

    cfg: DictConfig
    data: Any
    task: ZooTask
    factories: dict[str, AttentionFactory]
    trainer: L.Trainer
    protocol: dict[str, Any]
    flops: float
    seconds: float
    valid: dict[str, float]


def run(cfg: DictConfig, folder: Path, search: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train and test what `cfg` describes; returns the content of result.json.

    Args:
        cfg: Resolved configuration, see conf/.
        folder: Run folder; continued when `cfg.resume` is set.
        search: How `cfg` was found, when a search chose parts of it.
    """
    quiet()
    with RunFolder(folder):
        fitted = train(cfg, folder)
        task, trainer = fitted.task, fitted.trainer
        best = folder / "checkpoints" / "best.ckpt"
        if best.exists() and not cfg.trainer.fast_dev_run:
            load_best(task, best)
        trainer.test(task, datamodule=fitted.data, verbose=False)
        # What needs every process comes first; a figure that fails then fails in the first one alone.
        task.gather()
        tensors = whole_state(task.model)
        make_whole(task)
        if not trainer.is_global_zero:
            return {}
        figures = draw(task, folder / "figures")
        return finish(fitted, folder, figures, tensors, search)


def draw(task: ZooTask, folder: Path) -> list[Path]:
    """The task's figures. One that cannot be drawn is said, and costs the run nothing else."""
    try:
        return task.figures(folder)
    except Exception as error:
        warnings.warn(
            f"the figures could not be drawn ({type(error).__name__}: {error}); the rest of the run is whole",
            stacklevel=2,
        )
        return []


def train(cfg: DictConfig, folder: Path) -> Fitted:
    """Fit what `cfg` describes; when memory runs out, go on with half the batch, accumulated to the same step."""
    if is_main_process():
        write_config(cfg, folder)
    keep = bool(cfg.resume)
    if keep:
        cfg = remembered(cfg, folder)
    while True:
        try:
            return _train_once(cfg, folder, keep)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            cfg = smaller_batch(cfg, folder, error)
        gc.collect()  # the failed attempt's tensors hang on the traceback until here
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        keep = True


def _train_once(cfg: DictConfig, folder: Path, keep: bool) -> Fitted:
    check_settings(cfg)
    L.seed_everything(cfg.seed, verbose=False)
    torch.set_float32_matmul_precision(cfg.trainer.matmul_precision)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    data = build_data(cfg)
    cfg, protocol = settle(cfg, data)
    task, factories = build_task(cfg, data)
    budget = Budget.of(protocol, task)
    if is_main_process():
        print_slots(cfg.task.name, factories)
        print(f"protocol {describe(protocol)}", flush=True)
    trainer = build_trainer(cfg, task, folder, [budget])
    flops = count_flops(task.model, *task.example_inputs())
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(task, datamodule=data, ckpt_path=last if keep and last.exists() else None)
    seconds = _speed(trainer).elapsed
    budget.report(protocol, trainer)
    values = {k: float(v) for k, v in trainer.callback_metrics.items()}
    valid = {k.removeprefix("valid/"): v for k, v in values.items() if k.startswith("valid/")}
    return Fitted(
        cfg, data, task, factories, trainer, protocol, flops, seconds, _best_valid(trainer) or valid
    )


def finish(
    fitted: Fitted,
    folder: Path,
    figures: list[Path],
    tensors: dict[str, Tensor],
    search: dict[str, Any] | None,
) -> dict[str, Any]:
    """After the test, in the first process: baselines, weights, result.json and the printed table."""
    cfg, data, task, trainer = fitted.cfg, fitted.data, fitted.task, fitted.trainer
    values = {k: float(v) for k, v in trainer.callback_metrics.items()}
    speed = _speed(trainer)
    result = {
        "task": cfg.task.name,
        "model": cfg.model.name,
        "data": cfg.data.name,
        "attention": cfg.attention.name,
        "slots": slot_table(fitted.factories),
        "seed": cfg.seed,
        "protocol": fitted.protocol["name"],
        "protocol_detail": fitted.protocol,
        "search": search,
        "monitor": task.monitor,
        "mode": task.mode,
        "headline": list(getattr(task, "headline", ())),
        "test": {k.removeprefix("test/"): v for k, v in values.items() if k.startswith("test/")},
        "valid": fitted.valid,
        "baselines": {} if cfg.trainer.fast_dev_run else data.baselines(),
        "cost": {
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "flops": fitted.flops,
            "state_size": task.state_size() if hasattr(task, "state_size") else None,
            "peak_memory_mib": peak_memory_mib(),
            "samples_per_s": speed.samples / speed.seconds if speed.seconds else None,
            "train_seconds": fitted.seconds,
        },
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "out_of_memory": OmegaConf.to_container(cfg.get("out_of_memory") or OmegaConf.create([])),
        "skipped": dict(getattr(data, "skipped", {}) or {}),
        "split": data.split_record() if hasattr(data, "split_record") else {},
        "versions": versions(),
        "git": git_commit(),
        "command": command(),
    }
    result["figures"] = [str(Path(f).relative_to(folder)) for f in figures]
    card = make_card(cfg, data, task, fitted.factories, result)
    save_tensors(folder / "weights.safetensors", tensors, card)
    write_json(folder / "result.json", result)
    log_extras(trainer, figures, result, folder)
    print_result(result, folder)
    return result


def log_extras(trainer: L.Trainer, figures: list[Path], result: dict[str, Any], folder: Path) -> None:
    """Figures, tables and weights for the loggers that take them; one that fails costs the run nothing."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_run_extras"):
            try:
                logger.log_run_extras(figures, result, folder)
            except Exception as error:
                warnings.warn(
                    f"{type(logger).__name__} did not take figures and weights ({type(error).__name__}: {error}); they are in {folder}",
                    stacklevel=2,
                )


def load_best(task: ZooTask, path: Path) -> None:
    """Put the best checkpoint's weights, averaged ones where kept, into the model."""
    checkpoint = load_checkpoint(path)
    load_whole_state(task, checkpoint["state_dict"])
    if "ema" in checkpoint:
        load_whole_state(task.model, checkpoint["ema"], strict=False)


def make_card(
    cfg: DictConfig, data: Any, task: ZooTask, factories: dict[str, AttentionFactory], result: dict[str, Any]
) -> dict[str, Any]:
    """What a stranger needs to use and to judge the weights."""
    return {
        "task": cfg.task.name,
        "kind": cfg.task.kind,
        "model": task.model.build_arguments,
        "attention": cfg.attention.name,
        "slots": {k: f.card() for k, f in factories.items()},
        "preprocessing": data.preprocessing(),
        "labels": list(getattr(data, "labels", None) or []),
        "data": {**plain(cfg.data), "source": getattr(data, "source", None), "split": result["split"]},
        "metrics": result["test"],
        "baselines": result["baselines"],
        "seed": cfg.seed,
        "licence": getattr(data, "licence", None),
        "command": result["command"],
        "versions": result["versions"],
        "git": result["git"],
        "config": OmegaConf.to_container(cfg, resolve=True) | {"resume": None},
        **task.card(),
    }


def peak_memory_mib() -> float:
    """High-water mark of device memory where a GPU is used, of the process elsewhere."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_memory() / 2**20


def _speed(trainer: L.Trainer) -> Speed:
    return next(c for c in trainer.callbacks if isinstance(c, Speed))


def _best_valid(trainer: L.Trainer) -> dict[str, float]:
    callback = trainer.checkpoint_callback
    score = getattr(callback, "best_model_score", None)
    return {} if score is None else {callback.monitor.removeprefix("valid/"): float(score)}


def quiet() -> None:
    """Silence advice that does not concern the user of a finished configuration."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*torch.jit.script.*",
        ".*Checkpoint directory.*",
        ".*IterableDataset.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
        ".*smaller than the logging interval.*",
        ".*find_unused_parameters=True was specified.*",
        ".*sync_dist=True.*",  # metrics are summed over processes before they are logged
    ):
        warnings.filterwarnings("ignore", pattern)
