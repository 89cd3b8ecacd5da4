"""LargeST: a year of flow in California as `.h5`, sensor metadata as CSV, and an adjacency as `.npy`.

Source: "LargeST: a benchmark dataset for large-scale traffic forecasting", arXiv:2306.08259; preparation as in
liuxu77/LargeST, whose longer steps are rounded means and whose adjacency is in the order of the metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from data import register_data
from data.errors import DataError
from data.traffic_base import TrafficData
from data.traffic_formats import existing, read_csv, read_frame_h5, read_graph
from data.traffic_series import Series, match_adjacency, regular


@register_data("largest")
class LargestData(TrafficData):
    """Five-minute flow, put together to longer steps; one district may be cut out.

    Args:
        path: A yearly file such as ca_his_raw_2019.h5.
        key: Name of the frame; the only one when left out.
        meta: ca_meta.csv with the columns ID, Lat, Lng, District; null for no coordinates.
        adjacency: ca_rn_adj.npy, in the order of `meta`, or of the frame's columns without it; null for none.
        district: Keep this district's sensors alone (4 Bay Area, 7 Los Angeles, 11 San Diego); needs `meta`.
        aggregate: Neighbouring steps that become one; 3 makes 15 minutes, as in the paper.
        combine: "mean", the rounded mean of the readings that are there, as published: vehicles in five minutes still;
            or "sum", vehicles in the longer step, missing where a part is.
        split: 60/20/20 as in the paper.
        null_value: A gap is NaN; a zero is a reading.
        common: Options of :class:`data.traffic_base.TrafficData`.
    """

    unit: str = "vehicles in five minutes"
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
        combine: str = "mean",
        split: Sequence[float] = (0.6, 0.2, 0.2),
        null_value: str = "nan",
        **common: Any,
    ) -> None:
        super().__init__(split=split, null_value=null_value, **common)
        if aggregate < 1:
            raise DataError(f"data.aggregate={aggregate} must be at least 1")
        if combine not in ("mean", "sum"):
            raise DataError(f"data.combine={combine!r}: choose mean or sum")
        if district is not None and not meta:
            raise DataError(f"data.district={district} needs data.meta, the file that says who lies where")
        self.path, self.key, self.meta, self.graph = path, key, meta, adjacency
        self.district, self.aggregate, self.combine = district, aggregate, combine
        if combine == "sum":
            self.unit = "vehicles a step"

    def read(self) -> Series:
        """Flow in longer steps, with coordinates and graph."""
        times, values, sensors, zone = read_frame_h5(existing(self.path, "data.path"), self.key)
        raw = regular(times, values, sensors, null_value=self.null_value)
        rows = len(raw.values) // self.aggregate * self.aggregate
        clock, step = raw.times[: rows : self.aggregate], raw.step_minutes * self.aggregate
        cells = self._combined(raw.values[:rows].reshape(-1, self.aggregate, len(sensors)))
        series = Series(cells, clock, step, sensors, repairs=raw.repairs, zone=zone)
        meta = self._meta(sensors) if self.meta else None
        if meta is not None:
            series.coordinates = meta.loc[sensors, ["Lat", "Lng"]].to_numpy(np.float64)
        if self.graph:
            path = existing(self.graph, "data.adjacency")
            listed = replace(series, sensors=sensors if meta is None else list(meta.index))
            graph = read_graph(path, listed, sigma=None, cut=0.0)
            series.adjacency = match_adjacency(graph, listed.sensors, sensors, series.repairs)
        if self.district is not None:
            districts = meta.loc[sensors, "District"]
            keep = np.flatnonzero(districts.to_numpy() == self.district)
            if not len(keep):
                known = ", ".join(map(str, sorted(set(districts))))
                raise DataError(f"data.district={self.district} has no sensor; districts: {known}")
            series = series.keep(keep)
        return series

    def _combined(self, cells: np.ndarray) -> np.ndarray:
        """[T, steps, N] to [T, N]."""
        if (
            self.combine == "sum"
        ):  # half a count would look like half the traffic: missing with any of its parts
            return cells.sum(axis=1)
        count = (~np.isnan(cells)).sum(axis=1)
        mean = np.nansum(cells, axis=1) / np.where(count > 0, count, np.nan)
        return (mean.round() if self.aggregate > 1 else mean).astype(np.float32)

    def _meta(self, sensors: list[str]) -> Any:
        """The metadata by id, in the file's order; they know all `sensors`."""
        path = existing(self.meta, "data.meta")
        table = read_csv(path, dtype={"ID": str})
        missing = {"ID", "Lat", "Lng"} - set(table.columns)
        if missing:
            raise DataError(f"{path}: columns {', '.join(sorted(missing))} are missing")
        if table["ID"].duplicated().any():
            raise DataError(
                f"{path}: sensor {table['ID'][table['ID'].duplicated()].iloc[0]!r} occurs more than once"
            )
        table = table.set_index("ID")
        absent = [name for name in sensors if name not in table.index]
        if absent:
            raise DataError(f"{path} lacks {len(absent)} sensors, such as {absent[0]!r}")
        return table
