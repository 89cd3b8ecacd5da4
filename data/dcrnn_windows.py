"""The `train/val/test.npz` windows of DCRNN and Graph WaveNet: x and y of [windows, 12, sensors, channels]."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from data import register_data
from data.base import SPLITS
from data.errors import DataError
from data.traffic_base import TrafficData
from data.traffic_formats import existing, read_graph
from data.traffic_series import Series
from zoo.files import read_arrays


@register_data("dcrnn_windows")
class DcrnnWindowsData(TrafficData):
    """Windows as they come: cut before splitting, so neighbouring splits share rows; figures match DCRNN's, not GMAN's.

    Channel 0 is the reading, channel 1 the time of day in [0, 1), channel 2, where there is one, the day of the week.
    Sizes of a window come from the files. Windows are laid end to end: there are no earlier looks.

    Args:
        root: Folder with train.npz, val.npz and test.npz.
        adjacency: As in `data=metr_la`; null for none.
        weekday_scale: What channel 2 is multiplied with to give the days 0 .. 6: 7 where it lies in [0, 1), else 1.
        common: Options of :class:`data.traffic_base.TrafficData`; `split`, `lag_steps` and window sizes are not used.
    """

    unit: ClassVar[str] = "reading"

    def __init__(
        self,
        *,
        root: str | None = None,
        adjacency: str | None = None,
        weekday_scale: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if self.geometry.lags:
            raise DataError("data.lag_steps must be empty: windows from files have no earlier rows")
        self.root, self.graph, self.weekday_scale = root, adjacency, weekday_scale
        self._counts: dict[str, int] = {}

    def read(self) -> Series:
        """All windows end to end, each on its own stretch of the week."""
        root = existing(self.root, "data.root")
        parts = []
        for split in SPLITS:
            path = existing(root / f"{split}.npz", "data.root")
            x, y = read_arrays(path, "x", "y")
            if x.ndim != 4 or y.ndim != 4 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
                raise DataError(
                    f"{path}: x {list(x.shape)} and y {list(y.shape)} are not [windows, steps, sensors, channels]"
                )
            g = self.geometry
            if (x.shape[1], y.shape[1]) != (g.history, g.horizon):
                raise DataError(
                    f"{path} has {x.shape[1]} + {y.shape[1]} steps a window; set data.history_steps={x.shape[1]} "
                    f"data.horizon_steps={y.shape[1]}"
                )
            self._counts[split] = len(x)
            parts.append(np.concatenate((x[..., 0], y[..., 0]), axis=1))
            self._note_clock(path, x)
        windows = np.concatenate(parts)
        count, span, sensors = windows.shape
        series = Series(
            windows.reshape(count * span, sensors).astype(np.float32),
            self._times(count, span),
            self._step_minutes,
            [str(i) for i in range(sensors)],
        )
        if self.graph:
            path = existing(self.graph, "data.adjacency")
            series.adjacency = read_graph(path, series, sigma=None, cut=0.1)
        return series

    def _note_clock(self, path: Any, x: np.ndarray) -> None:
        """Time of day and weekday of each window's first step, from channels 1 and 2."""
        if x.shape[3] < 2:
            raise DataError(f"{path}: x has no time-of-day channel; save windows with [value, time of day]")
        day = x[:, :, 0, 1].astype(np.float64)
        step = np.median(np.diff(day, axis=1) % 1.0) * 24 * 60
        if not step > 0:
            raise DataError(
                f"{path}: channel 1 does not rise within a window; is it the time of day in [0, 1)?"
            )
        self._step_minutes = float(np.round(step * 60) / 60)
        weekday = np.zeros(len(x)) if x.shape[3] < 3 else x[:, 0, 0, 2] * self.weekday_scale
        if np.abs(weekday - np.rint(weekday)).max() > 0.01:
            raise DataError(
                f"{path}: channel 2 times weekday_scale={self.weekday_scale:g} is {weekday.max():.3g} and no whole day; set "
                "data.weekday_scale=7 for days in [0, 1)"
            )
        if not hasattr(self, "_starts") or path.stem == SPLITS[0]:
            self._starts: list[np.ndarray] = []
        minutes = np.rint(day[:, 0] * 24 * 60 / self._step_minutes) * self._step_minutes
        self._starts.append(np.rint(weekday % 7) * 24 * 60 + minutes)

    def _times(self, count: int, span: int) -> np.ndarray:
        monday = np.datetime64("2018-01-01T00:00:00")
        first = np.concatenate(self._starts)[:, None] + np.arange(span) * self._step_minutes
        return (monday + (first * 60).astype("timedelta64[s]")).reshape(count * span)

    def split_rows(self, series: Series) -> dict[str, slice]:
        """Rows of each file."""
        rows, start = {}, 0
        for split in SPLITS:
            stop = start + self._counts[split] * self.geometry.span
            rows[split], start = slice(start, stop), stop
        return rows

    def cut(self, series: Series, rows: dict[str, slice]) -> dict[str, np.ndarray]:
        """One window each ``span`` rows."""
        return {split: np.arange(part.start, part.stop, self.geometry.span) for split, part in rows.items()}
