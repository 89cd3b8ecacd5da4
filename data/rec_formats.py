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
    try:
        frame = FORMATS[format](path, dict(columns or {}))
    except DataError:
        raise
    except (ValueError, OSError, KeyError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path.name}: not a readable {format!r} file ({reason}); set data.format") from error
    return _tidy(frame, path, format)


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
    if "\t" in first:
        return "movielens_data"
    fields = [field.strip().lower() for field in first.split(",")]
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


def _csv(path: Path, names: list[str] | None, **options: Any) -> pd.DataFrame:
    return pd.read_csv(path, names=names, dtype=str, keep_default_na=False, na_values=[""], **options)


def _movielens_data(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """MovieLens-100K `u.data`: tabs, no header."""
    return _csv(path, ["user", "item", "rating", "time"], sep="\t")


def _movielens_dat(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """MovieLens-1M and 10M `ratings.dat`: fields between double colons."""
    with _open(path) as stream:
        rows = [line.rstrip("\n").split("::") for line in stream if line.strip()]
    if bad := next((i for i, row in enumerate(rows) if len(row) != 4), None):
        raise DataError(f"{path.name}, line {bad + 1}: expected user::item::rating::time, got {rows[bad]}")
    return pd.DataFrame(rows, columns=["user", "item", "rating", "time"])


def _headed(path: Path, columns: dict[str, str], **options: Any) -> pd.DataFrame:
    return _rename(_csv(path, None, **options), columns, path, NAMES)


def _recbole(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """RecBole atomic `.inter`: tabs and a header of `name:type`; categories come from the `.item` file beside it."""
    frame = _csv(path, None, sep="\t")
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
    frame = _csv(source, None, sep="\t")
    frame.columns = [str(column).split(":")[0] for column in frame.columns]
    return frame


def _taobao(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Taobao `UserBehavior.csv`: user, item, category, behaviour, unix time; no header."""
    return _csv(path, ["user", "item", "category", "behaviour", "time"])


def _tmall(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Tmall `user_log_format1.csv`: month and day as time, not sorted, actions as digits."""
    frame = _rename(_csv(path, None), columns, path, NAMES)
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
    """Amazon ratings only: user, item, rating, time; no header."""
    return _csv(path, ["user", "item", "rating", "time"])


def _parquet(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Parquet, one event a row, or one user a row with lists of equal length."""
    frame = pd.read_parquet(path)
    lists = [c for c in frame.columns if len(frame) and isinstance(frame[c].iloc[0], (list, np.ndarray))]
    frame = _rename(frame, columns, path, LIST_NAMES if lists else NAMES)
    lists = [c for c in frame.columns if len(frame) and isinstance(frame[c].iloc[0], (list, np.ndarray))]
    if lists:
        try:
            frame = frame.explode(lists, ignore_index=True)
        except ValueError:
            raise DataError(
                f"{path.name}: the lists of {', '.join(lists)} differ in length within a row"
            ) from None
    return frame


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


def _tidy(frame: pd.DataFrame, path: Path, format: str) -> pd.DataFrame:
    """Check columns, turn types, drop unusable rows, and count all of it."""
    for role in ("user", "item"):
        if role not in frame:
            raise DataError(
                f"{path.name} ({format}) has no {role} column; name it with data.columns.{role}=<title>"
            )
    notes = {"format": format, "rows": len(frame)}
    valid = np.ones(len(frame), dtype=bool)
    for role in ("user", "item"):
        ids = frame[role]
        missing = ids.isna().to_numpy() | (ids.astype(str).str.strip() == "").to_numpy()
        numbers = pd.to_numeric(ids, errors="coerce").to_numpy()
        negative = ~missing & (numbers < 0)  # -1 marks a missing id in many logs
        notes[f"missing_{role}"] = int(missing.sum())
        notes[f"negative_{role}"] = int(negative.sum())
        valid &= ~(missing | negative)
    if "time" in frame:
        frame["time"], unit = _seconds(frame["time"])
        if unit:
            notes["time_unit"] = unit
        missing = frame["time"].isna().to_numpy()
        if missing.all():
            frame = frame.drop(columns="time")
        else:
            notes["missing_time"] = int((missing & valid).sum())
            valid &= ~missing
    if "time" not in frame:
        notes["no_time"] = "file order"
    if "rating" in frame:
        frame["rating"] = pd.to_numeric(frame["rating"], errors="coerce")
    frame = frame[valid].reset_index(drop=True)
    if not len(frame):
        raise DataError(f"{path.name} ({format}): no usable row among {notes['rows']}: {notes}")
    for role in ("user", "item", "category", "behaviour"):
        if role in frame:
            frame[role] = frame[role].astype(str).str.strip()
    frame.attrs["notes"] = notes
    return frame


def _seconds(times: pd.Series) -> tuple[pd.Series, str]:
    """Times in seconds and the unit they were in, told from their size: seconds reach 1e11 in the year 5138."""
    numbers = pd.to_numeric(times, errors="coerce")
    if numbers.isna().all() and not times.isna().all():
        parsed = pd.to_datetime(times, errors="coerce", utc=True)
        return (parsed - pd.Timestamp(0, tz="UTC")).dt.total_seconds(), "text"
    middle = numbers.abs().median()
    for limit, factor, unit in ((1e17, 1e9, "ns"), (1e14, 1e6, "us"), (1e11, 1e3, "ms")):
        if middle > limit:
            return numbers / factor, unit
    return numbers, ""
