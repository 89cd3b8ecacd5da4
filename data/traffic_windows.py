"""Windows over a series: which rows belong to which split, and how a batch of windows is gathered.

Letters: B batch, P history steps, Q steps ahead, N sensors, L earlier looks (the same hour a day or a week before ...).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.base import SPLITS
from data.errors import DataError
from data.sampler import BatchKey
from data.traffic_series import moment


@dataclass(frozen=True)
class Geometry:
    """Sizes of a window.

    Attributes:
        history: P, steps that the model sees.
        horizon: Q, steps that it forecasts.
        lags: Distance in steps of each earlier look at the hour that is forecast; at least Q, so that it is known.
    """

    history: int
    horizon: int
    lags: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.history < 1 or self.horizon < 1:
            raise DataError(
                f"data.history_steps={self.history} and data.horizon_steps={self.horizon} must be positive"
            )
        for lag in self.lags:
            if lag < self.horizon:
                raise DataError(
                    f"data.lag_steps has {lag}, less than horizon_steps={self.horizon}: that reading would lie in the "
                    "future when the forecast is made"
                )

    @property
    def span(self) -> int:
        """Rows of one window, P + Q."""
        return self.history + self.horizon


def split_by_ratio(rows: int, ratios: tuple[float, float, float]) -> dict[str, slice]:
    """Rows of each split in time order, before any window is cut."""
    if len(ratios) != 3 or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise DataError(
            f"data.split={list(ratios)} must be three positive shares of train, validation and test that sum to 1"
        )
    first, second = round(rows * ratios[0]), round(rows * (ratios[0] + ratios[1]))
    return {"train": slice(0, first), "val": slice(first, second), "test": slice(second, rows)}


def split_by_time(times: np.ndarray, val_start: str, test_start: str) -> dict[str, slice]:
    """Rows of each split, cut at two dates."""
    borders = [moment(val_start, "data.val_start"), moment(test_start, "data.test_start")]
    first, second = np.searchsorted(times, np.array(borders))
    if not 0 < first < second < len(times):
        raise DataError(
            f"val_start={val_start} and test_start={test_start} must lie in this order between {times[0]} and {times[-1]}"
        )
    return {"train": slice(0, first), "val": slice(first, second), "test": slice(second, len(times))}


def window_starts(rows: dict[str, slice], geometry: Geometry) -> dict[str, np.ndarray]:
    """First row of each window, int64, by split: stride 1, each window inside the rows of its split."""
    starts = {}
    for split in SPLITS:
        part = rows[split]
        count = part.stop - part.start - geometry.span + 1
        if count < 1:
            raise DataError(
                f"the {split} split has {part.stop - part.start} steps, fewer than one window of {geometry.history} + "
                f"{geometry.horizon}; give more data or shorter windows"
            )
        starts[split] = np.arange(part.start, part.start + count)
    return starts


class Windows:
    """Gathers batches of windows.

    Args:
        values: Readings, float32 [T, N], NaN where missing.
        week_slot: Slot of the week of each row, int64 [T].
        geometry: Sizes.
        segment: Number of the unbroken stretch of rows that each row belongs to, int64 [T]; one stretch when left out.
            Earlier looks never reach into another stretch.
        missing_as_zero: Inputs show a missing reading as a zero that was read, as old code does; targets never do.
    """

    def __init__(
        self,
        values: np.ndarray,
        week_slot: np.ndarray,
        geometry: Geometry,
        segment: np.ndarray | None = None,
        *,
        missing_as_zero: bool = False,
    ) -> None:
        self.geometry = geometry
        self.missing_as_zero = missing_as_zero
        self.seen = torch.from_numpy(~np.isnan(values))
        self.values = torch.from_numpy(np.nan_to_num(values, nan=0.0))
        self.week_slot = torch.from_numpy(week_slot)
        self.segment = None if segment is None else torch.from_numpy(segment)
        self._lags = torch.tensor(geometry.lags, dtype=torch.long)

    def batch(self, starts: Tensor) -> dict[str, Tensor]:
        """Windows that begin at rows `starts` [B].

        Returns:
            history [B, P, N] (0 where missing) and history_seen (bool); known [B, L, Q, N] and known_seen, the earlier
            looks; clock [B], slot of the week of the first history step; target [B, Q, N] and target_seen.
        """
        g = self.geometry
        past = starts[:, None] + torch.arange(g.history)
        future = starts[:, None] + g.history + torch.arange(g.horizon)
        batch = {
            "history": self.values[past],
            "history_seen": self.seen[past] | self.missing_as_zero,
            "clock": self.week_slot[starts],
            "target": self.values[future],
            "target_seen": self.seen[future],
        }
        if g.lags:
            rows = future[:, None] - self._lags[:, None]
            valid = rows >= 0
            rows = rows.clamp_min(0)
            if self.segment is not None:
                valid &= self.segment[rows] == self.segment[starts][:, None, None]
            seen = self.seen[rows] & valid[..., None]
            batch["known"] = self.values[rows] * seen
            batch["known_seen"] = seen
        return batch


class WindowDataset(torch.utils.data.Dataset):
    """The windows of one split; indexed by a batch key."""

    def __init__(self, windows: Windows, starts: np.ndarray) -> None:
        self.windows = windows
        self.starts = torch.from_numpy(np.ascontiguousarray(starts, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.windows.batch(self.starts[torch.from_numpy(np.asarray(key.indices))])


def weekly_profile(values: np.ndarray, week_slot: np.ndarray, slots_per_day: int) -> np.ndarray:
    """Mean reading of each sensor by slot of the week, float32 [7 S, N].

    Slots that were never seen take the mean of their time of day, then the sensor's mean, then the mean of all.

    Args:
        values: Training readings, [T, N], NaN where missing.
        week_slot: [T].
        slots_per_day: S.
    """
    weekly = _slot_means(values, week_slot, 7 * slots_per_day)
    daily = _slot_means(values, week_slot % slots_per_day, slots_per_day)
    every = _slot_means(values, np.zeros_like(week_slot), 1)
    every = np.where(np.isnan(every), np.nanmean(values), every)
    daily = np.where(np.isnan(daily), every, daily)
    return np.where(np.isnan(weekly), np.tile(daily, (7, 1)), weekly).astype(np.float32)


def _slot_means(values: np.ndarray, slots: np.ndarray, count: int) -> np.ndarray:
    seen = ~np.isnan(values)
    sums = np.zeros((count, values.shape[1]))
    counts = np.zeros_like(sums)
    np.add.at(sums, slots, np.where(seen, values, 0.0))
    np.add.at(counts, slots, seen)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
