"""PEMS03, 04, 07 and 08: one `.npz` of flow, occupancy and speed, and a CSV of distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from data import register_data
from data.errors import DataError
from data.traffic_base import TrafficData
from data.traffic_formats import existing, read_graph
from data.traffic_series import Series, moment, regular
from zoo.files import read_arrays


@register_data("pems_flow")
class PemsFlowData(TrafficData):
    """One channel of an array `data` [T, N, channels] without timestamps.

    Args:
        path: Such as PEMS04.npz.
        channel: Which channel is forecast; 0 is flow.
        sensor_ids: Text file with one sensor id a line, as PEMS03.txt; numbers of the columns when left out.
        adjacency: CSV of from, to, cost, or a matrix; null for none.
        sigma: Width of the distance kernel; the distances' deviation when left out.
        cut: Smallest edge weight kept.
        start: Time of the first row: 2018-09-01 for 03, 2018-01-01 for 04, 2017-05-01 for 07, 2016-07-01 for 08.
        step_minutes: Length of a step.
        split: 60/20/20 as in the papers.
        null_value: Nothing is missing in the published arrays, and zero flow at night is real.
        common: Options of :class:`data.traffic_base.TrafficData`.
    """

    unit: ClassVar[str] = "vehicles a step"

    def __init__(
        self,
        *,
        path: str | None = None,
        channel: int = 0,
        sensor_ids: str | None = None,
        adjacency: str | None = None,
        sigma: float | None = None,
        cut: float = 0.1,
        start: str = "2018-01-01",
        step_minutes: float = 5.0,
        split: Sequence[float] = (0.6, 0.2, 0.2),
        null_value: str = "nan",
        **common: Any,
    ) -> None:
        super().__init__(split=split, null_value=null_value, **common)
        self.path, self.channel, self.sensor_ids, self.graph = path, channel, sensor_ids, adjacency
        self.sigma, self.cut_weight, self.start, self.step_minutes = sigma, cut, start, step_minutes

    def read(self) -> Series:
        """One channel, dated from ``start``."""
        path = existing(self.path, "data.path")
        (cells,) = read_arrays(path, "data")
        if cells.ndim == 2:
            cells = cells[..., None]
        if cells.ndim != 3 or not 0 <= self.channel < cells.shape[2]:
            raise DataError(
                f"{path}: data.channel={self.channel} does not fit an array of {list(cells.shape)}"
            )
        sensors = [str(i) for i in range(cells.shape[1])]
        if self.sensor_ids:
            sensors = existing(self.sensor_ids, "data.sensor_ids").read_text().split()
        times = moment(self.start, "data.start") + np.arange(len(cells)) * np.timedelta64(
            round(self.step_minutes * 60), "s"
        )
        series = regular(times, cells[..., self.channel], sensors, step_minutes=self.step_minutes)
        if self.graph:
            graph = existing(self.graph, "data.adjacency")
            series.adjacency = read_graph(graph, series, sigma=self.sigma, cut=self.cut_weight)
        return series
