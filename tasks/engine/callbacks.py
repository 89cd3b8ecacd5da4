"""What runs beside training: exact reproducibility, averaged weights, progress lines, speed, checkpoints."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from tasks.base import ZooTask, batch_size
from tasks.engine.csv_logger import MetricsCsv
from tasks.engine.folder import write_atomic
from tasks.engine.sharding import as_held, own_parameters, whole
from zoo.errors import ConfigError, WeightsError, ZooError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_atomic(Path(path), lambda p: torch.save(checkpoint, p))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and plain values.

    Raises:
        WeightsError: The file is missing, damaged or holds other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"no checkpoint at {path}; start without resume=") from None
    except Exception as error:
        raise WeightsError(
            f"cannot read checkpoint {path} ({type(error).__name__}); it is damaged or not one of ours"
        ) from error


class SeedEachStep(Callback):
    """Makes the randomness of a step a function of (seed, step), so that a resumed run repeats it exactly.

    Batches whose gradients add up to one step draw apart from one another.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        part = batch_idx % trainer.accumulate_grad_batches
        place = (self.seed, trainer.global_step, trainer.global_rank, *([part] if part else ()))
        torch.manual_seed(hash(place) & 0x7FFF_FFFF_FFFF)


class AveragedWeights(Callback):
    """Exponential moving average of the parameters, used for validation and test.

    Args:
        decay: Weight of the past, [0, 1). The first steps use min(decay, (1 + t) / (10 + t)), so short runs catch up.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.step = 0
        self.average: list[Tensor] = []
        self._live: list[Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, module: ZooTask) -> None:
        parameters = list(module.model.parameters())
        if self.average:
            self.average = [as_held(a, p) for a, p in zip(self.average, parameters, strict=True)]
        else:
            self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: ZooTask, *args: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in module.model.parameters()], 1 - decay)

    @torch.no_grad()
    def _exchange(self, module: ZooTask) -> None:
        for parameter, average in zip(own_parameters(module), self.average, strict=True):
            live = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(live)

    def on_validation_start(self, trainer: L.Trainer, module: ZooTask) -> None:
        if trainer.state.fn == "fit":
            self._exchange(module)

    def on_validation_end(self, trainer: L.Trainer, module: ZooTask) -> None:
        if trainer.state.fn == "fit":
            self._exchange(module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: ZooTask, checkpoint: dict[str, Any]) -> None:
        names = [n for n, _ in module.model.named_parameters()]
        checkpoint["ema"] = {n: whole(a) for n, a in zip(names, self.average, strict=True)}
        checkpoint["ema_step"] = self.step

    def on_load_checkpoint(self, trainer: L.Trainer, module: ZooTask, checkpoint: dict[str, Any]) -> None:
        averages = zip(checkpoint["ema"].values(), own_parameters(module), strict=True)
        self.average = [as_held(a, p) for a, p in averages]
        self.step = checkpoint["ema_step"]


class StopOnNan(Callback):
    """Ends a run whose loss is no longer a number; the last checkpoint is from before."""

    def on_train_batch_end(self, trainer: L.Trainer, module: ZooTask, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is not None and not math.isfinite(float(loss)):
            raise ZooError(
                f"the loss is {float(loss)} at step {trainer.global_step}; the last checkpoint is from before. Try "
                f"a smaller task.lr (now {module.lr}) or trainer.gradient_clip_val"
            )


class SaveWhenTerminated(Callback):
    """On SIGTERM (a scheduler's end of time) the step that ran is saved; Lightning raises after it.

    Amid a validation Lightning would raise between two of its batches, with the averaged weights in the model and half of the
    metrics summed: nothing to resume from. The signal is held until the validation has ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = False

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.received_sigterm and trainer.state.fn == "fit":
            self._held, trainer._signal_connector.received_sigterm = True, False

    def on_validation_end(self, trainer: L.Trainer, module: ZooTask) -> None:
        if self._held:
            trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer: L.Trainer, module: ZooTask, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and not trainer.validating:
            trainer.save_checkpoint(self.path)


class SaveBetweenValidations(ModelCheckpoint):
    """Saves every so many steps, but not where an epoch or a validation ends, which saves by itself.

    A run that resumes from the state between a step and its validation goes on with the next step: the validation would be lost.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        loop = trainer.fit_loop
        if not (
            loop.epoch_loop.batch_progress.is_last_batch
            or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        ):
            super().on_train_batch_end(trainer, *args)


class Speed(Callback):
    """Measures samples per second of training, validation left out, and the time of the whole fit; a resumed run goes on counting."""

    def __init__(self) -> None:
        self.samples = 0
        self.seconds = 0.0
        self._start = 0.0
        self._earlier, self._began = 0.0, time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of the fit so far, validation included."""
        return self._earlier + time.perf_counter() - self._began

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._began = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        return {"samples": self.samples, "seconds": self.seconds, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.samples, self.seconds, self._earlier = state["samples"], state["seconds"], state["elapsed"]

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._start
        self.samples += batch_size(batch) * trainer.world_size


class ValidateLast(Callback):
    """Validates the last epoch whatever `check_val_every_n_epoch` is: there the schedule ends, and a short run has no other."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    on_train_start = on_train_epoch_start  # amid its last epoch a resumed run does not start it again


class ProgressLines(Callback):
    """One plain line per validated epoch, for logs and pipes."""

    def on_validation_end(self, trainer: L.Trainer, module: ZooTask) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        shown = ["train/loss", f"valid/{module.monitor}"] + [k for k in values if k.startswith("valid/")]
        text = "  ".join(f"{k} {values[k]:.4g}" for k in dict.fromkeys(shown) if k in values)
        of = f"/{trainer.max_epochs}" if trainer.max_epochs > 0 else ""  # none on a budget of time
        print(
            f"epoch {trainer.current_epoch + 1}{of}  step {trainer.global_step}  {text}",
            flush=True,
        )


class RewindLog(Callback):
    """Drops logged rows that a resumed run will write again, and brings back the one that a kill can lose.

    Lightning logs a step after the callbacks that may save a checkpoint at its end; so the checkpoint carries that row.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, module: ZooTask, checkpoint: dict[str, Any]) -> None:
        row = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        checkpoint["last_row"] = row and row | {"epoch": trainer.current_epoch}

    def on_load_checkpoint(self, trainer: L.Trainer, module: ZooTask, checkpoint: dict[str, Any]) -> None:
        # Here and not at the start of the training, which a run that was killed in its test does not see again.
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.rewind(checkpoint["global_step"], checkpoint.get("last_row", {}))


def build_callbacks(
    task: ZooTask,
    folder: Path,
    seed: int,
    *,
    ema_decay: float = 0.0,
    early_stop_patience: int | None = None,
    checkpoint_every_steps: int | None = None,
    progress: str = "auto",
    terminal: bool = False,
) -> list[Callback]:
    """The callbacks of a run.

    Args:
        ema_decay: Averaging of weights; 0 switches it off.
        early_stop_patience: Validations without a better `task.monitor` before the run stops; None never.
        checkpoint_every_steps: Besides every epoch, save the last state every so many steps.
        progress: "auto" (bar on a terminal, lines elsewhere), "bar", "lines" or "none".
        terminal: Whether standard output is one.
    """
    callbacks: list[Callback] = [SeedEachStep(seed), StopOnNan(), Speed(), RewindLog(), ValidateLast()]
    if ema_decay:
        callbacks.append(AveragedWeights(ema_decay))
    monitor = f"valid/{task.monitor}"
    if early_stop_patience is not None:
        callbacks.append(EarlyStopping(monitor, mode=task.mode, patience=early_stop_patience))
    checkpoints = folder / "checkpoints"
    callbacks.append(
        ModelCheckpoint(
            checkpoints,
            "best",
            monitor=monitor,
            mode=task.mode,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
    )
    callbacks.append(
        ModelCheckpoint(
            checkpoints, "last", monitor=None, save_on_train_epoch_end=True, enable_version_counter=False
        )
    )
    if checkpoint_every_steps is not None:
        callbacks.append(
            SaveBetweenValidations(
                checkpoints, "last", every_n_train_steps=checkpoint_every_steps, enable_version_counter=False
            )
        )
    callbacks.append(SaveWhenTerminated(checkpoints / "last.ckpt"))
    if progress not in ("auto", "bar", "lines", "none"):
        raise ConfigError(f"callbacks.progress={progress!r}: choose auto, bar, lines or none")
    if progress == "bar" or (progress == "auto" and terminal):
        callbacks.append(RichProgressBar())
    elif progress != "none":
        callbacks.append(ProgressLines())
    return callbacks
