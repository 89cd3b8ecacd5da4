"""Traffic forecasting: masked mean absolute error on the readings' scale; MAE, RMSE, MAPE by step ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from data.sampler import BatchKey
from data.traffic_scores import HorizonErrors
from tasks.base import Batch, ZooTask, of_all_processes
from zoo.errors import ConfigError

INPUTS = ("history", "history_seen", "clock", "known", "known_seen")


class Traffic(ZooTask):
    """All sensors, all steps ahead at once.

    Args:
        nonnegative: Readings cannot be negative: forecasts are cut at 0 when they are scored.
        hide_sensors: Share of sensors whose whole history is hidden in a training window, [0, 1).
        hide_looks: Share of earlier looks that are hidden in a training window, [0, 1).
        common: Options of `ZooTask`.
    """

    monitor = "mae"
    mode = "min"
    data_kind = "traffic"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        nonnegative: bool = True,
        hide_sensors: float = 0.0,
        hide_looks: float = 0.0,
        **common: Any,
    ) -> None:
        for name, share in (("hide_sensors", hide_sensors), ("hide_looks", hide_looks)):
            if not 0 <= share < 1:
                raise ConfigError(f"task.{name}={share} is outside [0, 1)")
        # make_metrics, called by the base class, needs these.
        self.__dict__["horizon"] = data.geometry.horizon
        self.__dict__["report"] = (data.report_steps, data.mape_min)
        super().__init__(model, data, **common)
        self.nonnegative = nonnegative
        self.hide_sensors, self.hide_looks = hide_sensors, hide_looks
        self.headline = [*(f"mae_h{step}" for step in data.report_steps), "mae", "rmse", "mape"]
        give_statistics(model, data)
        # A constant that brings the loss near one, so that gradient clipping means the same on every data set.
        self.loss_unit = float(np.mean(data.std))
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._starts = np.empty(0)  # first step of each window of `_kept`, once gathered

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        data.setup()
        g = data.geometry
        return {
            "num_sensors": data.num_sensors,
            "slots_per_day": data.series.slots_per_day,
            "history_steps": g.history,
            "horizon_steps": g.horizon,
            "lag_steps": list(g.lags),
        }

    def make_metrics(self) -> MetricCollection:
        steps, mape_min = self.report
        return MetricCollection({"errors": HorizonErrors(self.horizon, steps, mape_min)})

    def forecast(self, batch: Batch) -> Tensor:
        """Readings [B, Q, N]; of an ensemble in training, each member's, [B, k, Q, N]."""
        return self.model(**{k: batch[k] for k in INPUTS if k in batch})

    def hide(self, batch: Batch) -> Batch:
        """Hide random sensors' histories and random earlier looks from the network; targets stay."""
        batch = dict(batch)
        for name, share, shape in (
            ("history", self.hide_sensors, lambda t: (len(t), 1, t.shape[2])),
            ("known", self.hide_looks, lambda t: (*t.shape[:2], 1, 1)),
        ):
            if share and name in batch:
                values = batch[name]
                keep = torch.rand(shape(values), device=values.device) >= share
                batch[name] = values * keep
                batch[f"{name}_seen"] = batch[f"{name}_seen"] & keep
        return batch

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        batch = self.hide(batch)
        forecast, target, seen = self.forecast(batch), batch["target"], batch["target_seen"]
        if forecast.dim() == 4:  # the mean of the members' losses, not the loss of their mean
            target, seen = (t[:, None].expand_as(forecast) for t in (target, seen))
        return {"mae": masked_mae(forecast, target, seen) / self.loss_unit}

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        forecast = self.forecast(batch)
        if self.nonnegative:
            forecast = forecast.clamp_min(0.0)
        metrics.update(forecast, batch["target"], batch["target_seen"])
        if split == "test":
            kept = (forecast, batch["target"], batch["target_seen"])
            self._kept.append(tuple(t.detach().cpu() for t in kept))

    def on_test_epoch_start(self) -> None:
        self._kept = []

    def compute_metrics(self, split: str) -> dict[str, float]:
        values = self.metrics[split].compute()
        return {k.removeprefix("errors_"): float(v) for k, v in values.items() if float(v) == float(v)}

    def example_inputs(self) -> tuple[tuple, dict]:
        batch = self.data.dataset("test")[BatchKey(np.array([0]), -1, 0)]
        return (), {k: batch[k] for k in INPUTS if k in batch}

    def card(self) -> dict[str, Any]:
        return {"nonnegative": self.nonnegative, "slots_per_day": self.data.series.slots_per_day}

    def gather(self) -> None:
        own = self.data.starts["test"][self.data.test_dataloader().sampler.order()]
        own = own[: sum(len(forecast) for forecast, _, _ in self._kept)]
        self._starts = np.concatenate(of_all_processes([own]))
        self._kept = of_all_processes(self._kept)

    def figures(self, folder: Path) -> list[Path]:
        from tasks._traffic_figures import draw

        if not self._kept:
            return []
        order = np.argsort(self._starts)
        columns = (torch.cat(column).numpy()[order] for column in zip(*self._kept, strict=True))
        return draw(folder, self.model, self.data, self._starts[order], *columns)


def masked_mae(forecast: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    """Mean absolute error over the cells that were read; zero where none was.

    Args:
        forecast: [B, Q, N], or of members [B, k, Q, N].
        target: As `forecast`; anything where not seen.
        seen: bool, as `forecast`.
    """
    error = torch.where(seen, forecast - target, 0.0).abs()
    return error.sum() / seen.sum().clamp_min(1)


def give_statistics(model: nn.Module, data: Any) -> None:
    """Fill the model's buffers: scaling from training rows, and the graph."""
    train = data.rows["train"]
    away = data.series.values[train] - data.profile[data.series.week_slot[train]]
    spread = np.nan_to_num(np.nanstd(away, axis=0), nan=1.0)
    statistics = (data.mean, data.std, data.profile, np.maximum(spread, 1e-3 * data.std))
    adjacency = data.adjacency()
    for module in model.modules():
        if hasattr(module, "set_statistics"):
            module.set_statistics(*(torch.from_numpy(np.ascontiguousarray(s)) for s in statistics))
        if hasattr(module, "set_graph"):
            module.set_graph(adjacency)
