"""LargeST: a year of flow in California as `.h5`, sensor metadata as CSV, and an adjacency as `.npy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from data import register_data
from data.errors import DataError
from data.traffic_base import TrafficData
from data.traffic_formats import existing, read_csv, read_frame_h5, read_graph
from data.traffic_series import Series, regular


@register_data("largest")
class LargestData(TrafficData):
    """Five-minute flow summed to longer steps; a district or a list of sensors may be cut out.

    Args:
        path: A yearly file such as ca_his_raw_2019.h5.
        key: Name of the frame; the only one when left out.
        meta: ca_meta.csv with the columns ID, Lat, Lng, District; null for no coordinates.
        adjacency: ca_rn_adj.npy, in the order of `meta`; null for none.
        district: Keep this district's sensors alone (4 Bay Area, 7 Los Angeles, 11 San Diego); needs `meta`.
        aggregate: Neighbouring steps that are summed; 3 makes 15 minutes, as in the paper.
        split: 60/20/20 as in the paper.
        null_value: A gap is NaN; a zero is a reading.
        common: Options of :class:`data.traffic_base.TrafficData`.
    """

    unit: ClassVar[str] = "vehicles a step"
    licence: ClassVar[str] = "CC BY-NC 4.0"

    def __init__(
        self,
        *,
        path: str | None = None,
        key: str | None = None,
        meta: str | None = None,
        adjacency: str | None = None,
        district: int | None = None,
        aggregate: int = 3,
        split: Sequence[float] = (0.6, 0.2, 0.2),
        null_value: str = "nan",
        **common: Any,
    ) -> None:
        super().__init__(split=split, null_value=null_value, **common)
        if aggregate < 1:
            raise DataError(f"data.aggregate={aggregate} must be at least 1")
        if district is not None and not meta:
            raise DataError(f"data.district={district} needs data.meta, the file that says who lies where")
        self.path, self.key, self.meta, self.graph = path, key, meta, adjacency
        self.district, self.aggregate = district, aggregate

    def read(self) -> Series:
        """Flow, summed, with coordinates and graph."""
        times, values, sensors = read_frame_h5(existing(self.path, "data.path"), self.key)
        raw = regular(times, values, sensors)
        rows = len(raw.values) // self.aggregate * self.aggregate
        # A sum with a missing part is missing: half a count would look like half the traffic.
        cells = raw.values[:rows].reshape(-1, self.aggregate, len(sensors)).sum(axis=1)
        clock = raw.times[: rows : self.aggregate]
        series = Series(cells, clock, raw.step_minutes * self.aggregate, sensors, repairs=raw.repairs)
        meta = self._meta(sensors) if self.meta else None
        if meta is not None:
            series.coordinates = meta[["Lat", "Lng"]].to_numpy(np.float64)
        if self.graph:
            path = existing(self.graph, "data.adjacency")
            series.adjacency = read_graph(path, series, sigma=None, cut=0.0)
        if self.district is not None:
            keep = np.flatnonzero(meta["District"].to_numpy() == self.district)
            if not len(keep):
                known = ", ".join(map(str, sorted(set(meta["District"]))))
                raise DataError(f"data.district={self.district} has no sensor; districts: {known}")
            series = series.keep(keep)
        return series

    def _meta(self, sensors: list[str]) -> Any:
        path = existing(self.meta, "data.meta")
        table = read_csv(path, dtype={"ID": str})
        missing = {"ID", "Lat", "Lng"} - set(table.columns)
        if missing:
            raise DataError(f"{path}: columns {', '.join(sorted(missing))} are missing")
        table = table.set_index("ID")
        absent = [name for name in sensors if name not in table.index]
        if absent:
            raise DataError(f"{path} lacks {len(absent)} sensors, such as {absent[0]!r}")
        return table.loc[sensors]
