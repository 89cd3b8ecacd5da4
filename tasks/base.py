"""What every task shares: named losses, metrics per split, optimiser, schedule, and hooks for figures.

A task file defines one subclass of `ZooTask`. It says which metrics count, how a batch becomes losses and
predictions, and which figures its users look at; everything else is here or in `tasks.engine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tasks.engine.sharding import make_whole, shard, share_again
from tasks.optimizers.muon import Muon, split_matrices
from zoo.attention.base import Attention
from zoo.errors import ConfigError

Batch = dict[str, Any]


class ZooTask(L.LightningModule):
    """Base of every task.

    Args:
        model: The network.
        data: The data module; set up already.
        optimizer: "adamw", or "muon" for the weights of hidden layers and AdamW for the rest, see `tasks.optimizers.muon`.
        lr: Peak learning rate, > 0.
        muon_lr: Peak rate of the matrices that Muon trains; None for `lr`. Short trainings like several times that.
        weight_decay: AdamW's decay for matrices; biases, norms and embeddings have none.
        betas: AdamW's moment decays.
        warmup_fraction: Share of all steps over which the rate rises from zero, [0, 1).
        schedule: "cosine" down to `min_lr_fraction`, or "constant".
        min_lr_fraction: Last rate over peak rate.
        auxiliary_weight: Factor on the variants' auxiliary losses (routing balance ...).

    Attributes:
        monitor: Validation metric that picks the best checkpoint.
        mode: "max" or "min" for that metric.
        data_kind: Kind of data module that fits; compared with the module's `kind`.
        whole_to_evaluate: Whether evaluation calls parts of the network outside their `forward` (decoding token by token), for which
            trainer=fsdp has to give every process all parameters.
        loss_split: Split whose batches `losses` takes: "validation", where evaluation's batches hold what training's do, "train", or
            None for a loss that is not of batches.
    """

    monitor: ClassVar[str] = "loss"
    mode: ClassVar[str] = "min"
    data_kind: ClassVar[str] = ""
    whole_to_evaluate: ClassVar[bool] = False
    loss_split: ClassVar[str | None] = "validation"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        muon_lr: float | None = None,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_fraction: float = 0.1,
        schedule: str = "cosine",
        min_lr_fraction: float = 0.01,
        auxiliary_weight: float = 0.01,
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("muon_lr", muon_lr)):
            if value is not None and value <= 0:
                raise ConfigError(f"task.{name}={value} must be positive")
        for name, value in (("weight_decay", weight_decay), ("auxiliary_weight", auxiliary_weight)):
            if value < 0:
                raise ConfigError(f"task.{name}={value} must not be negative")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"task.betas={list(betas)} must be two numbers in [0, 1)")
        if not 0 <= min_lr_fraction <= 1:
            raise ConfigError(f"task.min_lr_fraction={min_lr_fraction} is outside [0, 1]")
        if not 0 <= warmup_fraction < 1:
            raise ConfigError(f"task.warmup_fraction={warmup_fraction} is outside [0, 1)")
        if optimizer not in ("adamw", "muon"):
            raise ConfigError(f"task.optimizer={optimizer!r}: choose adamw or muon")
        if schedule not in ("cosine", "constant"):
            raise ConfigError(f"task.schedule={schedule!r}: choose cosine or constant")
        self.model = model
        # Not a submodule and not part of any copy or checkpoint: a plain reference.
        self.__dict__["data"] = data
        self.optimizer, self.lr, self.weight_decay, self.betas = optimizer, lr, weight_decay, tuple(betas)
        self.muon_lr = lr if muon_lr is None else muon_lr
        self.warmup_fraction, self.schedule, self.min_lr_fraction = warmup_fraction, schedule, min_lr_fraction
        self.auxiliary_weight = auxiliary_weight
        # Set by the protocol of a comparison: share of `total_steps` that is run, or the share of a time budget used.
        self.step_share: float = 1.0
        self.clock: Callable[[], float] | None = None
        self._steps: int | None = None
        self.metrics = nn.ModuleDict({split: self.make_metrics() for split in ("valid", "test")})
        self._has_auxiliary = any(
            isinstance(m, Attention) and type(m).auxiliary_loss is not Attention.auxiliary_loss
            for m in model.modules()
        )

    # ---------------------------------------------------------------- what a task defines

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        """What the data dictate about the model: sizes, channels, classes."""
        return {}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Named, already weighted terms; the training loss is their sum."""
        raise NotImplementedError

    def make_metrics(self) -> MetricCollection:
        """Fresh metrics for one split, under the names of `result.json`."""
        raise NotImplementedError

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        """Predict one batch and update `metrics`; may keep what figures need when split == "test"."""
        raise NotImplementedError

    def gather(self) -> None:
        """Bring what `figures` shows of the test set together, `of_all_processes`; every process is asked."""

    def figures(self, folder: Path) -> list[Path]:
        """Draw what the task's users look at, after the test and `gather`; returns the files written.

        The first process alone is asked: a drawing that waits for the others waits for ever.
        """
        return []

    def example_inputs(self) -> tuple[tuple, dict]:
        """Arguments of one forward pass of one sample, for counting FLOPs."""
        raise NotImplementedError

    def card(self) -> dict[str, Any]:
        """Further entries of the weights' card: labels, vocabulary, scaling ..."""
        return {}

    # ---------------------------------------------------------------- Lightning

    def configure_model(self) -> None:
        """Share out the network where the trainer has a mesh of processes (trainer=fsdp)."""
        if self.device_mesh is not None:
            shard(self, self.device_mesh["data_parallel"])

    def on_validation_start(self) -> None:
        if self.whole_to_evaluate:
            make_whole(self)

    def on_validation_end(self) -> None:
        if self.whole_to_evaluate:
            share_again(self)

    def on_test_start(self) -> None:
        if self.whole_to_evaluate:
            make_whole(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.losses(batch)
        if self._has_auxiliary:
            terms["auxiliary"] = self.auxiliary_weight * auxiliary_loss(self.model)
        total = sum(terms.values())
        size = batch_size(batch)
        self.log("train/loss", total.detach(), batch_size=size, prog_bar=True)
        if len(terms) > 1:
            self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=size)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.update_metrics(batch, self.metrics["valid"], "valid")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.update_metrics(batch, self.metrics["test"], "test")

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("valid")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def compute_metrics(self, split: str) -> dict[str, float]:
        """Metrics over everything seen in this split since the last reset."""
        return {k: float(v) for k, v in self.metrics[split].compute().items()}

    def _log_metrics(self, split: str) -> None:
        values = self.compute_metrics(split)
        self.log_dict({f"{split}/{k}": v for k, v in values.items()}, prog_bar=split == "valid")
        self.metrics[split].reset()

    def total_steps(self) -> int:
        """Optimiser steps of the whole run, at least 1.

        Not `trainer.estimated_stepping_batches`: that sets up the loaders before a resumed run's position in them is
        known, and Lightning then starts the epoch anew.
        """
        trainer = self.trainer
        if trainer.max_epochs == -1 and trainer.max_steps > 0:
            return trainer.max_steps
        batches = len(self.data.train_dataloader())
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * max(trainer.max_epochs or 1, 1)
        steps = max(1, round(steps * self.step_share))
        return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps

    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        if self.clock:
            return min(1.0, self.clock())
        if self._steps is None:  # asked at every step, and counting the batches may cost
            self._steps = self.total_steps()
        return min(1.0, self.global_step / self._steps)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.weight_decay)
        if self.optimizer == "muon":
            optimizer = Muon(split_matrices(groups, self.model, self.muon_lr), lr=self.lr, betas=self.betas)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        # On a budget of time the rate follows the clock, in thousandths.
        total = 1000 if self.clock else self.total_steps()
        warmup = int(self.warmup_fraction * total)

        def scale(step: int) -> float:
            step = int(self.progress() * total) if self.clock else step
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if self.schedule == "constant":
                return 1.0
            progress = min(1.0, (step - warmup) / max(1, total - warmup))
            return self.min_lr_fraction + (1 - self.min_lr_fraction) * 0.5 * (
                1 + math.cos(math.pi * progress)
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with decay; vectors, embeddings and what a module lists in `no_weight_decay` without."""
    skip = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in (
            [n for n, _ in module.named_parameters(recurse=False)]
            if isinstance(module, nn.Embedding)
            else _without_decay(module)
        )
    }
    decay = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and n not in skip]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not (p.ndim > 1 and n not in skip)]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _without_decay(module: nn.Module) -> Any:
    """What a module names in `no_weight_decay`, an attribute or a method."""
    names = getattr(module, "no_weight_decay", ())
    return names() if callable(names) else names


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses of all attention modules in `model`."""
    return sum(m.auxiliary_loss() for m in model.modules() if isinstance(m, Attention))


def full_precision(x: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is: losses and scores add up more than half precision holds."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def of_all_processes(rows: list[Any]) -> list[Any]:
    """`rows` of every process, those of the first process first; every process has to ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch: length of its first tensor or list."""
    first = next(iter(batch.values()))
    return len(first)
