"""What every traffic data set shares: repairs, splits before windowing, statistics from train, baselines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from data.base import SPLITS, ZooData, check_at_least, hash_arrays
from data.errors import DataError
from data.traffic_baselines import VERSION, ForecastBaselines, has_lightgbm
from data.traffic_series import Series, drop_dead, keep_self_loops, mark_missing
from data.traffic_windows import (
    Geometry,
    WindowDataset,
    Windows,
    split_by_ratio,
    weekly_profile,
    window_starts,
)

log = logging.getLogger(__name__)


class TrafficData(ZooData):
    """Windows of a sensor network's readings.

    Batches: ``history`` [B, P, N] with ``history_seen``, ``clock`` [B] (slot of the week of the first step),
    ``target`` [B, Q, N] with ``target_seen``, and with lags ``known`` [B, L, Q, N] with ``known_seen``; readings are in
    their own unit, 0 where missing. Rows are split in time order first; no window crosses a border. Earlier looks reach
    back across a border: at the time of a forecast they lie in the past.

    Args:
        history_steps: P, steps that the model sees.
        horizon_steps: Q, steps that it forecasts.
        lag_steps: Distances in steps of earlier looks at each forecast hour (24 at hourly steps: the same hour
            yesterday); each at least `horizon_steps`. Empty for the windows of the literature.
        split: Shares of train, validation and test in time order.
        null_value: What means "missing": zero, nan or none (nothing is missing).
        scale: "sensor" or "global": mean and deviation of each sensor, or of all together, over training rows.
        zscore_includes_missing: Count missing cells as zeros in mean and deviation and show them to the model as zeros
            that were read, as old code does; to reproduce published numbers.
        drop_dead_sensors: Leave out sensors without any training reading (counted) instead of refusing.
        mape_min: Smallest reading that counts for MAPE.
        report_steps: Steps ahead that get their own figures.
        common: Options of :class:`data.base.ZooData`.
    """

    kind: ClassVar[str] = "traffic"
    unit: ClassVar[str] = "reading"

    def __init__(
        self,
        *,
        history_steps: int = 12,
        horizon_steps: int = 12,
        lag_steps: Sequence[int] = (),
        split: Sequence[float] = (0.7, 0.1, 0.2),
        null_value: str = "zero",
        scale: str = "global",
        zscore_includes_missing: bool = False,
        drop_dead_sensors: bool = True,
        mape_min: float = 0.0,
        report_steps: Sequence[int] = (3, 6, 12),
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if scale not in ("sensor", "global"):
            raise DataError(f"data.scale={scale!r}: choose sensor or global")
        if null_value not in ("zero", "nan", "none"):
            raise DataError(f"data.null_value={null_value!r}: choose zero, nan or none")
        check_at_least(0, mape_min=mape_min)
        self.geometry = Geometry(history_steps, horizon_steps, tuple(lag_steps or ()))
        self.split_shares = tuple(split)
        self.null_value, self.scale = null_value, scale
        self.zscore_includes_missing = zscore_includes_missing
        self.drop_dead_sensors = drop_dead_sensors
        self.mape_min = float(mape_min)
        if any(not isinstance(s, int) or s < 1 for s in report_steps):
            raise DataError(
                f"data.report_steps={list(report_steps)} must be whole numbers from 1, steps ahead"
            )
        self.report_steps = tuple(s for s in report_steps if s <= horizon_steps)
        self.series: Series | None = None
        self.rows: dict[str, slice] = {}
        self.starts: dict[str, np.ndarray] = {}

    # -- what a data set defines -------------------------------------------------------------------------

    def read(self) -> Series:
        """The readings on a regular clock; ``null_value`` is applied afterwards."""
        raise NotImplementedError

    def split_rows(self, series: Series) -> dict[str, slice]:
        """Rows of each split, in time order."""
        return split_by_ratio(len(series.values), self.split_shares)

    def segments(self, series: Series) -> np.ndarray | None:
        """Unbroken stretch of each row, int64 [T], where the rows are not one stretch."""
        return None

    # -- ZooData -----------------------------------------------------------------------------------------

    def load(self) -> dict[str, Dataset]:
        """Read, repair, split, and take statistics from the training rows."""
        series = mark_missing(self.read(), self.null_value)
        rows = self.split_rows(series)
        series = keep_self_loops(drop_dead(series, rows["train"], drop=self.drop_dead_sensors))
        self.series, self.rows = series, rows
        self.starts = self.cut(series, rows)
        train = series.values[rows["train"]]
        slots = series.week_slot
        self.profile = weekly_profile(train, slots[rows["train"]], series.slots_per_day)
        self.mean, self.std = self._moments(train)
        windows = Windows(
            series.values,
            slots,
            self.geometry,
            self.segments(series),
            missing_as_zero=self.zscore_includes_missing,
        )
        self.windows = windows
        self.labels = list(series.sensors)
        for repair, count in series.repairs.items():
            log.warning("data %r: %d %s repaired", self.name, count, repair.replace("_", " "))
        return {split: WindowDataset(windows, self.starts[split]) for split in SPLITS}

    def cut(self, series: Series, rows: dict[str, slice]) -> dict[str, np.ndarray]:
        """First rows of the windows of each split."""
        return window_starts(rows, self.geometry)

    def _moments(self, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each sensor, float32 [N]."""
        cells = np.nan_to_num(train, nan=0.0) if self.zscore_includes_missing else train
        axis = 0 if self.scale == "sensor" else None
        mean = np.broadcast_to(np.nanmean(cells, axis=axis, dtype=np.float64), cells.shape[1:])
        std = np.broadcast_to(np.nanstd(cells, axis=axis, dtype=np.float64), cells.shape[1:])
        if self.scale == "global" and not std.all():
            raise DataError("all training readings are equal; there is nothing to forecast")
        return mean.astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)

    def preprocessing(self) -> dict[str, Any]:
        """Window sizes, clock and sensors; means and profiles travel with the model's weights."""
        self.setup()
        series, g = self.series, self.geometry
        return {
            "sensors": series.sensors,
            "coordinates": None if series.coordinates is None else series.coordinates.tolist(),
            "step_minutes": series.step_minutes,
            "zone": series.zone,
            "history_steps": g.history,
            "horizon_steps": g.horizon,
            "lag_steps": list(g.lags),
            "null_value": self.null_value,
            "missing_as_zero": self.zscore_includes_missing,
            "unit": self.unit,
        }

    def split_ids(self) -> dict[str, list[str]]:
        """Time of the first history step of each window."""
        self.setup()
        return {split: [str(time) for time in self.series.times[self.starts[split]]] for split in SPLITS}

    def split_record(self) -> dict[str, Any]:
        """Sizes and hashes of the splits, borders, and the repairs that the raw data needed."""
        record = super().split_record()
        times = self.series.times
        borders = {s: [str(times[part.start]), str(times[part.stop - 1])] for s, part in self.rows.items()}
        return {**record, "rows": borders, "repairs": dict(self.series.repairs)}

    def data_hash(self) -> str:
        """Readings, clock, splits, window sizes and what the scores depend on."""
        self.setup()
        settings = f"{VERSION} {self.geometry} {self.report_steps} {self.mape_min} {has_lightgbm()}"
        if self.zscore_includes_missing:
            settings += " missing as zero"
        parts = [self.starts[split] for split in SPLITS]
        return hash_arrays(settings, self.series.values, self.series.week_slot, *parts)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """copy_last, historical_average, last_week where looked at, ridge, ridge_network, lightgbm where installed."""
        self.setup()
        train = self.rows["train"]
        away = self.series.values[train] - self.profile[self.series.week_slot[train]]
        return ForecastBaselines(
            self.windows,
            self.starts,
            self.profile,
            np.nan_to_num(np.nanstd(away, axis=0), nan=1.0),
            steps=self.report_steps,
            mape_min=self.mape_min,
        ).run()

    # -- what models and tasks ask -----------------------------------------------------------------------

    @property
    def num_sensors(self) -> int:
        """N."""
        self.setup()
        return len(self.series.sensors)

    def adjacency(self) -> torch.Tensor:
        """Edge weights, float32 [N, N]; all ones where the data set has no graph."""
        self.setup()
        if self.series.adjacency is None:
            return torch.ones(self.num_sensors, self.num_sensors)
        return torch.from_numpy(self.series.adjacency)
