"""One run: build everything from a resolved configuration, train, test, report."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from tasks.base import ZooTask
from tasks.engine.callbacks import AtomicCheckpointIO, Speed, build_callbacks, load_checkpoint
from tasks.engine.csv_logger import MetricsCsv
from tasks.engine.folder import (
    RunFolder,
    command,
    git_commit,
    is_main_process,
    versions,
    write_atomic,
    write_json,
)
from tasks.engine.report import print_result, print_slots
from tasks.registry import check_options, get_data, get_task
from zoo.attention.slots import AttentionFactory, resolve_slots, slot_table
from zoo.errors import ConfigError
from zoo.layers.flops import count_flops
from zoo.models.registry import build_model, get_model
from zoo.pretrained.weights import save_weights


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train and test what `cfg` describes; returns the content of result.json.

    Args:
        cfg: Resolved configuration, see conf/.
        folder: Run folder; continued when `cfg.resume` is set.
    """
    quiet()
    with RunFolder(folder):
        if not cfg.resume and is_main_process():
            write_atomic(folder / "config.yaml", lambda p: OmegaConf.save(cfg, p, resolve=True))
        L.seed_everything(cfg.seed, verbose=False)
        torch.set_float32_matmul_precision(cfg.trainer.matmul_precision)
        if cfg.trainer.threads:
            torch.set_num_threads(cfg.trainer.threads)
        data = build_data(cfg)
        task, factories = build_task(cfg, data)
        if is_main_process():
            print_slots(cfg.task.name, factories)
        trainer = build_trainer(cfg, task, folder)
        flops = count_flops(task.model, *task.example_inputs())

        began = time.perf_counter()
        last = folder / "checkpoints" / "last.ckpt"
        trainer.fit(task, datamodule=data, ckpt_path=last if cfg.resume and last.exists() else None)
        seconds = time.perf_counter() - began
        best = folder / "checkpoints" / "best.ckpt"
        if best.exists() and not cfg.trainer.fast_dev_run:
            load_best(task, best)
        trainer.test(task, datamodule=data, verbose=False)
        # Every process draws: figures may gather metrics from all of them.
        with tempfile.TemporaryDirectory() as elsewhere:
            figures = task.figures(folder / "figures" if trainer.is_global_zero else Path(elsewhere))
        if not trainer.is_global_zero:
            return {}
        return finish(cfg, folder, data, task, factories, trainer, flops, seconds, figures)


def finish(
    cfg: DictConfig,
    folder: Path,
    data: Any,
    task: ZooTask,
    factories: dict[str, AttentionFactory],
    trainer: L.Trainer,
    flops: float,
    seconds: float,
    figures: list[Path],
) -> dict[str, Any]:
    """After the test: baselines, weights, result.json and the printed table."""
    values = {k: float(v) for k, v in trainer.callback_metrics.items()}
    test = {k.removeprefix("test/"): v for k, v in values.items() if k.startswith("test/")}
    valid = {k.removeprefix("valid/"): v for k, v in values.items() if k.startswith("valid/")}
    valid = _best_valid(trainer) or valid
    speed = next(c for c in trainer.callbacks if isinstance(c, Speed))
    result = {
        "task": cfg.task.name,
        "model": cfg.model.name,
        "data": cfg.data.name,
        "attention": cfg.attention.name,
        "slots": slot_table(factories),
        "seed": cfg.seed,
        "protocol": cfg.protocol,
        "monitor": task.monitor,
        "mode": task.mode,
        "headline": list(getattr(task, "headline", ())),
        "test": test,
        "valid": valid,
        "baselines": {} if cfg.trainer.fast_dev_run else data.baselines(),
        "cost": {
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "flops": flops,
            "state_size": task.state_size() if hasattr(task, "state_size") else None,
            "peak_memory_mib": peak_memory_mib(),
            "samples_per_s": speed.samples / speed.seconds if speed.seconds else None,
            "train_seconds": seconds,
        },
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "skipped": dict(getattr(data, "skipped", {}) or {}),
        "split": data.split_record() if hasattr(data, "split_record") else {},
        "versions": versions(),
        "git": git_commit(),
        "command": command(),
    }
    result["figures"] = [str(Path(f).relative_to(folder)) for f in figures]
    save_weights(folder / "weights.safetensors", task.model, make_card(cfg, data, task, factories, result))
    for logger in trainer.loggers:
        if hasattr(logger, "log_run_extras"):
            logger.log_run_extras(figures, result, folder)
    write_json(folder / "result.json", result)
    print_result(result, folder)
    return result


def build_data(cfg: DictConfig) -> Any:
    """The data module, prepared and set up."""
    options = plain(cfg.data)
    name = options.pop("name")
    cls = get_data(name)
    kind = get_task(cfg.task.kind).data_kind
    if kind and cls.kind != kind:
        raise ConfigError(f"data {name!r} holds {cls.kind}, task {cfg.task.name!r} needs {kind}")
    # data.seed shifts the order and augmentation of a run; it is 0 unless the user wants the same weights on another order.
    options["seed"] = cfg.seed + (options.get("seed") or 0)
    check_options(f"data {name!r}", cls, options)
    data = cls(**options)
    data.prepare_data()
    data.setup("fit")
    return data


def build_task(cfg: DictConfig, data: Any) -> tuple[ZooTask, dict[str, AttentionFactory]]:
    """Model and LightningModule, and which attention fills which slot."""
    cls = get_task(cfg.task.kind)
    options = {k: v for k, v in plain(cfg.task).items() if k not in ("name", "kind")}
    check_options(f"task {cfg.task.name!r}", cls, options)
    arguments = {**plain(cfg.model), **cls.model_arguments(data)}
    name = arguments.pop("name")
    model_cls = get_model(name)
    attention = plain(cfg.attention)
    switches = {k: attention.pop(k, False) for k in ("strict", "allow_order")}
    overrides = {
        key.removesuffix("_attention"): plain(value)
        for key, value in cfg.items()
        if key.endswith("_attention") and value is not None
    }
    factories = resolve_slots(
        model_cls.slots(**arguments), attention, overrides, task=cfg.task.name, **switches
    )
    model = build_model(name, attention=factories, **arguments)
    # What rebuilds this very model from its card.
    model.build_arguments = {"name": name, "options": arguments}
    return cls(model, data, **options), factories


def build_trainer(cfg: DictConfig, task: ZooTask, folder: Path) -> L.Trainer:
    options = plain(cfg.trainer)
    for ours in ("matmul_precision", "threads"):
        options.pop(ours)
    return L.Trainer(
        **options,
        default_root_dir=folder,
        logger=build_loggers(cfg, folder),
        callbacks=build_callbacks(
            task, folder, cfg.seed, terminal=sys.stdout.isatty(), **plain(cfg.callbacks)
        ),
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


def load_best(task: ZooTask, path: Path) -> None:
    """Put the best checkpoint's weights, averaged ones where kept, into the model."""
    checkpoint = load_checkpoint(path)
    task.load_state_dict(checkpoint["state_dict"])
    if "ema" in checkpoint:
        task.model.load_state_dict(checkpoint["ema"], strict=False)


def make_card(
    cfg: DictConfig, data: Any, task: ZooTask, factories: dict[str, AttentionFactory], result: dict[str, Any]
) -> dict[str, Any]:
    """What a stranger needs to use and to judge the weights."""
    return {
        "task": cfg.task.name,
        "kind": cfg.task.kind,
        "model": task.model.build_arguments,
        "attention": cfg.attention.name,
        "slots": {k: {"name": f.name, "options": dict(f.options)} for k, f in factories.items()},
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
        "config": OmegaConf.to_container(cfg, resolve=True),
        **task.card(),
    }


def peak_memory_mib() -> float:
    """High-water mark of device memory where a GPU is used, of the process elsewhere."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plain(node: Any) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True) if node is not None else {}


def _best_valid(trainer: L.Trainer) -> dict[str, float]:
    callback = trainer.checkpoint_callback
    score = getattr(callback, "best_model_score", None)
    return {} if score is None else {callback.monitor.removeprefix("valid/"): float(score)}


def quiet() -> None:
    """Silence advice that does not concern the user of a finished configuration."""
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*torch.jit.script.*",
        ".*Checkpoint directory.*",
        ".*IterableDataset.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
        ".*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", pattern)
