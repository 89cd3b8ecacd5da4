"""METR-LA and PEMS-BAY as their users have them: a pandas `.h5` of speeds and an adjacency."""

from __future__ import annotations

from typing import Any, ClassVar

from data import register_data
from data.traffic_base import TrafficData
from data.traffic_formats import existing, read_frame_h5, read_graph
from data.traffic_series import Series, regular


@register_data("metr_la")
class MetrLaData(TrafficData):
    """Speeds every five minutes; 0 means missing. Read with h5py: neither pandas nor PyTables is needed.

    Args:
        path: metr-la.h5, pems-bay.h5 or another frame of a DatetimeIndex and a column a sensor.
        key: Name of the frame; the only one when left out.
        adjacency: adj_mx.pkl (opened without running anything in it), .npy, .csv matrix, or .csv of from, to, cost; null
            for none.
        sigma: Width of the distance kernel for from, to, cost files; the distances' deviation when left out.
        cut: Smallest edge weight kept from such files.
        step_minutes: Length of a step; measured when left out.
        common: Options of :class:`data.traffic_base.TrafficData`.
    """

    unit: ClassVar[str] = "miles an hour"

    def __init__(
        self,
        *,
        path: str | None = None,
        key: str | None = None,
        adjacency: str | None = None,
        sigma: float | None = None,
        cut: float = 0.1,
        step_minutes: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.path, self.key, self.graph = path, key, adjacency
        self.sigma, self.cut_weight, self.step_minutes = sigma, cut, step_minutes

    def read(self) -> Series:
        """The frame on a regular clock, with its graph."""
        times, values, sensors, zone = read_frame_h5(existing(self.path, "data.path"), self.key)
        series = regular(times, values, sensors, step_minutes=self.step_minutes, null_value=self.null_value)
        series.zone = zone
        if self.graph:
            path = existing(self.graph, "data.adjacency")
            series.adjacency = read_graph(path, series, sigma=self.sigma, cut=self.cut_weight)
        return series
