"""Your own readings as CSV or Parquet: long (timestamp, sensor, value) or wide (timestamp, then a column a sensor)."""

from __future__ import annotations

from typing import Any

import numpy as np

from data import register_data
from data.errors import DataError
from data.traffic_base import TrafficData
from data.traffic_formats import existing, read_csv, read_graph, read_table
from data.traffic_series import Series, great_circle_m, kernel_adjacency, regular


@register_data("traffic_table")
class TrafficTableData(TrafficData):
    """A table of readings, with places of the sensors or a graph where there is one.

    Args:
        path: .csv or .parquet.
        locations: CSV of sensor, latitude, longitude; makes the distance graph where no adjacency is given.
        adjacency: As in `data=metr_la`; null for the distance graph or none.
        sigma: Width of the distance kernel in metres (or the unit of from, to, cost); their deviation when left out.
        cut: Smallest edge weight kept.
        step_minutes: Length of a step; measured when left out.
        null_value: What means missing; here NaN and absent rows, since zeros are often counts.
        common: Options of :class:`data.traffic_base.TrafficData`.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        locations: str | None = None,
        adjacency: str | None = None,
        sigma: float | None = None,
        cut: float = 0.1,
        step_minutes: float | None = None,
        null_value: str = "nan",
        **common: Any,
    ) -> None:
        super().__init__(null_value=null_value, **common)
        self.path, self.locations, self.graph = path, locations, adjacency
        self.sigma, self.cut_weight, self.step_minutes = sigma, cut, step_minutes

    def read(self) -> Series:
        """The table on a regular clock, with coordinates and graph."""
        repairs: dict[str, int] = {}
        path = existing(self.path, "data.path")
        times, values, sensors, zone = read_table(path, null_value=self.null_value, repairs=repairs)
        series = regular(times, values, sensors, step_minutes=self.step_minutes, null_value=self.null_value)
        series.zone = zone
        series.repairs |= repairs
        if self.locations:
            series.coordinates = self._places(series.sensors)
            distances = great_circle_m(series.coordinates)
            series.adjacency = kernel_adjacency(distances, sigma=self.sigma, cut=self.cut_weight)
        if self.graph:
            path = existing(self.graph, "data.adjacency")
            series.adjacency = read_graph(path, series, sigma=self.sigma, cut=self.cut_weight)
        return series

    def _places(self, sensors: list[str]) -> np.ndarray:
        path = existing(self.locations, "data.locations")
        table = read_csv(path, dtype=str)
        table.columns = [column.strip().lower() for column in table.columns]
        missing = {"sensor", "latitude", "longitude"} - set(table.columns)
        if missing:
            raise DataError(f"{path}: columns {', '.join(sorted(missing))} are missing")
        table = table.drop_duplicates("sensor").set_index("sensor")
        absent = [name for name in sensors if name not in table.index]
        if absent:
            raise DataError(f"{path} lacks {len(absent)} sensors, such as {absent[0]!r}")
        try:
            return table.loc[sensors, ["latitude", "longitude"]].to_numpy(np.float64)
        except ValueError as error:
            raise DataError(f"{path}: latitude and longitude must be numbers ({error})") from error
