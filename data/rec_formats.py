"""Reading interaction logs in the formats that recommender users have, into one table.

The table is a pandas frame with `user`, `item` (strings), and where the file has them `time` (float seconds),
`rating`, `category`, `behaviour` (strings). Rows keep the file's order. What was changed or left out is counted in
`frame.attrs["notes"]`.
"""

from __future__ import annotations

import difflib
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd

from data.errors import DataError
from data.rec_rows import tidy

ROLES = ("user", "item", "time", "rating", "category", "behaviour")
NAMES = {  # column titles seen in public files, lower case
    "user": ("user_id", "userid", "user", "reviewerid", "uid"),
    "item": ("item_id", "itemid", "item", "asin", "parent_asin", "movieid", "movie_id", "iid"),
    "time": ("timestamp", "time", "time_stamp", "unixreviewtime", "ts", "date"),
    "rating": ("rating", "overall", "score", "stars"),
    "category": ("category", "cat_id", "category_id", "class", "genre", "genres"),
    "behaviour": ("behaviour", "behavior", "behavior_type", "action_type", "event", "type"),
}
LIST_NAMES = {
    "user": NAMES["user"],
    "item": ("items", "item_ids", "item_seq", "history", "sequence", *NAMES["item"]),
    "time": ("times", "timestamps", *NAMES["time"]),
    "category": ("categories", "category_ids", *NAMES["category"]),
    "rating": ("ratings", *NAMES["rating"]),
    "behaviour": ("behaviours", "behaviors", *NAMES["behaviour"]),
}
TMALL_ACTIONS = {"0": "pv", "1": "cart", "2": "buy", "3": "fav"}


def read_interactions(
    path: Path | str, format: str = "auto", columns: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Read an interaction log.

    Args:
        path: File; `.gz` is unpacked on the way.
        format: One of `FORMATS`, or "auto" to tell by name and first line.
        columns: Column title by role, where the file uses titles of its own; a role is one of `ROLES`.

    Returns:
        The table described at the top of this module.

    Raises:
        DataError: Missing file, unknown format, missing column, or a line that is not of the format.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"no file {str(path)!r}; set data.path to an interaction log ({', '.join(FORMATS)})")
    for role in columns or {}:
        if role not in ROLES:
            raise DataError(f"data.columns has the role {role!r}; roles are {', '.join(ROLES)}")
    if format == "auto":
        format = detect_format(path)
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=3, cutoff=0.5) or list(FORMATS)
        raise DataError(f"unknown data.format {format!r}; nearest: {', '.join(near)}")
    if columns and format in UNTITLED:
        raise DataError(
            f"{path.name} is read as {format!r}, which has no column titles, so data.columns cannot name any; drop it, or "
            "write titles into the file and set data.format=csv"
        )
    try:
        frame = FORMATS[format](path, dict(columns or {}))
    except DataError:
        raise
    except (ValueError, OSError, KeyError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path.name}: not a readable {format!r} file ({reason}); set data.format") from error
    return tidy(frame, path, format)


def detect_format(path: Path) -> str:
    """Name of the format by file name and first line."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    if name.endswith(".inter"):
        return "recbole"
    with _open(path) as stream:
        first = stream.readline().strip()
    if not first:
        raise DataError(f"{path.name} is empty")
    if first.startswith("{"):
        return "amazon"
    if "::" in first:
        return "movielens_dat"
    if ":token" in first:
        return "recbole"
    fields = [field.strip().lower() for field in first.split(_separator(first))]
    if "\t" in first:
        return "csv" if any(field in NAMES["user"] for field in fields) else "movielens_data"
    if {"user_id", "item_id", "time_stamp", "action_type"} <= set(fields):
        return "tmall"
    if len(fields) == 5 and fields[3] in ("pv", "cart", "fav", "buy"):
        return "taobao"
    if any(field in NAMES["user"] for field in fields):
        return "csv"
    if len(fields) == 4:
        return "amazon_csv"
    raise DataError(
        f"{path.name}: cannot tell the format from its first line {first[:80]!r}; set data.format to one of "
        f"{', '.join(FORMATS)}"
    )


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _separator(line: str) -> str:
    return "\t" if "\t" in line else ","


def _csv(path: Path | TextIO, names: list[str] | None = None, **options: Any) -> pd.DataFrame:
    return pd.read_csv(path, names=names, dtype=str, keep_default_na=False, na_values=[""], **options)


def _untitled(path: Path, *names: str, sep: str = ",") -> pd.DataFrame:
    """A table without titles, whose fields are `names`, a time last.

    Raises:
        DataError: The first line is not of this kind. pandas would shift the fields or fill them up.
    """
    with _open(path) as stream:
        first = stream.readline().rstrip("\r\n").split(sep)
    if len(first) != len(names) or pd.isna(pd.to_numeric(first[-1], errors="coerce")):
        raise DataError(
            f"{path.name}: expected lines of {len(names)} fields without titles ({', '.join(names)}), the first one is "
            f"{sep.join(first)[:80]!r}; for other columns give them titles and set data.format=csv"
        )
    return _csv(path, list(names), sep=sep)


def _movielens_data(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """MovieLens-100K `u.data`: tabs, no header."""
    return _untitled(path, "user", "item", "rating", "time", sep="\t")


def _movielens_dat(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """MovieLens-1M and 10M `ratings.dat`: fields between double colons."""
    with _open(path) as stream:
        rows = [line.rstrip("\n").split("::") for line in stream if line.strip()]
    if bad := next((i for i, row in enumerate(rows) if len(row) != 4), None):
        raise DataError(f"{path.name}, line {bad + 1}: expected user::item::rating::time, got {rows[bad]}")
    return pd.DataFrame(rows, columns=["user", "item", "rating", "time"])


def _headed(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Commas or tabs, titles in the first line."""
    with _open(path) as stream:
        separator = _separator(stream.readline())
    return _rename(_csv(path, sep=separator), columns, path, NAMES)


def _recbole(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """RecBole atomic `.inter`: tabs and a header of `name:type`; categories come from the `.item` file beside it."""
    frame = _csv(path, sep="\t")
    frame.columns = [str(column).split(":")[0] for column in frame.columns]
    frame = _rename(frame, columns, path, NAMES)
    beside = path.with_name(path.name.replace(".inter", ".item"))
    if "category" not in frame and beside != path and beside.is_file():
        items = read_recbole_table(beside)
        key = next((c for c in items.columns if c.lower() in NAMES["item"]), None)
        kind = next((c for c in items.columns if c.lower() in NAMES["category"]), None)
        if key and kind:
            frame["category"] = frame["item"].map(dict(zip(items[key], items[kind], strict=True)))
    return frame


def read_recbole_table(source: Path | TextIO) -> pd.DataFrame:
    """A RecBole `.user` or `.item` file: all columns as strings under their plain names."""
    frame = _csv(source, sep="\t")
    frame.columns = [str(column).split(":")[0] for column in frame.columns]
    return frame


def _taobao(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Taobao `UserBehavior.csv`: user, item, category, behaviour, unix time; no header."""
    return _untitled(path, "user", "item", "category", "behaviour", "time")


def _tmall(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Tmall `user_log_format1.csv`: month and day as time, not sorted, actions as digits."""
    frame = _rename(_csv(path), columns, path, NAMES)
    days = pd.to_datetime("2015" + frame["time"].str.zfill(4), format="%Y%m%d", errors="coerce")
    frame["time"] = (days - pd.Timestamp("2015-01-01")).dt.total_seconds()
    frame["behaviour"] = frame["behaviour"].map(TMALL_ACTIONS)
    return frame


def _amazon(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Amazon reviews, one JSON object a line, in the layouts of 2014/2018 and 2023."""
    names = {role: ([columns[role]] if role in columns else NAMES[role]) for role in ROLES}
    # 2023 files have both asin and parent_asin: variants of one product share the latter.
    names["item"] = [n for n in names["item"] if n == "parent_asin"] + list(names["item"])
    rows = []
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                review = {key.lower(): value for key, value in json.loads(line).items()}
            except (json.JSONDecodeError, AttributeError):
                raise DataError(f"{path.name}, line {number}: not a JSON object") from None
            rows.append(
                {
                    r: next((review[n.lower()] for n in names[r] if n.lower() in review), None)
                    for r in ROLES[:4]
                }
            )
    return pd.DataFrame(rows, columns=list(ROLES[:4]))


def _amazon_csv(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Amazon ratings only: user, item, rating, time; the files of 2018 have the item first. No header."""
    frame = _untitled(path, "user", "item", "rating", "time")
    # Numbers of products (ASIN) have ten characters, those of reviewers nearly always more.
    ten = {role: (frame[role].str.len() == 10).mean() for role in ("user", "item")}
    if ten["user"] > 0.5 > ten["item"]:
        frame = frame.rename(columns={"user": "item", "item": "user"})
        frame.attrs["notes"] = {"columns": "item first"}
    return frame


def _parquet(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Parquet, one event a row, or one user a row with lists of equal length."""
    frame = pd.read_parquet(path)
    frame = _rename(frame, columns, path, LIST_NAMES if _lists(frame) else NAMES)
    if lists := _lists(frame):
        try:
            frame = frame.explode(lists, ignore_index=True)
        except ValueError:
            raise DataError(
                f"{path.name}: the lists of {', '.join(lists)} differ in length within a row"
            ) from None
    return frame


def _lists(frame: pd.DataFrame) -> list[str]:
    """Columns that hold lists; rows without one may come first."""
    return [c for c in frame if isinstance(next(iter(frame[c].dropna()), None), (list, np.ndarray))]


FORMATS: dict[str, Callable[[Path, dict[str, str]], pd.DataFrame]] = {
    "movielens_data": _movielens_data,
    "movielens_dat": _movielens_dat,
    "csv": _headed,
    "recbole": _recbole,
    "taobao": _taobao,
    "tmall": _tmall,
    "amazon": _amazon,
    "amazon_csv": _amazon_csv,
    "parquet": _parquet,
}
UNTITLED = ("movielens_data", "movielens_dat", "taobao", "amazon_csv")


def _rename(
    frame: pd.DataFrame, columns: dict[str, str], path: Path, names: Mapping[str, tuple[str, ...]]
) -> pd.DataFrame:
    """Give columns the names of their roles; the others are left out."""
    titles = {str(c).lower(): c for c in frame.columns}
    found = {}
    for role in ROLES:
        if role in columns:
            if columns[role].lower() not in titles:
                raise DataError(
                    f"{path.name} has no column {columns[role]!r} (data.columns.{role}); it has "
                    f"{', '.join(map(str, frame.columns))}"
                )
            found[role] = titles[columns[role].lower()]
        elif title := next((titles[n] for n in names[role] if n in titles), None):
            found[role] = title
    return frame[list(found.values())].set_axis(list(found), axis=1)
