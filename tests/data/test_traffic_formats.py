"""Files that users of traffic models bring, the repairs they need and the errors they earn."""

import os
import pickle

import numpy as np
import pytest

from data import create_data
from data.errors import DataError
from data.sampler import BatchKey
from data.traffic_formats import read_distances, read_frame_h5, read_graph, read_pickled_graph, read_table
from data.traffic_series import Series, check_adjacency, keep_self_loops, kernel_adjacency, regular

pd = pytest.importorskip("pandas")


def hours(count, start="2024-01-01"):
    return np.datetime64(start, "s") + np.arange(count) * np.timedelta64(3600, "s")


def frame(rows=400, sensors=("773869", "767541", "767542")):
    rng = np.random.default_rng(0)
    values = rng.uniform(20, 70, (rows, len(sensors)))
    values[3, 1] = 0.0
    index = pd.date_range("2012-03-01", periods=rows, freq="5min")
    return pd.DataFrame(values, index=index, columns=list(sensors))


@pytest.fixture
def metr(tmp_path):
    pytest.importorskip("tables")
    table = frame()
    table.to_hdf(tmp_path / "metr-la.h5", key="df", mode="w")
    return tmp_path / "metr-la.h5", table


def test_h5_written_by_pandas_loads_identically(metr):
    path, table = metr
    times, values, sensors, zone = read_frame_h5(path)
    assert sensors == list(table.columns) and zone is None
    assert (times == table.index.to_numpy().astype("datetime64[s]")).all()
    np.testing.assert_array_equal(values, table.to_numpy(np.float32))


def test_h5_with_integer_columns_and_mixed_blocks(tmp_path):
    pytest.importorskip("tables")
    table = frame(sensors=(7, 3, 5))
    table[3] = (table[3] * 0).astype("int64") + 4
    table.to_hdf(tmp_path / "mixed.h5", key="speed", mode="w")
    _, values, sensors, _ = read_frame_h5(tmp_path / "mixed.h5")
    assert sensors == ["7", "3", "5"]
    np.testing.assert_array_equal(values, table.to_numpy(np.float32))


@pytest.mark.parametrize("zone", ["America/Los_Angeles", "Etc/UTC"])
def test_h5_times_with_a_zone_come_back_on_the_local_clock(tmp_path, zone):
    """pandas stores them in UTC: rush hours would lie eight hours off, and move with daylight saving."""
    pytest.importorskip("tables")
    table = frame(rows=400).tz_localize(zone)
    table.to_hdf(tmp_path / "zone.h5", key="df", mode="w")
    times, _, _, found = read_frame_h5(tmp_path / "zone.h5")
    assert (times == table.index.tz_localize(None).to_numpy().astype("datetime64[s]")).all()
    assert found == zone
    data = create_data("metr_la", path=str(tmp_path / "zone.h5"))
    data.setup()
    assert data.preprocessing()["zone"] == found
    frame(rows=4).tz_localize("+12:00").to_hdf(tmp_path / "offset.h5", key="df", mode="w")
    with pytest.raises(DataError, match="pickled object, which is not opened.*tz_localize"):
        read_frame_h5(tmp_path / "offset.h5")


def test_real_counts_survive_the_h5_round_trip(tmp_path):
    pytest.importorskip("tables")
    try:
        data = create_data("auckland")
        data.prepare_data()
        data.setup()
    except DataError as error:
        pytest.skip(f"the counters cannot be fetched: {error}")
    series = data.series
    table = pd.DataFrame(series.values[:2000], index=series.times[:2000], columns=series.sensors)
    table.to_hdf(tmp_path / "akl.h5", key="df", mode="w")
    np.save(tmp_path / "adj.npy", series.adjacency)
    again = create_data(
        "metr_la", path=str(tmp_path / "akl.h5"), adjacency=str(tmp_path / "adj.npy"), null_value="nan"
    )
    again.setup()
    assert again.series.sensors == series.sensors and again.series.step_minutes == 60
    np.testing.assert_array_equal(again.series.values, series.values[:2000])
    np.testing.assert_array_equal(again.series.adjacency, series.adjacency)


def test_zero_is_missing_in_speeds_and_not_scaled_in(metr):
    path, table = metr
    data = create_data("metr_la", path=str(path), batch_size=8)
    data.setup()
    assert np.isnan(data.series.values[3, 1])
    old = create_data("metr_la", path=str(path), zscore_includes_missing=True)
    old.setup()
    train = table.to_numpy()[:280]
    assert old.mean[0] == pytest.approx(train.mean(), rel=1e-6)
    assert data.mean[0] == pytest.approx(train[train > 0].mean(), rel=1e-6)
    first = BatchKey(np.array([0]), 0, 0)
    seen = [d.dataset("train")[first]["history_seen"][0, 3, 1].item() for d in (data, old)]
    assert seen == [False, True] and old.dataset("train")[first]["history"][0, 3, 1] == 0
    assert data.series.step_minutes == 5 and data.series.slots_per_day == 288


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickled_adjacency_is_read_and_matched_by_id(tmp_path, protocol):
    ids = ["767542", "773869", "extra", "767541"]
    matrix = np.arange(16, dtype=np.float32).reshape(4, 4)
    path = tmp_path / "adj_mx.pkl"
    path.write_bytes(pickle.dumps((ids, {n: i for i, n in enumerate(ids)}, matrix), protocol=protocol))
    assert read_pickled_graph(path)[0] == ids
    series = regular(hours(3), np.ones((3, 3)), ["773869", "767541", "gone"])
    got = read_graph(path, series, sigma=None, cut=0.1)
    np.testing.assert_array_equal(got, [[5, 7, 0], [13, 15, 0], [0, 0, 1]])
    assert series.repairs["sensors_missing_from_adjacency"] == 1
    assert series.repairs["adjacency_rows_without_readings"] == 2


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_executes_nothing(tmp_path, protocol):
    mark = tmp_path / "owned"
    path = tmp_path / "adj_mx.pkl"
    path.write_bytes(pickle.dumps((["a"], {"a": 0}, Evil(str(mark))), protocol=protocol))
    with pytest.raises(DataError, match=r"nothing of it was run.*\.npy"):
        read_pickled_graph(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # the same file does act where it is trusted
    assert mark.exists()


def test_numpy_object_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([Evil(str(tmp_path / "owned"))], dtype=object), allow_pickle=True)
    series = regular(hours(3), np.ones((3, 2)), ["a", "b"])
    with pytest.raises(DataError, match="a.npy is no readable .npy file of numbers: .* Python objects"):
        read_graph(tmp_path / "a.npy", series, sigma=None, cut=0.1)
    assert not (tmp_path / "owned").exists()


def test_adjacency_csv_with_and_without_ids(tmp_path):
    series = regular(hours(3), np.ones((3, 2)), ["a", "b"])
    (tmp_path / "plain.csv").write_text("1,0.5\n0.25,1\n")
    (tmp_path / "named.csv").write_text(",b,a\nb,1,0.5\na,0.25,1\n")
    plain = read_graph(tmp_path / "plain.csv", series, sigma=None, cut=0.1)
    np.testing.assert_allclose(plain, [[1, 0.5], [0.25, 1]])
    named = read_graph(tmp_path / "named.csv", series, sigma=None, cut=0.1)
    np.testing.assert_allclose(named, [[1, 0.25], [0.5, 1]])
    (tmp_path / "header.csv").write_text("b,a\n1,0.5\n0.25,1\n")
    header = read_graph(tmp_path / "header.csv", series, sigma=None, cut=0.1)
    np.testing.assert_allclose(header, [[1, 0.25], [0.5, 1]])


def test_distance_csv_by_number_and_by_name(tmp_path):
    path = tmp_path / "distance.csv"
    path.write_text("from,to,cost\n0,1,100\n1,2,300\n")
    distances = read_distances(path, ["400", "401", "402"])
    assert distances[1, 0] == 100 and distances[0, 1] == 100 and np.isinf(distances[0, 2])
    path.write_text("from,to,distance\n401,400,100\n")
    assert read_distances(path, ["400", "401", "402"])[0, 1] == 100
    weights = kernel_adjacency(distances, sigma=100.0, cut=0.1)
    assert weights[0, 1] == pytest.approx(np.exp(-1)) and weights[1, 2] == 0
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="from, to and cost"):
        read_distances(path, ["x"])


def test_bad_adjacencies_say_what_is_wrong():
    with pytest.raises(DataError, match=r"square, got \[2, 3\]"):
        check_adjacency(np.ones((2, 3)), 2)
    with pytest.raises(DataError, match="3 sensors, the readings have 2"):
        check_adjacency(np.ones((3, 3)), 2)
    with pytest.raises(DataError, match="negative"):
        check_adjacency(-np.ones((2, 2)), 2)


def test_gaps_duplicates_and_order_are_repaired_and_counted():
    times = hours(6)[[3, 0, 1, 1, 5]]
    values = np.array([[3.0], [0.0], [1.0], [2.0], [np.inf]])
    series = regular(times, values, ["a"], step_minutes=60)
    np.testing.assert_array_equal(series.values[:, 0], [0, 1.5, np.nan, 3, np.nan, np.nan])
    wanted = {"unsorted_rows": 4, "absent_steps": 2, "duplicate_rows": 1, "infinite_cells": 1}
    assert series.repairs == {**wanted, "unsorted_rows": series.repairs["unsorted_rows"]}
    assert series.repairs["unsorted_rows"] > 0


def test_step_is_measured_and_unfit_clocks_refused():
    assert regular(hours(9)[[0, 1, 2, 5, 6, 7]], np.ones((6, 1)), ["a"]).step_minutes == 60
    ragged = np.datetime64("2024-01-01", "s") + np.cumsum([0, 60, 61, 67, 71, 60, 60, 60]).astype(
        "timedelta64[m]"
    )
    with pytest.raises(DataError, match="clock of 60 minutes"):
        regular(ragged, np.ones((8, 1)), ["a"])
    with pytest.raises(DataError, match="does not divide a day"):
        regular(np.datetime64("2024-01-01") + np.arange(9) * np.timedelta64(7, "m"), np.ones((9, 1)), ["a"])
    with pytest.raises(DataError, match="more than once"):
        regular(hours(3), np.ones((3, 2)), ["a", "a"])
    with pytest.raises(DataError, match="unreadable"):
        regular(np.array(["NaT", "2024-01-01"], dtype="datetime64[s]"), np.ones((2, 1)), ["a"])


def test_duplicate_rows_are_averaged_over_readings_alone():
    twice = hours(3)[[0, 0, 1, 2]]
    values = np.array([[0.0], [60.0], [4.0], [5.0]])
    assert regular(twice, values, ["a"], null_value="zero").values[0, 0] == 60
    assert regular(twice, values, ["a"]).values[0, 0] == 30


def test_slots_of_half_minutes():
    times = np.datetime64("2024-01-01T00:00:00") + np.arange(6) * np.timedelta64(30, "s")
    assert regular(times, np.ones((6, 1)), ["a"]).week_slot.tolist() == [0, 1, 2, 3, 4, 5]


def test_sensors_listen_to_themselves_whatever_the_graph_file_says():
    graph = np.array([[0, 0.5], [0, 0.9]], np.float32)
    series = keep_self_loops(Series(np.ones((2, 2), np.float32), hours(2), 60.0, ["a", "b"], adjacency=graph))
    np.testing.assert_allclose(series.adjacency, [[0.9, 0.5], [0, 0.9]])
    assert series.repairs == {"self_loops_missing": 1} and graph[0, 0] == 0


def test_dead_sensors_are_dropped_and_counted_or_refused(tmp_path):
    values = np.arange(800.0).reshape(400, 2) + 1
    values[:300, 1] = np.nan
    table = pd.DataFrame(values, columns=["a", "dead"])
    table.insert(0, "timestamp", hours(400))
    table.to_csv(tmp_path / "wide.csv", index=False)
    data = create_data("traffic_table", path=str(tmp_path / "wide.csv"))
    data.setup()
    assert data.labels == ["a"] and data.split_record()["repairs"] == {"dead_sensors": 1}
    strict = create_data("traffic_table", path=str(tmp_path / "wide.csv"), drop_dead_sensors=False)
    with pytest.raises(DataError, match="dead.*drop_dead_sensors=true"):
        strict.setup()


def test_places_that_are_no_numbers_are_refused(tmp_path):
    table = pd.DataFrame(np.arange(400.0).reshape(200, 2) + 1, columns=["a", "b"])
    table.insert(0, "timestamp", hours(200))
    table.to_csv(tmp_path / "wide.csv", index=False)
    (tmp_path / "places.csv").write_text("sensor,latitude,longitude\na,1.0,2.0\nb,north,2.5\n")
    paths = {"path": str(tmp_path / "wide.csv"), "locations": str(tmp_path / "places.csv")}
    with pytest.raises(DataError, match=r"places.csv: latitude and longitude must be numbers"):
        create_data("traffic_table", **paths).setup()


def test_long_and_wide_tables_agree(tmp_path):
    table = pd.DataFrame(np.arange(20.0).reshape(10, 2), columns=["a", "b"])
    table.insert(0, "timestamp", hours(10))
    table.to_csv(tmp_path / "wide.csv", index=False)
    long = table.melt("timestamp", var_name="sensor", value_name="value").sample(frac=1, random_state=0)
    long.to_csv(tmp_path / "long.csv", index=False)
    wide, other = (read_table(tmp_path / f"{name}.csv") for name in ("wide", "long"))
    assert wide[2] == other[2]
    np.testing.assert_array_equal(wide[0].astype("datetime64[s]"), other[0].astype("datetime64[s]"))
    np.testing.assert_array_equal(wide[1], other[1])
    (tmp_path / "bad.csv").write_text("timestamp,a\nyesterday,1\n")
    with pytest.raises(DataError, match="'yesterday' in row 1"):
        read_table(tmp_path / "bad.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="cannot read table .*empty.csv"):
        read_table(tmp_path / "empty.csv")


def test_repairs_of_a_long_table_are_counted(tmp_path):
    """Ids keep their zeros; a missing reading has no part in a mean; what is no number is counted or refused."""
    (tmp_path / "t.csv").write_text(
        "timestamp,sensor,value\n2024-01-01T00:00,010,0\n2024-01-01T00:00,010,60\n2024-01-01T00:00,9,5\n"
        "2024-01-01T01:00,010,n.a.\n2024-01-01T01:00,9,7\n"
    )
    counted: dict[str, int] = {}
    _, values, sensors, _ = read_table(tmp_path / "t.csv", null_value="zero", repairs=counted)
    assert sensors == ["9", "010"] and counted == {"duplicate_rows": 1, "cells_without_number": 1}
    np.testing.assert_array_equal(values, [[5, 60], [7, np.nan]])
    (tmp_path / "t.csv").write_text(
        "time,a,b\n2024-01-01T00:00,1,'3,5'\n2024-01-01T01:00,2,'3,6'\n".replace("'", '"')
    )
    with pytest.raises(DataError, match="'b' holds no number"):
        read_table(tmp_path / "t.csv")


def test_zones_of_timestamps_are_kept_and_unlike_ones_refused(tmp_path):
    """Readings stand at the hours that the file shows; the zone is for those who forecast later."""
    for zone, suffix in ((None, ""), ("+00:00", "Z"), ("+12:00", "+12:00")):
        (tmp_path / "t.csv").write_text(f"time,a\n2024-04-07T01:00{suffix},1\n2024-04-07T02:00{suffix},2\n")
        times, _, _, found = read_table(tmp_path / "t.csv")
        assert found == zone and str(times[0].astype("datetime64[m]")) == "2024-04-07T01:00"
    (tmp_path / "t.csv").write_text("time,a\n2024-04-07T01:00+13:00,1\n2024-04-07T02:00+12:00,2\n")
    with pytest.raises(DataError, match="'time' carry different UTC offsets"):
        read_table(tmp_path / "t.csv")
    summer = pd.date_range("2024-01-01", periods=3, freq="h", tz="Pacific/Auckland", name="time")
    pd.DataFrame({"a": [1.0, 2.0, 3.0]}, index=summer).to_parquet(tmp_path / "t.parquet")
    times, _, _, found = read_table(tmp_path / "t.parquet")
    assert found == "Pacific/Auckland" and str(times[0].astype("datetime64[m]")) == "2024-01-01T00:00"


def test_pems_archive(tmp_path):
    cells = np.random.default_rng(0).uniform(0, 9, (300, 4, 3))
    np.savez(tmp_path / "PEMS04.npz", data=cells)
    (tmp_path / "distance.csv").write_text("from,to,cost\n0,1,10\n1,2,20\n")
    options = {"path": str(tmp_path / "PEMS04.npz"), "adjacency": str(tmp_path / "distance.csv")}
    data = create_data("pems_flow", **options)
    data.setup()
    np.testing.assert_allclose(data.series.values, cells[..., 0], rtol=1e-6)
    assert [part.stop for part in data.rows.values()] == [180, 240, 300]
    assert data.adjacency()[0, 1] > 0 and data.adjacency()[0, 3] == 0
    with pytest.raises(DataError, match="channel=3"):
        create_data("pems_flow", channel=3, **options).setup()
    np.savez(tmp_path / "PEMS04.npz", other=cells)
    with pytest.raises(DataError, match="expected the arrays data, found other"):
        create_data("pems_flow", **options).setup()
    (tmp_path / "PEMS04.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match="PEMS04.npz is no readable .npz file"):
        create_data("pems_flow", **options).setup()


def test_largest_sums_steps_and_cuts_a_district(tmp_path):
    pytest.importorskip("tables")
    table = frame(rows=601, sensors=("1", "2", "3"))
    table.iloc[4, 0] = np.nan
    table.to_hdf(tmp_path / "ca.h5", key="t", mode="w")
    pd.DataFrame(
        {"ID": [3, 1, 2], "Lat": [37.0, 38, 39], "Lng": [-120.0, -121, -122], "District": [4, 7, 4]}
    ).to_csv(tmp_path / "meta.csv", index=False)
    np.save(tmp_path / "adj.npy", np.eye(3) + np.diag([0.5, 0.5], 1))
    files = {
        "path": str(tmp_path / "ca.h5"),
        "meta": str(tmp_path / "meta.csv"),
        "adjacency": str(tmp_path / "adj.npy"),
    }
    data = create_data("largest", **files, district=4, combine="sum")
    data.setup()
    assert data.labels == ["2", "3"] and data.series.step_minutes == 15 and len(data.series.values) == 200
    np.testing.assert_allclose(data.series.values[0], table.iloc[:3, 1:].sum(), rtol=1e-6)
    np.testing.assert_allclose(data.series.coordinates, [[39, -122], [37, -120]])
    everywhere = create_data("largest", **files)
    everywhere.setup()
    # The metadata, and so the matrix, list 3, 1, 2: sensor 3 listens to 1, and 1 to 2.
    np.testing.assert_allclose(everywhere.adjacency(), [[1, 0.5, 0], [0, 1, 0], [0.5, 0, 1]])
    np.testing.assert_array_equal(everywhere.series.values[0], table.iloc[:3].mean().round())
    assert everywhere.series.values[1, 0] == table.iloc[[3, 5], 0].mean().round()  # row 4 is a gap
    np.testing.assert_allclose(data.adjacency(), [[1, 0], [0, 1]])
    with pytest.raises(DataError, match="35 minutes do not divide a day"):
        create_data("largest", **files, aggregate=7).setup()


def test_dcrnn_windows_come_back_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    files = {}
    for split, count in (("train", 30), ("val", 8), ("test", 9)):
        x = np.zeros((count, 12, 5, 2), np.float32)
        y = np.zeros((count, 12, 5, 2), np.float32)
        x[..., 0], y[..., 0] = rng.uniform(1, 60, (2, count, 12, 5))
        x[..., 1] = ((np.arange(count)[:, None] * 7 + np.arange(12)) % 288 / 288)[..., None]
        files[split] = x, y
        np.savez(tmp_path / f"{split}.npz", x=x, y=y)
    data = create_data("dcrnn_windows", root=str(tmp_path))
    data.setup()
    batch = data.dataset("test")[BatchKey(np.array([0, 8]), -1, 0)]
    x, y = files["test"]
    np.testing.assert_array_equal(batch["history"], x[[0, 8], ..., 0])
    np.testing.assert_array_equal(batch["target"], y[[0, 8], ..., 0])
    assert batch["clock"].tolist() == [0, 56] and len(data.dataset("train")) == 30
    for split, (x, y) in files.items():
        days = np.broadcast_to((np.arange(len(x)) % 7 / 7)[:, None, None, None], (*x.shape[:3], 1))
        np.savez(tmp_path / f"{split}.npz", x=np.concatenate((x, days), -1), y=y)
    with pytest.raises(DataError, match="weekday_scale=7"):
        create_data("dcrnn_windows", root=str(tmp_path)).setup()
    week = create_data("dcrnn_windows", root=str(tmp_path), weekday_scale=7)
    week.setup()
    assert week.dataset("test")[BatchKey(np.array([0, 8]), -1, 0)]["clock"].tolist() == [0, 288 + 56]
    with pytest.raises(DataError, match="history_steps=12"):
        create_data("dcrnn_windows", root=str(tmp_path), history_steps=6).setup()


def test_missing_file_names_the_option():
    with pytest.raises(DataError, match=r"data\.path is not set"):
        create_data("metr_la").setup()
    with pytest.raises(DataError, match="does not exist"):
        create_data("traffic_table", path="/nowhere.csv").setup()


def test_null_value_none_refuses_gaps():
    from data.traffic_series import mark_missing

    series = Series(np.array([[1.0, np.nan]], np.float32), hours(1), 60.0, ["a", "b"])
    with pytest.raises(DataError, match="null_value=none"):
        mark_missing(series, "none")
