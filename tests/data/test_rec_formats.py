"""Every log format on a sample of its genuine layout, and what happens to bad rows."""

import gzip
from pathlib import Path

import pandas as pd
import pytest

from data.errors import DataError
from data.rec_formats import detect_format, read_interactions

SAMPLES = {
    "u.data": ("movielens_data", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n"),
    "ratings.dat": ("movielens_dat", "196::242::3::881250949\n186::302::3::891717742\n"),
    "ratings.csv": ("csv", "userId,movieId,rating,timestamp\n196,242,3.0,881250949\n186,302,3.0,891717742\n"),
    "ml.inter": (
        "recbole",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
    ),
    "UserBehavior.csv": ("taobao", "196,242,2520377,pv,881250949\n186,302,2520771,buy,891717742\n"),
    "reviews.json": (
        "amazon",
        '{"reviewerID": "196", "asin": "242", "overall": 3.0, "unixReviewTime": 881250949}\n'
        '{"reviewerID": "186", "asin": "302", "overall": 3.0, "unixReviewTime": 891717742}\n',
    ),
    "reviews2023.jsonl": (
        "amazon",
        '{"rating": 3.0, "asin": "x", "parent_asin": "242", "user_id": "196", "timestamp": 881250949000}\n'
        '{"rating": 3.0, "asin": "y", "parent_asin": "302", "user_id": "186", "timestamp": 891717742000}\n',
    ),
    "ratings_Beauty.csv": ("amazon_csv", "196,242,3.0,881250949\n186,302,3.0,891717742\n"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_formats_give_one_table(name: str, tmp_path: Path) -> None:
    expected, text = SAMPLES[name]
    path = tmp_path / name
    path.write_text(text)
    assert detect_format(path) == expected
    frame = read_interactions(path)
    assert frame["user"].tolist() == ["196", "186"] and frame["item"].tolist() == ["242", "302"]
    assert frame["time"].tolist() == [881250949, 891717742]
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    pd.testing.assert_frame_equal(read_interactions(packed), frame)


def test_tmall_month_and_day_sort_as_time(tmp_path: Path) -> None:
    path = tmp_path / "user_log_format1.csv"
    path.write_text(
        "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type\n"
        "328862,323294,833,2882,2660,1111,2\n328862,844400,1271,2882,2660,829,0\n328862,575153,1271,2882,,0901,3\n"
    )
    frame = read_interactions(path)
    assert frame.attrs["notes"]["format"] == "tmall"
    assert frame["time"].argsort().tolist() == [1, 2, 0]
    assert frame["behaviour"].tolist() == ["buy", "pv", "fav"] and frame["category"].tolist() == [
        "833",
        "1271",
        "1271",
    ]


def test_recbole_takes_categories_from_the_item_file(tmp_path: Path) -> None:
    (tmp_path / "d.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\nu\tb\t2\n")
    (tmp_path / "d.item").write_text("item_id:token\tclass:token_seq\na\tDrama\nb\tComedy\n")
    assert read_interactions(tmp_path / "d.inter")["category"].tolist() == ["Drama", "Comedy"]


def test_parquet_with_rows_and_with_lists(tmp_path: Path) -> None:
    flat = pd.DataFrame({"user": [1, 1, 2], "item": [5, 6, 7], "timestamp": [10, 11, 12]})
    flat.to_parquet(tmp_path / "flat.parquet")
    lists = pd.DataFrame({"user_id": [1, 2], "items": [[5, 6], [7]], "timestamps": [[10, 11], [12]]})
    lists.to_parquet(tmp_path / "lists.parquet")
    a, b = (read_interactions(tmp_path / f"{name}.parquet") for name in ("flat", "lists"))
    pd.testing.assert_frame_equal(a, b)
    assert b["item"].tolist() == ["5", "6", "7"]
    broken = pd.DataFrame({"user_id": [1], "items": [[5, 6]], "timestamps": [[10]]})
    broken.to_parquet(tmp_path / "broken.parquet")
    with pytest.raises(DataError, match="differ in length"):
        read_interactions(tmp_path / "broken.parquet")


def test_parquet_rows_without_a_list_or_a_date(tmp_path: Path) -> None:
    lists = pd.DataFrame({"user": ["a", "b"], "items": [None, ["x", "y"]], "times": [None, [1.0, 2.0]]})
    lists.to_parquet(tmp_path / "lists.parquet")
    frame = read_interactions(tmp_path / "lists.parquet")
    assert frame["item"].tolist() == ["x", "y"] and frame.attrs["notes"]["missing_item"] == 1
    days = pd.to_datetime(["1970-01-02", None, "1970-01-03"])
    pd.DataFrame({"user": "a", "item": ["x", "y", "z"], "time": days}).to_parquet(tmp_path / "days.parquet")
    frame = read_interactions(tmp_path / "days.parquet")
    assert frame["time"].tolist() == [86400, 172800] and frame.attrs["notes"]["missing_time"] == 1


def test_tabs_with_titles_are_read_by_title(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_text("user_id\titem_id\ttimestamp\trating\na\tb\t1600000000\t5\n")
    frame = read_interactions(path)
    assert frame["time"].tolist() == [1_600_000_000] and frame["rating"].tolist() == [5]


@pytest.mark.parametrize(
    ("format", "line"),
    [
        ("movielens_data", "a\tb\t5\t1600000000\tmore"),
        ("movielens_data", "a\tb\t5"),
        ("movielens_data", "customer\tsku\tstars\tday"),
        ("taobao", "1,2,3,pv,1600000000,more"),
        ("amazon_csv", "more,a,b,5.0,1600000000"),
    ],
)
def test_lines_of_another_width_are_refused(format: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(f"{line}\n")
    with pytest.raises(DataError, match="fields without titles.*data.format=csv"):
        read_interactions(path, format)


def test_amazon_ratings_of_2018_have_the_item_first(tmp_path: Path) -> None:
    path = tmp_path / "All_Beauty.csv"
    path.write_text("0143026860,A1V6B6TNIC10QE,1.0,1424304000\n014789302X,A1F1A0QQP2XVH5,3.0,1435968000\n")
    frame = read_interactions(path)
    assert frame["item"].tolist() == ["0143026860", "014789302X"] and frame["user"].str.startswith("A1").all()
    assert frame.attrs["notes"]["columns"] == "item first"


@pytest.mark.parametrize(("factor", "unit"), [(1_000, "ms"), (1_000_000, "us"), (1_000_000_000, "ns")])
def test_finer_times_become_seconds(factor: int, unit: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,time\n1,2,{1_500_000_000 * factor}\n1,3,{1_500_000_060 * factor}\n")
    frame = read_interactions(path)
    assert frame["time"].diff().iloc[1] == 60 and frame.attrs["notes"]["time_unit"] == unit


def test_dates_as_text_become_seconds(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\n1,2,2020-01-01T00:00:00\n1,3,2020-01-02T00:00:00\n")
    assert read_interactions(path)["time"].diff().iloc[1] == 86400


def test_bad_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\n1,2,10\n-1,3,11\n2,-5,12\n,4,13\n3,,14\n4,6,\n5,7,now\n")
    frame = read_interactions(path)
    assert len(frame) == 1
    notes = frame.attrs["notes"]
    assert (notes["negative_user"], notes["negative_item"]) == (1, 1)
    assert (notes["missing_user"], notes["missing_item"], notes["missing_time"]) == (1, 1, 2)


def test_missing_times_fall_back_to_file_order(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item\n1,2\n1,3\n")
    frame = read_interactions(path)
    assert "time" not in frame and frame.attrs["notes"]["no_time"] == "file order"


def test_own_column_titles(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("customer,sku,userId\na,b,c\n")
    frame = read_interactions(path, "csv", {"user": "customer", "item": "sku"})
    assert frame["user"].tolist() == ["a"] and frame["item"].tolist() == ["b"]
    with pytest.raises(DataError, match=r"no column 'shop'.*customer, sku"):
        read_interactions(path, "csv", {"user": "shop"})
    path.write_text("1,2,3,pv,1600000000\n")
    with pytest.raises(DataError, match="no column titles, so data.columns"):
        read_interactions(path, "auto", {"user": "customer"})
    with pytest.raises(DataError, match="roles are user"):
        read_interactions(path, "csv", {"buyer": "customer"})


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.path"):
        read_interactions(tmp_path / "none.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_interactions(empty)
    odd = tmp_path / "odd.csv"
    odd.write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match="set data.format"):
        read_interactions(odd)
    with pytest.raises(DataError, match="nearest: taobao"):
        read_interactions(odd, "taobbao")
    dat = tmp_path / "ratings.dat"
    dat.write_text("1::2::3::4\n1::2\n")
    with pytest.raises(DataError, match="line 2"):
        read_interactions(dat)
    lines = tmp_path / "x.json"
    lines.write_text('{"reviewerID": "a", "asin": "b"}\nnot json\n')
    with pytest.raises(DataError, match="line 2"):
        read_interactions(lines)
    unnamed = tmp_path / "unnamed.csv"
    unnamed.write_text("user,thing\n1,2\n")
    with pytest.raises(DataError, match=r"no item column.*data.columns.item"):
        read_interactions(unnamed)
