"""A generated road network: a ring with shortcuts, rush hours and incidents whose queues move upstream. For tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from data import register_data
from data.base import check_at_least, check_range
from data.traffic_base import TrafficData
from data.traffic_series import MINUTES_PER_WEEK, Series

FREE_SPEED_MPH = 62.0


@register_data("road_network")
class RoadNetworkData(TrafficData):
    """Speeds on a ring road; a sensor's slow-down reaches the sensor upstream one step later.

    Args:
        num_sensors: Sensors on the ring.
        days: Length of the record.
        step_minutes: Length of a step; divides a day.
        shortcuts: Extra links across the ring.
        incidents_per_day: Mean number of incidents.
        missing: Share of readings that are lost (0 in the record, as in METR-LA).
        data_seed: Of the record; the same for all seeds of a comparison.
        history_steps: See :class:`data.traffic_base.TrafficData`.
        horizon_steps: See there.
        report_steps: See there.
        common: Other options of :class:`data.traffic_base.TrafficData`.
    """

    unit: ClassVar[str] = "miles an hour"
    source: ClassVar[str] = "generated"
    licence: ClassVar[str] = "none needed"

    def __init__(
        self,
        *,
        num_sensors: int = 12,
        days: int = 28,
        step_minutes: float = 60.0,
        shortcuts: int = 2,
        incidents_per_day: float = 2.0,
        missing: float = 0.02,
        data_seed: int = 0,
        history_steps: int = 6,
        horizon_steps: int = 6,
        report_steps: Sequence[int] = (1, 3, 6),
        **common: Any,
    ) -> None:
        super().__init__(
            history_steps=history_steps, horizon_steps=horizon_steps, report_steps=report_steps, **common
        )
        check_at_least(3, num_sensors=num_sensors)
        check_at_least(1, days=days, step_minutes=step_minutes)
        check_at_least(0, shortcuts=shortcuts, incidents_per_day=incidents_per_day)
        check_range(0, 0.9, missing=missing)
        self.roads = {"num_sensors": num_sensors, "days": days, "step_minutes": step_minutes}
        self.roads |= {"shortcuts": shortcuts, "incidents_per_day": incidents_per_day}
        self.roads |= {"missing": missing, "seed": data_seed}

    def read(self) -> Series:
        """Generate the record."""
        return generate_roads(**self.roads)


def generate_roads(
    *,
    num_sensors: int,
    days: int,
    step_minutes: float,
    shortcuts: int,
    incidents_per_day: float,
    missing: float,
    seed: int,
) -> Series:
    """Speeds [T, N] with two rush hours on working days, incidents, noise and lost readings (0)."""
    rng = np.random.default_rng(seed)
    per_day = round(24 * 60 / step_minutes)
    steps = days * per_day
    times = np.datetime64("2024-01-01T00:00:00") + np.arange(steps) * np.timedelta64(
        round(step_minutes * 60), "s"
    )
    hour = np.arange(steps) % per_day * step_minutes / 60
    workday = np.arange(steps) * step_minutes % MINUTES_PER_WEEK < 5 * 24 * 60
    peaks = np.exp(-(((hour - 8) / 1.2) ** 2)) + 0.8 * np.exp(-(((hour - 17.5) / 1.6) ** 2))
    demand = np.where(workday, peaks, 0.25 * np.exp(-(((hour - 14) / 4) ** 2)))
    weight = rng.uniform(0.3, 1.0, num_sensors)
    strength = np.repeat(rng.normal(1.0, 0.15, days), per_day)
    load = demand[:, None] * strength[:, None] * weight
    shock = np.zeros((steps, num_sensors))
    for _ in range(rng.poisson(incidents_per_day * days)):
        start, place = rng.integers(steps), rng.integers(num_sensors)
        length = max(1, round(rng.exponential(60 / step_minutes)))
        shock[start : start + length, place] += rng.uniform(0.4, 0.9)
    links = np.zeros((num_sensors, num_sensors))
    ring = np.arange(num_sensors)
    links[ring, (ring + 1) % num_sensors] = 1.0  # each sensor feels the one downstream
    for _ in range(shortcuts):
        a, b = rng.choice(num_sensors, 2, replace=False)
        links[a, b] = 0.5
    mixing = links / links.sum(1, keepdims=True)
    queue = np.zeros((steps, num_sensors))
    for t in range(1, steps):
        queue[t] = 0.35 * queue[t - 1] + 0.55 * mixing @ queue[t - 1] + shock[t]
    slow = np.clip(0.55 * load + 0.5 * queue, 0.0, 0.9)
    speeds = FREE_SPEED_MPH * (1 - slow) + rng.normal(0, 1.2, slow.shape)
    speeds = np.clip(speeds, 2.0, None)
    speeds[rng.random(speeds.shape) < missing] = 0.0
    angle = 2 * np.pi * ring / num_sensors
    places = np.stack((34.05 + 0.05 * np.sin(angle), -118.25 + 0.06 * np.cos(angle)), axis=1)
    np.fill_diagonal(links, 1.0)
    return Series(
        speeds.astype(np.float32),
        times,
        float(step_minutes),
        [f"ring{i}" for i in ring],
        coordinates=places,
        adjacency=links.astype(np.float32),
    )
