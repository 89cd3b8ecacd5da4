"""Windows, splits, statistics, scores and baselines of traffic data."""

import numpy as np
import pytest
import torch

from data import create_data
from data.errors import DataError
from data.sampler import BatchKey
from data.traffic_base import TrafficData
from data.traffic_scores import HorizonErrors, score
from data.traffic_windows import (
    Geometry,
    Windows,
    split_by_ratio,
    split_by_time,
    weekly_profile,
    window_starts,
)


@pytest.fixture(scope="module")
def roads() -> TrafficData:
    data = create_data("road_network", lag_steps=[24, 168])
    data.setup()
    return data


def test_no_window_crosses_a_split():
    geometry = Geometry(3, 2)
    rows = split_by_ratio(100, (0.7, 0.1, 0.2))
    starts = window_starts(rows, geometry)
    touched = {
        split: {int(s) + i for s in part for i in range(geometry.span)} for split, part in starts.items()
    }
    assert touched["train"] == set(range(70)) and touched["val"] == set(range(70, 80))
    assert touched["test"] == set(range(80, 100))
    with pytest.raises(DataError, match="fewer than one window"):
        window_starts(split_by_ratio(20, (0.7, 0.1, 0.2)), geometry)
    with pytest.raises(DataError, match="sum to 1"):
        split_by_ratio(10, (0.7, 0.1, 0.1))


@pytest.mark.parametrize("steps", [[0, 1], [-1], [1.5]])
def test_steps_that_are_reported_lie_ahead(steps):
    """-1 used to report the last step but one under its own name."""
    with pytest.raises(DataError, match="whole numbers from 1"):
        create_data("road_network", report_steps=steps)


def test_borders_are_dates():
    times = np.datetime64("2025-01-01", "s") + np.arange(9) * np.timedelta64(1, "D").astype("timedelta64[s]")
    assert split_by_time(times, "2025-01-03", "2025-01-05T00:00")["val"] == slice(2, 4)
    with pytest.raises(DataError, match="data.test_start='2025-13-01' is no date"):
        split_by_time(times, "2025-01-03", "2025-13-01")


def test_batches_hold_what_the_rows_hold():
    values = np.arange(60, dtype=np.float32).reshape(30, 2)
    values[5, 0] = np.nan
    windows = Windows(values, np.arange(30) % 7, Geometry(3, 2, (4, 10)))
    batch = windows.batch(torch.tensor([4, 20]))
    np.testing.assert_array_equal(batch["history"][1], values[20:23])
    np.testing.assert_array_equal(batch["target"][1], values[23:25])
    np.testing.assert_array_equal(batch["known"][1], [values[19:21], values[13:15]])
    assert batch["known_seen"][1].all() and not batch["known_seen"][0, 1].any()  # rows -3, -2 do not exist
    assert batch["history"][0, 1, 0] == 0 and not batch["history_seen"][0, 1, 0]
    assert batch["clock"].tolist() == [4, 6]


def test_earlier_looks_stay_in_the_past_and_in_their_stretch():
    with pytest.raises(DataError, match="future when the forecast is made"):
        Geometry(12, 12, (6,))
    values = np.ones((20, 1), np.float32)
    windows = Windows(values, np.zeros(20, np.int64), Geometry(2, 1, (5,)), np.repeat([0, 1], 10))
    assert not windows.batch(torch.tensor([10]))["known_seen"].any()
    assert windows.batch(torch.tensor([15]))["known_seen"].all()


def test_statistics_come_from_training_rows_alone(roads):
    train = roads.series.values[roads.rows["train"]]
    assert roads.mean[0] == pytest.approx(np.nanmean(train), rel=1e-5)
    other = create_data("road_network", lag_steps=[24, 168])
    read = other.read

    def changed():
        series = read()
        series.values[roads.rows["train"].stop :] *= 3
        return series

    other.read = changed
    other.setup()
    np.testing.assert_array_equal(other.profile, roads.profile)
    np.testing.assert_array_equal(other.mean, roads.mean)


def test_profile_falls_back_from_week_to_day_to_sensor():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, 8.0]])
    profile = weekly_profile(values, np.array([0, 2, 1]), 2)
    assert profile.shape == (14, 2)
    assert profile[0].tolist() == [1, 8] and profile[4].tolist() == [2, 8]
    assert profile[1].tolist() == [2, 8]  # no reading of sensor 0 at the second time of day: its mean


def test_errors_are_sums_over_everything_not_means_of_batches():
    target = torch.tensor([[[1.0, 2.0]], [[100.0, 50.0]]])
    forecast = torch.tensor([[[2.0, 0.0]], [[90.0, 0.0]]])
    seen = torch.tensor([[[True, True]], [[True, False]]])
    metric = HorizonErrors(1, (1,), 2.0)
    for i in range(2):
        metric.update(forecast[i : i + 1], target[i : i + 1], seen[i : i + 1])
    got = metric.compute()
    assert got["mae"] == pytest.approx(13 / 3) and got["mae_h1"] == got["mae"]
    assert got["rmse"] == pytest.approx((105 / 3) ** 0.5)
    assert got["mape"] == pytest.approx(100 * (1.0 + 0.1) / 2)  # readings of at least 2
    empty = HorizonErrors(1, (1,), 0.0)
    empty.update(forecast, target, torch.zeros_like(seen))
    assert np.isnan(empty.compute()["mae"])


def test_baselines_by_hand(roads):
    scores = roads.compute_baselines()
    windows = roads.windows.batch(torch.from_numpy(roads.starts["test"]))
    truth = windows["target"].masked_fill(~windows["target_seen"], torch.nan).numpy()
    slots = (roads.series.week_slot[roads.starts["test"]][:, None] + 6 + np.arange(6)) % 168
    average = score(roads.profile[slots], truth, (1, 3, 6), 0.0)
    assert scores["historical_average"] == pytest.approx(average)
    values = roads.series.values
    last = values[roads.starts["test"] + 5]
    kept = ~np.isnan(last)
    mine = np.abs(last[:, None] - truth)[np.broadcast_to(kept[:, None], truth.shape)]
    assert scores["copy_last"]["mae"] == pytest.approx(np.nanmean(mine), rel=0.02)
    assert scores["ridge"]["mae"] < min(scores["copy_last"]["mae"], scores["historical_average"]["mae"])
    assert {"last_week", "ridge_network"} <= set(scores)


def test_records_are_stable(roads):
    again = create_data("road_network", lag_steps=[24, 168])
    assert again.split_record() == roads.split_record() and again.data_hash() == roads.data_hash()
    other = create_data("road_network", lag_steps=[24, 168], data_seed=1)
    assert other.data_hash() != roads.data_hash()
    zeros = create_data("road_network", lag_steps=[24, 168], zscore_includes_missing=True)
    assert zeros.data_hash() != roads.data_hash(), "baselines see other inputs"


def test_auckland_counter_day():
    data = create_data("auckland", first_day="2019-01-01")
    try:
        data.prepare_data()
    except DataError as error:
        pytest.skip(f"the counters cannot be fetched: {error}")
    series = data.read()
    # New Year's crowd: the busiest hour of each winter-to-summer turn is midnight of 1 January, not of 31 December.
    busy = np.nansum(series.values, axis=1)
    for year in ("2024", "2025"):
        midnight = np.datetime64(f"{year}-01-01T00:00:00")
        assert busy[series.times == midnight] > 5 * busy[series.times == midnight - np.timedelta64(24, "h")]
    assert series.times[-1] == np.datetime64("2025-12-31T23:00:00") and len(series.sensors) == 21


def test_auckland_splits_and_sizes():
    data = create_data("auckland")
    try:
        data.prepare_data()
    except DataError as error:
        pytest.skip(f"the counters cannot be fetched: {error}")
    data.setup()
    assert [part.stop - part.start for part in data.rows.values()] == [18288, 4344, 4416]
    batch = data.dataset("train")[BatchKey(np.array([0, 400]), 0, 0)]
    assert batch["history"].shape == (2, 12, 21) and batch["known"].shape == (2, 3, 12, 21)
    assert not batch["known_seen"][0].any()  # nothing lies before the first day used
    assert batch["known_seen"][1].float().mean() > 0.9
