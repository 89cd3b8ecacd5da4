"""Reading what users of traffic models bring: pandas HDF5 without pandas, adjacencies without unpickling, CSV tables."""

from __future__ import annotations

import pickle
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from data.errors import DataError
from data.traffic_series import Series, check_adjacency, kernel_adjacency, match_adjacency, without_nulls
from zoo.files import read_arrays

# All that a pickled (ids, index, matrix) needs; anything else is refused, since unpickling runs code.
_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


def existing(path: Any, what: str) -> Path:
    """The path of a file that exists, or an error that says which option to set."""
    if not path:
        raise DataError(f"{what} is not set; give the path of the file")
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{what}={path} does not exist")
    return path


def read_csv(path: Path, **options: Any) -> Any:
    """A CSV file as a data frame; a file that is no table raises DataError."""
    import pandas as pd

    try:
        return pd.read_csv(path, **options)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise DataError(f"cannot read table {path}: {' '.join(str(error).split())}") from None


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise DataError(
            f"the pickle asks for {module}.{name}, which a list of ids and a matrix do not need; nothing of it was run. "
            "Save the matrix as .npy or .csv instead"
        )


def read_pickled_graph(path: Path) -> tuple[list[str] | None, np.ndarray]:
    """Sensor ids and matrix of an `adj_mx.pkl`, written by Python 2 or 3, without running anything it contains."""
    try:
        with path.open("rb") as stream:
            content = _Restricted(stream, encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:
        raise DataError(f"{path} is no readable pickle ({type(error).__name__}: {error})") from error
    if isinstance(content, np.ndarray):
        return None, content
    if isinstance(content, list | tuple) and len(content) == 3 and isinstance(content[2], np.ndarray):
        return [_text(item) for item in content[0]], content[2]
    raise DataError(f"{path}: expected (ids, id -> index, matrix) or a matrix, got {type(content).__name__}")


def read_graph(path: Path, series: Series, *, sigma: float | None, cut: float) -> np.ndarray:
    """An adjacency for the sensors of `series`.

    Args:
        path: `.npy`, `.npz` (first array) or `.csv` matrix, `.pkl` triple, or a `.csv` of distances with the columns from,
            to and cost (or distance), which go through the Gaussian kernel.
        series: Readings; repairs are counted in it.
        sigma: Width of the kernel; see `kernel_adjacency`.
        cut: Smallest weight kept.
    """
    suffix = path.suffix.lower()
    ids: list[str] | None = None
    if suffix in (".pkl", ".pickle"):
        ids, matrix = read_pickled_graph(path)
    elif suffix in (".npy", ".npz"):
        arrays = read_arrays(path)
        if not arrays:
            raise DataError(f"data.adjacency={path} holds no array")
        matrix = arrays[0]
    elif suffix == ".csv":
        header = path.open(encoding="utf-8-sig").readline().lower()
        if "from" in header and "to" in header:
            distances = read_distances(path, series.sensors)
            return kernel_adjacency(distances, sigma=sigma, cut=cut)
        ids, matrix = _csv_matrix(path)
    else:
        raise DataError(f"data.adjacency={path}: use .npy, .npz, .csv or .pkl, not {suffix or 'no suffix'}")
    if ids is None:
        return check_adjacency(matrix, len(series.sensors))
    return match_adjacency(matrix, ids, series.sensors, series.repairs)


def _csv_matrix(path: Path) -> tuple[list[str] | None, np.ndarray]:
    """A matrix of numbers, with or without a header row of ids and an index column."""
    import pandas as pd

    table = read_csv(path, header=None, dtype=str)
    numbers = table.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if table.shape[0] == table.shape[1] + 1:  # a header alone
        return [str(name) for name in table.iloc[0]], numbers[1:]
    if np.isnan(numbers[0, 0]):
        return [str(name) for name in table.iloc[0, 1:]], numbers[1:, 1:]
    return None, numbers


def read_distances(path: Path, sensors: list[str]) -> np.ndarray:
    """Distances [N, N], infinite without a link, from a CSV of from, to, cost; ids are names or row numbers.

    Row i holds the distances of whom sensor i listens to: a line "from a to b" is an edge of row b. The official
    preparations of PEMS data use the same matrix the other way round or symmetrically; so both directions are set where a
    file lists only one.
    """
    import pandas as pd

    table = read_csv(path, dtype=str, encoding="utf-8-sig")
    table.columns = [column.strip().lower() for column in table.columns]
    cost = next((name for name in ("cost", "distance", "dist", "length") if name in table.columns), None)
    if cost is None or not {"from", "to"} <= set(table.columns):
        raise DataError(
            f"{path}: expected the columns from, to and cost (or distance), got {', '.join(table.columns)}"
        )
    place = {name: i for i, name in enumerate(sensors)}
    used = set(table["from"]) | set(table["to"])
    if not used & set(place) and all(_is_index(name, len(sensors)) for name in used):
        place = {str(i): i for i in range(len(sensors))}
    out = np.full((len(sensors), len(sensors)), np.inf)
    known = table["from"].isin(place) & table["to"].isin(place)
    if not known.any():
        raise DataError(
            f"{path}: no line joins two of the {len(sensors)} sensors (ids such as {sensors[0]!r}; the file has "
            f"{sorted(used)[0]!r})"
        )
    part = table[known]
    source, target = part["from"].map(place).to_numpy(int), part["to"].map(place).to_numpy(int)
    metres = pd.to_numeric(part[cost], errors="coerce").to_numpy(float)
    if np.isnan(metres).any():
        raise DataError(f"{path}: {int(np.isnan(metres).sum())} lines have no number as {cost}")
    out[target, source] = metres
    out = np.where(np.isinf(out), out.T, out)
    np.fill_diagonal(out, 0.0)
    return out


def _is_index(name: str, count: int) -> bool:
    return name.isdigit() and int(name) < count


def read_frame_h5(path: Path, key: str | None = None) -> tuple[np.ndarray, np.ndarray, list[str], str | None]:
    """Local timestamps [R], readings [R, N], column names and time zone, if any, of a frame that pandas wrote to HDF5.

    Args:
        path: Such as metr-la.h5, in the fixed format.
        key: Name of the frame in the file; the only one when left out.
    """
    try:
        import h5py
    except ImportError:
        raise DataError("reading .h5 files needs h5py; pip install h5py") from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is no readable HDF5 file ({error})") from None
    with file:
        frames = [name for name, item in file.items() if isinstance(item, h5py.Group) and "axis0" in item]
        tables = [name for name, item in file.items() if isinstance(item, h5py.Group) and "table" in item]
        if key is None and len(frames) != 1:
            if tables and not frames:
                raise DataError(
                    f"{path}: frame {tables[0]!r} is stored in table format; write it with df.to_hdf(path, key='df', "
                    "format='fixed')"
                )
            raise DataError(
                f"{path}: expected one data frame, found {', '.join(frames) or 'none'}; set data.key"
            )
        if key is not None and key not in frames:
            raise DataError(f"{path} has no frame {key!r}; there are: {', '.join(frames) or 'none'}")
        group = file[key or frames[0]]
        columns = [_text(item) for item in _axis(group["axis0"], path)]
        times, zone = _times(group["axis1"], path)
        values = np.full((len(times), len(columns)), np.nan, dtype=np.float32)
        place = {name: i for i, name in enumerate(columns)}
        for block in range(int(group.attrs.get("nblocks", 1))):
            items = [place[_text(item)] for item in _axis(group[f"block{block}_items"], path)]
            cells = group[f"block{block}_values"]
            if cells.dtype.kind not in "fiub":
                raise DataError(f"{path}: columns of block {block} hold no numbers but {cells.dtype}")
            values[:, items] = cells[()].astype(np.float32)
    return times, values, columns, zone


def _axis(node: Any, path: Path) -> np.ndarray:
    import h5py

    if h5py.check_vlen_dtype(node.dtype) is not None and h5py.check_string_dtype(node.dtype) is None:
        raise DataError(
            f"{path}: an axis is stored as pickled objects, which are not opened here; convert names to text "
            "(df.columns = df.columns.astype(str)) and save again"
        )
    return node[()]


def _times(node: Any, path: Path) -> tuple[np.ndarray, str | None]:
    kind = _text(node.attrs.get("kind", "datetime64"))
    if not kind.startswith("datetime64"):
        raise DataError(f"{path}: the index holds {kind}, not timestamps; set a DatetimeIndex before saving")
    unit = kind[11:-1] if kind.startswith("datetime64[") else "ns"
    times = node[()].astype(np.int64).astype(f"datetime64[{unit}]").astype("datetime64[s]")
    stored = node.attrs.get("tz")
    if stored is None:
        return times, None
    # pandas keeps such times in UTC; days and rush hours follow the local clock.
    zone = _stored_zone(stored, path)
    local = [datetime.fromtimestamp(seconds, zone) for seconds in times.astype(np.int64).tolist()]
    return np.array([time.replace(tzinfo=None) for time in local], dtype="datetime64[s]"), zone.key


def _stored_zone(stored: Any, path: Path) -> ZoneInfo:
    """A zone that pandas wrote as its name; plain offsets, UTC among them, it writes as pickles."""
    try:
        return ZoneInfo(_text(stored))
    except (KeyError, ValueError, OSError):  # no name, or none that is known here
        raise DataError(
            f"{path}: the index has a time zone without a name, stored as a pickled object, which is not opened here; save local times, "
            "df.index = df.index.tz_localize(None), or a named zone, df.index.tz_convert('Etc/UTC')"
        ) from None


def _text(item: Any) -> str:
    if isinstance(item, np.ndarray) and item.ndim == 0:
        item = item[()]
    return item.decode() if isinstance(item, bytes) else str(item)


def read_table(
    path: Path, *, null_value: str = "nan", repairs: dict[str, int] | None = None
) -> tuple[np.ndarray, np.ndarray, list[str], str | None]:
    """Local timestamps, readings and sensors of a CSV or Parquet table, and the zone that the timestamps carried, if any.

    Long: columns timestamp, sensor and value. Wide: a timestamp first, then a column a sensor.

    Args:
        path: The table.
        null_value: What means missing, see `data.traffic_series.mark_missing`.
        repairs: Gets the number of cells that hold no number, and of rows that repeat a sensor's time.
    """
    import pandas as pd

    if path.suffix.lower() in (".parquet", ".pq"):
        table = pd.read_parquet(path)
        if isinstance(table.index, pd.DatetimeIndex):
            table = table.reset_index()
    else:
        # Ids such as 00123 are names, not numbers.
        names = [name for name in read_csv(path, nrows=0).columns if name.strip().lower() == "sensor"]
        table = read_csv(path, dtype=dict.fromkeys(names, str))
    repairs = {} if repairs is None else repairs
    lower = {str(column).strip().lower(): column for column in table.columns}
    if {"timestamp", "sensor", "value"} <= set(lower):
        stamp, sensor, value = (lower[name] for name in ("timestamp", "sensor", "value"))
        table[stamp], zone = _parsed(table[stamp], path)
        table[value] = without_nulls(_numbers(table[value], path, repairs).to_numpy(np.float32), null_value)
        if repeated := int(table.duplicated([stamp, sensor]).sum()):
            repairs["duplicate_rows"] = repeated
        # Several readings of a sensor at a time are averaged, as duplicate rows are elsewhere.
        table = table.pivot_table(index=stamp, columns=sensor, values=value, dropna=False, observed=False)
        table = table.sort_index()
        table.columns = [str(name) for name in table.columns]
        names = list(table.columns)
        if all(name.isdigit() for name in names):
            names.sort(key=int)
        return table.index.to_numpy(), table[names].to_numpy(np.float32), names, zone
    if len(table.columns) < 2:
        raise DataError(
            f"{path}: expected the columns timestamp, sensor, value, or a timestamp and a column a sensor; got "
            f"{', '.join(map(str, table.columns))}"
        )
    first, *names = table.columns
    values = table[names].apply(_numbers, path=path, repairs=repairs)
    times, zone = _parsed(table[first], path)
    return times.to_numpy(), values.to_numpy(np.float32), [str(name) for name in names], zone


def _numbers(column: Any, path: Path, repairs: dict[str, int]) -> Any:
    """A column of readings; cells that hold no number are missing, and counted."""
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    wrong = numbers.isna() & column.notna()
    if wrong.any():
        if wrong.sum() == column.notna().sum():
            raise DataError(
                f"{path}: column {column.name!r} holds no number (first: {column[wrong].iloc[0]!r}); write readings such as 3.5, "
                "or leave the column out"
            )
        repairs["cells_without_number"] = repairs.get("cells_without_number", 0) + int(wrong.sum())
    return numbers


def _parsed(column: Any, path: Path) -> tuple[Any, str | None]:
    """Timestamps of the local clock, and its zone such as Pacific/Auckland or +12:00 where they carry one."""
    import pandas as pd

    if column.dtype.kind in "if":
        raise DataError(
            f"{path}: column {column.name!r} holds numbers, not timestamps such as 2024-05-01 06:00"
        )
    try:
        stamps = pd.to_datetime(column, errors="coerce")
    except ValueError:  # unlike offsets: no clock of the day that all rows share
        raise DataError(
            f"{path}: timestamps of column {column.name!r} carry different UTC offsets; write local times without an offset, or all "
            "with the same one"
        ) from None
    if stamps.isna().any():
        bad = int(stamps.isna().to_numpy().argmax())
        raise DataError(
            f"{path}: {int(stamps.isna().sum())} timestamps are unreadable (first: {column.iloc[bad]!r} in row {bad + 1})"
        )
    if stamps.dt.tz is None:
        return stamps, None
    zone = getattr(stamps.dt.tz, "key", None) or stamps.iloc[0].isoformat()[-6:]
    return stamps.dt.tz_localize(None), zone
