"""What a comparison holds equal: optimiser steps, parameters, FLOPs or training time.

`settle` turns the protocol into plain changes of the configuration (a width, a number of epochs), so that nothing below knows
of it; `Budget` ends the training where steps or seconds are used up. What was done is a record that travels with the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from tasks.base import ZooTask
from tasks.engine.build import build_task, plain
from zoo.attention.slots import FALLBACK
from zoo.errors import ConfigError
from zoo.layers.flops import count_flops

NAMES = ("equal_steps", "equal_params", "equal_flops", "equal_time")
CLOCKS: dict[str, Callable[[], float]] = {"process": time.process_time, "wall": time.perf_counter}

# Widths of the layers that do not mix tokens, in the order of preference; the model's own width comes last.
FREE_WIDTHS = ("mlp_ratio", "mlp_hidden", "mlp_dim", "mixer_hidden", "head_hidden", "dim", "width")


def settle(cfg: DictConfig, data: Any) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration that the protocol asks for, and the record of what was changed.

    Args:
        cfg: Resolved configuration; `cfg.protocol` names the protocol and its options.
        data: Data module; set up already.

    Raises:
        ConfigError: An unknown protocol, or no width makes the parameters match.
    """
    options = plain(cfg.protocol) if not isinstance(cfg.protocol, str) else {"name": cfg.protocol}
    name = options["name"]
    if name not in NAMES:
        raise ConfigError(f"protocol {name!r} is unknown; choose from {', '.join(NAMES)}")
    if name == "equal_steps":
        return cfg, {"name": name}
    found = OmegaConf.create(plain(cfg))
    if name == "equal_time":
        seconds, clock = options["seconds"], options["clock"]
        if clock == "auto":
            clock = "process" if cfg.trainer.accelerator == "cpu" else "wall"
        if seconds <= 0 or clock not in CLOCKS:
            raise ConfigError(
                f"protocol.seconds={seconds}, protocol.clock={clock!r}: give seconds > 0 and a clock of auto, process, wall"
            )
        found.trainer.max_epochs, found.trainer.max_steps = -1, -1
        return found, {"name": name, "clock": clock, "seconds": float(seconds)}
    reference = OmegaConf.create(plain(cfg))
    reference.attention = {"name": options.get("reference", FALLBACK)}
    if name == "equal_flops":
        return _equal_flops(found, reference, data)
    return _equal_params(found, reference, data, options)


def _equal_flops(cfg: DictConfig, reference: DictConfig, data: Any) -> tuple[DictConfig, dict[str, Any]]:
    """As many epochs as make forward FLOPs a sample times samples the reference's."""
    flops, goal = (_look(c, data, _flops) for c in (cfg, reference))
    epochs = cfg.trainer.max_epochs
    if not flops or not epochs or epochs < 0:
        raise ConfigError(
            "protocol equal_flops needs trainer.max_epochs and a model whose FLOPs can be counted"
        )
    exact = epochs * goal / flops
    cfg.trainer.max_epochs = math.ceil(exact)
    if cfg.trainer.max_steps > 0:
        cfg.trainer.max_steps = max(1, round(cfg.trainer.max_steps * goal / flops))
    return cfg, {
        "name": "equal_flops",
        "reference": reference.attention.name,
        "flops": flops,
        "reference_flops": goal,
        "epochs": exact,
        "reference_epochs": epochs,
        "share": exact / math.ceil(exact),
    }


def _equal_params(
    cfg: DictConfig, reference: DictConfig, data: Any, options: dict[str, Any]
) -> tuple[DictConfig, dict[str, Any]]:
    goal, tolerance = _look(reference, data, _parameters), options["tolerance"]
    record = {"name": "equal_params", "reference": reference.attention.name, "reference_parameters": goal}

    def off(changed: DictConfig) -> float:
        return _look(changed, data, _parameters) / goal - 1

    if abs(off(cfg)) <= tolerance / 10:
        return cfg, record | {"changed": {}, "difference": off(cfg)}
    adjust = options["adjust"]
    candidates = [k for k in FREE_WIDTHS if k in cfg.model] if adjust == "auto" else [adjust]
    if not candidates or any(k not in cfg.model for k in candidates):
        raise ConfigError(
            f"protocol equal_params: model {cfg.model.name!r} has no option {adjust!r} to change; name one of its "
            "widths in protocol.adjust"
        )
    best: tuple[float, str, Any] = (math.inf, "", None)
    for key in candidates:
        value, difference = _match(cfg, key, off, tolerance)
        best = min(best, (abs(difference), key, value), key=lambda t: t[0])
        if abs(difference) <= tolerance:
            found = OmegaConf.create(plain(cfg))
            found.model[key] = value
            return found, record | {"changed": {key: value}, "difference": difference}
    raise ConfigError(
        f"protocol equal_params: no {' or '.join(candidates)} of model {cfg.model.name!r} brings the parameters within "
        f"{tolerance:.0%} of {reference.attention.name}'s {goal:,}; the nearest is {best[1]}={best[2]} with "
        f"{best[0]:.1%}. Raise protocol.tolerance or use equal_flops"
    )


def _match(
    cfg: DictConfig, key: str, off: Callable[[DictConfig], float], tolerance: float
) -> tuple[Any, float]:
    """The value of a width that comes nearest to the goal, by bisection: parameters grow with every width."""
    changed = OmegaConf.create(plain(cfg))
    grain = _grain(cfg, key)

    def at(units: int) -> float:
        changed.model[key] = units * grain if isinstance(grain, int) else round(units * grain, 6)
        try:
            return off(changed)
        except (ConfigError, ValueError):  # too narrow for the model
            return -math.inf

    low, high = 1, 2
    while at(high) < 0 and high < 1 << 16:
        low, high = high, 2 * high
    while high - low > 1 and not abs(at(low)) <= tolerance / 20:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < 0 else (low, middle)
    difference = at(min((low, high), key=lambda u: abs(at(u))))
    return changed.model[key], difference


def _grain(cfg: DictConfig, key: str) -> int | float:
    """The smallest step of a width."""
    if key == "mlp_ratio":
        return 1 / 64
    if key not in ("dim", "width"):
        return 1
    heads = cfg.model.get("num_heads") or cfg.model.get("heads") or 1
    return math.lcm(4, heads)  # rotary and sine positions want fours


def _look(cfg: DictConfig, data: Any, what: Callable[[ZooTask], float]) -> float:
    """A number of the task that `cfg` describes; leaves the random state alone."""
    with torch.random.fork_rng(devices=[]):
        return what(build_task(cfg, data)[0])


def _parameters(task: ZooTask) -> int:
    return sum(p.numel() for p in task.model.parameters())


def _flops(task: ZooTask) -> float:
    return count_flops(task.model, *task.example_inputs())


class Budget(Callback):
    """Ends the training when its steps or its seconds are used up, with a last validation.

    Seconds count from the first step to the last, loading included, validation excluded; a resumed run goes on counting.

    Args:
        seconds: Training time; None for the number of steps of `ZooTask.total_steps`.
        clock: "process" (CPU seconds of the first process, all its threads; other programs do not shorten a run) or "wall".
    """

    def __init__(self, seconds: float | None = None, clock: str = "process") -> None:
        self.seconds, self.clock = seconds, CLOCKS[clock]
        self._used, self._since = 0.0, None

    @classmethod
    def of(cls, protocol: dict[str, Any], task: ZooTask) -> Budget:
        """The budget of a protocol, with the task's schedule tied to it."""
        task.step_share = protocol.get("share", 1.0)
        if protocol["name"] != "equal_time":
            return cls()
        budget = cls(protocol["seconds"], protocol["clock"])
        task.clock = lambda: budget.used / budget.seconds
        return budget

    @property
    def used(self) -> float:
        """Seconds of training so far."""
        return self._used + (0.0 if self._since is None else self.clock() - self._since)

    def report(self, protocol: dict[str, Any], trainer: L.Trainer) -> None:
        """Complete the record after the training."""
        protocol["steps"] = trainer.global_step
        if self.seconds is not None:
            protocol["used_seconds"] = self.used

    def _pause(self) -> None:
        self._used, self._since = self.used, None

    def on_train_start(self, trainer: L.Trainer, module: ZooTask) -> None:
        self._since = self.clock()

    def on_validation_start(self, trainer: L.Trainer, module: ZooTask) -> None:
        self._pause()

    def on_validation_end(self, trainer: L.Trainer, module: ZooTask) -> None:
        if trainer.state.fn == "fit":
            self._since = self.clock()

    def on_train_end(self, trainer: L.Trainer, module: ZooTask) -> None:
        self._pause()

    def on_train_batch_end(self, trainer: L.Trainer, module: ZooTask, *args: Any) -> None:
        if self.seconds is None:
            done = module.step_share < 1 and module.progress() >= 1
        else:
            done = trainer.strategy.broadcast(self.used >= self.seconds)
        if done:
            trainer.should_stop = True
            trainer.check_val_every_n_epoch = 1  # the last state is validated whatever the epoch

    def state_dict(self) -> dict[str, float]:
        return {"used": self.used}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._used = state["used"]


def describe(record: dict[str, Any]) -> str:
    """One line for tables and logs: what was held equal, and how."""
    name = record["name"]
    if name == "equal_params":
        changed = ", ".join(f"{k} {v:g}" for k, v in record["changed"].items()) or "nothing changed"
        goal = f"{record['reference']}'s {record['reference_parameters']:,}"
        return f"{name}: {changed}; parameters {record['difference']:+.2%} of {goal}"
    if name == "equal_flops":
        times = record["flops"] / record["reference_flops"]
        return (
            f"{name}: {record['epochs']:.2f} epochs for {record['reference']}'s {record['reference_epochs']}, at "
            f"{times:.3f} of its forward FLOPs a sample"
        )
    if name == "equal_time":
        unit = "CPU seconds of the process" if record["clock"] == "process" else "seconds of wall time"
        used = f", {record['used_seconds']:.1f} used" if "used_seconds" in record else ""
        return f"{name}: {record['seconds']:g} {unit} of training, validation not counted{used}"
    return f"{name}: the task's own number of optimiser steps"
