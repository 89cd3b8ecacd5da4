"""When memory runs out: half the batch, twice the accumulation, and a record of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from tasks.engine.build import plain
from tasks.engine.folder import write_json
from zoo.errors import ZooError

RECORD = "out_of_memory.json"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory, on a device or (as a plain RuntimeError) on the CPU."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text


def smaller_batch(cfg: DictConfig, folder: Path, error: BaseException) -> DictConfig:
    """The configuration with half the batch and the same samples per optimiser step; notes it in the run folder.

    Raises:
        ZooError: The batch cannot be halved, or other processes wait in the middle of a step.
    """
    size = OmegaConf.select(cfg, "data.batch_size")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ZooError(
            f"out of memory in process {torch.distributed.get_rank()} of {torch.distributed.get_world_size()} with "
            f"data.batch_size={size}; start again with half of it and twice trainer.accumulate_grad_batches. Cause: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not size or size % 2:
        raise ZooError(
            f"out of memory with data.batch_size={size}, which cannot be halved further; make the model smaller or "
            f"give an even batch size. Cause: {str(error).splitlines()[0]}"
        ) from error
    found = OmegaConf.create(plain(cfg))
    _halve(found)
    events = [*(plain(cfg).get("out_of_memory") or []), {"batch_size": size, "next_batch_size": size // 2}]
    found.out_of_memory = events
    write_json(folder / RECORD, events)
    warnings.warn(
        f"out of memory with data.batch_size={size}: going on with {size // 2}, gradients of "
        f"{found.trainer.accumulate_grad_batches} batches a step",
        stacklevel=2,
    )
    return found


def remembered(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration as an earlier process of this run had to change it."""
    if not (folder / RECORD).exists():
        return cfg
    found = OmegaConf.create(plain(cfg))
    for event in json.loads((folder / RECORD).read_text()):
        if found.data.batch_size == event["batch_size"]:
            _halve(found)
    found.out_of_memory = json.loads((folder / RECORD).read_text())
    return found


def _halve(cfg: DictConfig) -> None:
    """Half the batches of training and evaluation, twice the accumulation."""
    cfg.data.batch_size //= 2
    if cfg.data.get("eval_batch_size"):
        cfg.data.eval_batch_size = max(1, cfg.data.eval_batch_size // 2)
    cfg.trainer.accumulate_grad_batches *= 2
