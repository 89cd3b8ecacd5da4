"""A sensor network's readings on a regular clock, and the repairs that bring raw tables there.

Letters: T time steps, N sensors. Missing readings are NaN from here on, whatever a file used for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from data.errors import DataError

SECONDS_PER_DAY = 24 * 60 * 60
MINUTES_PER_WEEK = 7 * 24 * 60
EARTH_RADIUS_M = 6_371_000.0
# More absent steps than this share of the table means that the step length was misread.
MAX_GAP_SHARE = 0.9


@dataclass
class Series:
    """Readings of all sensors.

    Attributes:
        values: Readings in their own unit, float32 [T, N]; NaN where missing.
        times: Start of each step, datetime64[s] [T], without gaps.
        step_minutes: Length of a step.
        sensors: Names, N of them.
        coordinates: Latitude and longitude in degrees, [N, 2], or None.
        adjacency: Edge weights, float32 [N, N]; row i lists whom sensor i listens to. None where nothing is known.
        repairs: How many cells, rows or sensors each repair touched.
        zone: Whose local clock `times` are, such as Pacific/Auckland or +12:00; None where the data do not say.
    """

    values: np.ndarray
    times: np.ndarray
    step_minutes: float
    sensors: list[str]
    coordinates: np.ndarray | None = None
    adjacency: np.ndarray | None = None
    repairs: dict[str, int] = field(default_factory=dict)
    zone: str | None = None

    def __post_init__(self) -> None:
        seconds = self.step_minutes * 60
        if seconds < 1 or abs(seconds - round(seconds)) > 1e-6 or SECONDS_PER_DAY % round(seconds):
            raise DataError(
                f"steps of {self.step_minutes:g} minutes do not divide a day into equal parts of whole seconds; choose a step such "
                "as 5, 15 or 60 minutes"
            )

    @property
    def slots_per_day(self) -> int:
        """Steps in 24 hours."""
        return round(24 * 60 / self.step_minutes)

    @property
    def week_slot(self) -> np.ndarray:
        """Number of each step within its week, int64 [T]; 0 is Monday 00:00."""
        seconds = self.times.astype("datetime64[s]").astype(np.int64)
        seconds = seconds + 3 * SECONDS_PER_DAY  # 1970-01-01 was a Thursday
        return seconds % (7 * SECONDS_PER_DAY) // round(self.step_minutes * 60)

    def keep(self, sensors: np.ndarray) -> Series:
        """The same series with the sensors [K] (numbers) alone, in that order."""
        return replace(
            self,
            values=self.values[:, sensors],
            sensors=[self.sensors[i] for i in sensors],
            coordinates=None if self.coordinates is None else self.coordinates[sensors],
            adjacency=None if self.adjacency is None else self.adjacency[np.ix_(sensors, sensors)],
            repairs=dict(self.repairs),
        )


def moment(text: str, option: str) -> np.datetime64:
    """A date or time that a user gave, to the second."""
    try:
        return np.datetime64(text, "s")
    except ValueError:
        raise DataError(f"{option}={text!r} is no date such as 2025-07-01") from None


def step_of(times: np.ndarray) -> float:
    """Step length in minutes: the median distance of neighbouring distinct times; frequency attributes are not trusted.

    Raises:
        DataError: Fewer than two distinct times, or a step that does not divide a day.
    """
    distinct = np.unique(times.astype("datetime64[s]"))
    if len(distinct) < 2:
        raise DataError(f"a time series needs at least two distinct timestamps, got {len(distinct)}")
    minutes = float(np.median(np.diff(distinct).astype(np.int64))) / 60
    per_day = 24 * 60 / minutes
    if abs(per_day - round(per_day)) > 1e-6:
        raise DataError(
            f"the median distance of timestamps is {minutes:g} minutes, which does not divide a day; resample the table "
            "to a regular step such as 5, 15 or 60 minutes"
        )
    return minutes


def regular(
    times: np.ndarray,
    values: np.ndarray,
    sensors: list[str],
    *,
    step_minutes: float | None = None,
    null_value: str = "nan",
) -> Series:
    """Put rows on a regular clock: sort them, merge duplicates, fill gaps with missing rows; count each repair.

    Args:
        times: Timestamps, datetime64 [R], in any order.
        values: Readings, [R, N], NaN where missing.
        sensors: Names of the N columns.
        step_minutes: Step length; measured when left out.
        null_value: What means missing, see `mark_missing`: rows of the same step are averaged without it.

    Raises:
        DataError: Shapes that disagree, unreadable timestamps, or rows that do not lie on any regular clock.
    """
    times = np.asarray(times).astype("datetime64[s]")
    values = without_nulls(np.asarray(values, dtype=np.float32), null_value)
    if values.ndim != 2 or values.shape != (len(times), len(sensors)):
        raise DataError(
            f"{len(times)} timestamps and {len(sensors)} sensors need a table of [{len(times)}, {len(sensors)}], got "
            f"{list(values.shape)}"
        )
    if len(set(sensors)) != len(sensors):
        twice = sorted({s for s in sensors if sensors.count(s) > 1})
        raise DataError(
            f"sensor names occur more than once: {', '.join(twice[:5])}; rename or drop the copies"
        )
    if np.isnat(times).any():
        raise DataError(
            f"{int(np.isnat(times).sum())} timestamps are empty or unreadable; fix or drop these rows"
        )
    repairs: dict[str, int] = {}
    if (np.diff(times) < np.timedelta64(0, "s")).any():
        order = np.argsort(times, kind="stable")
        repairs["unsorted_rows"] = int((order != np.arange(len(order))).sum())
        times, values = times[order], values[order]
    step = step_minutes or step_of(times)
    seconds = round(step * 60)
    first = times[0]
    offset = (times - first).astype(np.int64)
    place = np.rint(offset / seconds).astype(np.int64)
    off_clock = int((offset % seconds != 0).sum())
    if off_clock > 0.01 * len(times):
        raise DataError(
            f"{off_clock} of {len(times)} timestamps do not lie on a clock of {step:g} minutes that starts at {first}; "
            "resample the table or give the right step_minutes"
        )
    if off_clock:
        repairs["snapped_timestamps"] = off_clock
    total = int(place[-1]) + 1
    absent = total - len(np.unique(place))
    if absent > MAX_GAP_SHARE * total:
        raise DataError(
            f"{absent} of {total} steps of {step:g} minutes between {first} and {times[-1]} are absent; is a timestamp "
            "wrong, or step_minutes?"
        )
    if absent:
        repairs["absent_steps"] = absent
    infinite = np.isinf(values)
    if infinite.any():
        repairs["infinite_cells"] = int(infinite.sum())
        values = np.where(infinite, np.nan, values)
    grid = np.full((total, len(sensors)), np.nan, dtype=np.float32)
    if len(np.unique(place)) == len(place):
        grid[place] = values
    else:
        repairs["duplicate_rows"] = len(place) - len(np.unique(place))
        grid = _merge(place, values, total)
    clock = first + np.arange(total) * np.timedelta64(seconds, "s")
    return Series(grid, clock, step, list(sensors), repairs=repairs)


def _merge(place: np.ndarray, values: np.ndarray, total: int) -> np.ndarray:
    """Mean of the readings that share a step, [total, N]."""
    seen = ~np.isnan(values)
    sums = np.zeros((total, values.shape[1]))
    counts = np.zeros_like(sums)
    np.add.at(sums, place, np.where(seen, values, 0.0))
    np.add.at(counts, place, seen)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan).astype(np.float32)


def mark_missing(series: Series, null_value: str) -> Series:
    """Turn the file's sign for "missing" into NaN.

    Args:
        series: Changed in place and returned.
        null_value: "zero" (0, within 5e-5, means missing, as in METR-LA), "nan" (only NaN does; zeros are readings), or
            "none" (nothing is missing: a NaN is an error).
    """
    if null_value not in ("zero", "nan", "none"):
        raise DataError(f"data.null_value={null_value!r}: choose zero, nan or none")
    series.values = without_nulls(series.values, null_value)
    missing = np.isnan(series.values)
    if null_value == "none" and missing.any():
        where = np.argwhere(missing)[0]
        raise DataError(
            f"{int(missing.sum())} cells are missing (first: {series.sensors[where[1]]!r} at {series.times[where[0]]}), but "
            "null_value=none promises that none is; set data.null_value=nan or zero"
        )
    return series


def without_nulls(values: np.ndarray, null_value: str) -> np.ndarray:
    """Readings with NaN where the file means "missing"."""
    return np.where(np.abs(values) <= 5e-5, np.float32(np.nan), values) if null_value == "zero" else values


def keep_self_loops(series: Series) -> Series:
    """Let every sensor listen to itself, as closely as to its nearest neighbour, and count those that the graph did not let."""
    graph = series.adjacency
    if graph is None or graph.diagonal().all():
        return series
    lost = graph.diagonal() == 0
    series.adjacency = graph.copy()
    series.adjacency[lost, lost] = graph.max() or 1.0
    series.repairs["self_loops_missing"] = int(lost.sum())
    return series


def drop_dead(series: Series, train: slice, *, drop: bool) -> Series:
    """Leave out sensors without any reading in the training rows, and count them; or refuse."""
    dead = np.isnan(series.values[train]).all(axis=0)
    if not dead.any():
        return series
    names = [series.sensors[i] for i in np.flatnonzero(dead)]
    if dead.all():
        raise DataError(
            "no sensor has a reading in the training rows; is null_value right, and the split inside the data?"
        )
    if not drop:
        raise DataError(
            f"{len(names)} sensors have no reading in the training rows: {', '.join(names[:5])}; set "
            "data.drop_dead_sensors=true to leave them out"
        )
    kept = series.keep(np.flatnonzero(~dead))
    kept.repairs["dead_sensors"] = len(names)
    return kept


def great_circle_m(coordinates: np.ndarray) -> np.ndarray:
    """Distances in metres, float64 [N, N], between latitudes and longitudes in degrees [N, 2]."""
    lat, lon = np.radians(coordinates.astype(np.float64)).T
    half = (
        np.sin((lat[:, None] - lat) / 2) ** 2
        + np.cos(lat[:, None]) * np.cos(lat) * np.sin((lon[:, None] - lon) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(np.clip(half, 0.0, 1.0)))


def kernel_adjacency(
    distances: np.ndarray, *, sigma: float | None = None, cut: float = 0.1, self_loops: bool = True
) -> np.ndarray:
    """Edge weights exp(-(d / sigma)^2) with small ones cut to zero, float32 [N, N].

    Args:
        distances: [N, N], infinite where there is no link.
        sigma: Width in the unit of the distances; the standard deviation of the finite ones when left out.
        cut: Weights below it become zero.
        self_loops: Whether a sensor is linked with itself.

    Source: the construction of DCRNN, arXiv:1707.01926, section 4.
    """
    finite = np.isfinite(distances)
    sigma = sigma or float(distances[finite].std()) or 1.0
    weights = np.where(finite, np.exp(-((np.where(finite, distances, 0.0) / sigma) ** 2)), 0.0)
    weights[weights < cut] = 0.0
    np.fill_diagonal(weights, 1.0 if self_loops else 0.0)
    return weights.astype(np.float32)


def check_adjacency(adjacency: np.ndarray, sensors: int) -> np.ndarray:
    """A float32 copy of an adjacency that fits `sensors`, or an error that says what does not."""
    adjacency = np.asarray(adjacency)
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise DataError(f"an adjacency must be square, got {list(adjacency.shape)}")
    if len(adjacency) != sensors:
        raise DataError(
            f"the adjacency has {len(adjacency)} sensors, the readings have {sensors}; give one made for these sensors, or "
            "one with sensor ids, so that they can be matched"
        )
    adjacency = adjacency.astype(np.float32)
    if not np.isfinite(adjacency).all() or (adjacency < 0).any():
        raise DataError(
            "an adjacency holds edge weights >= 0; this one has negative, infinite or NaN entries"
        )
    return adjacency


def match_adjacency(
    adjacency: np.ndarray, ids: list[str], sensors: list[str], repairs: dict[str, int]
) -> np.ndarray:
    """Reorder an adjacency with sensor ids to the readings' sensors.

    Readings without a row get a self-loop alone, which is counted; ids without readings are dropped and counted.

    Raises:
        DataError: No id matches any sensor.
    """
    adjacency = check_adjacency(adjacency, len(ids))
    place = {name: i for i, name in enumerate(ids)}
    found = np.array([place.get(name, -1) for name in sensors])
    if (found < 0).all():
        raise DataError(
            f"no sensor id of the adjacency (such as {ids[0]!r}) occurs among the readings' sensors (such as {sensors[0]!r})"
        )
    if (found < 0).any():
        repairs["sensors_missing_from_adjacency"] = int((found < 0).sum())
    if len(set(ids) - set(sensors)):
        repairs["adjacency_rows_without_readings"] = len(set(ids) - set(sensors))
    out = adjacency[np.ix_(found, found)].copy()
    lost = found < 0
    out[lost] = 0.0
    out[:, lost] = 0.0
    out[lost, lost] = 1.0
    return out
