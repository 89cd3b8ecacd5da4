"""A table's columns: read from a file, checked by name, as numbers and as words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.errors import DataError, closest

if TYPE_CHECKING:
    import pandas as pd

MISSING_WORDS = ("", "?", "NA", "N/A", "NaN", "nan", "null", "None")


def read_table(path: str | Path, *, missing_words: Sequence[str] = MISSING_WORDS) -> pd.DataFrame:
    """Read CSV, TSV or Parquet.

    Raises:
        DataError: No such file, an unknown suffix, an unreadable file, or repeated column names.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise DataError(f"no table at {path}; give a .csv, .tsv or .parquet file")
    name = path.name.lower()
    try:
        if name.endswith((".parquet", ".pq")):
            frame = pd.read_parquet(path)
        elif name.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt")):
            separator = "\t" if ".tsv" in name else ","
            check_header(path, separator)
            frame = pd.read_csv(
                path,
                sep=separator,
                na_values=list(missing_words),
                keep_default_na=False,
                skipinitialspace=True,
            )
        else:
            raise DataError(f"{path.name}: unknown kind of table; give .csv, .tsv or .parquet")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot read table {path}: {' '.join(str(error).split())[:300]}") from error
    frame.columns = [str(c) for c in frame.columns]
    check_names(list(frame.columns), str(path))
    if not len(frame):
        raise DataError(f"table {path} has no rows")
    return frame


def check_header(path: Path, separator: str) -> None:
    """Raise DataError for a column name that occurs more than once in a text file, which pandas would rename."""
    import pandas as pd

    header = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
    check_names([str(c) for c in header.iloc[0]], str(path))


def check_names(names: Sequence[str], where: str) -> None:
    """Raise DataError for a column name that occurs more than once."""
    repeated = [n for n, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(
            f"{where}: column name {repeated[0]!r} occurs {Counter(names)[repeated[0]]} times; rename"
        )


def check_columns(frame: pd.DataFrame, wanted: Sequence[str], role: str) -> None:
    """Raise DataError for the first of `wanted` that the table lacks, naming the nearest columns."""
    for name in wanted:
        if name not in frame.columns:
            near = closest(name, map(str, frame.columns)) or list(map(str, frame.columns))[:12]
            raise DataError(f"{role} {name!r} is not a column of the table; nearest: {', '.join(near)}")


def is_missing(column: pd.Series) -> np.ndarray:
    """Where a column has no value, bool [N]."""
    missing = column.isna().to_numpy()
    if column.dtype == object or str(column.dtype) in ("str", "string", "category"):
        missing = missing | column.astype(str).str.strip().isin(MISSING_WORDS).to_numpy()
    return missing


def as_numbers(column: pd.Series) -> np.ndarray:
    """A column as float64 [N], NaN where missing.

    Raises:
        DataError: A value that is no number, or an infinite one.
    """
    import pandas as pd

    missing = is_missing(column)
    values = pd.to_numeric(column.where(~missing), errors="coerce").to_numpy(
        dtype=np.float64, na_value=np.nan
    )
    wrong = np.isnan(values) & ~missing
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"column {column.name!r} is numerical but row {row} holds {column.iloc[row]!r}; correct it or declare "
            "the column categorical or ignore in the schema"
        )
    if np.isinf(values).any():
        row = int(np.flatnonzero(np.isinf(values))[0])
        raise DataError(
            f"column {column.name!r} holds an infinite value in row {row}; replace it by a number or leave it empty"
        )
    return values


def as_words(column: pd.Series) -> np.ndarray:
    """A column as strings [N] (object), None where missing; 3.0 and 3 are the same word."""
    missing = is_missing(column)
    if column.dtype.kind in "fiu":
        values = zip(column.tolist(), missing, strict=True)
        words = np.array(
            ["" if m else str(int(v)) if float(v).is_integer() else repr(v) for v, m in values], dtype=object
        )
    else:
        words = column.astype(str).str.strip().to_numpy(dtype=object).copy()
    words[missing] = None
    return words
